"""The account of a run as a file: a row a step, as CSV, or as JSON where the name ends in .json."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxpaged.host.account.accounting import RunStats


def check_account_name(path: str | Path | None) -> None:
    """ValueError where the name does not say in which form the account is to be written; None: there is to be none."""
    if path is not None and Path(path).suffix not in (".csv", ".json"):
        raise ValueError(f"{path}: the account is written as .csv or .json; choose a name that ends so")


def write_account(stats: RunStats, path: str | Path) -> None:
    """Token slots by category, pages, sequences and requests at every step (`MemoryAccount` says what each is)."""
    columns = account_columns(stats)
    with open(path, "w", newline="", encoding="utf-8") as file:
        if Path(path).suffix == ".csv":
            writer = csv.writer(file)
            writer.writerow(["step", *columns])
            writer.writerows(zip(range(stats.steps), *(values.tolist() for values in columns.values()), strict=True))
        else:
            steps = {name: values.tolist() for name, values in columns.items()}
            json.dump({"summary": summarise(stats), "steps": steps}, file, allow_nan=False)


def account_columns(stats: RunStats) -> dict[str, np.ndarray]:
    others = {"running": stats.running, "waiting": stats.waiting, "batch_tokens": stats.batch_tokens}
    return {**stats.memory.columns(), **others}


def summarise(stats: RunStats, steps: np.ndarray | None = None) -> dict[str, Any]:
    """Means over `steps` (bool[steps]; all by default), in per cent of the pool's token slots, and the run's totals."""
    steps = np.ones(stats.steps, bool) if steps is None else steps
    if not steps.any():
        raise ValueError("no step to take a mean of")
    memory = stats.memory
    percent = {name: 100 * share for name, share in memory.shares(steps).items()}
    percent["external (rounding + cached + free)"] = percent["rounding"] + percent["cached"] + percent["free"]
    for name in ("stranded", "gaps"):
        percent[name] = 100 * float(getattr(memory, name)[steps].mean()) / memory.num_slots
    return {
        "pages": stats.num_pages,
        "page_size": stats.page_size,
        "steps": stats.steps,
        "steps_in_mean": int(steps.sum()),
        "percent_of_pool": {name: round(value, 3) for name, value in percent.items()},
        "mean_running_sequences": round(float(stats.running[steps].mean()), 3),
        "saving_percent": round(100 * memory.mean_saving, 3),
        "copied_pages": stats.page_copies,
        "preemptions": stats.preemptions,
        "recomputed_tokens": stats.recomputed_tokens,
        "cached_tokens": stats.cached_tokens,
        "swapped_out_pages": int(memory.swapped_out_pages.sum()),
        "swapped_in_pages": int(memory.swapped_in_pages.sum()),
    }


def saturated_steps(waiting: np.ndarray) -> np.ndarray:
    """bool[steps]: while requests wait, the first tenth of the run left out; all steps, where that leaves none."""
    steps = waiting > 0
    steps[: len(steps) // 10] = False
    return steps if steps.any() else np.ones(len(steps), bool)
