"""The memory figures of the vLLM paper, 2, 13, 15 and half of 18b: no model, no accelerator, no step times."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from figure import Figure, Row

from jaxpaged.config import CacheConfig, EngineOptions, PreemptionConfig
from jaxpaged.host.account.memory_account import CATEGORIES
from jaxpaged.study.account_file import saturated_steps
from jaxpaged.study.simulate import PAPER_POOL, Simulation, paper_limits
from jaxpaged.study.workloads import make_workload

SYSTEMS = {
    "Orca (Max)": "contiguous-max", "Orca (Pow2)": "contiguous-pow2", "Orca (Oracle)": "contiguous-oracle",
    "paged": "paged",
}  # fmt: skip
COLOURS = dict(zip(CATEGORIES, ("#2a7f3f", "#e3a02f", "#c8503c", "#8c8c8c", "#bcd6c4", "#d9d9d9"), strict=True))


class Run(NamedTuple):
    """Means of one simulation over the steps in which requests wait, its first tenth left out."""

    shares: dict[str, float]  # per cent of the pool's token slots
    batch: float  # running requests
    saving: float  # per cent


@functools.cache
def simulate(
    kv_cache: str, workload: str, requests: int, seed: int, page_size: int = 16,
    watermark: float = EngineOptions.watermark, samples: int = 1, beams: int = 0,
) -> Run:  # fmt: skip
    slots = PAPER_POOL.num_usable_tokens
    cache = CacheConfig(page_size, slots // page_size + 1)
    # As in the paper, single sequences are computed again, and several of one request are swapped.
    preemption = PreemptionConfig("swap", swap_pages=cache.num_usable_pages) if max(samples, beams) > 1 else None
    limits = paper_limits(kv_cache, watermark=watermark, preemption=preemption)
    stats = Simulation(make_workload(workload, requests, seed), cache, limits, samples, beams, seed).run()
    steps, memory = saturated_steps(stats.waiting), stats.memory
    references = memory.logical_pages[steps] / memory.physical_pages[steps]
    sequences_each = max(samples, beams, 1)
    return Run(
        {name: 100 * share for name, share in memory.shares(steps).items()},
        float(stats.running[steps].mean()) / sequences_each,
        100 * float(1 - 1 / references.mean()),
    )


def figure_2(seeds: range, requests: int) -> Figure:
    paper = {
        "Orca (Max)": (20.4, 13.3, 57.3, 8.9), "Orca (Pow2)": (26.8, 17.9, 13.6, 41.6),
        "Orca (Oracle)": (38.2, 25.2, 0.0, 36.6), "paged": (96.3, None, None, None),
    }  # fmt: skip
    rows, bars = [], {}
    for name, kv_cache in SYSTEMS.items():
        runs = [simulate(kv_cache, "sharegpt", requests, seed) for seed in seeds]
        bars[name] = {part: float(np.mean([run.shares[part] for run in runs])) for part in CATEGORIES}
        used, reserved, internal, others = paper[name]
        rows.append(Row(f"{name}: token states", [r.shares["used"] for r in runs], used, used - 1.5, used + 1.5))
        rows.append(Row(f"{name}: reservation", [r.shares["reserved"] for r in runs], reserved))
        rows.append(Row(f"{name}: internal fragmentation", [r.shares["internal"] for r in runs], internal))
        external = [r.shares["rounding"] + r.shares["free"] for r in runs]
        rows.append(Row(f"{name}: external fragmentation and others", external, others))
        rows.append(Row(f"{name}:   of it powers of two and pages", [r.shares["rounding"] for r in runs]))
        rows.append(Row(f"{name}:   of it free", [r.shares["free"] for r in runs]))
    for title, options in (
        ("paged, watermark 0", dict(watermark=0.0)),
        ("paged, watermark 0, pages of 8", dict(watermark=0.0, page_size=8)),
    ):
        runs = [simulate("paged", "sharegpt", requests, seed, **options) for seed in seeds]
        rows.append(Row(f"{title}: token states", [run.shares["used"] for run in runs], None, 97.0))
        bars[title.replace(", ", ",\n")] = {
            part: float(np.mean([run.shares[part] for run in runs])) for part in CATEGORIES
        }

    def draw(axes: Any) -> None:
        bottom = np.zeros(len(bars))
        for part in CATEGORIES:
            height = np.array([bar[part] for bar in bars.values()])
            axes.bar(list(bars), height, bottom=bottom, label=part, color=COLOURS[part])
            bottom += height
        axes.set_ylabel("% of the pool's token slots")
        axes.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.1), fontsize="small", frameon=False)
        axes.tick_params(axis="x", labelsize="x-small")

    method = (
        f"ShareGPT-like lengths, {requests} requests in a full queue; % of the pool, mean over steps. Watermark 0: "
        "admission leaves free only what the next step takes; the paper has no figure for it, 97 is our own aim"
    )
    return Figure("Figure 2: where KV memory goes", method, rows, draw)


def figure_13(seeds: range, requests: int) -> Figure:
    paper = {"sharegpt": (7.00, 9.81, 13.62, 30.42), "alpaca": (7.00, 43.24, 72.75, 132.44)}
    rows: list[Row] = []
    for workload, batches in paper.items():
        ours: list[list[float]] = []
        for (name, kv_cache), batch in zip(SYSTEMS.items(), batches, strict=True):
            ours.append([simulate(kv_cache, workload, requests, seed).batch for seed in seeds])
            slack = 0.05 if workload == "sharegpt" else 0.2
            low, high = batch * (1 - slack), batch * (1 + slack)
            if kv_cache == "paged":
                low, high = 30.0 if workload == "sharegpt" else 1.8 * float(np.mean(ours[2])), None
            rows.append(Row(f"{workload}: {name}", ours[-1], batch, low, high))
        ratios = [paged / oracle for paged, oracle in zip(ours[3], ours[2], strict=True)]
        rows.append(Row(f"{workload}: paged / Oracle", ratios, batches[3] / batches[2], 2.2 if slack < 0.1 else 1.8))

    def draw(axes: Any) -> None:
        for offset, (title, values) in enumerate(
            {"ours": [r.mean for r in rows], "paper": [r.paper for r in rows]}.items()
        ):
            bars = [(i, v) for i, v in enumerate(values) if "/" not in rows[i].what]
            axes.bar([i + 0.4 * offset for i, _ in bars], [v for _, v in bars], width=0.38, label=title)
        axes.set_xticks([i + 0.2 for i, r in enumerate(rows) if "/" not in r.what])
        axes.set_xticklabels([r.what.replace(": ", "\n") for r in rows if "/" not in r.what], fontsize="x-small")
        axes.set_yscale("log")
        axes.set_ylabel("requests that run together")
        axes.legend()

    method = (
        f"{requests} requests in a full queue; the paper's arrived at 2 and 30 a second, which does not always fill "
        "the paged pool. Alpaca-like shapes were chosen near the paper's figures, so 20 % is asked of them"
    )
    return Figure("Figure 13: requests that run together", method, rows, draw)


def figure_15(seeds: range, requests: int) -> Figure:
    """Savings by sharing. Beams are of random scores, which share more than those of a trained model."""
    parallel, beam = {2: 6.09, 4: 8.53, 6: 9.79}, {2: 37.56, 4: 53.13, 6: 55.16}
    rows: list[Row] = []
    for width, saving in parallel.items():
        ours = [simulate("paged", "alpaca-lognormal", requests, s, samples=width).saving for s in seeds]
        rows.append(Row(f"alpaca: {width} samples", ours, saving, 0.8 * saving, 1.2 * saving))
    for width in parallel:
        ours = [simulate("paged", "sharegpt", requests // 4, s, samples=width).saving for s in seeds]
        rows.append(Row(f"sharegpt: {width} samples (paper: 16.2 to 30.5)", ours, None, 16.2, 30.5))
    for width, saving in beam.items():
        ours = [simulate("paged", "alpaca-lognormal", requests // 2, s, beams=width).saving for s in seeds]
        rows.append(Row(f"alpaca: {width} random beams", ours, saving, saving, saving + 12))
    for width in beam:
        ours = [simulate("paged", "sharegpt", requests // 16, s, beams=width).saving for s in seeds]
        rows.append(Row(f"sharegpt: {width} random beams (paper: 44.3 to 66.3)", ours, None, 44.3, 66.3 + 12))

    def draw(axes: Any) -> None:
        names = [row.what.split(" (")[0] for row in rows]
        axes.barh(names, [row.mean for row in rows], label="ours")
        known = [(i, row.paper) for i, row in enumerate(rows) if row.paper is not None]
        axes.plot([v for _, v in known], [i for i, _ in known], "k|", markersize=14, label="paper")
        axes.invert_yaxis()
        axes.set_xlabel("% of pages that sharing saves")
        axes.legend()

    method = (
        "1 - 1 / mean over steps of (logical / physical pages), queue full, groups that give way are swapped; "
        f"{requests} requests (ShareGPT-like a quarter, beams half and a sixteenth)"
    )
    return Figure("Figure 15: memory that sharing saves", method, rows, draw)


def figure_18b(seeds: range, requests: int) -> Figure:
    """The memory half: what larger pages cost. (What they gain in time needs a GPU.)"""
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    known: dict[int, float] = {1: 97.8, 8: 96.8, 16: 96.0, 32: 94.4, 64: 90.7, 128: 84.8, 256: 74.7}
    rows: list[Row] = []
    curves: dict[str, list[float]] = {}
    for workload in ("sharegpt", "alpaca"):
        for size in sizes:
            ours = [simulate("paged", workload, requests // 2, s, size).shares["used"] for s in seeds]
            expected = known.get(size) if workload == "sharegpt" else None
            limits = (None, None) if expected is None else (expected - 1.5, expected + 1.5)
            rows.append(Row(f"{workload}: pages of {size}", ours, expected, *limits))
            curves.setdefault(workload, []).append(rows[-1].mean)

    def draw(axes: Any) -> None:
        for workload, values in curves.items():
            axes.plot(sizes, values, "o-", label=workload)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("tokens in a page")
        axes.set_ylabel("token states, % of the pool")
        axes.legend()

    method = (
        f"{requests // 2} requests in a full queue over 15,728 slots, watermark 1 %; the column 'paper' is an "
        "independent simulation of the paper's policy, since the paper prints no memory for this figure"
    )
    return Figure("Figure 18b, memory half: page size", method, rows, draw)
