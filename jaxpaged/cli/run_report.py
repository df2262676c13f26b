"""What a batch says while it runs, and at its end: a bar on a terminal, elsewhere a line every half a minute."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.outputs import RequestOutput
from jaxpaged.batch import BatchRequest
from jaxpaged.cli.json_log import JsonLines
from jaxpaged.requests.progress import ProgressBar

#: Between two lines.
SECONDS = 30.0
LOG_FORMATS = ("text", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing on standard error but what is wrong")
    parser.add_argument(
        "--log-format", choices=LOG_FORMATS, default="text",
        help="of what is said on standard error; with json, or where that is no terminal, a line every "
        f"{SECONDS:g} s says how far the run is (default text)",
    )  # fmt: skip


class RunReport:
    """Counts the rows of a batch; as a context manager around its run, shows how far it is.

    `stats` is of the run, and is asked whenever something is shown. `num_done` rows are there before; with
    `shares_terminal` the rows themselves are written to a terminal, into which no bar fits.
    """

    def __init__(
        self,
        num_rows: int,
        num_done: int,
        stats: Callable[[], Any],
        quiet: bool = False,
        shares_terminal: bool = False,
        interval: float = SECONDS,
    ):
        on_terminal = sys.stderr.isatty()
        self._is_shown = not quiet and not (on_terminal and shares_terminal)
        self._num_rows, self._num_done = num_rows, num_done
        self._num_finished, self._num_failed = 0, 0
        self._stats = stats
        self._interval = interval
        self._shared_pages = {"samples": 0, "beams": 0}  # of each request, the most that it saved at a time
        self._began, self._seconds = time.monotonic(), 0.0
        self._bar = ProgressBar(num_rows, stats, num_done, enabled=self._is_shown)
        self._ended = threading.Event()
        self._lines = None if on_terminal or not self._is_shown else threading.Thread(target=self._say_lines)

    def __enter__(self) -> RunReport:
        self._began = time.monotonic()
        self._bar.__enter__()
        if self._lines is not None:
            self._lines.daemon = True
            self._lines.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._seconds = time.monotonic() - self._began
        self._ended.set()
        self._bar.__exit__(*error)
        if self._lines is not None:
            self._lines.join()

    def add(self, request: BatchRequest, outputs: Sequence[RequestOutput], has_failed: bool) -> None:
        """A row more."""
        self._num_finished += 1
        self._num_failed += has_failed
        for params, output in zip(request.params, outputs, strict=True):
            kind = "beams" if isinstance(params, BeamSearchParams) else "samples"
            self._shared_pages[kind] += output.kv.pages_shared
        self._bar.update(self._num_finished)

    def say_summary(self, num_earlier: int, num_failed: int) -> None:
        """How the run was: of all rows, so many are of earlier runs, and so many, of these too, have an error."""
        if self._is_shown:
            _say("summary", self._summary(num_earlier, num_failed), summary_line)

    def _say_lines(self) -> None:
        while not self._ended.wait(self._interval):
            _say("progress", self._progress(), progress_line)

    def _progress(self) -> dict[str, Any]:
        seconds, run = time.monotonic() - self._began, self._stats()
        done = self._num_done + self._num_finished
        left = (self._num_rows - done) * seconds / self._num_finished if self._num_finished else None
        return {
            "done": done, "rows": self._num_rows, "failed": self._num_failed, "tokens": run.num_generated_tokens,
            "tokens_per_second": round(run.tokens_per_second, 1), "pool_used": round(run.pool_used, 4),
            "seconds": round(seconds, 1), "seconds_left": None if left is None else round(left, 1),
        }  # fmt: skip

    def _summary(self, num_earlier: int, num_failed: int) -> dict[str, Any]:
        run = self._stats()
        return {
            "rows": self._num_rows, "earlier": num_earlier, "failed": num_failed,
            "prompt_tokens": run.num_prompt_tokens, "tokens": run.num_generated_tokens,
            "tokens_per_second": round(run.tokens_per_second, 1), "seconds": round(self._seconds, 1),
            "preemptions": run.preemptions, "swapped": run.swaps_out, "recomputed_tokens": run.recomputed_tokens,
            "shared": {
                "cached_tokens": run.cached_tokens, "cached_share": round(run.cached_share, 4),
                **{f"{kind}_pages": pages for kind, pages in self._shared_pages.items()},
                "page_share": round(max(0.0, run.memory.mean_saving), 4),
            },
        }  # fmt: skip


def progress_line(values: dict[str, Any]) -> str:
    left = "unknown" if values["seconds_left"] is None else duration(values["seconds_left"])
    failed = f" ({values['failed']:,} failed)" if values["failed"] else ""
    return (
        f"{values['done']:,} of {_rows(values)}{failed}, {values['tokens_per_second']:,.0f} tokens/s, "
        f"pool {values['pool_used']:.0%}, {duration(values['seconds'])} gone, time left {left}"
    )


def summary_line(values: dict[str, Any]) -> str:
    earlier = f" ({values['earlier']:,} of them there before)" if values["earlier"] else ""
    swapped = f" ({values['swapped']:,} of them swapped)" if values["swapped"] else ""
    return (
        f"{_rows(values)}{earlier}, {values['failed']:,} failed; {values['tokens']:,} tokens in "
        f"{duration(values['seconds'])}, {values['tokens_per_second']:,.0f} tokens/s; "
        f"{values['preemptions']:,} preemptions{swapped}; shared: {_sharing(values['shared'])}"
    )


def _rows(values: dict[str, Any]) -> str:
    return f"{values['rows']:,} row{'' if values['rows'] == 1 else 's'}"


def _sharing(shared: dict[str, Any]) -> str:
    parts = []
    if shared["cached_tokens"]:
        tokens = f"{shared['cached_tokens']:,} tokens of prompts"
        parts.append(f"{tokens} ({shared['cached_share']:.0%}) by prefix caching")
    for kind in ("samples", "beams"):
        if pages := shared[f"{kind}_pages"]:
            parts.append(f"{pages:,} pages by {kind} of one prompt")
    if shared["page_share"]:
        parts.append(f"in all {shared['page_share']:.0%} of the pages that sequences read")
    return ", ".join(parts) or "nothing"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _say(event: str, values: dict[str, Any], in_words: Callable[[dict[str, Any]], str]) -> None:
    """On standard error, in one piece; a reader who went away does not end the run."""
    try:
        if isinstance(sys.stderr, JsonLines):
            sys.stderr.event(event, **values)
        else:
            sys.stderr.write(f"jaxpaged: {in_words(values)}\n")
            sys.stderr.flush()
    except OSError:
        pass
