"""Opens a directory with a model in it, whichever its format: configuration, tokenizer file and weights.

Opening reads config.json and generation_config.json, which suffices to refuse what cannot run; the weights are read by
`load_params`, straight to the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from jaxpaged import demo_model
from jaxpaged.checkpoint import hf_config, hf_weights, native
from jaxpaged.checkpoint.files import find_file, read_json, user_path
from jaxpaged.config import DTYPES, ModelConfig
from jaxpaged.config.choices import LOAD_FORMATS
from jaxpaged.device.mesh import Placement
from jaxpaged.device.param_nodes import Params
from jaxpaged.device.params import random_params
from jaxpaged.device.shards import place_random
from jaxpaged.text.added_tokens import COMPANIONS

Format = Literal["native", "huggingface"]

TOKENIZER_FILES = {
    "native": ("tokenizer.model", "tokenizer.json"),
    "huggingface": ("tokenizer.json", "tokenizer.model"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A directory that holds a model, its weights not read yet."""

    directory: Path
    format: Format
    config: ModelConfig
    tokenizer_file: Path | None  # None: prompts must be token ids


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Recognise the format of a local directory, or of the bundled model, and parse its configuration; ValueError says
    what is not supported."""
    directory = user_path(demo_model.find_model(path))
    if not os.path.exists(directory):  # a name that is too long does not exist either
        raise FileNotFoundError(
            f"{path} does not exist: give the directory of a checkpoint (nothing is downloaded), "
            f"or {demo_model.NAME!r}, the model that comes with jaxpaged"
        )
    if not directory.is_dir():
        raise ValueError(f"{path} is a file: give the directory that holds config.json and the weights")
    config_file = find_file(directory, "config.json")
    if config_file is None:
        found = ", ".join(sorted(file.name for file in directory.iterdir())[:8]) or "nothing"
        raise ValueError(f"{path} has no config.json (it holds {found}): no checkpoint that jaxpaged can read")
    values = read_json(config_file)
    is_native = values.get("format") == native.FORMAT
    if is_native:
        with _naming(config_file):
            config = native.parse_config(values)
    else:
        config = _parse_huggingface(config_file, values)
    checkpoint_format: Format = "native" if is_native else "huggingface"
    return Checkpoint(directory, checkpoint_format, config, _find_tokenizer(directory, checkpoint_format))


def load_params(
    checkpoint: Checkpoint, *, dtype: str, device: jax.Device | Placement, load_format: str = "auto", seed: int = 0
) -> Params:
    """The weights on `device`, or divided among several, as `dtype`; load_format "dummy" makes random ones from `seed`
    and reads no file."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format is {load_format!r}; choose one of {', '.join(LOAD_FORMATS)}")
    if load_format == "dummy":
        placement = Placement.of(device)
        if placement.size > 1:
            return place_random(checkpoint.config, dtype, seed, placement)
        return random_params(checkpoint.config, dtype, seed, placement.device)
    wanted = "huggingface" if load_format == "safetensors" else load_format
    if wanted not in ("auto", checkpoint.format):
        raise ValueError(
            f"load_format is {load_format!r}, but {checkpoint.directory} has the {checkpoint.format} format"
        )
    loader = native.load_params if checkpoint.format == "native" else hf_weights.load_params
    return loader(checkpoint.directory, checkpoint.config, dtype=dtype, device=device)


def _parse_huggingface(config_file: Path, values: dict[str, Any]) -> ModelConfig:
    directory = config_file.parent
    generation = _read_generation_config(directory)
    with _naming(config_file):
        declares_dtype = hf_config.declared_dtype(values) is not None
    if not declares_dtype and any(directory.glob("*.safetensors")):
        values = {**values, "dtype": hf_weights.stored_dtype(directory)}
    with _naming(config_file):
        return hf_config.parse_config(values, generation)


def _read_generation_config(directory: Path) -> dict[str, Any]:
    """The contents of generation_config.json, of which only the ids of special tokens count; {} where there is none."""
    file = find_file(directory, "generation_config.json")
    if file is None:
        return {}
    values = read_json(file)
    for key in ("bos_token_id", "eos_token_id"):
        given = values.get(key)
        token_ids = given if isinstance(given, list) else [given]
        if given is not None and not all(type(token_id) is int for token_id in token_ids):
            raise ValueError(f"{file}: {key} is {given!r}; it must be a token id or a list of them")
    return values


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors of what stands in a file begin with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _find_tokenizer(directory: Path, checkpoint_format: Format) -> Path | None:
    for name in COMPANIONS:  # are read with the tokenizer
        find_file(directory, name)
    files = [find_file(directory, name) for name in TOKENIZER_FILES[checkpoint_format]]
    return next((file for file in files if file is not None), None)
