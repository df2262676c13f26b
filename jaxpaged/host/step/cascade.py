"""Cascade attention: which rows of a decode step read the same pages, planned from the block tables alone.

Samples and beams of one request name the same full pages at the start of their tables. The device reads such a run
once for all its rows, with their queries stacked, reads the rest of each row alone, and merges the parts by their
log-sum-exps. The plan follows the tree of the tables from its root: rows with the same first page form a node, whose
run ends where the first of them differs (or has no further full page); there the node splits into its children. Two
levels are followed: what a whole request has in common, then what some of its beams have.

The newest position of a row is never in a run, so every row reads at least one position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxpaged.host.step.step_plan import SearchRows
from jaxpaged.step_io import CascadeGroups, DecodeBatch

NUM_LEVELS = 2
#: A batch has room for a group for so many rows (few compiled shapes). With more, smaller groups, sharing hardly pays.
ROWS_PER_GROUP = 4
#: Bytes of keys and values of one layer that must not be read a second time for sharing to pay.
MIN_SAVED_BYTES = 32_768 * 4096


@dataclass(frozen=True)
class CascadeRule:
    """When sharing pays; `scripts/bench/attention.py --cascade` shows where that is on a device."""

    #: Reads saved, summed over the groups of a batch, (members - 1) * tokens of the run: below it, no row shares.
    min_saved_tokens: int = 32_768
    #: A group with a shorter run or with fewer members is dropped, and its rows read those pages otherwise.
    min_run_pages: int = 4
    min_members: int = 2

    def __post_init__(self) -> None:
        if self.min_members < 2 or self.min_run_pages < 1:
            raise ValueError(
                f"min_members={self.min_members}, min_run_pages={self.min_run_pages}; "
                "sharing needs at least 2 members and 1 page"
            )


def measured_rule(token_bytes: int) -> CascadeRule:
    """The rule for a layer that keeps so many bytes of keys and values a token.

    On an H100 a shared step costs 9 us a layer more than a plain one (gathering queries, merging every row), and gains
    20 us where 57,344 tokens of 4 KiB need not be read: less than memory's speed, since what several rows read is often
    still in the L2 cache. So it breaks even at 26,000 tokens; a fifth more is asked for.
    """
    return CascadeRule(min_saved_tokens=MIN_SAVED_BYTES // token_bytes)


@dataclass(frozen=True)
class Cascade:
    """How runs that rows share are read: at most `max_members` rows together, where the rule says that it pays."""

    max_members: int
    rule: CascadeRule = CascadeRule()


def plan_cascade(
    batch: DecodeBatch, page_size: int, cascade: Cascade, searches: Sequence[SearchRows] = ()
) -> DecodeBatch:
    """The batch with its runs planned that several rows share, or as it is where sharing does not pay.

    The beams of `searches` share their prompt alone: what some of them have in common behind it is not known to the
    steps that follow, for which this plan is good as long as the rows are the same.
    """
    inputs = batch.inputs
    capacity = len(inputs.context_lens) // ROWS_PER_GROUP
    lengths = inputs.context_lens.copy()
    for group, row, width, _ in searches:
        assert group.tables is not None, "this search has ended"
        most = group.tables.num_common * page_size + 1
        lengths[row : row + width] = np.minimum(lengths[row : row + width], most)
    groups = plan_groups(inputs.block_tables, lengths, page_size, cascade.max_members, cascade.rule)
    if groups is None or len(groups.num_pages) > capacity:
        return batch
    return batch._replace(inputs=inputs._replace(cascade_groups=pad_groups(groups, capacity)))


def empty_cascade(batch: DecodeBatch, cascade: Cascade) -> DecodeBatch | None:
    """The batch with padding groups alone: the same program as with any; None for batches that are never shared."""
    num_rows = len(batch.inputs.context_lens)
    if num_rows < ROWS_PER_GROUP:
        return None
    groups = CascadeGroups(
        members=np.empty((0, cascade.max_members), np.int32),
        first_pages=np.empty(0, np.int32),
        num_pages=np.empty(0, np.int32),
        own_starts=np.zeros(num_rows, np.int32),
        parts=np.full((NUM_LEVELS, num_rows), -1, np.int32),
    )
    groups = pad_groups(groups, num_rows // ROWS_PER_GROUP)
    return batch._replace(inputs=batch.inputs._replace(cascade_groups=groups))


def plan_groups(
    block_tables: np.ndarray, context_lens: np.ndarray, page_size: int, max_members: int, rule: CascadeRule
) -> CascadeGroups | None:
    """Groups for block_tables i32[B, P] and context_lens i32[B] (0 for padding rows); None where sharing does not pay.

    A run with more than `max_members` rows becomes several groups. There are never more than B groups.
    """
    num_rows = len(block_tables)
    sharable = np.maximum(context_lens - 1, 0) // page_size  # full pages in front of the newest position
    starts = np.zeros(num_rows, np.int64)  # page at which the row's next run starts: all pages before it are in groups
    ends = np.zeros(num_rows, np.int64)  # page at which the row's node splits
    nodes = np.zeros(num_rows, np.int64)  # rows of one node with one start have one number; -1: shares nothing more
    parts = np.full((NUM_LEVELS, num_rows), -1, np.int32)
    members, first_pages, num_pages = [], [], []
    num_groups = saved_pages = 0
    for level in range(NUM_LEVELS):
        rows, sizes = _children(block_tables, sharable, ends, nodes)
        nodes.fill(-1)
        if not len(rows):
            break
        ends[rows] = np.repeat(_run_ends(block_tables, sharable, rows, sizes), sizes)
        groups, columns = _split(sizes, max_members)
        counts = np.bincount(groups)
        heads = rows[columns == 0]  # the first member of each group
        lengths = ends[heads] - starts[heads]
        pays = (counts >= rule.min_members) & (lengths >= rule.min_run_pages)
        is_kept = pays[groups]
        kept, groups, columns = rows[is_kept], (np.cumsum(pays) - 1)[groups[is_kept]], columns[is_kept]
        table = np.full((np.count_nonzero(pays), max_members), -1, np.int32)
        table[groups, columns] = kept
        parts[level, kept] = (num_groups + groups) * max_members + columns
        members.append(table)
        first_pages.append(starts[heads[pays]])
        num_pages.append(lengths[pays])
        num_groups += len(table)
        saved_pages += int(((counts - 1) * lengths)[pays].sum())
        nodes[rows] = 2 * np.repeat(np.arange(len(sizes)), sizes) + is_kept
        starts[kept] = ends[kept]
    if num_groups == 0 or saved_pages * page_size < rule.min_saved_tokens:
        return None
    return CascadeGroups(
        members=np.concatenate(members),
        first_pages=np.concatenate(first_pages).astype(np.int32),
        num_pages=np.concatenate(num_pages).astype(np.int32),
        own_starts=(starts * page_size).astype(np.int32),
        parts=parts,
    )


def pad_groups(groups: CascadeGroups, num_groups: int) -> CascadeGroups:
    """The same plan with `num_groups` groups, so that few programs are compiled; padding groups read nothing."""
    padding = num_groups - len(groups.num_pages)
    assert padding >= 0, f"{len(groups.num_pages)} groups do not fit {num_groups}"
    return groups._replace(
        members=np.pad(groups.members, ((0, padding), (0, 0)), constant_values=-1),
        first_pages=np.pad(groups.first_pages, (0, padding)),
        num_pages=np.pad(groups.num_pages, (0, padding)),
    )


def _children(
    block_tables: np.ndarray, sharable: np.ndarray, ends: np.ndarray, nodes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Splits every node by the page at its end: the rows child by child, and the size of each child of two and more."""
    rows = np.flatnonzero((nodes >= 0) & (ends < sharable))
    keys = nodes[rows] << 32 | block_tables[rows, ends[rows]]
    order = np.argsort(keys, kind="stable")
    rows, keys = rows[order], keys[order]
    bounds = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1], [True]))) if len(rows) else np.zeros(1, int)
    sizes = np.diff(bounds)
    return rows[np.repeat(sizes > 1, sizes)], sizes[sizes > 1]


def _run_ends(block_tables: np.ndarray, sharable: np.ndarray, rows: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Where the rows of each child (laid out one child after the other) first differ or run out of full pages."""
    heads = np.cumsum(sizes) - sizes
    limits = np.minimum.reduceat(sharable[rows], heads)
    tables = block_tables[rows, : limits.max()]
    # If every row agrees with the row before it up to some page, all of them do.
    agrees = np.zeros((len(rows), tables.shape[1] + 1), bool)
    np.equal(tables[1:], tables[:-1], out=agrees[1:, :-1])
    agrees[heads, :-1] = True
    return np.minimum(limits, np.minimum.reduceat(agrees.argmin(axis=1), heads))


def _split(sizes: np.ndarray, max_members: int) -> tuple[np.ndarray, np.ndarray]:
    """For every row of nodes of these sizes: its group and its column there. A large node makes groups of like size."""
    num_groups = -(-sizes // max_members)
    row_sizes = np.repeat(sizes, sizes)
    ranks = np.arange(len(row_sizes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    groups = np.repeat(np.cumsum(num_groups) - num_groups, sizes) + ranks * np.repeat(num_groups, sizes) // row_sizes
    counts = np.bincount(groups)
    return groups, np.arange(len(groups)) - (np.cumsum(counts) - counts)[groups]
