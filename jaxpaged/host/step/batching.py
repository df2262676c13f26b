"""Turns a plan into padded arrays whose sizes come from short lists, so that few programs are ever compiled.

Every distinct shape is one compiled step. Packed tokens cost arithmetic, so their list is powers of two. So is that of
decode rows while a step is bound by its weights; from 64 rows on, where each row costs, it has more sizes. Table width
costs only its upload and padded prefill rows little more, so those lists are sparse. So are those of mixed steps: rows
that decode cost little beside a chunk of a prompt, and how many tokens it has is chosen by these sizes (mixing.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.pages.block_table import PageCopy, num_pages_for
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.sampling_batch import make_sampling_inputs, with_groups
from jaxpaged.host.step.step_plan import PlanRow, SearchRows, StepPlan
from jaxpaged.step_io import (
    NULL_PAGE,
    DecodeBatch,
    DecodeInputs,
    MixedBatch,
    MixedInputs,
    PrefillBatch,
    PrefillInputs,
    StepBatch,
    of_row,
)

#: Entries of the narrowest block tables. For 256 rows these are 256 KB of an upload, which is on its way while the step
#: before runs; each further width would be as many programs again.
NARROWEST_TABLE = 256


class StepShape(NamedTuple):
    """The padded sizes of one step; `num_tokens` is None for a decode step, which has one a row.

    A mixed step has `num_rows` rows of one token, and beside them `num_prompts` rows with `num_tokens` in all.
    """

    num_rows: int
    table_width: int
    num_tokens: int | None = None
    num_prompts: int | None = None


@dataclass(frozen=True)
class Buckets:
    """The sizes to which batches are padded, ascending; the last of each list holds the largest batch there can be."""

    decode_rows: tuple[int, ...]
    prefill_rows: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    table_widths: tuple[int, ...]
    copies: tuple[int, ...]
    swaps: tuple[int, ...] = ()  # pages of one transfer to or from swap space; a swap is several, and none is padded
    mixed_rows: tuple[int, ...] = ()  # of one token, in a mixed step; none where there are no such steps
    mixed_tokens: tuple[int, ...] = ()  # of the other rows of a mixed step

    @classmethod
    def for_limits(cls, limits: EngineConfig, cache: CacheConfig, min_rows: int = 1) -> Buckets:
        """`min_rows`: of a decode step, where fewer would be no quicker."""
        widest = num_pages_for(limits.max_model_len, cache.page_size)
        return cls(
            decode_rows=_row_sizes(min_rows, limits.max_num_seqs),
            # Where beams run by the thousand, few prompts are still computed at a time.
            prefill_rows=_geometric(8, limits.max_num_seqs, 16 if limits.max_num_seqs > 1024 else limits.max_num_seqs),
            prefill_tokens=_geometric(64, limits.max_num_batched_tokens, 2),
            # Without a cache tables are empty, and tell nothing of how long sequences are; nor is there what to copy.
            table_widths=(widest,) if limits.kv_cache == "none" else _geometric(NARROWEST_TABLE, widest, 4),
            copies=() if limits.kv_cache == "none" else _geometric(8, limits.max_num_seqs, 8),
            swaps=_geometric(1, min(limits.preemption.transfer_pages, cache.num_usable_pages), 4)
            if limits.preemption.can_swap
            else (),
            mixed_rows=_geometric(8, limits.max_num_seqs, 8) if limits.can_mix_steps else (),
            mixed_tokens=_geometric(128, limits.max_num_batched_tokens, 4) if limits.can_mix_steps else (),
        )

    def shapes(self) -> list[StepShape]:
        """Every shape that a step can have, but for mixed ones."""
        decode = [StepShape(rows, width) for rows in self.decode_rows for width in self.table_widths]
        prefill = [
            StepShape(rows, width, tokens)
            for rows in self.prefill_rows
            for width in self.table_widths
            for tokens in self.prefill_tokens
        ]
        return decode + prefill

    def mixed_shapes(self) -> list[StepShape]:
        return [
            StepShape(rows, width, tokens, self.mixed_prompts(tokens))
            for rows in self.mixed_rows
            for width in self.table_widths
            for tokens in self.mixed_tokens
        ]

    def mixed_prompts(self, num_tokens: int) -> int:
        """Rows of prompts in a mixed step of so many tokens: all that there can be, or one for each 16 tokens, which is
        more than most prompts leave."""
        most = self.mixed_rows[-1]
        return most if num_tokens == self.mixed_tokens[-1] else min(most, num_tokens // 16)

    def shape_of(self, plan: StepPlan, features: SamplingFeatures) -> StepShape:
        rows = plan.rows
        tables = [len(row.sequence.table.pages) for row in rows]
        tables += [group.tables.num_pages for group, _, _, _ in plan.searches if group.tables is not None]
        width = fit(max(tables, default=0), self.table_widths)
        if not plan.is_prefill or _can_decode(plan, features):
            return StepShape(fit(len(rows) + plan.num_beams + plan.num_idle_rows, self.decode_rows), width)
        if plan.is_mixed:
            return self._mixed_shape(plan, width)
        # As many rows to sample from as table rows, so that one list serves both.
        num_rows = fit(max(len(rows), len(plan.samples)), self.prefill_rows)
        return StepShape(num_rows, width, fit(sum(row.count for row in rows), self.prefill_tokens))

    def _mixed_shape(self, plan: StepPlan, width: int) -> StepShape:
        counts = [row.count for row in plan.listed if row.count > 1]
        num_rows = fit(max(len(plan.listed) - len(counts), len(plan.samples)), self.mixed_rows)
        num_tokens = next(
            size for size in self.mixed_tokens if size >= sum(counts) and self.mixed_prompts(size) >= len(counts)
        )
        return StepShape(num_rows, width, num_tokens, self.mixed_prompts(num_tokens))


def _can_decode(plan: StepPlan, features: SamplingFeatures) -> bool:
    """Whether a decode step, which is faster, computes these prompts: one token a row, and row i chooses for sample i.

    Rows behind the last sample are prompts that go on in the next step: what a decode step chooses for them is unread.
    Not where decode steps merge the rows of beams: these would be first rows, one for all beams of a search.
    """
    return (
        features.num_prompt_logprobs is None
        and features.merged_widths is None
        and all(row.count == 1 for row in plan.rows)
        and all(sample.row == i for i, sample in enumerate(plan.samples))
    )


def _row_sizes(least: int, most: int) -> tuple[int, ...]:
    """1, 2, 4 to 64, then in steps of 32 to 256, of 64 to 512, of 128 to 1024 and so on; from `least` on."""
    sizes = [least]
    while sizes[-1] < most:
        last = sizes[-1]
        step = last if last < 64 else max(32, 1 << (last.bit_length() - 3))
        sizes.append(min(last + step, most))
    return tuple(sizes)


def _geometric(first: int, last: int, factor: int) -> tuple[int, ...]:
    sizes = [min(first, last)]
    while sizes[-1] < last:
        sizes.append(min(sizes[-1] * factor, last))
    return tuple(sizes)


def fit(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest listed size that holds `size`."""
    return next(listed for listed in sizes if listed >= size)


def split(size: int, sizes: tuple[int, ...]) -> list[int]:
    """Listed sizes, largest first, whose sum is `size`; 1 is listed."""
    parts: list[int] = []
    for listed in reversed(sizes):
        parts += [listed] * (size // listed)
        size %= listed
    return parts


def make_batch(
    plan: StepPlan, shape: StepShape, cache: CacheConfig, vocab_size: int, features: SamplingFeatures
) -> StepBatch:
    """The step's arrays; row i of the plan is row i of the arrays. An empty plan gives a step that does nothing."""
    rows, size = plan.rows, cache.page_size
    sampling = make_sampling_inputs(
        plan.samples, shape.num_rows, shape.table_width * size, vocab_size, features, plan.searches
    )
    if shape.num_prompts is not None:
        return MixedBatch(_mixed_inputs(plan, shape, size), sampling)
    tables = _block_tables(rows, shape.num_rows, shape.table_width)
    if shape.num_tokens is None:
        if features.merged_widths is not None:
            sampling = with_groups(sampling, plan, shape.num_rows, features)
        inputs = _decode_inputs(rows, tables, size)
        _add_searches(inputs, plan.searches, size)
        return DecodeBatch(inputs, sampling)
    inputs = _prefill_inputs(rows, shape.num_tokens, tables, size)
    last_tokens = inputs.query_starts + inputs.query_lens - 1
    inputs = inputs._replace(sample_from=_padded([last_tokens[s.row] for s in plan.samples], shape.num_rows))
    if features.num_prompt_logprobs is not None:
        inputs = inputs._replace(next_tokens=_padded(_concatenate_tokens(rows, 1), shape.num_tokens))
    return PrefillBatch(inputs, sampling)


def _mixed_inputs(plan: StepPlan, shape: StepShape, page_size: int) -> MixedInputs:
    """Rows of one token apart from the others, be they of sequences that decode or ends of prompts: kernels for many
    queries a row take several times as long for one."""
    assert shape.num_tokens is not None and shape.num_prompts is not None, f"{shape} is not of a mixed step"
    single = [row for row in plan.listed if row.count == 1]
    longer = [row for row in plan.listed if row.count > 1]
    decode = _decode_inputs(single, _block_tables(single, shape.num_rows, shape.table_width), page_size)
    tables = _block_tables(longer, shape.num_prompts, shape.table_width)
    prefill = _prefill_inputs(longer, shape.num_tokens, tables, page_size)
    last_tokens = iter((shape.num_rows + prefill.query_starts + prefill.query_lens - 1).tolist())
    ones = itertools.count()
    places = [next(ones if row.count == 1 else last_tokens) for row in plan.listed]
    sample_from = _padded([places[sample.row] for sample in plan.samples], shape.num_rows)
    return MixedInputs(decode, prefill._replace(sample_from=sample_from))


def _decode_inputs(rows: list[PlanRow], tables: np.ndarray, page_size: int) -> DecodeInputs:
    num_rows = len(tables)
    positions = np.array([row.start for row in rows], np.int32)
    slots = tables[np.arange(len(rows)), positions // page_size] * page_size + positions % page_size
    return DecodeInputs(
        tokens=_padded([_token_or_row(row) for row in rows], num_rows),
        positions=_padded(positions, num_rows),
        slot_mapping=_padded(slots, num_rows, NULL_PAGE * page_size),
        block_tables=tables,
        context_lens=_padded(positions + 1, num_rows),
    )


def _add_searches(inputs: DecodeInputs, searches: list[SearchRows], page_size: int) -> None:
    """Fill in the rows of searches whose beams are arrays."""
    for group, row, width, position in searches:
        rows, tables = slice(row, row + width), group.tables
        assert tables is not None and tables.num_in_flight == 1, "the tables of these beams are not known"
        inputs.tokens[rows] = group.beams[0].tokens[-1]
        inputs.positions[rows], inputs.context_lens[rows] = position, position + 1
        inputs.block_tables[rows, : tables.num_pages] = tables.pages
        inputs.slot_mapping[rows] = tables.pages[:, position // page_size] * page_size + position % page_size


def _token_or_row(row: PlanRow) -> int:
    """The token that the row computes; where the step in flight is to choose it, the row of that step's outputs."""
    sequence = row.sequence
    return sequence.token_ids[row.start] if row.start < len(sequence.token_ids) else of_row(sequence.pending_row)


def _prefill_inputs(rows: list[PlanRow], num_tokens: int, tables: np.ndarray, page_size: int) -> PrefillInputs:
    """Without what is sampled from."""
    num_rows = len(tables)
    counts = np.array([row.count for row in rows], np.int32)
    ends = np.cumsum(counts, dtype=np.int32)
    row_of_token = np.repeat(np.arange(len(rows)), counts)
    first = np.array([row.start for row in rows], np.int32) - (ends - counts)  # position of the packed array's start
    positions = np.arange(len(row_of_token), dtype=np.int32) + first[row_of_token]
    slots = tables[row_of_token, positions // page_size] * page_size + positions % page_size
    return PrefillInputs(
        tokens=_padded(_concatenate_tokens(rows, 0), num_tokens),
        positions=_padded(positions, num_tokens),
        slot_mapping=_padded(slots, num_tokens, NULL_PAGE * page_size),
        block_tables=tables,
        query_starts=_padded(ends - counts, num_rows),
        query_lens=_padded(counts, num_rows),
        context_lens=_padded([row.start + row.count for row in rows], num_rows),
        sample_from=None,
    )


def with_copies(batch: DecodeBatch, copies: SequenceOf[PageCopy]) -> DecodeBatch:
    """The batch with a list of copies, at most one a row, for its step to begin with."""
    padded = _padded_copies(copies, len(batch.inputs.tokens))
    return batch._replace(inputs=batch.inputs._replace(copies=padded))


def make_copies(copies: SequenceOf[PageCopy], buckets: Buckets) -> Iterator[np.ndarray]:
    """i32[2, C]: source and destination pages, for launches that do nothing but copy."""
    most = max(buckets.copies, default=1)
    for start in range(0, len(copies), most):
        part = copies[start : start + most]
        yield _padded_copies(part, fit(len(part), buckets.copies))


def _padded_copies(copies: SequenceOf[PageCopy], size: int) -> np.ndarray:
    """i32[2, size], padded with NULL_PAGE copied onto itself."""
    padded = np.full((2, size), NULL_PAGE, np.int32)
    if copies:
        padded[:, : len(copies)] = np.array(copies, np.int32).T
    return padded


def _block_tables(rows: list[PlanRow], num_rows: int, width: int) -> np.ndarray:
    tables = np.full((num_rows, width), NULL_PAGE, np.int32)
    if not rows:
        return tables
    pages = [row.sequence.table.pages for row in rows]
    lengths = np.fromiter(map(len, pages), np.intp, len(pages))
    entries = np.frombuffer(b"".join(pages), np.int32)  # many times quicker than filling row by row
    used = tables[: len(rows), : lengths.max()]
    if len(entries) == used.size:
        used[:] = entries.reshape(used.shape)
    else:
        used[np.arange(used.shape[1]) < lengths[:, None]] = entries
    return tables


def _concatenate_tokens(rows: list[PlanRow], shift: int) -> list[int]:
    """The rows' tokens, moved `shift` positions ahead; 0 where a sequence has no token there yet."""
    parts: list[int] = []
    for row in rows:
        tokens = row.sequence.token_ids[row.start + shift : row.start + row.count + shift]
        parts += tokens
        parts += [0] * (row.count - len(tokens))
    return parts


def _padded(values, size: int, fill: int = 0) -> np.ndarray:
    array = np.full(size, fill, np.int32)
    array[: len(values)] = values
    return array
