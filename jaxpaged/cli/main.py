"""The command `jaxpaged`: `generate` runs prompts or batch files, `beams` shows a search, `trace` what the page pool
did, `compare` measures ways to keep KV memory, `simulate` replays lengths, `info` and `convert` look at and rewrite
checkpoints.

Exit codes: 0 all is well; 1 some lines failed (their errors are in the output); 2 the command cannot run as given, with
one line on standard error that says why; 130 interrupted; 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jaxpaged
from jaxpaged.batch import WriteError
from jaxpaged.batch.parse import FORMATS
from jaxpaged.cli import compare as compare_command
from jaxpaged.cli import simulate as simulate_command
from jaxpaged.cli.beams import SEARCH_FLAGS, beams
from jaxpaged.cli.errors import INTERRUPTED, READER_GONE, USAGE, UsageError, one_line, usage_errors
from jaxpaged.cli.flags import BEAM_FLAGS, MODEL_FLAGS, PROMPT_FLAGS, SAMPLING_FLAGS, add_flags
from jaxpaged.cli.generate import generate
from jaxpaged.cli.interrupts import exit_at_interrupt
from jaxpaged.cli.output_files import check_new_folder
from jaxpaged.cli.trace import EPILOG as TRACE_EPILOG
from jaxpaged.cli.trace import TRACE_FLAGS, TRACE_MODEL_FLAGS, trace
from jaxpaged.trace_page import example_names


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is there for those who ask for it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None, make_llm: Callable[..., Any] | None = None) -> int:
    """`make_llm` takes the place of `jaxpaged.LLM`."""
    try:
        args = make_parser().parse_args(argv)
        if args.verbose:
            logging.basicConfig(level=logging.WARNING)
            logging.getLogger("jaxpaged").setLevel(logging.INFO)
        return args.run(args, make_llm or _make_llm)
    except UsageError as error:
        print(f"jaxpaged: {one_line(str(error))}", file=sys.stderr)
        return USAGE
    except WriteError as error:
        print(f"jaxpaged: {error}; mend that and give the same command again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jaxpaged: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What Python still buffers for this pipe must not fail a second time when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def make_parser() -> Parser:
    parser = Parser(prog="jaxpaged", description="Language-model generation over a paged KV cache.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"jaxpaged {jaxpaged.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    _add_generate(commands)
    _add_beams(commands)
    compare = _add_command(
        commands, "compare", _compare, "run one workload on every way to keep KV memory; table, JSON and pictures",
        epilog=compare_command.EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    compare_command.add_arguments(compare)
    simulate = _add_command(
        commands, "simulate", _simulate, "say where KV memory would go, from lengths alone; needs no model",
        epilog=simulate_command.EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    simulate_command.add_arguments(simulate)
    _add_trace(commands)
    info = _add_command(commands, "info", _info, "say what a checkpoint holds, without loading its weights")
    info.add_argument("path", metavar="PATH", help="checkpoint directory")
    convert = _add_command(commands, "convert", _convert, "rewrite a Hugging Face checkpoint in the native format")
    convert.add_argument("source", metavar="SRC", help="checkpoint directory, native or Hugging Face")
    convert.add_argument("destination", metavar="DST", help="directory to write: a new or an empty one")
    return parser


def _add_command(commands: Any, name: str, run: Callable[..., int], summary: str, **options: Any) -> Parser:
    command = commands.add_parser(name, help=summary, allow_abbrev=False, **options)
    command.add_argument("-v", "--verbose", action="store_true", help="say on standard error what was chosen")
    command.set_defaults(run=run)
    return command


GENERATE_EPILOG = """\
input files, told apart by their first line: plain text, one prompt a line; JSON, one object a line, either
  {"prompt": "..."} or {"prompt_token_ids": [...]}, with "id" and any parameter, or an OpenAI batch line
  {"custom_id": "...", "method": "POST", "url": "/v1/completions", "body": {"prompt": "...", ...}}
  Flags are the defaults of lines that do not say otherwise.

A run that was stopped, at any moment and in any way, goes on when the same command is given again.
"""


def _add_generate(commands: Any) -> None:
    parser = _add_command(
        commands, "generate", generate, "complete prompts",
        epilog=GENERATE_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeat for more")
    source.add_argument("--input", metavar="FILE", help="a file of prompts, '-' for standard input")
    parser.add_argument(
        "--shared-prefix", metavar="TEXT", help="comes before every prompt; computed once and stored once for all"
    )
    parser.add_argument("--format", choices=FORMATS, default="auto", help="of the input (default auto)")
    parser.add_argument("--output", metavar="FILE", default="-", help="rows of JSON (default '-': standard output)")
    parser.add_argument("--account", metavar="FILE", help="write where memory was at every step, as .csv or .json")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the output has results already")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="of lines without a seed of their own, each of which gets one made of N and its line number (default 0)",
    )  # fmt: skip
    add_flags(parser, "prompts", PROMPT_FLAGS)
    add_flags(parser, "sampling", SAMPLING_FLAGS)
    add_flags(parser, "beam search, with --beam-width", BEAM_FLAGS)
    add_flags(parser, "model and memory", MODEL_FLAGS)


def _add_beams(commands: Any) -> None:
    parser = _add_command(commands, "beams", beams, "search with beams and show how they compete")
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--plot", metavar="FILE", help="draw the whole search: a .png, .pdf or .svg file")
    parser.add_argument("--delay", type=float, default=0.0, metavar="X", help="seconds to wait after each step")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of beams that are drawn (default 0)")
    add_flags(parser, "prompts", PROMPT_FLAGS)
    add_flags(parser, "search (4 beams, unless --beam-width says otherwise)", SEARCH_FLAGS)
    add_flags(parser, "model and memory", MODEL_FLAGS)


def _add_trace(commands: Any) -> None:
    parser = _add_command(
        commands, "trace", trace, "write a page that shows what the page pool did in a run",
        epilog=TRACE_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", nargs="?", help="checkpoint directory")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeat for more")
    parser.add_argument("--example", choices=example_names(), help="a bundled run instead of a model's")
    parser.add_argument("--html", metavar="FILE", help="the page: one file, to be opened in any browser")
    parser.add_argument("--json", metavar="FILE", help="the trace as data (host/account/trace.py has the format)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (default 0)")
    add_flags(parser, "prompts", PROMPT_FLAGS)
    add_flags(parser, "sampling and search", TRACE_FLAGS)
    add_flags(parser, "model and memory", TRACE_MODEL_FLAGS)


def _make_llm(**options: Any) -> Any:
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        # The process is ours alone: --memory-utilization is of this share of a GPU, by XLA's default of three quarters.
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    with exit_at_interrupt():
        from jaxpaged.llm import LLM  # imports jax: seconds that --help and a mistyped flag need not cost

    return LLM(**options)


def _compare(args: argparse.Namespace, make_llm: Callable[..., Any]) -> int:
    with usage_errors():
        return compare_command.run(args, make_llm)


def _simulate(args: argparse.Namespace, _make_llm: object) -> int:
    with usage_errors():
        return simulate_command.run(args)


def _info(args: argparse.Namespace, _make_llm: object) -> int:
    with exit_at_interrupt():
        from jaxpaged.checkpoint import describe_checkpoint

    with usage_errors():
        print(describe_checkpoint(args.path), flush=True)
    return 0


def _convert(args: argparse.Namespace, _make_llm: object) -> int:
    with exit_at_interrupt():
        from jaxpaged.checkpoint import convert_checkpoint

    with usage_errors():
        check_new_folder(Path(args.destination).expanduser(), "DST")
        convert_checkpoint(args.source, args.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
