"""Which attention implementation runs: resolved once, on the host, out loud. Nothing falls back silently."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels import reference
from pallas_kernels.checks import unsupported_cache

logger = logging.getLogger("jaxpaged")

IMPLEMENTATIONS = ("auto", "pallas", "reference")


class AttentionKernels(NamedTuple):
    """The functions of one implementation; signatures as in pallas_kernels/reference.py. Hashable: static to jit."""

    name: str
    paged_decode: Callable[..., jax.Array]
    paged_prefill: Callable[..., jax.Array]
    #: paged_decode that reads the runs of pages in a `PrefixGroups` once, and (query heads, KV heads, head_dim) -> rows
    #: that a group can have; None where an implementation gains nothing by it.
    shared_prefix_decode: Callable[..., jax.Array] | None = None
    max_members: Callable[[int, int, int], int] | None = None
    copy_pages: Callable[..., tuple[jax.Array, ...]] = reference.copy_pages  # for all pools at once


REFERENCE = AttentionKernels("reference", reference.paged_decode, reference.paged_prefill)


def resolve_attention(
    requested: str, device: jax.Device, *, head_dim: int, page_size: int, dtype: str
) -> AttentionKernels:
    """The kernels for "auto", "pallas" or "reference" over such a cache; ValueError for a choice that cannot run."""
    if requested not in IMPLEMENTATIONS:
        raise ValueError(f"attention={requested!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    if requested == "reference":
        return REFERENCE
    obstacle = _obstacle(device, head_dim, page_size, dtype)
    if obstacle is None:
        if requested == "auto":
            logger.info("attention: 'auto' is 'pallas' on %s", device.device_kind)
        return _pallas()
    if requested == "pallas":
        raise ValueError(
            f"attention='pallas' cannot run its kernels on {device.device_kind}: {obstacle}; or choose "
            "attention='reference' or 'auto'"
        )
    logger.info("attention: 'auto' is 'reference' on %s: %s", device.device_kind, obstacle)
    return REFERENCE


def _obstacle(device: jax.Device, head_dim: int, page_size: int, dtype: str) -> str | None:
    """Why the Pallas kernels cannot run, as "they need ..."; None if they can."""
    from pallas_kernels.mosaic import missing_support  # a third of a second that attention="reference" need not cost

    return missing_support(device) or unsupported_cache(head_dim, page_size, dtype)


def _pallas() -> AttentionKernels:
    # Not at the top: these modules need a newer JAX than the rest.
    from pallas_kernels.decode_tile import max_members
    from pallas_kernels.page_copy import copy_pages
    from pallas_kernels.paged_decode import paged_decode
    from pallas_kernels.paged_prefill import paged_prefill
    from pallas_kernels.shared_prefix import shared_prefix_decode

    return AttentionKernels("pallas", paged_decode, paged_prefill, shared_prefix_decode, max_members, copy_pages)
