"""What attention begins with: a layer's projection of its tokens, and what makes queries, keys and values of it."""

from __future__ import annotations

from typing import NamedTuple

import jax

from pallas_kernels.layer_reference import HeadNorms, Rotation, split_heads

Array = jax.Array


class Heads(NamedTuple):
    """The projection of one layer. A cache may make queries, keys and values of it in its own way, as it writes."""

    projected: Array  # [T, H + 2 K, D] queries, keys, values
    num_kv_heads: int
    rotation: Rotation | None
    norms: HeadNorms | None

    def split(self) -> tuple[Array, Array, Array]:
        """Queries [T, H, D], keys and values [T, K, D], ready to attend."""
        return split_heads(*self)
