"""Which files of a directory make a model, and a digest by which a later run knows it again.

What else lies in the directory (notes, results, accounts, pictures) is no part of the model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SAMPLE_BYTES = 4096  # read at the start, middle and end of every model file

#: What loading reads: of both formats, of any tokenizer.
NAMES = frozenset(
    (
        "config.json", "generation_config.json", "checksums.json", "tokenizer.json", "tokenizer_config.json",
        "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt",
        "chat_template.jinja",
    )
)  # fmt: skip
SUFFIXES = (".safetensors", ".safetensors.index.json", ".model")
TENSOR_FOLDER = "params"  # of the native format
TEMPLATE_FOLDER = "additional_chat_templates"
FOLDERS = (TENSOR_FOLDER, TEMPLATE_FOLDER)
WEIGHT_INDEX = "model.safetensors.index.json"


def model_identity(path: str | Path) -> str:
    """A digest of a checkpoint or tokenizer that costs milliseconds: names, sizes and a few kilobytes of every file.

    Training changes nearly every weight, so a fine-tuned copy with the same names and sizes differs in the samples.
    """
    root = Path(path)
    if root.is_file():
        return _sampled_digest(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist: give the directory of a checkpoint")
    return digest([[str(file.relative_to(root)), _sampled_digest(file)] for file in model_files(root)])


def model_files(root: Path) -> list[Path]:
    """The files that make the model in this directory, in order."""
    candidates = [*root.iterdir(), *(file for folder in FOLDERS for file in (root / folder).rglob("*"))]
    return sorted(file for file in candidates if file.is_file() and is_of_model(file, root))


def is_of_model(path: Path, root: Path) -> bool:
    """Whether a file at `path`, if there is one, is part of the model in the directory `root`."""
    if not path.is_relative_to(root):
        return False
    first, *others = path.relative_to(root).parts or ("",)
    if others:
        return first in FOLDERS and not any(part.startswith(".") for part in others)
    if first.startswith("."):
        return False
    return first in NAMES or first.endswith(SUFFIXES) or first in _indexed_names(root / WEIGHT_INDEX)


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _indexed_names(index: Path) -> frozenset[str]:
    """The files that an index of weights names, whatever they are called; loading says what is wrong with an index."""
    try:
        names = json.loads(index.read_bytes())["weight_map"].values()
        return frozenset(name for name in names if isinstance(name, str))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return frozenset()


def _sampled_digest(path: Path) -> str:
    size = path.stat().st_size
    hashed = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset in (0, size // 2, max(0, size - SAMPLE_BYTES)):
            file.seek(offset)
            hashed.update(file.read(SAMPLE_BYTES))
    return hashed.hexdigest()
