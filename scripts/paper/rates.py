"""How many requests a second each way to keep KV memory sustains: figures 12, 14 and 16 of the vLLM paper, by replay.

The engine's scheduler runs the paper's workloads over the paper's pool; a step takes what steps like it took on the
device that the step times are of. Lengths and arrivals of one seed are the same for all systems and rates.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from figure import Figure, Row, bars_beside_paper
from verdict import at_least, within

from jaxpaged.config import CacheConfig, EngineConfig, PreemptionConfig
from jaxpaged.looks import palette
from jaxpaged.study.simulate import PAPER_POOL, Simulation, paper_limits
from jaxpaged.study.step_table import StepTable
from jaxpaged.study.workloads import Workload, make_workload

SYSTEMS = {name: kv_cache for kv_cache, name in palette.PAPER_NAMES.items()}
#: Seconds a token of normalized latency up to which a rate counts as sustained. The paper fixes none.
THRESHOLDS = (0.2, 0.5)
#: Rates of a sweep, as shares of that at which the queue diverges; beyond the last, each is a quarter more.
SHARES = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0, 1.05, 1.12, 1.25)
#: Samples or beams of the requests of figure 14.
WIDTH = 6
#: Tokens of the prefixes of figure 16 (one example, and five), and the paper's request rates over Orca's (Oracle).
PREFIXES = {80: 1.67, 341: 3.58}


class Kind(NamedTuple):
    """What every request asks for."""

    name: str = "greedy"  # whose step times
    samples: int = 1
    beams: int = 0


GREEDY, SAMPLES, BEAMS = Kind(), Kind("samples", samples=WIDTH), Kind("beams", beams=WIDTH)


def figure_12(seeds: range, requests: int, steps: StepTable) -> Figure:
    """Panel (a): OPT-13B on ShareGPT's lengths."""
    count = max(64, requests // 2)
    diverging: dict[str, list[float]] = {}
    sustained: dict[tuple[str, float], list[float]] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, kv_cache in SYSTEMS.items():
        for seed in seeds:
            diverging.setdefault(name, []).append(capacity(steps, kv_cache, "sharegpt", count, seed))
            curve = sweep(steps, kv_cache, "sharegpt", count, seed, diverging[name][-1])
            curves.setdefault(name, curve)
            for threshold in THRESHOLDS:
                sustained.setdefault((name, threshold), []).append(rate_at(curve, threshold))
    measures = {"queue diverges": diverging}
    for threshold in THRESHOLDS:
        measures[f"{threshold} s/token"] = {name: sustained[name, threshold] for name in SYSTEMS}
    rows = [Row(f"{name}: requests/s, {at}", rates[name]) for at, rates in measures.items() for name in SYSTEMS]
    claims = {
        "Orca (Oracle)": within(1.7, 2.7, better="more"),
        "Orca (Pow2)": None,
        "Orca (Max)": within(2.7, 8.0, better="more"),
        "static": at_least(22.0, note="the paper's most,"),
    }
    for at, rates in measures.items():
        for other, held in claims.items():
            rows.append(Row(f"paged / {other}, {at}", ratios(rates["paged"], rates[other]), None, held))

    def draw(canvas: Any) -> None:
        from jaxpaged.looks.style import grid, legend_below

        axes = canvas.subplots()
        for name, curve in curves.items():
            look, marker = palette.SYSTEMS[SYSTEMS[name]], palette.MARKERS[SYSTEMS[name]]
            axes.plot(*zip(*curve, strict=True), color=look.colour, marker=marker, label=name)
        for threshold in THRESHOLDS:
            axes.axhline(threshold, color=palette.PAPER.colour, linewidth=0.8, linestyle=":")
            axes.annotate(f"{threshold} s/token", (1.005, threshold), xycoords=("axes fraction", "data"), va="center",
                          fontsize=9.5, annotation_clip=False)  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="requests a second", ylabel="normalized latency, s/token", xlim=(0, None))
        axes.margins(x=0.1)
        grid(axes)
        legend_below(canvas, axes)

    method = (
        f"{described(steps)}; ShareGPT-like lengths, {count} requests at Poisson times, mean of latency / output "
        "length; the queue diverges above the rate at which one that is never empty is served; beyond that, latency "
        "grows with the number of requests (the paper's came for an hour). A pool as the paper's on a faster device: "
        "rates are not the paper's, ratios may be"
    )
    return Figure("Figure 12a: sustained request rates", method, rows, draw, device_of(steps))


def figure_14(seeds: range, requests: int, steps: StepTable) -> Figure:
    """Alpaca-like requests of one sample, of six, and of six beams, against Orca (Oracle)."""
    if not steps.copies or not steps.swaps:
        raise ValueError(
            "figure 14 copies and swaps pages, whose times are not in the file: step_times.py --parts moves"
        )
    count = {"1 sample": requests // 2, "6 samples": requests // 5, "6 beams": max(64, requests // 16)}
    kinds = {"1 sample": GREEDY, "6 samples": SAMPLES, "6 beams": BEAMS}
    rows: list[Row] = []
    gains: dict[str, list[float]] = {}
    for what, kind in kinds.items():
        rates = {
            system: [capacity(steps, kv_cache, "alpaca", count[what], seed, kind) for seed in seeds]
            for system, kv_cache in (("paged", "paged"), ("Oracle", "contiguous-oracle"))
        }
        rows += [Row(f"{what}: {system}, requests/s", values) for system, values in rates.items()]
        gains[what] = ratios(rates["paged"], rates["Oracle"])
    rows.append(Row("paged / Oracle, 1 sample", gains["1 sample"], 1.3, at_least(1.3)))
    rows.append(Row("paged / Oracle, 6 samples", gains["6 samples"]))
    rows.append(Row("paged / Oracle, 6 beams", gains["6 beams"], 2.3, at_least(2.3)))
    growth = [b / a for a, b in zip(gains["1 sample"], gains["6 beams"], strict=True)]
    rows.append(Row("gain with 6 beams / with 1 sample", growth, 1.77, at_least(1.77)))

    def draw(canvas: Any) -> None:
        draw_gains(canvas, gains, [1.3, None, 2.3])

    method = (
        f"{described(steps)}; Alpaca-like lengths, the rate at which a queue that is never empty is served; "
        f"{', '.join(f'{n} requests of {what}' for what, n in count.items())}. Beams are of random scores, which share "
        "more than those of a trained model; Oracle reserves for each sample, and copies a prompt or beam that forks"
    )
    return Figure("Figure 14: the gain grows with what is shared", method, rows, draw, device_of(steps))


def figure_16(seeds: range, requests: int, steps: StepTable) -> Figure:
    """Sentences to translate behind examples that all requests share, against Orca (Oracle), which computes and stores
    them for each request."""
    if not steps.copies:
        raise ValueError("figure 16 copies pages, whose times are not in the file: step_times.py --parts moves")
    rows: list[Row] = []
    gains: dict[int, list[float]] = {}
    shared: dict[int, list[float]] = {}
    for prefix_len in PREFIXES:
        systems = {
            "paged, shared": ("paged", prefix_len, 0),
            "paged, not shared": ("paged", 0, prefix_len),
            "Oracle": ("contiguous-oracle", 0, prefix_len),
        }
        rates = {
            system: [
                capacity(steps, kv_cache, "translation", requests, seed, longer_by=own_len, prefix_len=shared_len)
                for seed in seeds
            ]
            for system, (kv_cache, shared_len, own_len) in systems.items()
        }
        rows += [Row(f"prefix of {prefix_len}: {system}, requests/s", values) for system, values in rates.items()]
        gains[prefix_len] = ratios(rates["paged, shared"], rates["Oracle"])
        shared[prefix_len] = ratios(rates["paged, shared"], rates["paged, not shared"])
    for prefix_len, paper in PREFIXES.items():
        rows.append(Row(f"paged, shared / Oracle, prefix of {prefix_len}", gains[prefix_len], paper, at_least(paper)))
    for prefix_len, values in shared.items():
        rows.append(Row(f"paged, shared / not shared, prefix of {prefix_len}", values))

    def draw(canvas: Any) -> None:
        named = {f"prefix of {prefix_len} tokens": values for prefix_len, values in gains.items()}
        draw_gains(canvas, named, list(PREFIXES.values()))

    method = (
        f"{described(steps)}; {requests} requests of log-normal lengths (sigma 0.5), means of 30 tokens behind the "
        "prefix and 40 generated, the rate at which a queue that is never empty is served. The paper's model is "
        "LLaMA-13B, which takes as much KV a token as OPT-13B. Decode steps read the prefix for every request; times "
        f"of steps that read more than {most_read(steps):,} tokens are extrapolated. Prefill steps take what their new "
        "tokens take, whatever these read"
    )
    return Figure("Figure 16: a prefix that all requests share", method, rows, draw, device_of(steps))


def draw_gains(canvas: Any, gains: dict[str, list[float]], paper: list[float | None]) -> None:
    """How many times Orca's (Oracle) request rate paging sustains, beside the paper's figures."""
    from jaxpaged.looks.style import legend_below

    axes = canvas.subplots()
    colours = [palette.SYSTEMS["paged"].colour] * len(gains)
    bars_beside_paper(axes, list(gains), [float(np.mean(values)) for values in gains.values()], paper, colours)
    axes.set_ylabel(f"request rate, paged / {palette.PAPER_NAMES['contiguous-oracle']}")
    legend_below(canvas, axes)


def make_run(
    steps: StepTable,
    kv_cache: str,
    workload: Workload,
    kind: Kind = GREEDY,
    cache: CacheConfig = PAPER_POOL,
    seed: int = 0,
    max_model_len: int = 2048,
    least_rows: int = 1,
    prefix_len: int = 0,
) -> Simulation:
    """A run that takes its time from the table. Several sequences of one request are swapped, as in the paper."""
    preemption = None
    if max(kind.samples, kind.beams) > 1 and kv_cache == "paged":
        preemption = PreemptionConfig("swap", swap_pages=cache.num_usable_pages)
    limits: EngineConfig = paper_limits(
        kv_cache, max_model_len=max_model_len, max_num_seqs=steps.facts["max_num_seqs"],
        max_num_batched_tokens=steps.facts["max_num_batched_tokens"], preemption=preemption,
    )  # fmt: skip
    clock = steps.clock(limits, cache, kind.name, least_rows=least_rows)
    return Simulation(workload, cache, limits, kind.samples, kind.beams, seed, clock, prefix_len=prefix_len)


def capacity(
    steps: StepTable,
    kv_cache: str,
    lengths: str,
    requests: int,
    seed: int,
    kind: Kind = GREEDY,
    longer_by: int = 0,
    **options: Any,
) -> float:
    """Requests a second that are served while others wait, from when the first tenth has been.

    `longer_by`: tokens that every prompt has more than the workload's.
    """
    workload = make_workload(lengths, requests, seed)
    workload = workload._replace(prompt_lens=workload.prompt_lens + longer_by)
    simulation = make_run(steps, kv_cache, workload, kind, seed=seed, **options)
    stats = simulation.run()
    ended = np.sort(simulation.finished_times)
    waits = np.flatnonzero(stats.waiting)
    if not len(waits):
        raise ValueError(f"{requests} requests are too few to fill the pool: raise --requests")
    first, last = len(ended) // 10, int(np.searchsorted(ended, stats.step_times[1][waits[-1]], side="right"))
    if last - first < 10:
        raise ValueError(
            f"{requests} requests are too few: {last} have ended when none waits any more: raise --requests"
        )
    return (last - 1 - first) / float(ended[last - 1] - ended[first])


def latency(
    steps: StepTable, kv_cache: str, lengths: str, requests: int, seed: int, rate: float, **options: Any
) -> float:
    """Normalized: the mean over requests of seconds from arrival to the last token, by output tokens."""
    workload = make_workload(lengths, requests, seed, rate)
    simulation = make_run(steps, kv_cache, workload, seed=seed, **options)
    simulation.run()
    return float(((simulation.finished_times - workload.arrivals) / workload.output_lens).mean())


def sweep(
    steps: StepTable, kv_cache: str, lengths: str, requests: int, seed: int, diverging: float
) -> list[tuple[float, float]]:
    """(rate, normalized latency), the rates rising until the latency is above all thresholds."""
    curve: list[tuple[float, float]] = []
    share = 0.0
    while not curve or curve[-1][1] <= max(THRESHOLDS):
        share = SHARES[len(curve)] if len(curve) < len(SHARES) else share * 1.25
        rate = share * diverging
        curve.append((rate, latency(steps, kv_cache, lengths, requests, seed, rate)))
        if share > 100:
            raise ValueError(f"{requests} requests are too few to make a queue: raise --requests")
    return curve


def rate_at(curve: list[tuple[float, float]], threshold: float) -> float:
    """The rate at which the latency reaches the threshold, on lines over its logarithm; NaN where it is above it at
    the lowest rate."""
    rates, latencies = zip(*curve, strict=True)
    if latencies[0] > threshold:
        return math.nan
    above = next(i for i, value in enumerate(latencies) if value > threshold)
    return float(np.interp(np.log(threshold), np.log(latencies[above - 1 : above + 1]), rates[above - 1 : above + 1]))


def most_read(steps: StepTable) -> int:
    """Tokens of KV that a measured greedy decode step read at most."""
    return max(point["tokens"] for point in steps.points if (point["name"], point["step"]) == ("paged-16", "decode"))


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def device_of(steps: StepTable) -> str:
    return str(steps.facts.get("device"))


def described(steps: StepTable) -> str:
    text = f"a replay with step times of {steps.facts.get('model')} on {steps.facts.get('device')}"
    if missing := steps.facts.get("stand_ins"):
        text += f" (not measured, and taken for greedy steps over pages of 16: {', '.join(missing)})"
    return text
