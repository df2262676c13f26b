"""The command `jaxpaged`: `demo` shows what it does, `generate` runs prompts or batch files, `chat` answers on a
terminal, `beams` shows a search, `trace` what the page pool did, `compare` measures ways to keep KV memory, `simulate`
replays lengths, `profile` shows where a step's time goes, `warm-up` compiles ahead, `info` and `convert` look at and
rewrite checkpoints.

Exit codes: 0 all is well; 1 some lines failed (their errors are in the output); 2 the command cannot run as given, with
one line on standard error that says why; 130 interrupted; 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import Any, NoReturn

import jaxpaged
from jaxpaged.cli.errors import INTERRUPTED, READER_GONE, USAGE, UsageError, one_line
from jaxpaged.cli.interrupts import exit_at_interrupt

#: Name -> what it does. Each is the module of that name (with _ for -) beside this one, with `add_arguments(parser)`,
#: `run(args, make_llm)` and, where its help ends with more than its arguments, `EPILOG`.
COMMANDS = {
    "demo": "complete a few prompts with the bundled model, and say what their KV took",
    "generate": "complete prompts",
    "chat": "talk to a model that was trained to answer",
    "beams": "search with beams and show how they compete",
    "compare": "run one workload on every way to keep KV memory; table, JSON and pictures",
    "simulate": "say where KV memory would go, from lengths alone; needs no model",
    "trace": "write a page that shows what the page pool did in a run",
    "profile": "write a trace of a run's steps for Perfetto",
    "warm-up": "compile what later runs of a model need, and keep it in files",
    "info": "say what a checkpoint holds, without loading its weights",
    "convert": "rewrite a Hugging Face checkpoint in the native format",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is there for those who ask for it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class CommandParser(Parser):
    """Of one command, whose module is imported when it is the one that was given: `jaxpaged --help` needs none."""

    def __init__(self, command: str, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.command = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        with exit_at_interrupt():
            module: Any = import_module(f"jaxpaged.cli.{self.command.replace('-', '_')}")
        self.add_argument("-v", "--verbose", action="store_true", help="say on standard error what was chosen")
        module.add_arguments(self)
        self.epilog = getattr(module, "EPILOG", None)
        self.set_defaults(run=module.run)
        parsed, unknown = super().parse_known_args(args, namespace)
        for flag in unknown:
            self._refuse_renamed(flag.partition("=")[0])
        return parsed, unknown

    def _refuse_renamed(self, flag: str) -> None:
        """UsageError that says what a flag of before is called now, where this command has that one."""
        from jaxpaged.api.names import RENAMED_OPTIONS

        for old, new in RENAMED_OPTIONS.items():
            old_flag, new_flag = ("--" + name.replace("_", "-") for name in (old, new))
            if flag == old_flag and new_flag in self._option_string_actions:
                self.error(f"{old_flag} is called {new_flag} now")


def main(argv: list[str] | None = None, make_llm: Callable[..., Any] | None = None) -> int:
    """`make_llm` takes the place of `jaxpaged.LLM`."""
    with ExitStack() as said:
        return _main(argv, make_llm or _make_llm, said)


def _main(argv: list[str] | None, make_llm: Callable[..., Any], said: ExitStack) -> int:
    try:
        if _wants_json(sys.argv[1:] if argv is None else argv):
            from jaxpaged.cli.json_log import json_lines

            said.enter_context(json_lines())
        args = make_parser().parse_args(argv)
        if args.verbose:
            import logging

            logging.basicConfig(level=logging.WARNING)
            logging.getLogger("jaxpaged").setLevel(logging.INFO)
        return args.run(args, make_llm)
    except UsageError as error:
        print(f"jaxpaged: {one_line(str(error))}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("jaxpaged: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What Python still buffers for this pipe must not fail a second time when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def _wants_json(argv: list[str]) -> bool:
    """Whether what is wrong with the arguments is to be said as JSON, too."""
    return "--log-format=json" in argv or ("--log-format", "json") in itertools.pairwise(argv)


def make_parser() -> Parser:
    parser = Parser(prog="jaxpaged", description="Language-model generation over a paged KV cache.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"jaxpaged {jaxpaged.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    for command, summary in COMMANDS.items():
        commands.add_parser(command, help=summary, command=command)
    return parser


def _make_llm(**options: Any) -> Any:
    with exit_at_interrupt():
        from jaxpaged.llm import LLM  # imports jax: seconds that --help and a mistyped flag need not cost

    return LLM(**options)


if __name__ == "__main__":
    sys.exit(main())
