"""How parameters are divided among the devices of a mesh: which rows and columns of each are whose.

Of a matrix that lies divided, the pieces of all shards lie side by side: queries, keys and values of the first shard,
then those of the second. So the whole is the model's own matrix in another order, and each device finds its part as one
array, laid out as the model's is. Where there are more shards than KV heads, neighbours have copies of the same one. A
vocabulary that does not divide is padded with zeros, which are the last shard's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxpaged.config import ModelConfig
from jaxpaged.device.mesh import AXIS, WHOLE, Placement
from jaxpaged.device.param_nodes import Params
from jaxpaged.device.params import Tensor, make_params, param_records, param_shapes

Array = jax.Array

#: Logical axes (params.py) that are divided; the others are whole on each device.
DIVIDED = ("heads", "kv_heads", "qkv", "mlp", "vocab")


def placed_structs(model: ModelConfig, dtype: str, placement: Placement) -> Params:
    """`param_shapes` of a model as it lies on these devices, before there are weights."""

    def struct(record: Tensor, piece: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axis = divided_axis(record)
        shape = [size * placement.size if i == axis else size for i, size in enumerate(piece.shape)]
        return jax.ShapeDtypeStruct(tuple(shape), piece.dtype, sharding=placement.lay(_spec(record)))

    return jax.tree.map(struct, param_records(model), param_shapes(placement.shard(model), dtype))


def place_parts(
    parts: Sequence[np.ndarray], record: Tensor, model: ModelConfig, placement: Placement, *, dtype: str,
    is_transposed: bool = False,
) -> Array:  # fmt: skip
    """A parameter of which these are the parts, in main memory: each device gets its own pieces of them alone, and lays
    them side by side. `is_transposed`: they are [out, in]."""
    axis = divided_axis(record)
    if axis is None:
        placed = [placement.put(part) for part in parts]
    else:
        stored_axis = 1 - axis if is_transposed else axis
        pieces = [
            _pieces(part, stored_axis, name, model, placement.size)
            for part, name in zip(parts, _axes(record), strict=True)
        ]
        placed = [placement.put_pieces(some, stored_axis) for some in pieces]
    jax.block_until_ready(placed)  # before the host's copies go
    return jax.block_until_ready(_assemble(placed, placement.mesh, _spec(record), is_transposed, dtype))


def place_random(model: ModelConfig, dtype: str, seed: int, placement: Placement) -> Params:
    """The weights of `random_params`, bit for bit: each device makes all of a tensor and keeps its pieces."""
    mesh = placement.mesh
    assert mesh is not None, "the random weights of one device are `random_params`"
    return make_params(model, seed, lambda record, key: _random_pieces(placement.put(key), record, model, mesh, dtype))


def divided_axis(record: Tensor) -> int | None:
    """Which axis of a parameter is divided; None where it is whole on each device."""
    divided = [i for i, name in enumerate(record.axes) if name in DIVIDED]
    assert len(divided) < 2, f"{record.axes} are divided twice"
    return divided[0] if divided else None


def _spec(record: Tensor) -> PartitionSpec:
    return PartitionSpec(*(AXIS if name in DIVIDED else None for name in record.axes))


def _axes(record: Tensor) -> tuple[str, ...]:
    """Of each part the name of its divided axis."""
    axis = divided_axis(record)
    assert axis is not None, record
    is_last = axis == len(record.axes) - 1
    return tuple(part.axis if is_last else record.axes[axis] for part in record.parts)


def _ranges(size: int, name: str, model: ModelConfig, num_shards: int) -> list[tuple[int, int]]:
    """Where each shard's piece of an axis of so many rows or columns begins and ends; it may end behind the last."""
    if name == "kv_heads" and num_shards > model.num_kv_heads:
        heads = [i * model.num_kv_heads // num_shards for i in range(num_shards)]
        return [(head * model.head_dim, (head + 1) * model.head_dim) for head in heads]
    width = -(-size // num_shards)
    return [(i * width, (i + 1) * width) for i in range(num_shards)]


def _pieces(part: np.ndarray, axis: int, name: str, model: ModelConfig, num_shards: int) -> list[np.ndarray]:
    pieces = []
    for start, stop in _ranges(part.shape[axis], name, model, num_shards):
        piece = part[start:stop] if axis == 0 else part[:, start:stop]
        missing = stop - start - piece.shape[axis]
        padding = [(0, missing if i == axis else 0) for i in range(part.ndim)]
        pieces.append(np.pad(piece, padding) if missing else piece)
    return pieces


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _assemble(parts: list[Array], mesh: Any, spec: PartitionSpec, is_transposed: bool, dtype: str) -> Array:
    def local(parts: list[Array]) -> Array:
        return jnp.concatenate([(part.T if is_transposed else part).astype(dtype) for part in parts], axis=-1)

    stored = PartitionSpec(*spec[::-1]) if is_transposed else spec
    return jax.shard_map(local, mesh=mesh, in_specs=(stored,), out_specs=spec, check_vma=False)(parts)


@functools.partial(jax.jit, static_argnames=("record", "model", "mesh", "dtype"))
def _random_pieces(key: Array, record: Tensor, model: ModelConfig, mesh: Mesh, dtype: str) -> Array:
    axis = divided_axis(record)

    def local(key: Array) -> Array:
        # As one device makes it, to the last bit: nothing of what follows may become part of that.
        whole = jax.lax.optimization_barrier(record.init(key, record.shape, jnp.dtype(dtype)))
        if axis is None:
            return whole
        ends = np.cumsum([part.width for part in record.parts])[:-1]
        parts = jnp.split(whole, ends, axis=-1)
        own = [
            _own_piece(part, axis, _ranges(part.shape[axis], name, model, mesh.size))
            for part, name in zip(parts, _axes(record), strict=True)
        ]
        return jnp.concatenate(own, axis=-1)

    return jax.shard_map(local, mesh=mesh, in_specs=WHOLE, out_specs=_spec(record), check_vma=False)(key)


def _own_piece(part: Array, axis: int, ranges: list[tuple[int, int]]) -> Array:
    """Of a whole part what the device that runs this has."""
    missing = max(0, ranges[-1][1] - part.shape[axis])
    part = jnp.pad(part, [(0, missing if i == axis else 0) for i in range(part.ndim)])
    start = jnp.asarray([start for start, _ in ranges])[jax.lax.axis_index(AXIS)]
    return jax.lax.dynamic_slice_in_dim(part, start, ranges[0][1] - ranges[0][0], axis)
