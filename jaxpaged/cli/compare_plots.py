"""The pictures of `jaxpaged compare`, for slides: where memory was, how many ran, how fast, and how long it took.

matplotlib is imported with this module. Steps last as long as they did: the horizontal axis is seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxpaged.cli.compare_table import arrivals_name
from jaxpaged.looks import style
from jaxpaged.looks.palette import MARKERS, PARTS, SYSTEMS
from jaxpaged.study.compare import Result


def draw(results: list[Result], directory: str | Path) -> list[Path]:
    """Write the pictures; one of memory and one of batches for each rate. Returns their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (size, paint) in pictures(results).items():
        paths.append(directory / f"{name}.png")
        style.draw(paths[-1], size, paint)
    return paths


def pictures(results: list[Result]) -> dict[str, tuple[tuple[float, float], Callable[[Figure], None]]]:
    """Name -> size in inches, and what draws it."""
    rates = list(dict.fromkeys(result.rate for result in results))
    found = {}
    for rate in rates:
        of_rate = [result for result in results if result.rate == rate]
        suffix = "" if len(rates) == 1 else "-burst" if rate is None else f"-{rate:g}"
        heights = {"memory": 1.3 + 1.5 * len(of_rate), "batch": 4.8, "throughput": 1.2 + 0.55 * len(of_rate)}
        paints = {"memory": paint_memory, "batch": paint_batch, "throughput": paint_throughput}
        for name, paint in paints.items():
            found[name + suffix] = (style.WIDTH, heights[name]), functools.partial(paint, of_rate)
    if sum(rate is not None for rate in rates) > 1:
        timed = [result for result in results if result.rate is not None]
        found["latency"] = (style.WIDTH, 4.8), functools.partial(paint_latency, timed)
    return found


def paint_memory(results: list[Result], figure: Figure) -> None:
    """Share of the pool in each category over time, one panel a system, all with the same axes."""
    panels = figure.subplots(len(results), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, result in zip(panels, results, strict=True):
        account = result.stats.memory
        shares = np.stack([100 * getattr(account, part) / account.num_slots for part in PARTS])
        times, stacked = timeline(result, shares, idle=[100.0 * (part == "free") for part in PARTS])
        looks = PARTS.values()
        axes.stackplot(times, stacked, colors=[look.colour for look in looks], labels=[look.word for look in looks],
                       linewidth=0)  # fmt: skip
        mean, steps = result.summary()["percent_of_pool"]["used"], result.averaged_steps_name
        axes.set_title(f"{result.system}: {mean:.0f} % {PARTS['used'].word} {steps}")
        axes.set(ylim=(0, 100), xlim=(0, max(one.seconds for one in results)), yticks=(0, 50, 100))
    figure.supylabel("% of the pool")
    panels[-1].set_xlabel(f"seconds ({arrivals_name(results[0])})")
    style.legend_below(figure, panels[0])


def paint_batch(results: list[Result], figure: Figure) -> None:
    """Sequences that run together, over time."""
    axes = figure.subplots()
    for result in results:
        times, running = timeline(result, result.stats.running[None], idle=[0])
        mean = result.summary()["mean_running_sequences"]
        axes.plot(times, running[0], color=SYSTEMS[result.system].colour, label=f"{result.system} (mean {mean:.1f})")
    axes.set(xlim=(0, None), ylim=(0, None), ylabel="running sequences", title="Batch size over time, same pool")
    axes.set_xlabel(f"seconds ({arrivals_name(results[0])})")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    style.grid(axes)
    style.legend_below(figure, axes, most_columns=2)


def paint_throughput(results: list[Result], figure: Figure) -> None:
    """Generated tokens a second, and how many times the slowest system's."""
    axes = figure.subplots()
    values = [result.generated_per_second for result in results]
    bars = axes.barh([result.system for result in results], values, height=0.7,
                     color=[SYSTEMS[result.system].colour for result in results])  # fmt: skip
    axes.bar_label(bars, [f" {value:,.0f}  ({value / min(values):.1f}x)" for value in values])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.2 * max(values)), title="Throughput, same pool; in brackets: of the slowest")
    axes.set_xlabel(f"generated tokens a second ({arrivals_name(results[0])})")


def paint_latency(results: list[Result], figure: Figure) -> None:
    """Normalized latency against the request rate, a line a system, as in Figure 12 of the vLLM paper."""
    axes = figure.subplots()
    for system in dict.fromkeys(result.system for result in results):
        points = sorted((r.rate or 0.0, r.normalized_latency) for r in results if r.system == system)
        plot_system(axes, system, *zip(*points, strict=True))
    axes.set(xlim=(0, None), ylim=(0, None), title="Latency against request rate, same pool")
    axes.set(xlabel="requests a second", ylabel="normalized latency, s/token")
    style.grid(axes, "both")
    style.legend_below(figure, axes, most_columns=4)


def plot_system(axes: Axes, system: str, xs: tuple[float, ...], ys: tuple[float, ...]) -> None:
    axes.plot(xs, ys, color=SYSTEMS[system].colour, marker=MARKERS[system], label=system)


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
