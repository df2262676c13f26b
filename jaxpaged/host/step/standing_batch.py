"""The arrays of decode steps, kept from step to step while the batch stays the same: only what moves is touched.

Most decode steps have the rows of the step before, each one position further. Listing 256 rows anew, a column a
parameter, takes the host several times as long as moving them on. With beams among them, the device moves the tables
on: it knows which beams go on before the host does.
"""

from __future__ import annotations

import numpy as np

from jaxpaged.config import CacheConfig
from jaxpaged.host.step.batching import Buckets, fit, make_batch
from jaxpaged.host.step.constraint_batch import with_limits
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.sampling_batch import with_carried_beams, with_edits, without_history
from jaxpaged.host.step.step_plan import StepPlan
from jaxpaged.step_io import FREE_NODE, NULL_PAGE, DecodeBatch, StepBatch, of_row


class BatchMaker:
    """Makes the arrays of one plan after the other: those of `make_batch`, which they are tested against, but for the
    history of a batch that stays, which the device has.

    What it returns is good until it is called again.
    """

    def __init__(self, cache: CacheConfig, vocab_size: int):
        self._cache = cache
        self._vocab_size = vocab_size
        self._standing: _StandingBatch | None = None

    def make(self, plan: StepPlan, buckets: Buckets, features: SamplingFeatures) -> StepBatch:
        standing = self._standing
        if standing is not None and standing.goes_on_in(plan, features):
            standing.move(plan, buckets, self._vocab_size)
            return standing.batch
        shape = buckets.shape_of(plan, features)
        batch = make_batch(plan, shape, self._cache, self._vocab_size, features)
        self._standing = None
        # Beams that are sequences go on from one another's pages, and where the last page is full, nothing tells.
        has_beams = any(group.beams for group, _, _ in plan.samples)
        if isinstance(batch, DecodeBatch) and not plan.is_prefill and plan.num_choices and not has_beams:
            self._standing = _StandingBatch(batch, plan, self._cache, features)
        return batch


class _StandingBatch:
    def __init__(self, batch: DecodeBatch, plan: StepPlan, cache: CacheConfig, features: SamplingFeatures):
        self.batch = batch
        self._samples = plan.samples  # the scheduler's list, another one as soon as a sequence comes or goes
        self._num_idle_rows = plan.num_idle_rows
        self._searches = [(search.group, search.row) for search in plan.searches]
        self._features = features
        self._page_size, self._window = cache.page_size, cache.window
        self._rows = np.arange(plan.num_rows)
        self._rows_before = np.array([of_row(row) for row in range(plan.num_rows)], np.int32)
        self._longest = int(batch.inputs.positions.max())  # position of the longest row

    def goes_on_in(self, plan: StepPlan, features: SamplingFeatures) -> bool:
        """Whether the plan is this batch's next step, over tables that have grown at their ends alone."""
        return (
            plan.samples is self._samples
            and plan.num_idle_rows == self._num_idle_rows
            and not plan.copies
            and features == self._features
            and [(search.group, search.row) for search in plan.searches] == self._searches
            and (bool(self._searches) or self._num_pages(1) <= self.batch.inputs.block_tables.shape[1])
        )

    def _num_pages(self, ahead: int) -> int:
        """Of the longest table, so many steps ahead."""
        return (self._longest + ahead) // self._page_size + 1

    def move(self, plan: StepPlan, buckets: Buckets, vocab_size: int) -> None:
        """One position further."""
        if self._searches:
            self._move_with_beams(plan, buckets)
        else:
            self._move_tables()
        self._move_sampling(plan, vocab_size)

    def _move_with_beams(self, plan: StepPlan, buckets: Buckets) -> None:
        """The device has the tables, and knows which beams go on; it is told of the pages that begin."""
        self._longest += 1
        width = fit(self._num_pages(0), buckets.table_widths)
        self.batch = with_carried_beams(self.batch, width)
        inputs, rows = self.batch.inputs, self._rows
        inputs.tokens[: len(rows)] = self._rows_before
        inputs.positions[: len(rows)] += 1
        inputs.context_lens[: len(rows)] += 1
        begins = inputs.positions[: len(rows)] % self._page_size == 0
        for row in np.flatnonzero(begins[: len(self._samples)]).tolist():
            inputs.fresh_pages[row] = self._samples[row].sequence.table.pages[-1]
        for group, row, count, position in plan.searches:
            assert group.tables is not None and inputs.positions[row] == position, "a search is not where it was"
            if begins[row]:
                inputs.fresh_pages[row : row + count] = group.tables.fresh_pages

    def _move_tables(self) -> None:
        inputs, rows, size = self.batch.inputs, self._rows, self._page_size
        count = len(rows)
        self._longest += 1
        inputs.context_lens[:count] += 1
        positions = inputs.positions[:count]
        positions += 1
        columns, offsets = np.divmod(positions, size)
        for row in np.flatnonzero(offsets == 0).tolist():
            inputs.block_tables[row, columns[row]] = self._samples[row].sequence.table.pages[-1]
        if self._window is not None:
            self._clear_gone(positions)
        inputs.slot_mapping[:count] = inputs.block_tables[rows, columns] * size + offsets
        if self._samples[0].sequence.num_pending:  # the step in flight is this batch's last one: row i is row i there
            inputs.tokens[:count] = self._rows_before
        else:
            inputs.tokens[:count] = [sample.sequence.token_ids[-1] for sample in self._samples]

    def _clear_gone(self, positions: np.ndarray) -> None:
        """Take the pages out that were given back for this step (window.py), at most one a row."""
        assert self._window is not None
        gone, offsets = np.divmod(positions - (self._window - 1), self._page_size)
        rows = np.flatnonzero((offsets == 0) & (gone > 0))
        self.batch.inputs.block_tables[rows, gone[rows] - 1] = NULL_PAGE

    def _move_sampling(self, plan: StepPlan, vocab_size: int) -> None:
        """Without beams among the samples, what a step has for beams stays as it is: padding."""
        features, sampling, count = self._features, self.batch.sampling, len(self._rows)
        if features.needs_seeds:
            sampling.positions[:count] += 1
        if features.needs_history:
            sampling.history_lens[:count] += 1
            self.batch = without_history(self.batch)
        if features.max_edits:
            num_rows = len(self.batch.inputs.tokens)
            sampling = with_edits(self.batch.sampling, self._samples, num_rows, features, plan.searches)
            self.batch = self.batch._replace(sampling=sampling)
        if self._searches and features.tries is not None:  # the device has all rows' nodes, as it has their tokens
            nodes = self.batch.sampling.nodes
            nodes[:count] = np.where(nodes[:count] == FREE_NODE, FREE_NODE, self._rows_before)
        elif features.tries is not None or features.has_masks:
            num_rows = len(self.batch.inputs.tokens)
            sampling = with_limits(self.batch.sampling, self._samples, num_rows, vocab_size, features)
            self.batch = self.batch._replace(sampling=sampling)
