"""Reproduce a figure of the vLLM paper (Kwon et al. 2023), or Anyscale's of continuous batching.

    python scripts/paper/reproduce.py 2                     # where KV memory goes, in four systems
    python scripts/paper/reproduce.py 13 15 18b --plot docs
    python scripts/paper/reproduce.py 12 14 16 batching --step-times TIMES.json    # by scripts/bench/step_times.py
    python scripts/paper/reproduce.py validate --step-times TIMES.json
    python scripts/paper/reproduce.py 18a 19                # on a GPU

2, 13, 15, 18b   memory: lengths drawn from published distributions (jaxpaged/study/workloads.py) are replayed through
                 the engine's scheduler over the paper's pool of 983 pages of 16 tokens, outputs forced to their lengths
12, 14, 16, 18b-time, batching
                 speed, as replays: likewise, and each step takes what steps like it took on a device, so that arrivals,
                 latencies and rates are that device's (jaxpaged/study/step_table.py); needs --step-times
18a, 19          measured here, on a GPU: the paged kernel, and swapping against computing again
validate         whether replays take as long as runs of the engine that the step times came with

Prints the method and our figures beside the paper's, each with a verdict and the range that it is held to
(scripts/paper/verdict.py has the words); the same goes to a file of JSON, whose name is the last line, and --plot
writes one PNG a figure. Figures are means over seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batching as paper_batching
import kernels as paper_kernels
import memory as paper_memory
import pages as paper_pages
import rates as paper_rates
from figure import Figure, Row, check_plotting, plot, table
from validate import validate

from jaxpaged.study.report_file import report_path, write_report
from jaxpaged.study.step_table import StepTable

#: Name -> function of (seeds, requests). Another figure is another function.
FIGURES: dict[str, Callable[[range, int], Figure]] = {
    "2": paper_memory.figure_2, "13": paper_memory.figure_13, "15": paper_memory.figure_15,
    "18b": paper_memory.figure_18b, "18a": paper_kernels.figure_18a, "19": paper_kernels.figure_19,
}  # fmt: skip
#: Those that replay step times: name -> function of (seeds, requests, step times).
REPLAYS: dict[str, Callable[[range, int, StepTable], Figure]] = {
    "12": paper_rates.figure_12, "14": paper_rates.figure_14, "16": paper_rates.figure_16,
    "18b-time": paper_pages.figure_18b_time, "batching": paper_batching.figure_batching,
}  # fmt: skip
VALIDATE = "validate"
#: Whose step times the replays are to be: the paper's model.
MODEL = Path(__file__).parent.parent / "shapes" / "opt-13b"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*FIGURES, *REPLAYS, VALIDATE]
    parser.add_argument("figures", nargs="+", choices=names, metavar="FIGURE", help=", ".join(names))
    parser.add_argument("--seeds", type=int, default=4, help="runs that are averaged (default 4)")
    parser.add_argument("--requests", type=int, default=4000, help="requests of a run (default 4000)")
    parser.add_argument("--step-times", type=Path, metavar="FILE", help="what scripts/bench/step_times.py measured")
    parser.add_argument(
        "--stand-ins", action="store_true",
        help="dense steps, samples and beams that were not measured take what greedy paged steps take",
    )  # fmt: skip
    parser.add_argument("--model", type=Path, default=MODEL, help="whose step times they are (default shapes/opt-13b)")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write figure-NAME.png there; needs matplotlib")
    parser.add_argument("--json", type=report_path, metavar="FILE", help="of all figures (default: a temporary file)")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.requests < 64:
        parser.error("a figure takes at least 1 seed and 64 requests")
    if args.plot is not None:
        check_plotting(parser, args.plot)
    results, status = {}, 0
    try:
        steps = None if args.step_times is None else StepTable.read(args.step_times)
        if steps is not None and args.stand_ins:
            steps = steps.with_stand_ins()
        for name in args.figures:
            if name == VALIDATE:
                results[name] = validate(_needed(steps, name))
                status = max(status, int(results[name]["verdict"] != "agree"))
                continue
            figure = _make(name, range(args.seeds), args.requests, steps, args.model)
            print("\n".join(table(figure, args.seeds)), flush=True)
            results[name] = _report(figure)
            if args.plot is not None:
                plot(figure, args.plot / f"figure-{name}.png")
    except (ValueError, OSError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2
    write_report({"seeds": args.seeds, "requests": args.requests, "figures": results}, args.json, "reproduce")
    return status


def _report(figure: Figure) -> dict[str, Any]:
    facts = {"title": figure.full_title, "method": figure.method, "beside": figure.beside}
    return {**facts, "replayed_on": figure.replayed_on or None, "rows": [_values(row) for row in figure.rows]}


def _values(row: Row) -> dict[str, Any]:
    """A row for JSON, which has no NaN: a rate that no run reached is null."""
    ours, mean = ([None if math.isnan(value) else value for value in values] for values in (row.ours, [row.mean]))
    held = None if row.held is None else {**row.held._asdict(), "range": row.held.range}
    return {
        "what": row.what,
        "ours": ours,
        "mean": mean[0],
        "paper": row.paper,
        "held_to": held,
        "verdict": row.verdict,
    }


def _make(name: str, seeds: range, requests: int, steps: StepTable | None, model: Path) -> Figure:
    if name in FIGURES:
        return FIGURES[name](seeds, requests)
    from jaxpaged.checkpoint import open_checkpoint  # imports jax, which the memory figures need not wait for

    table = _needed(steps, name)
    table.check_model(open_checkpoint(model).config)
    return REPLAYS[name](seeds, requests, table)


def _needed(steps: StepTable | None, name: str) -> StepTable:
    if steps is None:
        raise ValueError(
            f"{name} replays a device's step times: give --step-times FILE, made by scripts/bench/step_times.py"
        )
    return steps


if __name__ == "__main__":
    sys.exit(main())
