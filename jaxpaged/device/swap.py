"""The device's side of swapping: pages of all layers gathered into one array a transfer, to host memory and back.

A transfer holds at most so many pages, and at most two are under way, so that what they take of the device is bounded
(`transfer_bytes`) and the link is not idle in between. On a GPU host memory is pinned: the device reads and writes it
at the full speed of the link, where pageable memory is many times slower. XLA hands out pinned memory from a pool of
its own that grows (in regions, up to twice what is asked) and never shrinks, and growing it is slow: the driver pins
page by page. So `reserve` makes it grow once, at the start, to all of the swap space; later transfers take from there.
On a CPU host memory is where the pool is, and the array that was gathered is the copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.device import steps
from jaxpaged.device.cache import PagedCache
from jaxpaged.device.mesh import MOVED_PAGES, Placement

Array = jax.Array

#: Arrays as large as a transfer that exist on the device at a time: two that are under way, and a program's temporaries
#: (none on a GPU, where the gather is one kernel).
ARRAYS_A_TRANSFER = 3


def host_memory(where: Placement | jax.Device) -> jax.sharding.Sharding:
    """Where swapped pages lie: pinned host memory if the device has its own memory, else where everything lies."""
    placement = Placement.of(where)
    device = placement.device
    if device.platform == "cpu":
        return placement.lay(MOVED_PAGES)
    kinds = [memory.kind for memory in device.addressable_memories()]
    if "pinned_host" not in kinds:
        raise ValueError(
            f"{device.device_kind} has no memory of kind 'pinned_host', which swapping needs, but only "
            f"{', '.join(kinds)}: choose preemption='recompute'"
        )
    return placement.lay(MOVED_PAGES, memory_kind="pinned_host")


def transfer_bytes(num_pages: int, page_bytes: int) -> int:
    """What swapping with transfers of so many pages takes of the device's memory at most, beside the pool."""
    return ARRAYS_A_TRANSFER * num_pages * page_bytes


def reserve(num_bytes: int, bytes_a_transfer: int, device: jax.Device) -> None:
    """Let the pool of pinned memory grow to `num_bytes`; ValueError if the machine has no such amount to pin."""
    host = host_memory(device)
    if host.memory_kind != "pinned_host":
        return
    source = jnp.zeros(bytes_a_transfer, jnp.uint8, device=device)
    try:
        held = [jax.device_put(source, host) for _ in range(-(-num_bytes // bytes_a_transfer))]
        jax.block_until_ready(held)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"{num_bytes / (1 << 30):.2f} GiB of host memory for swapped pages cannot be pinned: lower swap_space_gib, "
            "or choose preemption='recompute'. XLA pins 64 GiB at most, unless XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says "
            f"otherwise ({str(error).splitlines()[0]})"
        ) from error


def fetch_pages(
    pool: PagedCache, page_ids: np.ndarray, sizes: Sequence[int], host: jax.sharding.Sharding,
    where: Placement | jax.Device,
) -> list[Array]:  # fmt: skip
    """Copies in host memory of the pages i32[C], `sizes` of them a transfer, [2 * layers, size, S, K, D] each.

    When this returns they are there, so the pages may be overwritten.
    """
    fetched: list[Array] = []
    placement = Placement.of(where)
    for part in np.split(page_ids, np.cumsum(sizes)[:-1]):
        gathered = steps.gather_pages(pool, placement.put(part))
        fetched.append(jax.device_put(gathered, host))
        jax.block_until_ready(fetched[-2:-1])
    return jax.block_until_ready(fetched)


def restore_pages(
    pool: PagedCache, page_ids: np.ndarray, fetched: Sequence[Array], where: Placement | jax.Device
) -> PagedCache:
    """The pool, which is donated, with what `fetch_pages` gave in the pages i32[C]."""
    sizes = [pages.shape[1] for pages in fetched]
    placement = Placement.of(where)
    on_device = placement.lay(MOVED_PAGES)
    before: Array | None = None
    for part, pages in zip(np.split(page_ids, np.cumsum(sizes)[:-1]), fetched, strict=True):
        arriving = jax.device_put(pages, on_device)
        pool = steps.scatter_pages(pool, placement.put(part), arriving)
        jax.block_until_ready(before)
        before = arriving
    return jax.block_until_ready(pool)
