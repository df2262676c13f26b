"""Figure 18b of the vLLM paper, the half that is about time: latency over the size of a page, by replay."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from figure import Figure, Row
from memory import draw_over_page_sizes
from rates import capacity, described, device_of, latency
from verdict import within

from jaxpaged.config import CacheConfig
from jaxpaged.study.simulate import PAPER_POOL
from jaxpaged.study.step_table import StepTable

#: Of the rate at which the queue diverges with pages of 16.
SHARE = 0.9
#: What counts as as good as the best.
SLACK = 1.1


def figure_18b_time(seeds: range, requests: int, steps: StepTable) -> Figure:
    """The kernels take pages of 8 to 256 tokens; the paper's 1, 2 and 4 are not run."""
    sizes = measured_sizes(steps)
    if 16 not in sizes or len(sizes) < 2:
        raise ValueError("figure 18b-time needs step times of several page sizes: step_times.py --parts page-sizes")
    others = {p["rows"] for p in steps.points if p["name"] == f"paged-{max(sizes)}" and p["step"] == "decode"}
    options = {"least_rows": min(others)}
    count = max(64, requests // 2)
    good = {"sharegpt": (16, 32, 64, 128), "alpaca": (16, 32)}
    rows: list[Row] = []
    curves: dict[str, list[float]] = {}
    for workload, good_sizes in good.items():
        rates = [SHARE * capacity(steps, "paged", workload, count, seed, **options) for seed in seeds]
        times: dict[int, list[float]] = {}
        for size in sizes:
            cache = CacheConfig(size, PAPER_POOL.num_usable_tokens // size + 1)
            times[size] = [
                1e3 * latency(steps, "paged", workload, count, seed, rate, cache=cache, **options)
                for seed, rate in zip(seeds, rates, strict=True)
            ]
            rows.append(Row(f"{workload}: pages of {size}, ms/token", times[size]))
        best = [min(values) for values in zip(*times.values(), strict=True)]
        for size in sizes:
            note = "good" if size in good_sizes else "worse"
            held = within(None, SLACK, why="good in the paper")
            if size not in good_sizes:  # ShareGPT's shorter pages: the paper's are a little worse
                held = within(SLACK, None, why="worse in the paper") if workload == "alpaca" or size > 128 else None
            share = [value / least for value, least in zip(times[size], best, strict=True)]
            rows.append(Row(f"{workload}: pages of {size} / the best (paper: {note})", share, None, held))
        curves[workload] = [float(np.mean(times[size])) for size in sizes]

    def draw(canvas: Any) -> None:
        draw_over_page_sizes(canvas, sizes, curves, "normalized latency, ms/token")
        canvas.axes[0].set_ylim(bottom=0)

    method = (
        f"{described(steps)}; {count} requests at {SHARE:.0%} of the rate at which the queue diverges with pages of "
        f"16. Decode steps of each page size, prefill of pages of 16; batches count as of {min(others)} rows at least. "
        f"Good is within {SLACK - 1:.0%} of the best"
    )
    return Figure("Figure 18b, time half: page size", method, rows, draw, device_of(steps))


def measured_sizes(steps: StepTable) -> list[int]:
    found = (re.fullmatch(r"paged-(\d+)", name) for name in steps.names)
    return sorted(int(match[1]) for match in found if match)
