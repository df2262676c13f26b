"""Settles how groups give way when pages run out: what swap space holds, how large a transfer is, what swapping costs.

What "auto" weighs is `page_cost`: the tokens that are recomputed in the time in which one page goes out and comes back.

    page_cost = 2 * bytes of a page / bytes a second of the link  /  (FLOPs a token / FLOPs a second)
              = 2 * bytes of a page * FLOPS_PER_BYTE / FLOPs a token

The device enters by one number, the FLOPs that it does while a byte crosses the link to host memory. A prefill of a
large model reaches 400 to 600 TFLOP/s on an H200, whose link moves 43 GB/s: about 10,000. An A100 has a third of the
arithmetic and half of the link, so the ratio is much the same. On a CPU a swap is a copy in main memory, in whose time
few FLOPs are done: on two cores 50 GFLOP/s and 2 GB/s were measured (scripts/bench/preemption.py), so 30.

Two models with 16-bit floats and pages of 16 tokens. Llama 3.1 8B: 2 MiB a page, 14 GFLOP a token, page_cost 3, so a
group is moved unless its pages hold less than 3 tokens on average. OPT 13B, without grouped heads: 12.5 MiB a page, 25
GFLOP a token, page_cost 10: full pages are moved, a group of part-filled ones may be computed again. That is the near
tie which the paper found for this model at 16 to 64 tokens a page (its Figure 19). A factor of two in the ratio changes
few choices, so it is not measured at the start: a run repeats itself, choices included.

Left out, since they are on both sides and small: the launches (one for each transfer, one for each prefill step), and
the attention within what is recomputed.
"""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp

from jaxpaged.config import CacheConfig, EngineConfig, ModelConfig, PreemptionConfig
from jaxpaged.device.params import param_shapes
from jaxpaged.device.swap import reserve

logger = logging.getLogger("jaxpaged")

GIB = 1 << 30
#: FLOPs of a prefill in the time in which one byte goes to host memory or comes from there.
FLOPS_PER_BYTE = {"cpu": 30.0, "gpu": 10_000.0}
#: A transfer is no larger: long enough to reach the speed of the link, small beside a pool.
TRANSFER_BYTES = 64 << 20
#: Nor does it hold more pages, which bounds the list of sizes that are compiled.
TRANSFER_PAGES = 256


def resolve_preemption(
    mode: str, swap_space_gib: float, model: ModelConfig, page_size: int, itemsize: int, platform: str
) -> PreemptionConfig:
    """Swap space in pages, and "auto" made "recompute" where no group would ever swap; ValueError if none can."""
    page_bytes = page_size * model.kv_bytes_per_token(itemsize)
    swap_pages = int(swap_space_gib * GIB) // page_bytes
    if mode == "swap" and swap_pages == 0:
        raise ValueError(
            f"preemption='swap' needs swap space for at least one page of {page_bytes} bytes, "
            f"but swap_space_gib={swap_space_gib} holds none: raise it, or choose preemption='recompute'"
        )
    page_cost = 2 * page_bytes * FLOPS_PER_BYTE.get(platform, FLOPS_PER_BYTE["gpu"]) / flops_per_token(model)
    if mode == "auto":
        reason = "there is no swap space" if swap_pages == 0 else None
        if page_cost > page_size:
            reason = f"moving a page of {page_size} tokens costs as much as computing {page_cost:.0f}"
        mode = "recompute" if reason else "auto"
        logger.info("preemption: 'auto' is %s", f"'recompute': {reason}" if reason else "by cost, group by group")
    if mode == "recompute":
        return PreemptionConfig()
    assert mode in ("swap", "auto"), mode
    transfer_pages = max(1, min(TRANSFER_PAGES, TRANSFER_BYTES // page_bytes, swap_pages))
    return PreemptionConfig(mode, swap_pages, page_cost, transfer_pages)


def reserve_swap_space(
    limits: EngineConfig, cache: CacheConfig, model: ModelConfig, device: jax.Device
) -> EngineConfig:
    """Take the host memory that swapping needs, before the engine starts; the limits with what it is.

    None where the pool holds all sequences that may run, at any length, and no more than these could fill: nothing is
    admitted while a group waits in swap space, so what lies there ran together. Where so much cannot be had, "auto"
    becomes "recompute", and "swap" is a ValueError.
    """
    preemption = limits.preemption
    most = limits.max_num_seqs * -(-limits.max_model_len // cache.page_size)
    if not preemption.can_swap or cache.num_usable_pages >= most:
        return dataclasses.replace(limits, preemption=PreemptionConfig())
    swap_pages = min(preemption.swap_pages, most)
    page_bytes = cache.page_size * model.kv_bytes_per_token(jnp.dtype(cache.dtype).itemsize)
    try:
        reserve(swap_pages * page_bytes, preemption.transfer_pages * page_bytes, device)
    except ValueError as error:
        if preemption.mode == "swap":
            raise
        logger.warning("preemption: 'auto' is 'recompute': %s", error)
        return dataclasses.replace(limits, preemption=PreemptionConfig())
    return dataclasses.replace(limits, preemption=dataclasses.replace(preemption, swap_pages=swap_pages))


def flops_per_token(model: ModelConfig) -> float:
    """Of a prefill: a multiplication and an addition for each weight of the layers' matrices."""
    layers = jax.tree.leaves(param_shapes(model, "float32").layers)
    return 2.0 * sum(leaf.size for leaf in layers if leaf.ndim == 2)
