"""Which attention implementation runs: resolved once, on the host, out loud. Nothing falls back silently."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from jaxpaged.config import ModelConfig
from jaxpaged.config.choices import ATTENTIONS
from pallas_kernels import layer_reference, reference
from pallas_kernels.checks import missing_support, unsupported_cache
from pallas_kernels.layer_reference import HeadNorms

logger = logging.getLogger("jaxpaged")


#: Rows of a tile of a matrix product on a GPU. For a single row XLA has other kernels, which are slower: for the
#: products of a layer of a 1B model they took 63 us on an H200, where those of 8 rows take 43.
MIN_ROWS = 8


#: As `layer_reference.write_heads`.
WriteHeads = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


class AttentionKernels(NamedTuple):
    """The functions of one implementation; signatures as in pallas_kernels/reference.py. Hashable: static to jit."""

    name: str
    paged_decode: Callable[..., jax.Array]
    paged_prefill: Callable[..., jax.Array]
    #: paged_decode that reads the runs of pages in `CascadeGroups` once, and (query heads, KV heads, head_dim) -> rows
    #: that a group can have; None where an implementation gains nothing by it.
    cascade_decode: Callable[..., jax.Array] | None = None
    max_members: Callable[[int, int, int], int] | None = None
    copy_pages: Callable[..., tuple[jax.Array, ...]] = reference.copy_pages  # for all pools at once
    #: What stands around attention in a layer; signatures as in pallas_kernels/layer_reference.py.
    write_heads: WriteHeads = layer_reference.write_heads
    add_norm: Callable[..., tuple[jax.Array, jax.Array]] = layer_reference.add_norm
    min_rows: int = 1  # of a decode step: with fewer it takes as long, and would be another program
    copies_in_steps: bool = False  # whether padding in a list of copies costs nothing, so that every step may have one
    is_batch_invariant: bool = False  # whether a row's bits depend on that row alone, wherever it stands
    dense: Literal["cudnn", "xla"] = "xla"  # what reads the dense caches that paging is compared with


def _attention_once(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attend`, traced and lowered once in a program and not in each of its layers, which are alike: XLA puts it back
    in its places. Of a model with 32 layers this is four fifths of the time before the compiler begins. What the
    Pallas kernels become JAX keeps by itself."""
    return jax.jit(attend, static_argnames=("scale", "soft_cap", "sliding_window"))


def _add_norm_once(add_norm: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    return jax.jit(add_norm, static_argnames=("eps", "offset"))


def _write_heads_once(write_heads: WriteHeads) -> WriteHeads:
    @functools.partial(jax.jit, static_argnames=("eps", "offset"))
    def traced_once(weights: Any, *arrays: Any, eps: float, offset: float):
        projected, rotation, slots, k_pages, v_pages = arrays
        norms = None if weights is None else HeadNorms(weights[0], weights[1], eps, offset)
        return write_heads(projected, rotation, norms, slots, k_pages, v_pages)

    def write(projected: jax.Array, rotation: Any, norms: HeadNorms | None, *arrays: jax.Array):
        eps, offset = (0.0, 0.0) if norms is None else (norms.eps, norms.offset)
        weights = None if norms is None else (norms.query, norms.key)
        return traced_once(weights, projected, rotation, *arrays, eps=eps, offset=offset)

    return write


REFERENCE = AttentionKernels(
    "reference", _attention_once(reference.paged_decode), _attention_once(reference.paged_prefill),
    write_heads=_write_heads_once(layer_reference.write_heads), add_norm=_add_norm_once(layer_reference.add_norm),
)  # fmt: skip
DENSE_CUDNN = REFERENCE._replace(name="dense-cudnn", dense="cudnn")
DENSE_XLA = REFERENCE._replace(name="dense-xla")


def resolve_attention(
    requested: str, device: jax.Device, *, head_dim: int, page_size: int, dtype: str, kv_dtype: str | None = None,
    batch_invariant: bool = False,
) -> AttentionKernels:  # fmt: skip
    """The kernels for "auto", "pallas" or "reference" over such a cache; ValueError for a choice that cannot run.

    Pages are of `dtype` unless `kv_dtype` says otherwise. `batch_invariant` asks "pallas" for its kernels that are;
    whether it got them is in what comes back.
    """
    if requested not in ATTENTIONS:
        raise ValueError(f"attention={requested!r}; choose one of {', '.join(ATTENTIONS)}")
    if requested == "reference":
        return REFERENCE
    obstacle = _obstacle(device, head_dim, page_size, dtype, kv_dtype)
    if obstacle is None:
        if requested == "auto":
            logger.info("attention: 'auto' is 'pallas' on %s", device.device_kind)
        return _pallas(batch_invariant)
    if requested == "pallas":
        raise ValueError(
            f"attention='pallas' cannot run its kernels on {device.device_kind}: {obstacle}; or choose "
            "attention='reference' or 'auto'"
        )
    logger.info("attention: 'auto' is 'reference' on %s: %s", device.device_kind, obstacle)
    return REFERENCE


def resolve_dense_attention(requested: str, device: jax.Device, model: ModelConfig, dtype: str) -> AttentionKernels:
    """What attends over dense rows: cuDNN where it can for "auto", XLA elsewhere and for "reference".

    ValueError for "pallas", whose kernels read pages alone.
    """
    if requested == "pallas":
        raise ValueError(
            "attention='pallas' reads pages, which dense caches and systems without a cache have not: choose "
            "attention='auto' (cuDNN on a GPU that has it) or 'reference' (XLA), or kv_cache='paged'"
        )
    if requested not in ATTENTIONS:
        raise ValueError(f"attention={requested!r}; choose one of {', '.join(ATTENTIONS)}")
    obstacle = "attention='reference' is XLA's" if requested == "reference" else cudnn_obstacle(device, model, dtype)
    if obstacle is None:
        logger.info("dense attention: cuDNN on %s", device.device_kind)
        return DENSE_CUDNN
    logger.info("dense attention: XLA on %s: %s", device.device_kind, obstacle)
    return DENSE_XLA


def cudnn_obstacle(device: jax.Device, model: ModelConfig, dtype: str) -> str | None:
    """Why cuDNN's attention cannot run, None if it can: the conditions of jax.nn.dot_product_attention, and of ours."""
    capability = str(getattr(device, "compute_capability", "0.0"))
    if device.platform != "gpu" or not capability.replace(".", "").isdigit() or float(capability) < 8:
        return f"cuDNN's needs an NVIDIA GPU of compute capability 8.0 or more, this is {device.device_kind}"
    if dtype not in ("bfloat16", "float16"):
        return f"cuDNN's needs 16-bit floats, this is {dtype}"
    most = 256 if float(capability) >= 9 else 128
    if model.head_dim > most or model.head_dim % 8:
        return f"cuDNN's needs a head_dim of at most {most} and a multiple of 8, this is {model.head_dim}"
    if model.attention_soft_cap is not None:
        return "cuDNN's has no soft cap"
    if model.sliding_window is not None:
        return "cuDNN's has no sliding window in decoding"
    return None


def _obstacle(device: jax.Device, head_dim: int, page_size: int, dtype: str, kv_dtype: str | None) -> str | None:
    """Why the Pallas kernels cannot run, as "they need ..."; None if they can."""
    return missing_support(device) or unsupported_cache(head_dim, page_size, dtype, kv_dtype)


def named_kernels(name: str, is_batch_invariant: bool) -> AttentionKernels | None:
    """Those of this module that are called so, in every process; None if there are none."""
    if name == "pallas":
        return _pallas(is_batch_invariant)
    known = {"reference": REFERENCE, "dense-cudnn": DENSE_CUDNN, "dense-xla": DENSE_XLA}
    return None if is_batch_invariant else known.get(name)


@functools.cache  # equal kernels are one object, so that programs compiled for them are found again
def _pallas(batch_invariant: bool) -> AttentionKernels:
    # Not at the top: these modules need a newer JAX than the rest.
    from pallas_kernels.add_norm import add_norm
    from pallas_kernels.cascade import cascade_decode
    from pallas_kernels.decode_tile import max_members
    from pallas_kernels.page_copy import copy_pages
    from pallas_kernels.paged_decode import paged_decode
    from pallas_kernels.paged_prefill import paged_prefill
    from pallas_kernels.write_heads import write_heads

    if batch_invariant:  # prefill is, whoever asks; reading shared pages once cannot be
        decode = functools.partial(paged_decode, batch_invariant=True)
        return _pallas(False)._replace(
            paged_decode=decode, cascade_decode=None, max_members=None, is_batch_invariant=True
        )
    return AttentionKernels(
        "pallas", paged_decode, paged_prefill, cascade_decode, max_members, copy_pages, write_heads, add_norm,
        min_rows=MIN_ROWS, copies_in_steps=True,
    )  # fmt: skip
