"""What the Mosaic GPU kernels of this package share: layouts, and the constants of a softmax.

All use of `jax.experimental.pallas.mosaic_gpu` stays inside this package: its names change with every JAX release.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
#: What a masked score becomes. Finite: the difference of two infinities would be a NaN.
MASKED = -1e30

#: Register layout of a wgmma accumulator [M, N], of one value a row and of one value a column.
TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)
#: An accumulator of wgmma, in registers: ACCUMULATOR((M, N), dtype). Type checkers take the name for a private one.
ACCUMULATOR = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


def num_multiprocessors() -> int:
    """Of the default device; of an H100 or H200 when that is no GPU (a kernel can be lowered without one)."""
    device = jax.devices()[0]
    return getattr(device, "core_count", None) or 132 if device.platform == "gpu" else 132


def capped_scores(scores: Any, scale: float, soft_cap: float | None) -> tuple[Any, float]:
    """Scores and a factor: their product is scaled, capped and in base 2, for exp2 is one instruction."""
    if soft_cap is None:
        return scores, scale * LOG2E  # the product can become part of a fused multiply-add
    # tanh(x) = 1 - 2 / (1 + exp(2 x)); the hardware's own tanh is too coarse for logits of this size.
    scores = 1.0 - 2.0 / (1.0 + jnp.exp2(scores * (2.0 * LOG2E * scale / soft_cap)))
    return scores, soft_cap * LOG2E


def row_tiles(size: int) -> tuple[int, ...]:
    """Where tiles of 64 rows begin that cover `size` rows (at least 64): the last may overlap the one before it."""
    return (*range(0, size - 63, 64), *([size - 64] if size % 64 else []))


def swizzle_bytes(head_dim: int, dtype: jnp.dtype) -> int:
    """The widest swizzle (128, 64 or 32 bytes) whose tiles fit a row of `head_dim` elements exactly."""
    row_bytes = head_dim * jnp.dtype(dtype).itemsize
    return next(swizzle for swizzle in (128, 64, 32) if row_bytes % swizzle == 0)


def swizzled(swizzle: int, dtype: jnp.dtype) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """How a matrix lies in shared memory so that TMA fills it and wgmma reads it without bank conflicts.

    Its rows come in tiles of eight: every row offset, in shared and in device memory, must be a multiple of 8.
    """
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
