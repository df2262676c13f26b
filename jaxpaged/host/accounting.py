"""What a run did, step by step: how full the pool was, how much of it was shared, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jaxpaged.config import CacheConfig
from jaxpaged.host.scheduler import Scheduler, StepPlan
from jaxpaged.host.swap import Swap


@dataclass
class RunStats:
    """One run of the engine. The arrays have one entry a step, taken when the step was planned."""

    num_pages: int  # usable pages of the pool
    page_size: int
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    steps: int = 0
    prefill_steps: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0  # prefilled again after preemptions that did not swap
    swaps_out: int = 0  # preemptions that kept the group's pages in host memory
    swaps_in: int = 0  # groups that came back from there
    swapped_out_bytes: int = 0
    swapped_in_bytes: int = 0
    swap_overflows: int = 0  # preemptions that would have swapped, but swap space was full
    page_copies: int = 0
    compilations: int = 0  # programs compiled during the run
    #: "schedule": deciding; "device": until the step's results are on the host; "host": the rest; "total": their sum.
    #: Parts of "device" are "swap" and "recompute": the share that recomputed tokens have in the steps they are in.
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("schedule", "device", "host", "total", "swap", "recompute"), 0.0)
    )
    _series: dict[str, list[int]] = field(
        default_factory=lambda: {
            name: [] for name in ("pages_used", "logical_pages", "running", "waiting", "batch_tokens")
        }
    )

    @classmethod
    def for_cache(cls, cache: CacheConfig) -> RunStats:
        return cls(num_pages=cache.num_usable_pages, page_size=cache.page_size)

    @property
    def pages_used(self) -> np.ndarray:
        """Physical pages in use, i64[steps]."""
        return np.array(self._series["pages_used"], np.int64)

    @property
    def logical_pages(self) -> np.ndarray:
        """Entries of all block tables: a page that three samples share counts three times, i64[steps]."""
        return np.array(self._series["logical_pages"], np.int64)

    @property
    def running(self) -> np.ndarray:
        """Sequences with pages, i64[steps]."""
        return np.array(self._series["running"], np.int64)

    @property
    def waiting(self) -> np.ndarray:
        """Requests that wait for admission, i64[steps]."""
        return np.array(self._series["waiting"], np.int64)

    @property
    def batch_tokens(self) -> np.ndarray:
        """Tokens that the step computed, i64[steps]."""
        return np.array(self._series["batch_tokens"], np.int64)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of the engine's time: what the caller does between results does not count."""
        return self.num_generated_tokens / self.seconds["total"] if self.seconds["total"] else 0.0

    @property
    def pool_used(self) -> float:
        """Share of the pool in use at the last step."""
        return self._series["pages_used"][-1] / self.num_pages if self.steps else 0.0

    def record(self, plan: StepPlan, scheduler: Scheduler) -> None:
        """Take down the state of the scheduler right after it made `plan`."""
        tables = [sequence.table for group in scheduler.running for sequence in group.unfinished]
        entries = {
            "pages_used": scheduler.allocator.num_used,
            "logical_pages": sum(len(table.pages) for table in tables),
            "running": len(tables),
            "waiting": len(scheduler.waiting),
            "batch_tokens": sum(row.count for row in plan.rows),
        }
        for name, value in entries.items():
            self._series[name].append(value)
        self.steps += 1
        self.prefill_steps += plan.is_prefill
        self.preemptions += plan.num_preempted
        self.recomputed_tokens += plan.num_recomputed
        self.swap_overflows += plan.num_swap_overflows
        self.page_copies += len(plan.copies)
        self.num_generated_tokens += len(plan.samples)

    def add_seconds(self, schedule: float, device: float, step: float) -> None:
        self.seconds["schedule"] += schedule
        self.seconds["device"] += device
        self.seconds["host"] += step - schedule - device
        self.seconds["total"] += step

    def add_swap(self, swap: Swap, num_bytes: int) -> None:
        if swap.is_out:
            self.swaps_out += 1
            self.swapped_out_bytes += num_bytes
        else:
            self.swaps_in += 1
            self.swapped_in_bytes += num_bytes

    def add_preemption_seconds(self, plan: StepPlan, swap: float, compute: float) -> None:
        if plan.swaps:
            self.seconds["swap"] += swap
        if plan.num_recomputed:
            self.seconds["recompute"] += compute * plan.num_recomputed / sum(row.count for row in plan.rows)
