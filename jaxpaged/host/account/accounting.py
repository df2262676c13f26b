"""What a run did, step by step: how full the pool was, how much of it was shared, and where the time went."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from jaxpaged.config import CacheConfig
from jaxpaged.host.account.memory_account import MemoryAccount, make_account
from jaxpaged.host.pages.beam_tables import BeamTables
from jaxpaged.host.pages.block_table import BlockTable
from jaxpaged.host.pages.swap import Swap
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.host.systems.roles import Hindsight

#: What is taken down a step; int32 holds them, since it holds every slot of a pool.
_SERIES = (
    "pages_used", "logical_pages", "running", "waiting", "batch_tokens", "used_slots", "requested_slots",
    "largest_free", "cached_pages", "is_short", "copied_pages", "swapped_out_pages", "swapped_in_pages",
)  # fmt: skip
#: What several engines did in sum.
_SUMS = (
    "num_requests", "num_prompt_tokens", "num_generated_tokens", "cached_tokens", "steps", "prefill_steps",
    "mixed_steps", "preemptions", "recomputed_tokens", "swaps_out", "swaps_in", "swapped_out_bytes",
    "swapped_in_bytes", "swap_overflows", "page_copies",
)  # fmt: skip


@dataclass
class RunStats:
    """One run of the engine. The arrays have one entry a step, taken when the step was planned."""

    num_pages: int  # usable pages of the pool
    page_size: int
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    cached_tokens: int = 0  # of the prompts, and of a shared prefix, found in pages that were known, so not computed
    steps: int = 0
    prefill_steps: int = 0  # that computed prompts
    mixed_steps: int = 0  # of these, those in which others decoded too
    preemptions: int = 0
    recomputed_tokens: int = 0  # prefilled again after preemptions that did not swap
    swaps_out: int = 0  # preemptions that kept the group's pages in host memory
    swaps_in: int = 0  # groups that came back from there
    swapped_out_bytes: int = 0
    swapped_in_bytes: int = 0
    swap_overflows: int = 0  # preemptions that would have swapped, but swap space was full
    page_copies: int = 0
    compilations: int = 0  # programs compiled during the run
    programs_read: int = 0  # compiled by an earlier process, and read from their files during the run
    #: "device": some step is on its way or runs; else "schedule": deciding, or "host": the rest; "total": their sum.
    #: Parts of "device" are "swap" and "recompute": the share that recomputed tokens have in the steps they are in.
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("schedule", "device", "host", "total", "swap", "recompute"), 0.0)
    )
    _series: dict[str, array] = field(default_factory=lambda: {name: array("i") for name in _SERIES})
    _times: tuple[array, array] = field(default_factory=lambda: (array("d"), array("d")))
    _pauses: list[int] = field(default_factory=list)
    _hindsight: Hindsight | None = None  # of the policy that made the plans
    _parts: list[RunStats] = field(default_factory=list)  # of several engines, those that this one adds up

    @classmethod
    def for_cache(cls, cache: CacheConfig) -> RunStats:
        return cls(num_pages=cache.num_usable_pages, page_size=cache.page_size)

    def with_others(self, others: list[RunStats]) -> RunStats:
        """This and what other engines did in the same run, as one: sums, and the steps of one engine behind those of
        the other. Seconds are those of the engine that took longest; programs, which each sees of all, likewise."""
        every = [self, *others]
        joined = RunStats(self.num_pages, self.page_size, _parts=every)
        for name in _SUMS:
            setattr(joined, name, sum(getattr(one, name) for one in every))
        for name in ("compilations", "programs_read"):
            setattr(joined, name, max(getattr(one, name) for one in every))
        joined.seconds = dict(max((one.seconds for one in every), key=lambda seconds: seconds["total"]))
        num_steps = 0
        for one in every:
            joined._pauses += [num_steps + step for step in one._pauses]
            num_steps += one.steps
            for times, theirs in zip(joined._times, one._times, strict=True):
                times.extend(theirs)
            for name, values in joined._series.items():
                values.extend(one._series[name])
        return joined

    @property
    def programs_made(self) -> int:
        """Programs that the run did not find ready, and waited for."""
        return self.compilations + self.programs_read

    @property
    def pages_used(self) -> np.ndarray:
        """Pages in use, i64[steps]; of a contiguous cache all that are reserved."""
        return np.array(self._series["pages_used"], np.int64)

    @property
    def logical_pages(self) -> np.ndarray:
        """Entries of the block tables of `running`: a page that three samples share counts three times, i64[steps].

        So many pages there would be without sharing; a prefix that the run holds is none of it.
        """
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
        """Tokens that the step computed, those of idle rows of a static batch included, i64[steps]."""
        return np.array(self._series["batch_tokens"], np.int64)

    @property
    def step_times(self) -> np.ndarray:
        """When each step began and ended, in seconds since the run began, f64[2, steps]; by a simulation's clock.

        Of those that have ended: while a run goes on, and where it was left, one more may be on its way.
        """
        return np.array(self._times, np.float64)

    @property
    def steps_after_pauses(self) -> np.ndarray:
        """Steps i64[pauses] before which the engine had nothing to do but to wait for the next arrival."""
        return np.unique(np.array(self._pauses, np.int64))

    @property
    def memory(self) -> MemoryAccount:
        """Where every token slot of the pool was at each step, in hindsight; while the run goes on, as far as it is."""
        series = {name: np.array(values, np.int64) for name, values in self._series.items()}
        return make_account(series, self.num_pages, self.page_size, self._final_slots())

    def _final_slots(self) -> np.ndarray | None:
        if self._parts:
            finals = [one._final_slots() for one in self._parts]
            known = [final for final in finals if final is not None]
            return np.concatenate(known) if len(known) == len(finals) else None
        return None if self._hindsight is None else self._hindsight.final_slots(self.steps)

    @property
    def cached_share(self) -> float:
        """Of the prompts' tokens, those that were found: `cached_tokens`."""
        return self.cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of the engine's time: what the caller does between results does not count."""
        return self.num_generated_tokens / self.seconds["total"] if self.seconds["total"] else 0.0

    @property
    def pool_used(self) -> float:
        """Share of the pool in use at the last step."""
        return self._series["pages_used"][-1] / self.num_pages if self.steps else 0.0

    def record(self, plan: StepPlan, scheduler: Scheduler, num_unqueued: int = 0) -> None:
        """Take down the state of the scheduler right after it made `plan`; `num_unqueued` more requests wait for it."""
        tables, allocator, policy = scheduler.tables, scheduler.allocator, scheduler.policy
        beams = scheduler.beam_tables
        claimed = sum([one.num_claimed for one in beams])
        num_used = allocator.num_used - claimed
        held = [*tables, *scheduler.prefix_tables]
        logical = sum([len(table.pages) - table.num_gone for table in tables])
        logical += sum([one.width * one.num_pages for one in beams])
        is_shared = bool(beams) or sum([len(table.pages) - table.num_gone for table in held]) > num_used
        num_decoded = plan.num_rows + plan.num_idle_rows
        entries = {
            "pages_used": num_used,
            "logical_pages": logical,
            "running": len(tables) + sum([one.width for one in beams]),
            "waiting": len(scheduler.waiting) + num_unqueued,
            "batch_tokens": sum([row.count for row in plan.rows]) if plan.is_prefill else num_decoded,
            "used_slots": self._num_filled(held, num_used) - sum([one.num_unfilled for one in beams])
            if is_shared
            else sum([table.num_slots - table.num_gone * self.page_size for table in held]),
            "requested_slots": policy.requested_slots - claimed * self.page_size,
            "largest_free": allocator.largest_free + claimed,
            "cached_pages": scheduler.num_cached_pages,
            "is_short": int(scheduler.is_short),
            "copied_pages": plan.num_copies,
            "swapped_out_pages": sum([len(one.page_ids) for one in plan.swaps if one.is_out]),
            "swapped_in_pages": sum([len(one.page_ids) for one in plan.swaps if not one.is_out]),
        }
        for name, value in entries.items():
            self._series[name].append(value)
        self._hindsight = policy.hindsight
        self.cached_tokens = scheduler.num_cached_tokens
        self._tick(1)
        self.prefill_steps += plan.is_prefill
        self.mixed_steps += plan.is_mixed
        self.preemptions += plan.num_preempted
        self.recomputed_tokens += plan.num_recomputed
        self.swap_overflows += plan.num_swap_overflows
        self.page_copies += plan.num_copies

    def add_tokens(self, plan: StepPlan) -> None:
        """What the step of `plan` chose has come."""
        self.num_generated_tokens += plan.num_choices - plan.num_trimmed

    def correct(self, ahead: list[BeamTables]) -> None:
        """Which beams of these searches go on in the step that was planned last is known now: what it copies, and which
        pages are not theirs any more."""
        copied, freed = sum(one.copies.shape[1] for one in ahead), sum(one.num_freed for one in ahead)
        slots = freed * self.page_size
        changes = {
            "copied_pages": copied, "pages_used": -freed, "largest_free": freed, "used_slots": -slots,
            "requested_slots": -slots,
        }  # fmt: skip
        for name, change in changes.items():
            self._series[name][-1] += change
        self.page_copies += copied

    def record_ahead(self, num_steps: int, num_rows: int, new_pages: np.ndarray, is_paged: bool) -> None:
        """Take down `num_steps` more decode steps like the last, in which `num_rows` sequences only grow.

        new_pages i64[num_steps]: pages that tables have more than at the last step, at each of them.
        """
        grown = np.arange(1, num_steps + 1)
        rise = {"logical_pages": new_pages, "used_slots": grown * num_rows}
        if is_paged:
            rise |= {
                "pages_used": new_pages, "requested_slots": new_pages * self.page_size, "largest_free": -new_pages,
            }  # fmt: skip
        is_once = ("copied_pages", "swapped_out_pages", "swapped_in_pages")  # done before the last step
        for name, values in self._series.items():
            last = 0 if name in is_once else values[-1]
            values.frombytes((np.full(num_steps, last) + rise.get(name, 0)).astype(np.int32).tobytes())
        self._tick(num_steps)
        self.num_generated_tokens += num_rows * num_steps

    def _tick(self, num_steps: int) -> None:
        if self._hindsight is not None:
            self._hindsight.tick(num_steps)
        self.steps += num_steps

    def _num_filled(self, tables: list[BlockTable], num_pages: int) -> int:
        """Slots of `num_pages` shared pages that are filled: all but the unfilled ends of last pages.

        Tables that share a last page see the same fill of it: whoever writes next gets a page of its own.
        """
        slots = {table.pages[-1]: table.num_slots for table in tables if table.num_slots % self.page_size}
        return num_pages * self.page_size - sum([-num_slots % self.page_size for num_slots in slots.values()])

    def add_seconds(self, schedule: float, device: float, step: float) -> None:
        self.seconds["schedule"] += schedule
        self.seconds["device"] += device
        self.seconds["host"] += step - schedule - device
        self.seconds["total"] += step

    def add_pause(self) -> None:
        """Nothing is there to run before the next step."""
        self._pauses.append(self.steps)

    def add_times(self, began: float, ended: float) -> None:
        """Of the latest step, in seconds since the run began."""
        for times, time in zip(self._times, (began, ended), strict=True):
            times.append(time)

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
