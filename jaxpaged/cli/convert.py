"""`jaxpaged convert`: a Hugging Face checkpoint, rewritten in the native format."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxpaged.cli.errors import usage_errors
from jaxpaged.cli.flags import HUB_FLAGS, MODEL_HELP, add_flags
from jaxpaged.cli.interrupts import exit_at_interrupt
from jaxpaged.cli.model import settle_model
from jaxpaged.cli.output_files import check_new_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="SRC", help=MODEL_HELP)
    parser.add_argument("destination", metavar="DST", help="directory to write: a new or an empty one")
    add_flags(parser, "model", HUB_FLAGS)


def run(args: argparse.Namespace, _make_llm: object) -> int:
    settle_model(args)
    with exit_at_interrupt():
        from jaxpaged.checkpoint import convert_checkpoint  # imports jax

    with usage_errors():
        check_new_folder(Path(args.destination).expanduser(), "DST")
        convert_checkpoint(args.model, args.destination)
    return 0
