"""Anyscale's figure of continuous batching (2023), by replay: naive static, static, continuous and paged.

1,000 prompts of 512 tokens at once, exponential outputs of mean 128 redrawn until at most a cap. Every system has the
paper's pool; dense ones as many rows of 512 tokens and the cap as it holds, which is more than Anyscale gave them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from figure import Figure, Row
from rates import described, device_of, make_run, ratios
from verdict import aim, at_least

from jaxpaged.config import num_dense_rows
from jaxpaged.looks import palette
from jaxpaged.study.simulate import PAPER_POOL
from jaxpaged.study.step_table import StepTable
from jaxpaged.study.workloads import Workload, make_workload

PROMPT_LEN, MEAN = 512, 128
CAPS = (32, 128, 512, 1536)
SYSTEMS = {
    "naive static": "dense-static-global", "static": "dense-static", "continuous, dense": "dense",
    "continuous, Orca (Max)": "contiguous-max", "paged": "paged",
}  # fmt: skip


def figure_batching(seeds: range, requests: int, steps: StepTable) -> Figure:
    count = max(64, requests // 4)
    rates: dict[tuple[str, int], list[float]] = {}
    bounds: dict[int, list[float]] = {}
    for cap in CAPS:
        for seed in seeds:
            workload = make_workload(f"exponential:{PROMPT_LEN}:{MEAN}:{cap}", count, seed, max_len=None)
            num_rows = num_dense_rows(PAPER_POOL, PROMPT_LEN + cap)
            bounds.setdefault(cap, []).append(row_bound(workload, num_rows))
            for name, kv_cache in SYSTEMS.items():
                simulation = make_run(steps, kv_cache, workload, max_model_len=PROMPT_LEN + cap)
                simulation.run()
                tokens = int(workload.prompt_lens.sum() + workload.output_lens.sum())
                rates.setdefault((name, cap), []).append(tokens / float(simulation.finished_times.max()))
    rows = [Row(f"cap {cap}: {name}, tokens/s", rates[name, cap]) for cap in CAPS for name in SYSTEMS]
    naive, dense_name = "naive static", "continuous, dense"
    for cap in CAPS:
        gains = {name: ratios(rates[name, cap], rates[naive, cap]) for name in SYSTEMS}
        of_bound = ratios(gains[dense_name], bounds[cap])
        is_widest = cap == CAPS[-1]
        rows += [
            _claim(f"cap {cap}: static / naive", gains["static"], 4.0 if is_widest else None),
            _claim(f"cap {cap}: continuous / naive", gains[dense_name], 8.0 if is_widest else None),
            Row(f"cap {cap}: bound of continuous / naive by rows", bounds[cap]),
            Row(f"cap {cap}: continuous, share of that bound", of_bound, None, aim(0.9)),
            _claim(f"cap {cap}: paged / naive", gains["paged"], 23.0 if is_widest else None),
            Row(f"cap {cap}: paged / continuous", ratios(rates["paged", cap], rates[dense_name, cap]), None, aim(2.0)),
        ]

    def draw(canvas: Any) -> None:
        from jaxpaged.looks.style import grid, legend_below

        axes = canvas.subplots()
        for name, kv_cache in SYSTEMS.items():
            axes.plot(CAPS, [float(np.mean(rates[name, cap])) for cap in CAPS], color=palette.SYSTEMS[kv_cache].colour,
                      marker=palette.MARKERS[kv_cache], label=name)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(CAPS, [f"{cap:,}" for cap in CAPS])
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set(xlabel="tokens of an output at most", ylabel="tokens a second, prompts included", ylim=(0, None))
        grid(axes)
        legend_below(canvas, axes)

    method = (
        f"{described(steps)}; {count} requests at once, prompt tokens count, as in Anyscale's harness. The bound "
        "counts decode steps of equally many rows; prefill, the same for all, keeps the measured ratio below it"
    )
    return Figure("Continuous batching (Anyscale 2023)", method, rows, draw, device_of(steps), beside="Anyscale")


def _claim(what: str, ours: list[float], claimed: float | None) -> Row:
    return Row(what, ours, claimed, None if claimed is None else at_least(claimed, note="Anyscale's"))


def row_bound(workload: Workload, num_rows: int) -> float:
    """Decode steps of naive static batches, by those in which every row is of use."""
    outputs = workload.output_lens
    naive = math.ceil(len(outputs) / num_rows) * int(outputs.max())
    return naive * num_rows / float(outputs.sum())
