"""Where keys and values live: a pool of pages. Other ways to keep them are in dense_cache.py.

A cache is a pytree with one array a layer for K and one for V, replaced by every step (and donated to it, so updated in
place). What every cache can do is `KVCache`; copying pages is `CopiesPages`; only the pool has pages that can leave it.

Pages of fp8 are kept as bits, uint8, and are floats only for who reads them. XLA on a CPU would otherwise turn all
pages of a layer into 16-bit floats and back to write a few; to a GPU it is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, Self, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from jaxpaged.config import AttentionOptions, CacheConfig, ModelConfig
from jaxpaged.config.choices import FP8
from jaxpaged.device.attention import AttentionKernels
from jaxpaged.device.heads import Heads
from jaxpaged.step_io import DecodeInputs, StepInputs

Array = jax.Array

#: The dtype of the arrays that hold pages of fp8, and the largest number of fp8.
FP8_BITS, FP8_MAX = jnp.uint8, 448.0


class KVCache(Protocol):
    """What a step needs of every cache."""

    def write(self, layer: int, k: Array, v: Array, slots: Array) -> Self:
        """Scatter new k, v [T, K, D] to slots i32[T]."""
        ...

    def write_heads(self, layer: int, heads: Heads, slots: Array, kernels: AttentionKernels) -> tuple[Array, Self]:
        """Write the keys and values of `heads` -> their queries [T, H, D], and the cache."""
        ...

    def attend(
        self, layer: int, q: Array, inputs: StepInputs, options: AttentionOptions, kernels: AttentionKernels
    ) -> Array:
        """q [T, H, D] against what the rows of `inputs` may read -> [T, H, D]."""
        ...

    def part(self, start: int, end: int) -> Self:
        """The layers from `start` up to `end`, numbered from 0 on."""
        ...

    def joined(self, parts: Sequence[Self]) -> Self:
        """These parts, all of the cache, as one."""
        ...

    def kept(self) -> Self:
        """What is left for the next step."""
        ...


Cache = TypeVar("Cache", bound=KVCache)


@runtime_checkable
class CopiesPages(Protocol):
    """A cache that outlives a step, so that sequences can fork: what is shared is copied before it is written."""

    def copy_pages(self, src: Array, dst: Array, kernels: AttentionKernels) -> Self:
        """Copy whole pages src i32[C] to dst i32[C], in every layer."""
        ...


@struct.dataclass
class LayerArrays:
    """The arrays of a cache, layer by layer, and what follows from that alone.

    Attributes:
        k: keys, a tuple over layers; what the arrays' axes are is the cache's.
        v: values, likewise.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]

    def part(self, start: int, end: int) -> Self:
        return dataclasses.replace(self, k=self.k[start:end], v=self.v[start:end])

    def joined(self, parts: Sequence[Self]) -> Self:
        k = tuple(pool for part in parts for pool in part.k)
        return dataclasses.replace(self, k=k, v=tuple(pool for part in parts for pool in part.v))

    def kept(self) -> Self:
        return self


@struct.dataclass
class PagedCache(LayerArrays):
    """The page pool.

    Attributes:
        k: keys, a tuple over layers of [N, S, K, D]; of fp8 their bits, uint8.
        v: values, likewise.
    """

    def write(self, layer: int, k: Array, v: Array, slots: Array) -> Self:
        return dataclasses.replace(self, k=_written(self.k, layer, k, slots), v=_written(self.v, layer, v, slots))

    def write_heads(self, layer: int, heads: Heads, slots: Array, kernels: AttentionKernels) -> tuple[Array, Self]:
        stores_as_computed = self.k[layer].dtype == heads.projected.dtype
        if heads.rotation is None or not stores_as_computed:
            return write_split(self, layer, heads, slots)
        pages = self.k[layer], self.v[layer]
        q, k, v = kernels.write_heads(heads.projected, heads.rotation, heads.norms, slots, *pages)
        return q, dataclasses.replace(self, k=_replaced(self.k, layer, k), v=_replaced(self.v, layer, v))

    def attend(
        self, layer: int, q: Array, inputs: StepInputs, options: AttentionOptions, kernels: AttentionKernels
    ) -> Array:
        k_pages, v_pages = _as_floats(self.k[layer]), _as_floats(self.v[layer])
        with jax.named_scope("attention"):
            if isinstance(inputs, DecodeInputs):
                if inputs.cascade_groups is not None and options.sliding_window is None:
                    assert kernels.cascade_decode is not None, f"{kernels.name} has no cascade attention"
                    return kernels.cascade_decode(
                        q, k_pages, v_pages, inputs.block_tables, inputs.context_lens, inputs.cascade_groups,
                        scale=options.scale, soft_cap=options.soft_cap,
                    )  # fmt: skip
                return kernels.paged_decode(
                    q, k_pages, v_pages, inputs.block_tables, inputs.context_lens, **options._asdict()
                )
            return kernels.paged_prefill(
                q, k_pages, v_pages, inputs.block_tables, inputs.query_starts, inputs.query_lens,
                inputs.context_lens, **options._asdict(),
            )  # fmt: skip

    def copy_pages(self, src: Array, dst: Array, kernels: AttentionKernels) -> Self:
        pools, num_layers = kernels.copy_pages((*self.k, *self.v), src, dst), len(self.k)
        return dataclasses.replace(self, k=pools[:num_layers], v=pools[num_layers:])

    def gather_pages(self, page_ids: Array) -> Array:
        """Pages i32[C] of all layers, keys and then values: [2 * layers, C, S, K, D]."""
        return jnp.stack([pool.at[page_ids].get(mode="promise_in_bounds") for pool in (*self.k, *self.v)])

    def scatter_pages(self, page_ids: Array, pages: Array) -> Self:
        """The reverse of `gather_pages`; page_ids are unique."""
        leaves = [
            pool.at[page_ids].set(pages[i], unique_indices=True, mode="promise_in_bounds")
            for i, pool in enumerate((*self.k, *self.v))
        ]
        return dataclasses.replace(self, k=tuple(leaves[: len(self.k)]), v=tuple(leaves[len(self.k) :]))


def write_split(cache: Cache, layer: int, heads: Heads, slots: Array) -> tuple[Array, Cache]:
    """`write_heads` in two: what XLA makes of the heads, and the cache's own way to write it."""
    q, k, v = heads.split()
    return q, cache.write(layer, k, v, slots)


def _written(pools: tuple[Array, ...], layer: int, values: Array, slots: Array) -> tuple[Array, ...]:
    """Scatter into one layer's array; in place when the caller donated it.

    Slots are unique but for padding rows, which all hit NULL_PAGE: which of them wins does not matter, nothing reads
    it.
    """
    pool = pools[layer]
    page_size = pool.shape[1]
    written = pool.at[slots // page_size, slots % page_size].set(
        _as_stored(values, pool.dtype), unique_indices=True, mode="promise_in_bounds"
    )
    return _replaced(pools, layer, written)


def _replaced(pools: tuple[Array, ...], layer: int, pool: Array) -> tuple[Array, ...]:
    return (*pools[:layer], pool, *pools[layer + 1 :])


def _as_stored(values: Array, dtype: jnp.dtype) -> Array:
    """As a pool of this dtype holds them. What exceeds fp8 becomes its largest number, not NaN; NaN stays NaN."""
    if dtype != FP8_BITS:
        return values.astype(dtype)
    return jax.lax.bitcast_convert_type(jnp.clip(values, -FP8_MAX, FP8_MAX).astype(FP8), FP8_BITS)


def _as_floats(pool: Array) -> Array:
    return jax.lax.bitcast_convert_type(pool, jnp.dtype(FP8)) if pool.dtype == FP8_BITS else pool


def make_paged_cache(
    model: ModelConfig, cache: CacheConfig, device: jax.Device | jax.sharding.Sharding | None = None
) -> PagedCache:
    """An empty pool (zeros: what a page held before must never be a NaN) on the device, or on several as it says."""
    shape = (cache.num_pages, cache.page_size, model.num_kv_heads * model.num_shards, model.head_dim)
    dtype = FP8_BITS if cache.dtype == FP8 else cache.dtype

    def pools() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, dtype, device=device) for _ in range(model.num_layers))

    return PagedCache(pools(), pools())
