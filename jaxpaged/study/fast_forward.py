"""Many decode steps at once, where nothing happens in them but that sequences grow.

A simulated run spends nearly all of its steps so: no sequence ends, none is admitted, none gives way. Such a stretch is
carried out in one go, with the same result as step by step (a test holds that): the plan of its first step is made as
always, then all sequences grow by the steps that follow, and the plan is committed as if it were the last of them.

Why nobody is admitted in a stretch: the head of the queue was refused when the first step was planned. It needs a free
chunk, which only an end gives; or, paged, so many pages beyond those that the next step takes. What is free after the
next step only shrinks while all grow, so it is refused at every later step of the stretch too.
"""

from __future__ import annotations

import numpy as np

from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.pages.block_table import num_pages_for
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.host.systems.reservation import Paged


def num_quiet_steps(plan: StepPlan, scheduler: Scheduler) -> int:
    """Steps like this decode step that can follow it before its tokens are committed; 0 where it must stand alone.

    Only for requests that end by length. The last of these steps may be one in which sequences end.
    """
    if plan.is_prefill or not plan.samples or plan.num_preempted or any(group.beams for group in scheduler.running):
        return 0
    if scheduler.policy.window is not None:  # they give pages back, too
        return 0
    most = min(group.max_len - sequence.num_tokens for group, sequence, _ in plan.samples) - 1
    if most < 1 or not isinstance(scheduler.policy, Paged):
        return max(most, 0)
    free, size = scheduler.allocator.num_free, scheduler.cache.page_size
    if plan.num_rows * num_pages_for(most, size) <= free:
        return most
    growth = page_growth([row.sequence.table.num_slots for row in plan.rows], most, size)
    return int(np.searchsorted(growth, free, side="right"))


def page_growth(num_slots: list[int], num_steps: int, page_size: int) -> np.ndarray:
    """Pages i64[num_steps] that tables of these lengths have more after each of the steps, all growing by one."""
    # A table of s positions takes a page in the step that writes position s + step - 1, where that starts a page.
    takes = np.bincount(-np.array(num_slots) % page_size, minlength=page_size)
    return np.cumsum(np.resize(takes, num_steps))


def advance(plan: StepPlan, scheduler: Scheduler, stats: RunStats, num_steps: int, tokens: list[int]) -> None:
    """Let every row of the plan take `num_steps` more steps; `tokens[i]` is what row i chooses in each of them."""
    tables = scheduler.tables
    growth = page_growth([table.num_slots for table in tables], num_steps, scheduler.cache.page_size)
    copies = scheduler.policy.append(tables, [num_steps] * len(tables))
    assert not copies, "pages are shared in a stretch of steps, though all sequences have written"
    for row, token in zip(plan.rows, tokens, strict=True):
        sequence = row.sequence
        sequence.token_ids.extend([token] * num_steps)
        sequence.num_computed += num_steps
        sequence.num_once_computed = max(sequence.num_once_computed, sequence.num_computed)
    stats.record_ahead(num_steps, plan.num_rows, growth, isinstance(scheduler.policy, Paged))
