"""`jaxpaged info`: what a checkpoint holds, without loading its weights."""

from __future__ import annotations

import argparse

from jaxpaged.cli.errors import usage_errors
from jaxpaged.cli.flags import MODEL_FLAGS, add_flags, given
from jaxpaged.cli.interrupts import exit_at_interrupt

FLAGS = tuple(flag for flag in MODEL_FLAGS if flag.name == "kv_cache_dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="checkpoint directory")
    add_flags(parser, "memory", FLAGS)


def run(args: argparse.Namespace, _make_llm: object) -> int:
    with exit_at_interrupt():
        from jaxpaged.checkpoint import describe_checkpoint  # imports jax

    with usage_errors():
        print(describe_checkpoint(args.path, **given(args, FLAGS)), flush=True)
    return 0
