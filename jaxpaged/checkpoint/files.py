"""Finds the files of a checkpoint directory and says, in words, which one is missing or cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError with the place of the mistake when it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def find_weight_files(directory: Path) -> list[Path]:
    """The safetensors files to read: those of the index, else `model.safetensors`, else every one there is."""
    index = directory / INDEX_NAME
    if index.is_file():
        return _indexed_files(index)
    single = directory / SINGLE_NAME
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise _no_weights(directory)
    return files


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f'{index} has no "weight_map" of tensor names to file names')
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    if not files:
        raise ValueError(f'the "weight_map" of {index} is empty')
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index.name} names {', '.join(missing)}, which is not in {index.parent}")
    return files


def _no_weights(directory: Path) -> Exception:
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if not pickled:
        return FileNotFoundError(f"no *.safetensors file in {directory}; load_format='dummy' makes random weights")
    return ValueError(
        f"{directory} has its weights as {pickled[0]}, a pickle, which jaxpaged does not read; convert it once with "
        f"transformers: AutoModelForCausalLM.from_pretrained(source, dtype='auto').save_pretrained(destination)"
    )
