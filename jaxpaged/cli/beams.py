"""`jaxpaged beams`: one search as it runs, as a live tree on a terminal and a line a step elsewhere; then its result.

Whatever can be refused is refused before the model is loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.beam_snapshot import BeamSnapshot
from jaxpaged.api.outputs import RequestOutput
from jaxpaged.api.values import check_encodable
from jaxpaged.batch.requests import BEAM_NAMES
from jaxpaged.cli.beam_tree import TextOf, grow_branches, shown, tree_lines
from jaxpaged.cli.constraint_flags import CONSTRAINT_FLAGS, constraint_files, given_constraint
from jaxpaged.cli.errors import UsageError, usage_errors
from jaxpaged.cli.flags import BEAM_FLAGS, MODEL_FLAGS, MODEL_HELP, PROMPT_FLAGS, SAMPLING_FLAGS, add_flags, given
from jaxpaged.cli.output_files import Named, check_outputs
from jaxpaged.text.stream import decode_continuation

DEFAULT_WIDTH = 4
MAX_DELAY = 3600
PLOT_FORMATS = (".png", ".pdf", ".svg")
#: What flags of sampling mean for a search, where it is something else.
HELP = {
    "n": "hypotheses returned, best first (default: as many as beams)",
    "temperature": "of beams that are drawn, with --do-sample (default 1)",
    "stop": "a string that ends a beam; repeat for more",
    "stop_token_ids": "token ids that end a beam, as 1,2,3",
}
#: What this command shows is fixed, so it has no flags for log-probabilities of tokens.
SEARCH_FLAGS = (
    *BEAM_FLAGS,
    *(
        flag._replace(help=HELP.get(flag.name, flag.help))
        for flag in SAMPLING_FLAGS
        if flag.name in BEAM_NAMES and flag.name not in ("logprobs", "prompt_logprobs")
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--plot", metavar="FILE", help="draw the whole search: a .png, .pdf or .svg file")
    parser.add_argument("--delay", type=float, default=0.0, metavar="X", help="seconds to wait after each step")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of beams that are drawn (default 0)")
    add_flags(parser, "prompts", PROMPT_FLAGS)
    add_flags(parser, "search (4 beams, unless --beam-width says otherwise)", SEARCH_FLAGS)
    add_flags(parser, "what beams are to be: one of", CONSTRAINT_FLAGS)
    add_flags(parser, "model and memory", MODEL_FLAGS)


def run(args: argparse.Namespace, make_llm: Callable[..., Any]) -> int:
    with usage_errors():
        check_encodable(args.prompt, "--prompt: the text")
        asked = given(args, SEARCH_FLAGS) | given_constraint(args)
        params = BeamSearchParams(**{"beam_width": DEFAULT_WIDTH, "seed": args.seed, **asked})
        if not 0 <= args.delay <= MAX_DELAY:
            raise ValueError(f"--delay must be from 0 to {MAX_DELAY} seconds, got {args.delay}")
    if args.plot is not None:
        models = {"MODEL": args.model, "--tokenizer": getattr(args, "tokenizer", None)}
        check_plot(Path(args.plot), models, constraint_files(args))
    with usage_errors(kinds=(ValueError, OSError, RuntimeError)):
        llm = make_llm(model=args.model, seed=args.seed, **given(args, MODEL_FLAGS))
    with usage_errors():
        snapshots = llm.watch_beams(args.prompt, params, **given(args, PROMPT_FLAGS))
    text_of = _text_of(llm.tokenizer, llm.tokenizer.encode(args.prompt, **given(args, PROMPT_FLAGS)))
    history: list[BeamSnapshot] = []
    with _display(params, text_of) as show:
        for snapshot in snapshots:
            history.append(snapshot)
            show(snapshot)
            time.sleep(args.delay)
    output = history[-1].output
    assert output is not None, "the search did not end"
    if output.error is not None:
        print(f"jaxpaged: {output.error}", file=sys.stderr)
        return 1
    print("\n".join(result_lines(output, history)))
    if args.plot is not None:
        from jaxpaged.cli.beam_plot import plot_search  # imports matplotlib

        with usage_errors("cannot write the picture: ", (OSError,)):
            plot_search(history, params, args.prompt, text_of, Path(args.plot))
    return 0


def check_plot(path: Path, models: Named, inputs: Named | None = None) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot draws with matplotlib, which is not installed: pip install 'jaxpaged[plots]'")
    if path.suffix.lower() not in PLOT_FORMATS:
        raise UsageError(f"--plot {path}: name a file that ends in one of {', '.join(PLOT_FORMATS)}")
    with usage_errors():
        check_outputs({"--plot": path}, inputs, models)


def _text_of(tokenizer: Any, prompt_ids: list[int]) -> TextOf:
    def text_of(before: list[int], token_ids: list[int]) -> str:
        # What a branch leaves of a character is written with the branch that completes it.
        return decode_continuation(tokenizer, [*prompt_ids, *before], token_ids, False, is_finished=False)

    return text_of


@contextmanager
def _display(params: BeamSearchParams, text_of: TextOf) -> Iterator[Callable[[BeamSnapshot], None]]:
    """How a snapshot is shown while the search runs: drawn over the one before it, or as one line."""
    if not sys.stdout.isatty():
        yield lambda snapshot: print(headline(snapshot), flush=True)
        return
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=20, transient=True) as live:

        def show(snapshot: BeamSnapshot) -> None:
            lines = snapshot_lines(snapshot, params, text_of)
            live.update(Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines)), refresh=True)

        yield show


def headline(snapshot: BeamSnapshot) -> str:
    running = [beam for search in snapshot.searches for beam in search.running]
    finished = [beam for search in snapshot.searches for beam in search.finished]
    parts = [f"step {snapshot.step:3}: {len(running)} beams, {len(finished)} finished"]
    if running:
        best = max(beam.cumulative_logprob for beam in running)
        parts.append(f"best log-probability {best:.3f}")
        parts.append(f"pages {snapshot.pages} (without sharing {snapshot.logical_pages})")
    return ", ".join(parts)


def snapshot_lines(snapshot: BeamSnapshot, params: BeamSearchParams, text_of: TextOf) -> list[str]:
    """The running beams as a tree, with log-probability and score; below, what has finished."""
    lines = [headline(snapshot)]
    for number, search in enumerate(snapshot.searches, start=1):
        if len(snapshot.searches) > 1:
            lines.append(f"group {number}")
        labelled = []
        for rank, beam in enumerate(search.running, start=1):
            score = beam.cumulative_logprob / len(beam.token_ids) ** params.length_penalty
            labelled.append((beam.token_ids, f"#{rank} {beam.cumulative_logprob:.3f} ({score:.4f})"))
        lines += tree_lines(grow_branches(labelled), text_of)
        for beam in search.finished:
            text = shown(text_of([], beam.token_ids))
            lines.append(f"finished {beam.cumulative_logprob:.3f} ({beam.score:.4f}) {text}")
    return lines


def result_lines(output: RequestOutput, history: list[BeamSnapshot]) -> list[str]:
    lines = ["rank    score  log-prob.  tokens  ended   text"]
    for rank, beam in enumerate(output.outputs, start=1):
        lines.append(
            f"{rank:4} {beam.score:8.4f} {beam.cumulative_logprob:10.3f} {len(beam.token_ids):7}  "
            f"{beam.finish_reason:6}  {beam.text!r}"
        )
    kv = output.kv
    most = max(history, key=lambda snapshot: snapshot.logical_pages - snapshot.pages)
    lines.append(
        f"pages: {kv.pages_at_peak} at the peak, {kv.logical_pages_at_peak} without sharing; at step {most.step} the "
        f"beams shared {most.logical_pages - most.pages} of {most.logical_pages}; {kv.pages_copied} copied; "
        f"the prompt's {len(output.prompt_token_ids)} tokens were computed once"
    )
    return lines
