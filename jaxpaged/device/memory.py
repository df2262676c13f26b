"""How much of a device's memory is ours.

XLA takes a share of a GPU's memory when it is started, three quarters unless it is told otherwise, and nothing that it
allocates can lie outside of that. So whoever is to fill a share of the card must start it with that share. XLA takes it
of what is free then, which is less than the card has: the driver and other programs hold some of it.
"""

from __future__ import annotations

import ctypes
import logging
import os

import jax

logger = logging.getLogger("jaxpaged")

GIB = 1 << 30
#: Where a user says which share XLA is to take; the second is what JAX called it before.
SHARE_VARIABLES = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
#: Of what is free, at most: programs and CUDA graphs need some.
MOST_OF_FREE = 0.97
#: What rounding may take of a share before that is worth a word.
ROUNDING = 0.99


def start_device(memory_utilization: float) -> jax.Device:
    """The default device. If JAX is not running yet, XLA gets this share of a GPU, unless the environment names one."""
    if any(name in os.environ for name in SHARE_VARIABLES):
        return jax.devices()[0]
    free, total = _first_card() or (1, 1)
    name = SHARE_VARIABLES[0]
    os.environ[name] = f"{min(memory_utilization * total / free, MOST_OF_FREE):.4f}"
    try:
        return jax.devices()[0]
    finally:
        del os.environ[name]  # what this process starts later may have another share


def usable_memory(device: jax.Device, memory_utilization: float) -> int:
    """Bytes of this share of the device's memory, as far as XLA may allocate them."""
    total, _ = device_memory(device)
    share = int(total * memory_utilization)
    limit = _xla_limit(device)
    if limit is None or limit >= share * ROUNDING:
        return share if limit is None else min(share, limit)
    logger.warning(
        "memory_utilization=%g is %.1f GiB of this %s, but XLA may allocate %.1f GiB: JAX was started with a smaller "
        "share. Make the LLM before anything else uses JAX, or set %s=%g",
        memory_utilization, share / GIB, device.device_kind, limit / GIB, SHARE_VARIABLES[0], memory_utilization,
    )  # fmt: skip
    return limit


def device_memory(device: jax.Device) -> tuple[int, str]:
    """Bytes, and whose they are: the accelerator's where the runtime knows them, else the machine's."""
    total = _card_memory(device) or _xla_limit(device)
    if total is not None:
        return total, device.device_kind
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine's main memory"


def bytes_in_use(device: jax.Device) -> int | None:
    """Bytes that this process holds on the device now; None where the runtime does not count them (a CPU)."""
    stats = device.memory_stats()
    return stats.get("bytes_in_use") if stats else None


def _xla_limit(device: jax.Device) -> int | None:
    """Bytes that XLA may allocate; None where it may allocate all there are."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats.get("bytes_limit") if stats else None


def _card_memory(device: jax.Device) -> int | None:
    """Bytes of an NVIDIA GPU, which its driver alone knows."""
    if device.platform != "gpu" or device.local_hardware_id is None:
        return None
    driver, card, total = _driver(), ctypes.c_int(), ctypes.c_size_t()
    if driver is None or driver.cuDeviceGet(ctypes.byref(card), device.local_hardware_id):
        return None
    return None if driver.cuDeviceTotalMem_v2(ctypes.byref(total), card) else total.value


def _first_card() -> tuple[int, int] | None:
    """Bytes that are free on the first NVIDIA GPU, and all that it has; None where there is none.

    The context that this takes is the process's own, and XLA's later.
    """
    driver, card, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    if driver is None or driver.cuDeviceGet(ctypes.byref(card), 0):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), card) or driver.cuCtxPushCurrent_v2(context):
        return None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    return None if failed or not free.value else (free.value, total.value)


def _driver() -> ctypes.CDLL | None:
    """NVIDIA's, ready to be asked; None where it is not installed or sees no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver
