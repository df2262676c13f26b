"""`--text` of `generate`: the generated text alone on standard output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpaged.batch import ResultStream
from jaxpaged.batch.results import write_errors
from jaxpaged.cli.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", action="store_true",
        help="print the generated text alone, in the order of the input; rows go to --output FILE, if one is given",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """UsageError for flags that contradict `--text`, or each other."""
    if args.text and getattr(args, "detokenize", True) is False:
        raise UsageError("--text prints texts, and --no-detokenize leaves them empty: leave out one of the two")
    if args.prompt is not None and args.prompt_column is not None:
        raise UsageError("--prompt-column is for a file of --input, and --prompt is none: leave out one of the two")
    if args.quiet and args.verbose:
        raise UsageError("--quiet and --verbose contradict each other: leave out one of the two")


class PrintedTexts(ResultStream):
    """Prints the texts of rows, one behind the other as `order` has the indices of their lines; passes rows on."""

    def __init__(self, rows: ResultStream | None, order: Sequence[int]):
        self._rows = rows
        self._order = list(reversed(order))  # the next one last
        self._waiting: dict[int, list[str]] = {}

    def write(self, row: dict[str, Any], settings: Mapping[str, Any] | None = None) -> None:
        if self._rows is not None:
            self._rows.write(row, settings)
        elif row.get("error") is not None:
            print(f"jaxpaged: {row['error']['message']}", file=sys.stderr)
        self._waiting[row["index"]] = texts_of(row)
        with write_errors():
            while self._order and self._order[-1] in self._waiting:
                for text in self._waiting.pop(self._order.pop()):
                    sys.stdout.buffer.write(f"{text}\n".encode())
            sys.stdout.buffer.flush()

    def finish(self) -> None:
        if self._rows is not None:
            self._rows.finish()

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()


def texts_of(row: Mapping[str, Any]) -> list[str]:
    """Of every sample of a row, in either form; none of an error's."""
    if row.get("error") is not None:
        return []
    if "outputs" in row:
        return [sample["text"] for sample in row["outputs"]]
    choices = row["response"]["body"]["choices"]
    return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]
