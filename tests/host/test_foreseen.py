"""The first decode step is foretold where lengths alone decide it, and is then the one that comes."""

from __future__ import annotations

import pytest
from scripted_device import make_group, make_search

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.step.batching import Buckets, StepShape
from jaxpaged.host.step.foreseen import first_decode_shape

LIMITS = EngineConfig(max_model_len=1600, max_num_seqs=8)
CACHE = CacheConfig(page_size=4, num_pages=401)
BUCKETS = Buckets.for_limits(LIMITS, CACHE)


def foretold(groups, limits=LIMITS):
    return first_decode_shape(groups, BUCKETS, limits, CACHE)


def late(group):
    group.arrival_time = 1.0
    return group


def test_a_row_for_each_sample_and_a_table_for_the_longest_prompt_and_its_token():
    assert BUCKETS.table_widths == (256, 400)
    assert foretold([make_group(5)]) == StepShape(1, 256)
    assert foretold([make_group(5), make_group(7, n=2)]) == StepShape(4, 256)
    assert foretold([make_group(1023)]) == StepShape(1, 256)
    assert foretold([make_group(1024)]) == StepShape(1, 400)


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [make_group(5, max_tokens=1)],  # ends with the token that its prompt gives
        [make_group(5, n=9)],  # not all together
        [make_group(400, n=4)],
        [make_group(5), late(make_group(5))],
        [make_search(5, 4, width=2)],
    ],
)
def test_what_depends_on_more_is_not_foretold(groups):
    assert foretold(groups) is None


def test_nor_is_it_for_other_systems_than_paging():
    assert foretold([make_group(5)], EngineConfig(1600, 8, kv_cache="contiguous-max")) is None
