"""The table of `jaxpaged compare`: a column a system, a row a figure, one table for each request rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpaged.looks.palette import PARTS
from jaxpaged.study.compare import Refusal, Result


class TableRow(NamedTuple):
    name: str
    value: Callable[[dict[str, Any]], float]  # of a result's summary
    form: str


def _rows() -> list[TableRow]:
    return [
        TableRow("generated tokens/s", lambda s: s["generated_tokens_per_second"], ",.1f"),
        TableRow("prompt + generated tokens/s", lambda s: s["processed_tokens_per_second"], ",.1f"),
        *(
            TableRow(f"latency {q}, s", lambda s, q=q: s["latency_seconds"][q], ".2f")
            for q in ("p50", "p90", "p99")
        ),
        TableRow("normalized latency, s/token", lambda s: s["normalized_latency_seconds"], ".4f"),
        TableRow("mean running sequences", lambda s: s["mean_running_sequences"], ".2f"),
        *(
            TableRow(f"{look.word}, %", lambda s, part=part: s["percent_of_pool"][part], ".1f")
            for part, look in PARTS.items()
        ),
        TableRow("pages copied", lambda s: s["copied_pages"], ",d"),
        TableRow("preemptions", lambda s: s["preemptions"], ",d"),
        TableRow("steps", lambda s: s["steps"], ",d"),
        TableRow("seconds", lambda s: s["seconds"], ".1f"),
    ]  # fmt: skip


def print_table(facts: dict[str, Any], results: list[Result], refusals: list[Refusal]) -> None:
    print(
        f"{facts['workload']}: {facts['requests']} requests, prompts of {facts['mean_prompt_len']:.0f} and outputs of "
        f"{facts['mean_output_len']:.0f} tokens on average, {facts['max_model_len']} together at most\n"
        f"{facts['model']} (weights {facts['weights']}, {facts['dtype']}) on {facts['device']}, JAX {facts['jax']}, "
        f"attention {', '.join(dict.fromkeys(result.attention for result in results))}\n"
        f"the same for all: pool of {facts['num_pages'] - 1} pages of {facts['page_size']} tokens "
        f"({facts['kv_bytes'] / 2**20:,.0f} MiB), prompts, output lengths, arrivals, seed {facts['seed']}, "
        f"at most {facts['max_num_seqs']} sequences"
    )
    for rate in dict.fromkeys(result.rate for result in results):
        print()
        _print_one([result for result in results if result.rate == rate])
    if refusals:
        print()
    for refusal in refusals:
        print(f"{refusal.system} did not run: {refusal.reason}")
    if len(results) > 1:
        equal, total = facts["requests_with_equal_tokens"], facts["requests"]
        print(f"\nThe tokens of {equal} of {total} requests are the same in all {len(results)} runs.")


def arrivals_name(result: Result) -> str:
    if result.rate is not None:
        return f"{result.rate:g} requests a second"
    return "arrivals of the file" if result.arrivals.any() else "all requests at once"


def _print_one(results: list[Result]) -> None:
    summaries = [result.summary() for result in results]
    widths = [max(len(result.system), 10) + 2 for result in results]
    print(
        f"{arrivals_name(results[0]):30}"
        + "".join(f"{r.system:>{width}}" for r, width in zip(results, widths, strict=True))
    )
    for row in _rows():
        cells = (f"{row.value(s):{width}{row.form}}" for s, width in zip(summaries, widths, strict=True))
        print(f"{row.name:30}" + "".join(cells))
