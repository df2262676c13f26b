"""`jaxpaged convert`: any checkpoint that opens, rewritten in the native format."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax

from jaxpaged.checkpoint.files import user_path
from jaxpaged.checkpoint.native import save_checkpoint
from jaxpaged.checkpoint.opening import load_params, open_checkpoint
from jaxpaged.text.added_tokens import COMPANIONS
from jaxpaged.text.chat_template import TEMPLATE_FILE, TEMPLATE_FOLDER


def convert_checkpoint(source: str | Path, destination: str | Path) -> None:
    """Write the checkpoint `source` to a new or empty `destination` in the native format, its dtype unchanged.

    The weights pass through main memory as a whole. Nothing is written before they have all been read.
    """
    checkpoint, destination = open_checkpoint(source), user_path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} is not an empty directory: convert to a new one")
    params = load_params(checkpoint, dtype=checkpoint.config.dtype, device=jax.devices("cpu")[0])
    destination.mkdir(parents=True, exist_ok=True)
    for file in (checkpoint.tokenizer_file, *(checkpoint.directory / name for name in (*COMPANIONS, TEMPLATE_FILE))):
        if file is not None and file.is_file():
            shutil.copyfile(file, destination / file.name)
    for file in (checkpoint.directory / TEMPLATE_FOLDER).glob("*.jinja"):
        (destination / TEMPLATE_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(file, destination / TEMPLATE_FOLDER / file.name)
    save_checkpoint(destination, checkpoint.config, params)
