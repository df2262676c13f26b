"""`jaxpaged demo`: a few prompts completed, greedily and with four samples each, and what the KV of them came to."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from typing import Any

from jaxpaged import demo_model
from jaxpaged.api.outputs import RequestOutput
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.cli.errors import usage_errors
from jaxpaged.cli.flags import HUB_FLAGS, add_flags, given

PROMPTS = """\
def is_prime(n):
    # Return True if n is a prime number.
---
class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
---
import argparse
import os
import sys


def main():
    parser = argparse.ArgumentParser(description=__doc__)
---
def read_lines(path):
    with open(path, encoding="utf-8") as f:
---
import unittest


class TestParser(unittest.TestCase):
    def setUp(self):
        self.parser = Parser()

    def test_""".split("---\n")
MAX_TOKENS = 48
EPILOG = f"""\
The bundled model is called {demo_model.NAME} wherever a model is asked for:
  jaxpaged generate {demo_model.NAME} --prompt 'class Stack:'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default=demo_model.directory(), metavar="MODEL",
        help="of source code: a checkpoint directory, or a name of the Hub (default: the bundled one)",
    )  # fmt: skip
    add_flags(parser, "model", HUB_FLAGS)


def run(args: argparse.Namespace, make_llm: Callable[..., Any]) -> int:
    with usage_errors(kinds=(ValueError, OSError, RuntimeError)):  # RuntimeError: jax without memory or device
        llm = make_llm(model=args.model, **given(args, HUB_FLAGS))
    _show_run(llm, "greedy", SamplingParams(temperature=0, max_tokens=MAX_TOKENS))
    _show_run(llm, "n=4 samples", SamplingParams(n=4, temperature=0.8, top_p=0.95, max_tokens=MAX_TOKENS))
    return 0


def _show_run(llm: Any, title: str, params: SamplingParams) -> None:
    llm.generate(PROMPTS, params, progress=False)  # compiles; the run that is shown is the second
    print(f"{'=' * 20} {title} {'=' * 20}")
    for output in llm.generate(PROMPTS, params, progress=False):
        _show_output(output)
    _show_memory(llm.last_run)


def _show_output(output: RequestOutput) -> None:
    print(f"\n{output.prompt}")
    for sample in output.outputs:
        print(f"  --- sample {sample.index + 1}, {len(sample.token_ids)} tokens, {sample.finish_reason}")
        print(textwrap.indent(sample.text, "  | ", lambda _line: True))


def _show_memory(run: Any) -> None:
    peak = run.logical_pages.argmax()  # the step at which the samples read most pages, shared ones counted for each
    used, read = run.pages_used[peak], run.logical_pages[peak]
    print(f"\n{run.num_generated_tokens} tokens in {run.seconds['total']:.2f} s: {run.tokens_per_second:,.0f} tokens/s")
    print(f"KV memory: {used} pages of {run.page_size} tokens at the peak, {used / run.num_pages:.1%} of the pool")
    print(f"Sharing: {read} pages read, {1 - used / read:.0%} saved by sharing; {run.page_copies} copied on write\n")
