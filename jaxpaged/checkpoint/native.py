"""The native format: what training writes and `convert` makes, one orbax checkpoint of exactly the parameter pytree.

    config.json           ModelConfig.to_dict() with "format": "jaxpaged" and a format version
    params/               orbax; written first, so a directory with a config.json is complete
    checksums.json        of every tensor, from version 2 on; see checksums.py
    tokenizer.model or tokenizer.json, if there is one

Orbax writes params/ as zarr arrays in one key-value store, and tensorstore reads them from it without more ado.
Restoring goes in batches no larger than the largest tensor, read at once and as they are stored, so that host memory
holds little beyond what is on its way to the device; the wanted dtype is made there.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import traverse_util

from jaxpaged.checkpoint.checksums import (
    FILE_NAME,
    Checksums,
    check_tensors,
    compute_checksums,
    read_checksums,
    write_checksums,
)
from jaxpaged.checkpoint.files import find_file, read_json
from jaxpaged.checkpoint.tensor_check import Shape, check_shapes
from jaxpaged.config import DTYPES, ModelConfig
from jaxpaged.device.mesh import Placement
from jaxpaged.device.param_nodes import Params, by_name
from jaxpaged.device.params import Tensor, param_records, param_shapes
from jaxpaged.device.shards import place_parts

FORMAT = "jaxpaged"
FORMAT_VERSION = 2
FORMAT_VERSIONS = (1, 2)  # that are read; version 1 has no checksums
PARAMS_FOLDER = "params"
MANIFEST = "manifest.ocdbt"  # of the key-value store in which orbax keeps all tensors


def save_checkpoint(directory: Path, config: ModelConfig, params: Params) -> None:
    """Write `config` and `params` to a new or empty place; an existing checkpoint there is never overwritten."""
    import orbax.checkpoint as ocp  # a quarter of a second, which who only loads need not wait for

    directory = Path(directory).resolve()
    for name in (PARAMS_FOLDER, "config.json"):
        if (directory / name).exists():
            raise FileExistsError(f"{directory} already holds {name}: save to another directory or remove it first")
    check_shapes(_shapes_by_name(params), _shapes_by_name(param_shapes(config, config.dtype)), "params")
    directory.mkdir(parents=True, exist_ok=True)
    with _quiet_orbax(), ocp.PyTreeCheckpointer(use_ocdbt=True, use_zarr3=False) as checkpointer:
        checkpointer.save(directory / PARAMS_FOLDER, _as_saved(params))
    # Orbax notes the folder's absolute path here, for object stores; a checkpoint that travels should name no machine.
    (directory / PARAMS_FOLDER / "commit_success.txt").unlink(missing_ok=True)
    write_checksums(directory, compute_checksums(by_name(params)))
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, **config.to_dict()}
    (directory / "config.json").write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


def parse_config(values: dict[str, Any]) -> ModelConfig:
    """The contents of a native config.json -> ModelConfig."""
    if (version := values.get("format_version")) not in FORMAT_VERSIONS or type(version) is not int:
        raise ValueError(f"native format version is {version!r}; this jaxpaged reads versions 1 and 2")
    return ModelConfig.from_dict({key: values[key] for key in values if key not in ("format", "format_version")})


def load_params(directory: Path, config: ModelConfig, *, dtype: str, device: jax.Device | Placement) -> Params:
    """Restore the parameters onto `device` as `dtype`, or divided among several, after checking every name and shape
    against `config`.

    ValueError names a tensor that is not the one that was saved, or says what is broken in a damaged directory.
    """
    directory = Path(directory).resolve()
    folder = directory / PARAMS_FOLDER
    treedef = jax.tree.structure(param_shapes(config, dtype))
    expected = _shapes_by_name(param_shapes(config, dtype))
    stored = _open_tensors(folder)
    check_shapes({name: tensor.shape for name, tensor in stored.items()}, expected, str(folder))
    _check_dtypes(stored, folder)
    checksums = _read_checksums(directory, set(expected))
    placement, records = Placement.of(device), by_name(param_records(config))
    names, arrays = list(expected), []
    for batch in _batches([stored[name].size * stored[name].dtype.numpy_dtype.itemsize for name in names]):
        tensors = _read_tensors({names[i]: stored[names[i]] for i in batch}, folder)
        if checksums is not None:
            check_tensors(tensors, checksums, folder)
        arrays += [_placed(tensor, records[name], config, dtype, placement) for name, tensor in tensors.items()]
        del tensors
        jax.block_until_ready(arrays)  # or this batch would stay in host memory beside the next
    return jax.tree.unflatten(treedef, arrays)


def _placed(tensor: np.ndarray, record: Tensor, config: ModelConfig, dtype: str, placement: Placement) -> jax.Array:
    if placement.size == 1:
        return jax.device_put(tensor, placement.device).astype(dtype)
    ends = np.cumsum([part.width for part in record.parts])[:-1]
    return place_parts(np.split(tensor, ends, axis=-1), record, config, placement, dtype=dtype)


def _open_tensors(folder: Path) -> dict[str, ts.TensorStore]:
    """Every tensor in the folder by name, its data not read yet."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: a native checkpoint keeps its tensors there")
    for path in folder.rglob("*"):
        if not path.is_dir():
            find_file(path.parent, path.name)  # to open a pipe would wait for ever
    if find_file(folder, MANIFEST) is None:
        raise FileNotFoundError(f"{folder} has no {MANIFEST}, the list of its tensors; copy the checkpoint again")
    kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    with _naming_damage(folder):
        keys = ts.KvStore.open(kvstore).result().list().result()
        names = {key.decode().rpartition("/")[0] for key in keys}  # "layers.0.qkv.weight/.zarray" and ".../0.0"
        opening = {
            name: ts.open({"driver": "zarr", "kvstore": {**kvstore, "path": f"{name}/"}}, open=True, read=True)
            for name in sorted(names)
        }
        return {name: future.result() for name, future in opening.items()}


def _check_dtypes(tensors: dict[str, ts.TensorStore], folder: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype.name not in DTYPES:
            raise ValueError(f"{name} in {folder} is {tensor.dtype.name}; supported are {', '.join(DTYPES)}")


def _read_checksums(directory: Path, names: set[str]) -> Checksums | None:
    is_old = read_json(directory / "config.json").get("format_version") == 1
    if is_old and find_file(directory, FILE_NAME) is None:
        return None
    return read_checksums(directory, names)


def _read_tensors(tensors: dict[str, ts.TensorStore], folder: Path) -> dict[str, np.ndarray]:
    with _naming_damage(folder):
        reading = {name: tensor.read() for name, tensor in tensors.items()}
        return {name: future.result() for name, future in reading.items()}


def _batches(sizes: list[int]) -> list[range]:
    """Consecutive leaves whose bytes together stay within those of the largest leaf."""
    limit = max(sizes)
    starts, total = [0], 0
    for i, size in enumerate(sizes):
        if total + size > limit:
            starts.append(i)
            total = 0
        total += size
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def _as_saved(params: Params) -> dict[str, Any]:
    """Dictionaries in place of nodes, as the format has it: orbax notes of which kind they are."""
    tree = traverse_util.unflatten_dict(by_name(params), sep=".")
    return {**tree, "layers": tuple(tree["layers"].values())}


def _shapes_by_name(tree: Params) -> dict[str, Shape]:
    return {name: tuple(leaf.shape) for name, leaf in by_name(tree).items()}


@contextlib.contextmanager
def _naming_damage(folder: Path) -> Iterator[None]:
    """One line for what tensorstore meets in a damaged directory."""
    try:
        yield
    except (ValueError, LookupError, OSError, NotImplementedError) as error:
        reason = str(error).partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]
        raise ValueError(
            f"{folder} is damaged or incomplete: {' '.join(reason.split())}; copy or convert the checkpoint again"
        ) from None


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax logs a page per checkpoint at INFO through absl; ours is one call of many in someone's program."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
