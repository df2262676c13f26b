"""Which devices run an engine, and how arrays lie on them.

One device has all of everything. Several have a shard each of the weights and of the page pool, divided by heads, and
run the same program (`jax.shard_map`, around each step as a whole), in which they add up what each has computed. What
is small lies whole on each of them, the arrays of a step and the tokens that it chose among it: so the host need not
know how many there are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxpaged.config import ModelConfig
from jaxpaged.config.shard import shard_config

Array = jax.Array

#: The one axis of a mesh.
AXIS = "shard"
#: A pool [N, S, K, D] or dense rows [rows, max_len, K, D]; and pages that have left it [2 * layers, C, S, K, D].
POOL, MOVED_PAGES = PartitionSpec(None, None, AXIS), PartitionSpec(None, None, None, AXIS)
WHOLE = PartitionSpec()


@dataclass(frozen=True)
class Placement:
    """The devices of one engine, in the order of their shards."""

    devices: tuple[jax.Device, ...]

    @classmethod
    def of(cls, where: Placement | jax.Device | Sharding) -> Placement:
        if isinstance(where, Placement):
            return where
        if isinstance(where, NamedSharding):
            return cls(tuple(np.asarray(where.mesh.devices).flat))
        return cls(tuple(where.device_set) if isinstance(where, Sharding) else (where,))

    @property
    def size(self) -> int:
        return len(self.devices)

    @property
    def device(self) -> jax.Device:
        """The first one, which stands for all: they are alike."""
        return self.devices[0]

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """None where there is one device: then nothing is divided, and no program has a word about it."""
        return Mesh(np.array(self.devices), (AXIS,)) if self.size > 1 else None

    def lay(self, spec: PartitionSpec = WHOLE, memory_kind: str | None = None) -> Sharding:
        """How an array lies that is divided so: by default whole, on each device."""
        if self.mesh is None:
            return SingleDeviceSharding(self.device, memory_kind=memory_kind)
        return NamedSharding(self.mesh, spec, memory_kind=memory_kind)

    def put(self, value: Any) -> Any:
        """Arrays that lie whole on each device."""
        return jax.device_put(value, self.device if self.mesh is None else self.lay())

    def struct(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """What `put` makes of an array like this; of one device the shape alone."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=None if self.mesh is None else self.lay())

    def copy(self, arrays: Any) -> Any:
        """Arrays that lie on as many other devices, lying here as they lie there."""
        return jax.device_put(
            arrays, self.lay() if specs_of(arrays) == WHOLE else jax.tree.map(self.lay, specs_of(arrays))
        )

    def put_pieces(self, pieces: Sequence[Array | np.ndarray], axis: int) -> Array:
        """One piece for each device, which side by side along this axis are the array."""
        assert self.mesh is not None, "pieces for one device"
        # A CPU "device" that may alias would keep the host's copy alive.
        placed = [
            jax.device_put(piece, device, may_alias=False) for piece, device in zip(pieces, self.devices, strict=True)
        ]
        shape = list(placed[0].shape)
        shape[axis] *= self.size
        layout = self.lay(PartitionSpec(*[None] * axis, AXIS))
        return jax.make_array_from_single_device_arrays(tuple(shape), layout, placed)

    def shard(self, model: ModelConfig) -> ModelConfig:
        """What each device computes of a model; ValueError where it cannot be divided among so many."""
        return shard_config(model, self.size)


def mesh_of(array: Any) -> Mesh | None:
    """The mesh on which an array lies, or is to lie; None where it is one device's."""
    layout = getattr(array, "sharding", None)
    mesh = layout.mesh if isinstance(layout, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def specs_of(arrays: Any) -> Any:
    """How these arrays are divided, each as it lies; what lies nowhere yet, as what the host sends, is whole. Where all
    are whole that is one word, whichever of them there are."""

    def spec_of(leaf: Any) -> PartitionSpec:
        layout = getattr(leaf, "sharding", None)
        return layout.spec if isinstance(layout, NamedSharding) else WHOLE

    specs = jax.tree.map(spec_of, arrays)
    return WHOLE if all(spec == WHOLE for spec in jax.tree.leaves(specs)) else specs


# What shards do together, in a program that all of them run


def add_up(x: Array, config: ModelConfig) -> Array:
    """The sum of what all shards have computed."""
    return x if config.num_shards == 1 else jax.lax.psum(x, AXIS)


def side_by_side(x: Array, config: ModelConfig) -> Array:
    """What all shards have, one behind the other along the last axis."""
    return x if config.num_shards == 1 else jax.lax.all_gather(x, AXIS, axis=x.ndim - 1, tiled=True)


def first_replaced(values: Array, first: Array) -> Array:
    """`values` with `first` in the place of as many. All of them set at once would be a scatter by an empty list of
    places, at which XLA crashes on a mesh."""
    return first if len(first) == len(values) else values.at[: len(first)].set(first)
