"""What wider beams find: log-probability and syntactic validity of functions that a checkpoint writes, width by width.

    python scripts/make/beam_widths.py checkpoints/tiny-python [--plot docs/beam_widths.png]

A prompt is the header of a function in held-out files (evaluate_tiny.py says which and how a function is judged). From
each, `--max-tokens` tokens are searched for with every width, end-of-sequence ignored, so that log-probabilities are of
continuations of one length. A function counts as valid where header and body parse; `any` counts a prompt where one of
the returned beams does, `distinct` the different bodies among them. Ends with the same as JSON on one line.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
from evaluate_tiny import cut_function, find_headers, parses
from train_tiny import find_sources, split_sources

import jaxpaged
from jaxpaged import LLM, BeamSearchParams, RequestOutput
from jaxpaged.text.tokenizer import load_tokenizer

COLUMNS = ("width", "logprob", "better", "valid", "any", "distinct", "seconds")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    _, sources = split_sources(find_sources(args.source))
    headers = find_headers(sources)
    headers = random.Random(args.seed).sample(headers, min(args.prompts, len(headers)))
    llm = LLM(args.model, max_model_len=args.max_model_len, max_num_seqs=max(256, *args.widths))
    tokenizer, longest = load_tokenizer(args.model), args.max_model_len - args.max_tokens
    headers = [header for header in headers if len(tokenizer.encode(header)) < longest]
    print("".join(f"{name:>10}" for name in COLUMNS))
    rows: list[dict[str, Any]] = []
    greedy: list[float] = []
    for width in args.widths:
        row, logprobs = measure(llm, headers, width, args.max_tokens)
        greedy = greedy or logprobs
        row["better"] = round(sum(b > a + 1e-3 for a, b in zip(greedy, logprobs, strict=True)) / len(headers), 3)
        rows.append(row)
        print("".join(f"{row[name]:10}" for name in COLUMNS), flush=True)
    if args.plot is not None:
        plot(rows, args.plot)
    card = dict(prompts=len(headers), max_tokens=args.max_tokens, seed=args.seed, python=platform.python_version())
    versions = dict(jax=jax.__version__, jaxpaged=jaxpaged.__version__, device=jax.devices()[0].device_kind)
    print(json.dumps({**card, **versions, "widths": rows}, allow_nan=False))
    return 0


def measure(llm: LLM, headers: list[str], width: int, max_tokens: int) -> tuple[dict[str, Any], list[float]]:
    """One row of the table, and the log-probability of each prompt's best continuation."""
    began = time.perf_counter()
    outputs = llm.beam_search(headers, BeamSearchParams(beam_width=width, max_tokens=max_tokens, ignore_eos=True))
    seconds = time.perf_counter() - began
    logprobs = [output.outputs[0].cumulative_logprob for output in outputs]
    judged = [judge(header, output) for header, output in zip(headers, outputs, strict=True)]
    row = dict(
        width=width,
        logprob=round(statistics.mean(logprobs), 3),
        valid=round(statistics.mean(valid[0] for valid, _ in judged), 3),
        any=round(statistics.mean(any(valid) for valid, _ in judged), 3),
        distinct=round(statistics.mean(distinct for _, distinct in judged), 2),
        seconds=round(seconds, 1),
    )
    return row, logprobs


def judge(header: str, output: RequestOutput) -> tuple[list[bool], int]:
    """Whether the function of each beam, best first, parses, and how many different ones there are."""
    functions = [header + cut_function(beam.text) for beam in output.outputs]
    return [parses(function) for function in functions], len(set(functions))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from jaxpaged.looks import style
    from jaxpaged.looks.palette import BEST, RETURNED

    def paint(figure: Any) -> None:
        widths = [row["width"] for row in rows]
        left, right = figure.subplots(1, 2)
        left.plot(widths, [row["logprob"] for row in rows], "o-", color=BEST)
        left.set_ylabel("mean log-probability of the best")
        right.plot(widths, [row["valid"] for row in rows], "o-", color=BEST, label="the best parses")
        right.plot(widths, [row["any"] for row in rows], "s--", color=RETURNED, label="any of the beams parses")
        right.set(ylabel="share of prompts", ylim=(0, 1.02))
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(widths, [str(width) for width in widths])
            axes.set_xlabel("beam width")
            style.grid(axes, "both")
        style.legend_below(figure, right)

    style.draw(path, (style.WIDTH, 3.8), paint)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument(
        "--source", type=Path, default=Path(sysconfig.get_path("stdlib")), help="where to look for held-out files"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--max-model-len", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    parser.add_argument("--plot", type=Path, default=None, help="where to draw the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
