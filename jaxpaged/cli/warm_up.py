"""`jaxpaged warm-up`: compiles what runs of a model can need, so that later processes read it from files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from jaxpaged.batch import make_params
from jaxpaged.cli.constraint_flags import CONSTRAINT_FLAGS, given_constraint
from jaxpaged.cli.errors import usage_errors
from jaxpaged.cli.flags import BEAM_FLAGS, MODEL_FLAGS, MODEL_HELP, SAMPLING_FLAGS, add_flags, given
from jaxpaged.cli.interrupts import exit_at_interrupt

EPILOG = """\
Give the flags of the runs that are to come: other parameters of sampling need other programs, and so do other options
of the model. Programs are kept in the folder that is printed, JAXPAGED_CACHE_DIR names another one.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_flags(parser, "sampling", SAMPLING_FLAGS)
    add_flags(parser, "beam search, with --beam-width", BEAM_FLAGS)
    add_flags(parser, "what outputs are to be: one of", CONSTRAINT_FLAGS)
    add_flags(parser, "model and memory", MODEL_FLAGS)


@usage_errors(kinds=(ValueError, OSError, RuntimeError))  # RuntimeError: what jax raises without memory or device
def run(args: argparse.Namespace, make_llm: Callable[..., Any]) -> int:
    params = make_params({}, given(args, (*SAMPLING_FLAGS, *BEAM_FLAGS)) | given_constraint(args))
    llm = make_llm(model=args.model, **given(args, MODEL_FLAGS))
    with exit_at_interrupt():
        done = llm.warm_up(params)
    made = f"{done.compiled + done.read} programs in {done.seconds:.1f} s: {done.compiled} compiled, {done.read} read"
    kept = f"{done.folder_bytes / 1e6:.1f} MB are kept in {done.folder}" if done.folder else "none is kept in files"
    print(f"{made}; {kept}")
    return 0
