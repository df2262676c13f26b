"""The MODEL of a command that looks into its directory itself; for the others `LLM` finds it."""

from __future__ import annotations

import argparse

from jaxpaged.cli.errors import usage_errors
from jaxpaged.cli.flags import HUB_FLAGS, given
from jaxpaged.hub import find_model


def settle_model(args: argparse.Namespace, needs_weights: bool = True) -> None:
    """Make `args.model` the directory that it names; there are no flags of the Hub then."""
    needs_weights = needs_weights and getattr(args, "load_format", "") != "dummy"
    with usage_errors():
        args.model = str(find_model(args.model, needs_weights=needs_weights, **given(args, HUB_FLAGS)))
    for flag in HUB_FLAGS:
        vars(args).pop(flag.name, None)
