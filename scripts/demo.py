"""Complete a few prompts with the bundled checkpoint, greedily and with four samples each, and say what the KV cost.

python scripts/demo.py [MODEL]        (what `make demo` runs)
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from jaxpaged import LLM, RequestOutput, SamplingParams

BUNDLED = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny-python"
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=BUNDLED, metavar="MODEL", help="checkpoint directory")
    llm = LLM(parser.parse_args(argv).model)
    show_run(llm, "greedy", SamplingParams(temperature=0, max_tokens=MAX_TOKENS))
    show_run(llm, "n=4 samples", SamplingParams(n=4, temperature=0.8, top_p=0.95, max_tokens=MAX_TOKENS))
    return 0


def show_run(llm: LLM, title: str, params: SamplingParams) -> None:
    llm.generate(PROMPTS, params, progress=False)  # compiles; the run that is shown is the second
    print(f"{'=' * 20} {title} {'=' * 20}")
    outputs = llm.generate(PROMPTS, params, progress=False)
    for output in outputs:
        show_output(output)
    show_memory(llm)


def show_output(output: RequestOutput) -> None:
    print(f"\n{output.prompt}")
    for sample in output.outputs:
        print(f"  --- sample {sample.index + 1}, {len(sample.token_ids)} tokens, {sample.finish_reason}")
        print(textwrap.indent(sample.text, "  | ", lambda _line: True))


def show_memory(llm: LLM) -> None:
    run = llm.last_run
    peak = run.logical_pages.argmax()  # the step at which the samples read most pages, shared ones counted for each
    used, read = run.pages_used[peak], run.logical_pages[peak]
    print(f"\n{run.num_generated_tokens} tokens in {run.seconds['total']:.2f} s: {run.tokens_per_second:,.0f} tokens/s")
    print(f"KV memory: {used} pages of {run.page_size} tokens at the peak, {used / run.num_pages:.1%} of the pool")
    print(f"Sharing: {read} pages read, {1 - used / read:.0%} saved by sharing; {run.page_copies} copied on write\n")


if __name__ == "__main__":
    raise SystemExit(main())
