"""The pictures of `jaxpaged compare`, for slides: where memory was, how many ran, how fast, and how long it took.

matplotlib is imported here alone, without a display. Steps last as long as they did: the horizontal axis is seconds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxpaged.cli.compare_table import CATEGORY_NAMES, arrivals_name
from jaxpaged.config import KV_CACHES
from jaxpaged.host.account.memory_account import CATEGORIES
from jaxpaged.study.compare import Result

#: Colours that stay apart in print and for the colour-blind (Okabe and Ito): what is used is strong, waste is pale.
CATEGORY_COLORS = {
    "used": "#0072B2",
    "reserved": "#56B4E9",
    "internal": "#E69F00",
    "rounding": "#F0D27A",
    "cached": "#C9DCCF",
    "free": "#E9E9E9",
}
SYSTEM_COLORS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7A5C3E", "#555555")
DPI = 110
FONT = {"title": 13, "label": 12, "tick": 11, "note": 10}


def draw(results: list[Result], directory: str | Path) -> list[Path]:
    """Write the pictures; one of memory and one of batches for each rate. Returns their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rates = list(dict.fromkeys(result.rate for result in results))
    pictures: dict[str, Figure] = {}
    for rate in rates:
        of_rate = [result for result in results if result.rate == rate]
        suffix = "" if len(rates) == 1 else "-burst" if rate is None else f"-{rate:g}"
        pictures[f"memory{suffix}"] = memory_figure(of_rate)
        pictures[f"batch{suffix}"] = batch_figure(of_rate)
        pictures[f"throughput{suffix}"] = throughput_figure(of_rate)
    if sum(rate is not None for rate in rates) > 1:
        pictures["latency"] = latency_figure([result for result in results if result.rate is not None])
    paths = []
    for name, figure in pictures.items():
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths


def memory_figure(results: list[Result]) -> Figure:
    """Share of the pool in each category over time, one panel a system, all with the same axes."""
    figure = _figure(9.5, 1.0 + 1.5 * len(results))
    panels = figure.subplots(len(results), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, result in zip(panels, results, strict=True):
        account = result.stats.memory
        shares = {name: 100 * getattr(account, name) / account.num_slots for name in CATEGORIES}
        times, stacked = timeline(result, np.stack(list(shares.values())), idle=[0, 0, 0, 0, 0, 100])
        axes.stackplot(times, stacked, colors=[CATEGORY_COLORS[name] for name in CATEGORIES], linewidth=0)
        mean, steps = result.summary()["percent_of_pool"]["used"], result.averaged_steps_name
        axes.set_title(f"{result.system}: {mean:.0f} % token states {steps}",
                       loc="left", fontsize=FONT["title"])  # fmt: skip
        axes.set(ylim=(0, 100), xlim=(0, max(one.seconds for one in results)), yticks=(0, 50, 100))
        _tidy(axes)
    figure.supylabel("% of the pool", fontsize=FONT["label"])
    panels[-1].set_xlabel(f"seconds ({arrivals_name(results[0])})", fontsize=FONT["label"])
    handles = panels[0].collections[: len(CATEGORIES)]
    figure.legend(handles, [CATEGORY_NAMES[name] for name in CATEGORIES], loc="outside lower center", ncols=6,
                  frameon=False, fontsize=FONT["note"])  # fmt: skip
    return figure


def batch_figure(results: list[Result]) -> Figure:
    """Sequences that run together, over time."""
    figure = _figure(9.5, 4.6)
    axes = figure.subplots()
    for result in results:
        times, running = timeline(result, result.stats.running[None], idle=[0])
        mean = result.summary()["mean_running_sequences"]
        axes.plot(times, running[0], color=_color(result.system), linewidth=1.8,
                  label=f"{result.system} (mean {mean:.1f})")  # fmt: skip
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.set_xlabel(f"seconds ({arrivals_name(results[0])})", fontsize=FONT["label"])
    axes.set_ylabel("running sequences", fontsize=FONT["label"])
    axes.set_title("Batch size over time, same pool", loc="left", fontsize=FONT["title"])
    axes.legend(frameon=False, fontsize=FONT["tick"])
    axes.grid(axis="y", alpha=0.3)
    _tidy(axes)
    return figure


def throughput_figure(results: list[Result]) -> Figure:
    """Generated tokens a second, and how many times the slowest system's."""
    figure = _figure(9.5, 0.9 + 0.6 * len(results))
    axes = figure.subplots()
    values = [result.generated_per_second for result in results]
    bars = axes.barh([result.system for result in results], values, height=0.7,
                     color=[_color(result.system) for result in results])  # fmt: skip
    labels = [f" {value:,.0f}  ({value / min(values):.1f}x)" for value in values]
    axes.bar_label(bars, labels, fontsize=FONT["tick"])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(values))
    axes.set_xlabel(f"generated tokens a second ({arrivals_name(results[0])})", fontsize=FONT["label"])
    axes.set_title("Throughput, same pool", loc="left", fontsize=FONT["title"])
    _tidy(axes)
    return figure


def latency_figure(results: list[Result]) -> Figure:
    """Normalized latency against the request rate, a line a system, as in Figure 12 of the vLLM paper."""
    figure = _figure(9.5, 4.6)
    axes = figure.subplots()
    for system in dict.fromkeys(result.system for result in results):
        points = sorted((r.rate or 0.0, r.normalized_latency) for r in results if r.system == system)
        axes.plot(*zip(*points, strict=True), color=_color(system), marker="o", linewidth=1.8, label=system)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.set_xlabel("requests a second", fontsize=FONT["label"])
    axes.set_ylabel("normalized latency, s/token", fontsize=FONT["label"])
    axes.set_title("Latency against request rate, same pool", loc="left", fontsize=FONT["title"])
    axes.legend(frameon=False, fontsize=FONT["tick"])
    axes.grid(alpha=0.3)
    _tidy(axes)
    return figure


def timeline(result: Result, values: np.ndarray, idle: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Corner points of a staircase: f64[points] seconds, f64[lines, points].

    values [lines, steps] hold from the beginning of their step to that of the next, or, where nothing was there to
    run in between, to its end; then, and behind the last step, the value is `idle`.
    """
    begins, ends = result.stats.step_times
    until = np.append(begins[1:], ends[-1])
    is_idle = np.isin(np.arange(1, len(ends) + 1), result.stats.steps_after_pauses)
    until = np.where(is_idle, ends, until)
    times = np.stack([begins, until], 1).ravel()
    lines = np.repeat(values.astype(np.float64), 2, axis=1)
    at = 2 * np.flatnonzero(is_idle) + 2  # points before which a pause of two corners goes
    pauses = np.repeat(np.array(idle, np.float64)[:, None], 2 * len(at), axis=1)
    lines = np.insert(lines, np.repeat(at, 2), pauses, axis=1)
    times = np.insert(times, np.repeat(at, 2), np.stack([ends[is_idle], begins[1:][is_idle[:-1]]], 1).ravel())
    return np.append(times, times[-1]), np.append(lines, np.array(idle, np.float64)[:, None], axis=1)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _color(system: str) -> str:
    """The same for a system in every picture, whichever others are there."""
    return SYSTEM_COLORS[KV_CACHES.index(system) % len(SYSTEM_COLORS)]


def _tidy(axes: Axes) -> None:
    axes.tick_params(labelsize=FONT["tick"])
    axes.spines[["top", "right"]].set_visible(False)
