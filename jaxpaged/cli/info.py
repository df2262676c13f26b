"""`jaxpaged info`: what a checkpoint holds, and the pool that an engine of it would have; no weight is read."""

from __future__ import annotations

import argparse

from jaxpaged.cli.errors import usage_errors
from jaxpaged.cli.flags import MODEL_FLAGS, MODEL_HELP, add_flags, given
from jaxpaged.cli.interrupts import exit_at_interrupt
from jaxpaged.cli.model import settle_model

#: No tokenizer and no weight is read.
FLAGS = tuple(flag for flag in MODEL_FLAGS if flag.name not in ("tokenizer", "load_format"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_flags(parser, "model and memory", FLAGS)


def run(args: argparse.Namespace, _make_llm: object) -> int:
    settle_model(args, needs_weights=False)
    with exit_at_interrupt():
        from jaxpaged.llm import LLM  # imports jax

    with usage_errors(kinds=(ValueError, OSError, RuntimeError)):  # RuntimeError: what jax raises without a device
        print(LLM.describe(args.model, **given(args, FLAGS)), flush=True)
    return 0
