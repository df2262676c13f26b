"""Measure the bundled checkpoint: its loss on held-out files, and how often the functions that it writes parse.

    python scripts/make/evaluate_tiny.py checkpoints/tiny-python
    python scripts/make/evaluate_tiny.py checkpoints/tiny-python --show 12

A prompt is the header of a function in the held-out files (see train_tiny.py for the split), with the comments right
below it if there are any; methods are moved to column 0. What the model adds is cut where the function ends, at the
first line that begins in column 0, and counts if `ast` accepts header and body together. A body that is longer than
--max-tokens is cut there, so it counts only if it happens to parse. The last line of the output is the result as JSON.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import platform
import random
import sys
import sysconfig
import textwrap
from pathlib import Path

import jax
from train_tiny import encode_files, find_sources, load_tokenizer, split_sources, stream_loss

from jaxpaged import LLM, SamplingParams
from jaxpaged.checkpoint import load_params, open_checkpoint


def find_headers(sources: dict[str, str]) -> list[str]:
    """The `def ...:` lines of every function and method, moved to column 0."""
    headers = []
    for text in sources.values():
        lines = text.split("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                header = textwrap.dedent("\n".join(lines[node.lineno - 1 : first_body_line(node) - 1])) + "\n"
                if parses(header + "    pass\n"):  # not so: a body in the header's line, comments in between
                    headers.append(header)
    return headers


def first_body_line(node: ast.FunctionDef) -> int:
    first = node.body[0]
    decorators = getattr(first, "decorator_list", [])
    return decorators[0].lineno if decorators else first.lineno


def cut_function(text: str) -> str:
    """`text` up to its first line that begins in column 0."""
    lines = text.split("\n")
    end = next((i for i, line in enumerate(lines) if line and not line[0].isspace()), len(lines))
    return "\n".join(lines[:end]).rstrip() + "\n"


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):  # ValueError: null bytes
        return False
    return True


def measure_loss(directory: Path, sources: dict[str, str]) -> dict[str, float]:
    """Held-out loss in nats per token and bits per byte."""
    checkpoint = open_checkpoint(directory)
    params = load_params(checkpoint, dtype="float32", device=jax.devices()[0])
    stream = encode_files(load_tokenizer(directory / "tokenizer.model"), sources)
    loss = stream_loss(params, checkpoint.config, stream, checkpoint.config.max_position_embeddings)
    num_bytes = sum(len(text.encode()) for text in sources.values())
    return dict(
        held_out_nats_per_token=round(loss, 4),
        held_out_bits_per_byte=round(loss * len(stream) / num_bytes / math.log(2), 4),
    )


def sample_functions(args: argparse.Namespace, headers: list[str]) -> list[tuple[str, bool]]:
    """-> the functions written, and whether each came to its end within --max-tokens."""
    # A seed each: a sample depends on its seed and position alone, so one seed would give every prompt the same noise.
    params = [
        SamplingParams(temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens, seed=args.seed + i)
        for i in range(len(headers))
    ]
    functions = []
    for header, output in zip(headers, LLM(args.model).generate(headers, params), strict=True):
        completion = output.outputs[0]
        body = cut_function(completion.text)
        finished = completion.finish_reason == "stop" or body.rstrip() != completion.text.rstrip()
        functions.append((header + body, finished))
    return functions


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument(
        "--source", type=Path, default=Path(sysconfig.get_path("stdlib")), help="where to look for held-out files"
    )
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="print that many of the functions")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    _, sources = split_sources(find_sources(args.source))
    headers = find_headers(sources)
    headers = random.Random(args.seed).sample(headers, min(args.samples, len(headers)))
    functions = sample_functions(args, headers)
    for function, _ in functions[: args.show]:
        print(f"# {'parses' if parses(function) else 'does not parse'}\n{function}")
    num_parsed = sum(parses(function) for function, _ in functions)
    result = dict(
        python=platform.python_version(),
        device=jax.devices()[0].device_kind,
        samples=len(functions),
        parsed=num_parsed,
        parse_share=round(num_parsed / len(functions), 3),
        finished=sum(finished for _, finished in functions),
        finished_and_parsed=sum(finished and parses(function) for function, finished in functions),
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_tokens,
        **measure_loss(args.model, sources),
    )
    print(json.dumps(result, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
