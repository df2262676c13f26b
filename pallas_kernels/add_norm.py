"""What stands between two matrix products of a transformer, in one launch: the residual sum, and its RMS norm.

XLA makes two or three kernels of it, which cost more in launches than in bytes where a step has few rows. Here one
program takes one row, reads it once and keeps it in registers until both results are written (Mosaic GPU).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import layer_reference

Array = jax.Array
f32 = jnp.float32

#: Threads of a program: each takes as many elements of a row as the others.
THREADS = 128
#: Elements of a row that its program's registers can hold.
MAX_WIDTH = 8192


@functools.partial(jax.jit, static_argnames=("eps", "offset"))  # compiled once for all layers
def add_norm(x: Array, h: Array, weight: Array, *, eps: float, offset: float) -> tuple[Array, Array]:
    """Arguments and results as of `layer_reference.add_norm`, which does it for widths that this kernel does not."""
    rows, width = x.shape
    if width % THREADS or width > MAX_WIDTH:
        return layer_reference.add_norm(x, h, weight, eps=eps, offset=offset)

    def kernel(x_ref, h_ref, weight_ref, sum_ref, norm_ref):
        row = lax.axis_index("row")
        total = (x_ref[row].astype(f32) + h_ref[row].astype(f32)).astype(x.dtype)
        sum_ref[row] = total
        y = total.astype(f32)
        scale = lax.rsqrt(jnp.sum(y * y) * (1.0 / width) + eps)
        norm_ref[row] = (y * scale * (weight_ref[...].astype(f32) + offset)).astype(x.dtype)

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plgpu.kernel(
        kernel,
        out_type=[out, out],
        grid=(rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(),
        kernel_name="add_norm",
    )(x, h, weight)
