"""Which attention implementation runs: resolved once, on the host, out loud. Nothing falls back silently."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels import reference

logger = logging.getLogger("jaxpaged")

IMPLEMENTATIONS = ("auto", "pallas", "reference")


class AttentionKernels(NamedTuple):
    """The functions of one implementation; signatures as in pallas_kernels/reference.py. Hashable: static to jit."""

    name: str
    paged_decode: Callable[..., jax.Array]
    paged_prefill: Callable[..., jax.Array]


REFERENCE = AttentionKernels("reference", reference.paged_decode, reference.paged_prefill)


def resolve_attention(requested: str, device: jax.Device) -> AttentionKernels:
    """The kernels for "auto", "pallas" or "reference"; ValueError for a choice that cannot run here."""
    if requested not in IMPLEMENTATIONS:
        raise ValueError(f"attention={requested!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    if requested == "pallas":
        raise ValueError(
            f"attention='pallas' cannot run on {device.device_kind}: this version of jaxpaged has no Pallas kernels; "
            "use attention='reference' or 'auto'"
        )
    if requested == "auto":
        logger.info("attention: 'auto' is 'reference' on %s", device.device_kind)
    return REFERENCE
