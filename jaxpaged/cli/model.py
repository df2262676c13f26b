"""The MODEL of a command: a directory, or a name on the Hugging Face Hub, which becomes a directory before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxpaged.cli.errors import usage_errors
from jaxpaged.cli.flags import HUB_FLAGS, given
from jaxpaged.hub import find_model


def settle_model(args: argparse.Namespace) -> None:
    """Make `args.model` the directory that it means, of which `args.given_model` keeps the name; there are no flags of
    the Hub then."""
    if getattr(args, "model", None) is None:
        return
    args.given_model = args.model
    needs_weights = getattr(args, "needs_weights", True) and getattr(args, "load_format", "") != "dummy"
    with usage_errors():
        args.model = str(find_model(args.model, needs_weights=needs_weights, **given(args, HUB_FLAGS)))
    for flag in HUB_FLAGS:
        vars(args).pop(flag.name, None)


def short_name(args: argparse.Namespace) -> str:
    """Of the model, for a title."""
    return Path(args.model).resolve().name if args.given_model == args.model else args.given_model
