"""The native format: what training writes and `convert` makes, one orbax checkpoint of exactly the parameter pytree.

    config.json           ModelConfig.to_dict() with "format": "jaxpaged" and a format version
    params/               orbax; written first, so a directory with a config.json is complete
    tokenizer.model or tokenizer.json, if there is one

Restoring goes in batches no larger than the largest tensor, so that host memory holds little beyond what is on its way
to the device. (Tensor by tensor would do too, but each orbax call costs tens of milliseconds.)
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxpaged.checkpoint.tensor_check import Shape, check_shapes
from jaxpaged.config import ModelConfig
from jaxpaged.device.params import Params, param_shapes

FORMAT = "jaxpaged"
FORMAT_VERSION = 1
PARAMS_FOLDER = "params"


def save_checkpoint(directory: Path, config: ModelConfig, params: Params) -> None:
    """Write `config` and `params` to a new or empty place; an existing checkpoint there is never overwritten."""
    directory = Path(directory).resolve()
    for name in (PARAMS_FOLDER, "config.json"):
        if (directory / name).exists():
            raise FileExistsError(f"{directory} already holds {name}: save to another directory or remove it first")
    check_shapes(_shapes_by_name(params), _shapes_by_name(param_shapes(config, config.dtype)), "params")
    directory.mkdir(parents=True, exist_ok=True)
    with _quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(directory / PARAMS_FOLDER, params)
    # Orbax notes the folder's absolute path here, for object stores; a checkpoint that travels should name no machine.
    (directory / PARAMS_FOLDER / "commit_success.txt").unlink(missing_ok=True)
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, **config.to_dict()}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def parse_config(values: dict[str, Any]) -> ModelConfig:
    """The contents of a native config.json -> ModelConfig."""
    if (version := values.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"native format version is {version!r}; this jaxpaged reads version {FORMAT_VERSION}")
    return ModelConfig.from_dict({key: values[key] for key in values if key not in ("format", "format_version")})


def load_params(directory: Path, config: ModelConfig, *, dtype: str, device: jax.Device) -> Params:
    """Restore the parameters onto `device` as `dtype`, after checking every name and shape against `config`."""
    folder = Path(directory).resolve() / PARAMS_FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: a native checkpoint keeps its tensors there")
    expected = param_shapes(config, dtype)
    with _quiet_orbax(), ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        check_shapes(_shapes_by_name(stored), _shapes_by_name(expected), str(folder))
        leaves, treedef = jax.tree.flatten(expected)
        sizes = [
            math.prod(leaf.shape) * max(leaf.dtype.itemsize, stored_leaf.dtype.itemsize)
            for leaf, stored_leaf in zip(leaves, jax.tree.leaves(stored), strict=True)
        ]
        arrays: list[jax.Array] = []
        for batch in _batches(sizes):
            arrays += _restore_leaves(checkpointer, folder, leaves, treedef, batch, device)
    return jax.tree.unflatten(treedef, arrays)


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


def _restore_leaves(
    checkpointer: ocp.PyTreeCheckpointer, folder: Path, leaves: list, treedef, batch: range, device: jax.Device
) -> list[jax.Array]:
    sharding = jax.sharding.SingleDeviceSharding(device)
    items, restore_args = [], []
    for i, leaf in enumerate(leaves):
        wanted = i in batch
        items.append(leaf if wanted else ocp.PLACEHOLDER)
        restore_args.append(ocp.ArrayRestoreArgs(sharding=sharding, dtype=leaf.dtype) if wanted else ocp.RestoreArgs())
    args = ocp.args.PyTreeRestore(
        item=jax.tree.unflatten(treedef, items), restore_args=jax.tree.unflatten(treedef, restore_args)
    )
    restored = jax.tree.leaves(checkpointer.restore(folder, args=args))
    return [restored[i] for i in batch]


def _shapes_by_name(tree: Params) -> dict[str, Shape]:
    """Names like "layers.0.qkv.weight" -> shapes, of any tree whose leaves have one."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


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
