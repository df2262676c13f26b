from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.host.step.cascade import CascadeRule, pad_groups, plan_groups
from jaxpaged.step_io import NULL_PAGE, pack
from pallas_kernels.cascade_groups import CascadeGroups

#: Shares whatever can be shared.
ALWAYS = CascadeRule(min_saved_tokens=0, min_run_pages=1)


def plan(
    tables: list[list[int]], lens: list[int], max_members: int = 4, rule: CascadeRule = ALWAYS, page_size: int = 2
):
    padded = np.full((len(tables), max(map(len, tables))), NULL_PAGE, np.int32)
    for row, pages in zip(padded, tables, strict=True):
        row[: len(pages)] = pages
    return plan_groups(padded, np.array(lens, np.int32), page_size, max_members, rule)


def assert_plan(groups: CascadeGroups | None, **expected) -> None:
    assert groups is not None
    assert {name: array.tolist() for name, array in groups._asdict().items()} == expected


def test_samples_of_two_prompts_make_two_groups():
    assert_plan(
        plan([[1, 2, 5], [3, 4, 6], [1, 2, 7], [3, 4, 8]], [5, 5, 6, 6]),
        members=[[0, 2, -1, -1], [1, 3, -1, -1]],
        first_pages=[0, 0],
        num_pages=[2, 2],
        own_starts=[4, 4, 4, 4],
        parts=[[0, 4, 1, 5], [-1, -1, -1, -1]],
    )


def test_beams_with_common_history_make_a_second_level_where_the_prompt_ends():
    assert_plan(
        plan([[1, 2, 3, 4, 9], [1, 2, 3, 4, 10], [1, 2, 5, 6, 11], [1, 2, 7, 8, 12]], [9, 9, 9, 9]),
        members=[[0, 1, 2, 3], [0, 1, -1, -1]],
        first_pages=[0, 2],
        num_pages=[2, 2],
        own_starts=[8, 8, 4, 4],
        parts=[[0, 1, 2, 3], [4, 5, -1, -1]],
    )


def test_a_row_that_shares_nothing_and_a_padding_row_are_in_no_group():
    assert_plan(
        plan([[1, 2], [3, 4], [1, 5], []], [3, 3, 3, 0], max_members=2),
        members=[[0, 2]],
        first_pages=[0],
        num_pages=[1],
        own_starts=[2, 0, 2, 0],
        parts=[[0, -1, 1, -1], [-1, -1, -1, -1]],
    )


@pytest.mark.parametrize("length, own_start", [(4, 2), (5, 4)])
def test_the_newest_position_is_never_in_a_run_even_if_its_page_is_full(length: int, own_start: int):
    groups = plan([[1, 2, 3], [1, 2, 3]], [length, length])
    assert groups is not None
    assert groups.own_starts.tolist() == [own_start, own_start]


def test_a_short_row_limits_the_run_and_level_1_picks_up_the_rest():
    # Page 2 is common, but not full for row 0.
    assert_plan(
        plan([[1, 2], [1, 2, 3, 4], [1, 2, 3, 5]], [3, 8, 7], max_members=3),
        members=[[0, 1, 2], [1, 2, -1]],
        first_pages=[0, 1],
        num_pages=[1, 2],
        own_starts=[2, 6, 6],
        parts=[[0, 1, 2], [-1, 3, 4]],
    )


def test_a_run_that_is_too_short_is_read_with_the_next_level():
    # One page for all three is dropped; rows 1 and 2 have three pages in common, from the first page on.
    assert_plan(
        plan([[1, 2], [1, 3, 4, 5], [1, 3, 4, 6]], [3, 7, 7], rule=CascadeRule(0, min_run_pages=2)),
        members=[[1, 2, -1, -1]],
        first_pages=[0],
        num_pages=[3],
        own_starts=[0, 6, 6],
        parts=[[-1, -1, -1], [-1, 0, 1]],
    )


def test_the_same_page_behind_different_prefixes_is_not_shared():
    assert plan([[1, 7, 7], [2, 7, 7]], [6, 6]) is None


def test_more_members_than_fit_make_groups_of_like_size_with_the_same_run():
    assert_plan(
        plan([[1, 2 + row] for row in range(5)], [4] * 5, max_members=4),
        members=[[0, 1, 2, -1], [3, 4, -1, -1]],
        first_pages=[0, 0],
        num_pages=[1, 1],
        own_starts=[2] * 5,
        parts=[[0, 1, 2, 4, 5], [-1] * 5],
    )


def test_a_member_left_over_reads_alone():
    groups = plan([[1, 2], [1, 3], [1, 4]], [4, 4, 4], max_members=2)
    assert groups is not None
    assert groups.members.tolist() == [[0, 1]]
    assert groups.own_starts.tolist() == [2, 2, 0]


def test_sharing_must_save_enough_tokens_in_the_whole_batch():
    tables, lens = [[1, 2, 5], [1, 2, 6], [3, 4, 7], [3, 4, 8]], [5, 5, 5, 5]
    assert plan(tables, lens, rule=CascadeRule(8, 1)) is not None  # two groups save 4 tokens each
    assert plan(tables, lens, rule=CascadeRule(9, 1)) is None


def test_a_rule_without_sense_is_refused():
    with pytest.raises(ValueError, match="min_members=1"):
        CascadeRule(min_members=1)


def test_padding_groups_read_nothing_and_leave_the_plan_as_it_is():
    groups = plan([[1, 2], [1, 3]], [3, 3], max_members=2)
    assert groups is not None
    assert_plan(
        pad_groups(groups, 2),
        members=[[0, 1], [-1, -1]],
        first_pages=[0, 0],
        num_pages=[1, 0],
        own_starts=[2, 2],
        parts=[[0, 1], [-1, -1]],
    )
    assert all(array.dtype == np.int32 for array in pad_groups(groups, 2))
    pack(pad_groups(groups, 2))


@st.composite
def batches(draw) -> tuple[np.ndarray, np.ndarray]:
    """Tables over few page ids, many of them continuing a prefix of an earlier one, and any lengths that fit."""
    page = st.integers(1, 3)
    tables: list[list[int]] = []
    for _ in range(draw(st.integers(1, 9))):
        parent = draw(st.sampled_from(tables)) if tables else []
        kept = parent[: draw(st.integers(0, len(parent)))]
        tables.append((kept + draw(st.lists(page, max_size=5)))[:8])
    lens = [draw(st.integers(max(0, 3 * len(table) - 2), 3 * len(table))) for table in tables]
    padded = np.full((len(tables), 8), NULL_PAGE, np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded, np.array(lens, np.int32)


@given(batches(), st.integers(1, 5), st.integers(1, 3), st.integers(2, 3))
def test_every_row_reads_its_own_pages_exactly_once(batch, max_members: int, min_run_pages: int, min_members: int):
    tables, lens = batch
    groups = plan_groups(tables, lens, 3, max_members, CascadeRule(0, min_run_pages, min_members))
    if groups is None:
        return
    num_groups = len(groups.num_pages)
    assert groups.members.shape == (num_groups, max_members)
    assert 0 < num_groups <= len(tables)
    assert groups.num_pages.min() >= min_run_pages
    assert (groups.members >= 0).sum(axis=1).min() >= min_members
    for members, first, count in zip(groups.members, groups.first_pages, groups.num_pages, strict=True):
        runs = tables[members[members >= 0], first : first + count]
        assert (runs == runs[0]).all()
    for row, (table, length) in enumerate(zip(tables, lens, strict=True)):
        read: list[int] = []
        for part in groups.parts[:, row]:
            if part >= 0:
                group, column = divmod(int(part), max_members)
                assert groups.members[group, column] == row
                assert groups.first_pages[group] == len(read)
                read += table[len(read) : len(read) + groups.num_pages[group]].tolist()
        assert groups.own_starts[row] == len(read) * 3
        assert len(read) * 3 <= max(0, length - 1)
        read += table[len(read) : -(-length // 3)].tolist()
        assert read == table[: -(-length // 3)].tolist()
    assert (groups.members >= 0).sum() == (groups.parts >= 0).sum()


@given(batches())
def test_rows_with_the_same_full_first_page_share_it(batch):
    tables, lens = batch
    groups = plan_groups(tables, lens, 3, 16, ALWAYS)
    first_pages = tables[lens > 3, 0].tolist()
    sharing = sum(first_pages.count(page) > 1 for page in first_pages)
    assert (0 if groups is None else (groups.parts[0] >= 0).sum()) == sharing
