"""Which devices the engines get: as many as were asked for, or those of a mesh that the user has."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpaged.config.checks import short
from jaxpaged.device.mesh import Placement


def resolve_placements(
    tensor_parallel_size: int, data_parallel_size: int, mesh: Any, first: jax.Device
) -> list[Placement]:
    """For each engine its devices: the first ones of the kind of `first`, or for a single one those of the mesh.

    ValueError for more than there are, and for a mesh that says something else.
    """
    if mesh is not None:
        return [_placement_on(mesh, tensor_parallel_size, data_parallel_size)]
    devices = jax.local_devices(backend=first.platform)
    needed = tensor_parallel_size * data_parallel_size
    if needed > len(devices):
        asked = f"tensor_parallel_size={tensor_parallel_size}"
        if data_parallel_size > 1:
            asked += f" and data_parallel_size={data_parallel_size} need {needed} devices"
        raise ValueError(
            f"{asked}, but this process has {len(devices)} device{'' if len(devices) == 1 else 's'} "
            f"({first.device_kind}): {'their product' if data_parallel_size > 1 else 'it'} can be at most "
            f"{len(devices)}"
        )
    starts = range(0, needed, tensor_parallel_size)
    return [Placement(tuple(devices[start : start + tensor_parallel_size])) for start in starts]


def _placement_on(mesh: Any, tensor_parallel_size: int, data_parallel_size: int) -> Placement:
    devices = _devices_of(mesh)
    if tensor_parallel_size not in (1, len(devices)):
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size}, but the mesh has {len(devices)} devices, among which the "
            "model is divided: leave tensor_parallel_size out"
        )
    if data_parallel_size > 1:
        raise ValueError(
            f"data_parallel_size={data_parallel_size}, but the mesh names the devices of one engine: leave one of "
            "them out"
        )
    return Placement(devices)


def _devices_of(mesh: Any) -> tuple[jax.Device, ...]:
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh of devices, got {short(mesh)}")
    sizes = dict(mesh.shape)
    if sum(size > 1 for size in sizes.values()) > 1:
        raise ValueError(
            f"mesh has the axes {sizes}: a model is divided along one axis alone, by heads. Give a mesh of that axis, "
            "such as jax.sharding.Mesh(devices, ('model',)), and another LLM for each of the others' devices"
        )
    devices = tuple(np.asarray(mesh.devices).flat)
    if not devices:
        raise ValueError("mesh has no devices")
    if remote := [device for device in devices if device.process_index != jax.process_index()]:
        raise ValueError(f"mesh has devices of other processes, such as {remote[0]}: an LLM uses those of its own")
    return devices
