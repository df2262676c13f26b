"""Refuses devices and arrays that a kernel cannot run, in words, before anything is traced or Mosaic is imported.

Of arrays it sees shapes and dtypes. The *contents* of block tables and lengths are the caller's to check, on the host:
a kernel reads device memory, and a page id outside the pool raises nothing there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

#: First version of JAX whose Mosaic GPU can express these kernels (a swizzled operand may be transposed).
MINIMUM_JAX = (0, 11)
#: The warpgroup matrix instructions (wgmma) exist on Hopper alone: older GPUs lack them, Blackwell replaced them.
COMPUTE_CAPABILITY = "9."

QUERY_DTYPES = ("bfloat16", "float16")
FP8 = "float8_e4m3fn"
FP8_COLUMNS = 32  # of a row of 8-bit pages, which shared memory takes in pieces of at least 32 bytes
HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)


def missing_support(device: jax.Device) -> str | None:
    """Why these kernels cannot run on the device, or None if they can."""
    version = ".".join(str(number) for number in MINIMUM_JAX)
    if jax.__version_info__ < MINIMUM_JAX:
        return f"they need JAX {version} or newer, this is {jax.__version__}"
    if device.platform != "gpu":
        return f"they need a Hopper GPU (H100, H200, GH200), this is {device.device_kind}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if not capability.startswith(COMPUTE_CAPABILITY):
        return (
            f"they need a Hopper GPU (compute capability {COMPUTE_CAPABILITY}0), {device.device_kind} has {capability}"
        )
    return None


def unsupported_cache(head_dim: int, page_size: int, dtype: str, pages_dtype: str | None = None) -> str | None:
    """Why the kernels cannot run over such a cache with queries of this dtype, or None if they can.

    Pages are of the queries' dtype unless `pages_dtype` says otherwise.
    """
    for name, value, known in (
        ("head_dim", head_dim, HEAD_DIMS),
        ("page_size", page_size, PAGE_SIZES),
        ("dtype", dtype, QUERY_DTYPES),
    ):
        if value not in known:
            return f"they run {name} {_listed(known)}, this is {value}"
    if pages_dtype == FP8 and head_dim % FP8_COLUMNS:
        return f"they run {FP8} pages with a head_dim that is a multiple of {FP8_COLUMNS}, this is {head_dim}"
    return None


def check_pages(q: Array, k_pages: Array, v_pages: Array, block_tables: Array) -> None:
    """q [.., H, D], pages [N, S, K, D] and block tables i32[B, P] that belong together."""
    if q.ndim != 3 or k_pages.ndim != 4 or block_tables.ndim != 2:
        raise ValueError(
            f"expected q [rows, heads, head_dim], pages [num_pages, page_size, kv_heads, head_dim] and block_tables "
            f"[rows, pages], got {q.shape}, {k_pages.shape} and {block_tables.shape}"
        )
    if k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            f"k_pages {k_pages.dtype}{list(k_pages.shape)} and v_pages {v_pages.dtype}{list(v_pages.shape)} differ"
        )
    _, page_size, kv_heads, head_dim = k_pages.shape
    if q.shape[2] != head_dim:
        raise ValueError(f"q has head_dim {q.shape[2]}, the pages have {head_dim}")
    if q.shape[1] % kv_heads:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {kv_heads} KV heads")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim {head_dim}; these kernels run {_listed(HEAD_DIMS)}")
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size {page_size}; these kernels run {_listed(PAGE_SIZES)}")
    if q.dtype.name not in QUERY_DTYPES:
        raise ValueError(f"q is {q.dtype}; these kernels run {_listed(QUERY_DTYPES)}")
    if k_pages.dtype != q.dtype and k_pages.dtype.name != FP8:
        raise ValueError(f"pages are {k_pages.dtype} and q is {q.dtype}; pages have q's dtype or {FP8}")
    if k_pages.dtype.name == FP8 and head_dim % FP8_COLUMNS:
        raise ValueError(f"head_dim {head_dim} with {FP8} pages; it must be a multiple of {FP8_COLUMNS}")
    check_ids("block_tables", block_tables, block_tables.shape)


def check_ids(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """An int32 array of this shape."""
    if array.shape != shape or array.dtype != jnp.int32:
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, expected int32{list(shape)}")


def check_options(soft_cap: float | None, sliding_window: int | None) -> None:
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}; a soft cap is positive, None for none")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window}; a window holds at least the query's own position")


def check_scales(pages: Array, k_scales: Array | None, v_scales: Array | None) -> tuple[Array, Array] | None:
    """The scales of fp8 pages, 1 where none are given; None for pages that have none."""
    if pages.dtype.name != FP8:
        if k_scales is not None or v_scales is not None:
            raise ValueError(f"k_scales and v_scales belong to pages of {FP8}, these are {pages.dtype}")
        return None
    num_pages, _, kv_heads, _ = pages.shape
    one = jnp.ones((1, 1), jnp.float32)
    scales = (one if k_scales is None else k_scales, one if v_scales is None else v_scales)
    for name, scale in zip(("k_scales", "v_scales"), scales, strict=True):
        fits = scale.ndim == 2 and scale.shape[0] in (1, num_pages) and scale.shape[1] in (1, kv_heads)
        if not fits or scale.dtype != jnp.float32:
            raise ValueError(
                f"{name} is {scale.dtype}{list(scale.shape)}, expected float32[{num_pages} or 1, {kv_heads} or 1]"
            )
    return scales


def _listed(choices: tuple[object, ...]) -> str:
    return ", ".join(str(choice) for choice in choices)
