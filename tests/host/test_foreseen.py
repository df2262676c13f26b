"""Steps are foretold as far as lengths decide them, and are then the ones that come."""

from __future__ import annotations

import random

import pytest
from scripted_device import make_group, make_scheduler, make_search, run_all

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.step.batching import Buckets, StepShape
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.foreseen import first_decode_shape, foreseen_shapes

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


@pytest.mark.parametrize("mixed_steps", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_every_step_but_the_first_was_foretold(seed, mixed_steps):
    rng = random.Random(seed)
    groups = [
        make_group(rng.randint(1, 60), rng.randint(1, 30), n=rng.choice((1, 1, 3))) for _ in range(rng.randint(1, 12))
    ]
    scheduler = make_scheduler(400, page_size=2, max_num_seqs=16, max_num_batched_tokens=64, mixed_steps=mixed_steps)
    buckets = Buckets.for_limits(scheduler.limits, scheduler.cache)
    shapes = foreseen_shapes(groups, buckets, scheduler.limits, scheduler.cache)
    _, plans = run_all(scheduler, groups)
    features = SamplingFeatures.of(groups, 1000)
    assert {buckets.shape_of(plan, features) for plan in plans[1:]} <= set(shapes)


def test_prompts_that_one_step_computes_come_no_second_time_and_one_request_decodes_in_one_row():
    assert foreseen([make_group(60), make_group(90)]) == [StepShape(2, 256), StepShape(1, 256)]
    assert foreseen([make_group(1500)]) == [StepShape(1, 400)]
    assert foreseen([]) == []


def foreseen(groups):
    return foreseen_shapes(groups, BUCKETS, LIMITS, CACHE)


@pytest.mark.parametrize("widths, rows", [([3], {4}), ([2, 2, 2], {2, 4, 8}), ([1, 4], {1, 2, 4, 8})])
def test_searches_come_and_go_whole(widths, rows):
    groups = [make_search(5, 4, width=width) for width in widths]
    shapes = foreseen_shapes(groups, BUCKETS, LIMITS, CACHE)
    assert {shape.num_rows for shape in shapes if shape.num_tokens is None} == rows
