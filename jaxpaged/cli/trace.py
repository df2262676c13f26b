"""`jaxpaged trace`: runs a few prompts, or takes a bundled run, and writes the page that shows what the pool did.

Small defaults of its own: pages of 4 tokens and 40 of them, so that every page can be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.api.values import check_encodable
from jaxpaged.cli.errors import UsageError, usage_errors
from jaxpaged.cli.flags import (
    MODEL_FLAGS,
    MODEL_HELP,
    PROMPT_FLAGS,
    SAMPLING_FLAGS,
    Flag,
    add_flags,
    given,
    with_defaults,
)
from jaxpaged.cli.output_files import check_outputs
from jaxpaged.trace_page import dump_trace, example_names, example_trace, make_page

DEFAULTS = {"page_size": 4, "num_pages": 41}
MAX_TOKENS = 24
TRACE_FLAGS = (
    *(flag for flag in SAMPLING_FLAGS if flag.name in ("n", "temperature", "top_p", "top_k", "stop", "ignore_eos")),
    Flag("beam_width", int, "search with that many beams instead of sampling"),
    Flag("max_tokens", int, f"tokens generated at most (default {MAX_TOKENS})"),
)
TRACE_MODEL_FLAGS = with_defaults(MODEL_FLAGS, DEFAULTS)
EPILOG = """\
examples:
  jaxpaged trace --example beam-search --html pool.html
  jaxpaged trace MODEL --prompt 'def f(x):' --n 4 --html pool.html
  jaxpaged trace MODEL --prompt one --prompt two --beam-width 4 --num-pages 30 --preemption swap --html pool.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeat for more")
    parser.add_argument("--example", choices=example_names(), help="a bundled run instead of a model's")
    parser.add_argument("--html", metavar="FILE", help="the page: one file, to be opened in any browser")
    parser.add_argument("--json", metavar="FILE", help="the trace as data (host/account/trace.py has the format)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (default 0)")
    add_flags(parser, "prompts", PROMPT_FLAGS)
    add_flags(parser, "sampling and search", TRACE_FLAGS)
    add_flags(parser, "model and memory", TRACE_MODEL_FLAGS)


def run(args: argparse.Namespace, make_llm: Callable[..., Any]) -> int:
    with usage_errors("cannot write: "):
        _check_outputs(args)
    made, errors = (_bundled(args), []) if args.example is not None else _run(args, make_llm)
    with usage_errors("cannot write: ", (OSError,)):
        if args.json is not None:
            Path(args.json).write_text(dump_trace(made) + "\n", encoding="utf-8")
        if args.html is not None:
            Path(args.html).write_text(make_page(made), encoding="utf-8")
    written = " and ".join(path for path in (args.html, args.json) if path is not None)
    num_steps, num_sequences = made["frames"][-1]["step"], len(made["sequences"])
    print(f"jaxpaged: {written}: {num_steps} steps, {num_sequences} sequence(s)", file=sys.stderr)
    for error in errors:
        print(f"jaxpaged: {error}", file=sys.stderr)
    return 1 if errors else 0


def _check_outputs(args: argparse.Namespace) -> None:
    if args.html is None and args.json is None:
        raise UsageError("say where the trace goes: --html FILE for the page, --json FILE for the data, or both")
    models = {"MODEL": args.model, "--tokenizer": getattr(args, "tokenizer", None)}
    with usage_errors():
        check_outputs({"--html": args.html, "--json": args.json}, models=models)


def _bundled(args: argparse.Namespace) -> dict[str, Any]:
    options = given(args, (*PROMPT_FLAGS, *TRACE_FLAGS, *TRACE_MODEL_FLAGS))
    if args.model is not None or args.prompt or args.seed or options:
        raise UsageError(
            "--example replays a bundled run: it takes no model, no prompt, no seed and no options of them"
        )
    return example_trace(args.example)


def _run(args: argparse.Namespace, make_llm: Callable[..., Any]) -> tuple[dict[str, Any], list[str]]:
    """The trace, and what the requests that could not go on say."""
    if args.model is None or not args.prompt:
        raise UsageError("give a MODEL with at least one --prompt, or --example NAME (see jaxpaged trace --help)")
    with usage_errors("--prompt: "):
        for prompt in args.prompt:
            check_encodable(prompt, "the text")
    with usage_errors():
        params = _params(args)
    with usage_errors(kinds=(ValueError, OSError, RuntimeError)):  # RuntimeError: jax without memory or device
        llm = make_llm(model=args.model, seed=args.seed, **DEFAULTS | given(args, TRACE_MODEL_FLAGS))
    for number, prompt in enumerate(args.prompt, start=1):
        with usage_errors(f"prompt {number}: "):
            llm.check_request(prompt, params, **given(args, PROMPT_FLAGS))
    recorder = llm.record_trace()
    outputs = llm.generate(args.prompt, params, **given(args, PROMPT_FLAGS))
    errors = [f"prompt {i}: {output.error}" for i, output in enumerate(outputs, start=1) if output.error is not None]
    tokenizer = llm.tokenizer
    made = recorder.trace(
        f"{Path(args.model).resolve().name}: {_describe(params, len(args.prompt))}",
        " | ".join(args.prompt),
        piece=lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False),
    )
    return made, errors


def _params(args: argparse.Namespace) -> RequestParams:
    options: dict[str, Any] = {"max_tokens": MAX_TOKENS} | given(args, TRACE_FLAGS)
    if "beam_width" not in options:
        return SamplingParams(**options)
    others = [name for name in ("n", "temperature", "top_p", "top_k") if name in options]
    if others:
        raise ValueError(f"--{others[0].replace('_', '-')} is of sampling, --beam-width of a search: give one of them")
    return BeamSearchParams(**options)


def _describe(params: RequestParams, num_prompts: int) -> str:
    if isinstance(params, BeamSearchParams):
        what = f"beam search of width {params.beam_width}"
    else:
        what = f"{params.num_samples} samples" if params.num_samples > 1 else "one sample"
    return what if num_prompts == 1 else f"{num_prompts} prompts, {what} each"
