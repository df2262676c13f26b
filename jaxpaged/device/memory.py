"""How much memory a device has for us."""

from __future__ import annotations

import os

import jax


def device_memory(device: jax.Device) -> tuple[int, str]:
    """Bytes, and whose they are: the accelerator's where the runtime knows them, else the machine's."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], device.device_kind
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine's main memory"


def bytes_in_use(device: jax.Device) -> int | None:
    """Bytes that this process holds on the device now; None where the runtime does not count them (a CPU)."""
    stats = device.memory_stats()
    return stats.get("bytes_in_use") if stats else None
