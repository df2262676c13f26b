"""Checkpoints that people have: the native format and Hugging Face directories in, the native format out."""

from jaxpaged.checkpoint.convert import convert_checkpoint
from jaxpaged.checkpoint.native import save_checkpoint
from jaxpaged.checkpoint.opening import Checkpoint, load_params, open_checkpoint

__all__ = [
    "Checkpoint",
    "convert_checkpoint",
    "load_params",
    "open_checkpoint",
    "save_checkpoint",
]
