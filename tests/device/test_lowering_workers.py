"""Workers that lower steps: the program is the one that this process would have made, and what fails costs nothing."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from toy import TOY, toy_params

from jaxpaged.config import CacheConfig
from jaxpaged.device import lowering_workers, steps
from jaxpaged.device.attention import REFERENCE
from jaxpaged.device.cache import make_paged_cache
from jaxpaged.device.lowering_workers import LoweringWorkers, Task, inlined
from jaxpaged.step_io import DecodeBatch, DecodeInputs, SamplingInputs, pack


@pytest.fixture(scope="module")
def crew():
    crew = lowering_workers._Crew(1)
    yield crew
    crew.end()


def a_step():
    """Arguments and static arguments of a decode step of four rows."""
    zeros = np.zeros(4, np.int32)
    tables = np.arange(4, dtype=np.int32).reshape(4, 1)
    batch = DecodeBatch(
        DecodeInputs(np.int32([1, 2, 3, 4]), zeros, tables[:, 0] * 4, tables, zeros + 1),
        SamplingInputs(np.zeros((4, 2), np.int32), zeros, zeros),
    )
    packed, layout = pack(batch)
    cache = make_paged_cache(TOY, CacheConfig(4, 6, "float32"))
    carried = steps.Carried(np.zeros(4, np.int32))
    static = dict(config=TOY, kernels=REFERENCE, layout=layout, layers=(0, TOY.num_layers))
    return (toy_params(), cache, None, carried, packed), static


def test_a_step_lowered_elsewhere_computes_the_same_in_place(crew):
    arguments, static = a_step()
    task = Task.of(steps.decode_layers.function, static, arguments)
    answer = crew.ask(task)
    step = inlined(answer, functools.partial(jax.jit, donate_argnums=1)).lower(*arguments).compile()
    results, cache = step(*arguments)
    assert all(pool.is_deleted() for pool in arguments[1].k)
    again, static = a_step()
    expected, expected_cache = steps.decode_layers(*again, **static)
    np.testing.assert_array_equal(results.columns, expected.columns)
    assert results.columns.sharding.memory_kind == expected.columns.sharding.memory_kind
    np.testing.assert_array_equal(results.carried.tokens, expected.carried.tokens)
    np.testing.assert_array_equal(cache.k[1], expected_cache.k[1])


def test_a_worker_that_fails_answers_nothing_nor_does_one_that_is_gone(crew):
    arguments, static = a_step()
    failing = Task.of(steps.decode_layers.function, static, arguments)._replace(function="no_such_step")
    own = lowering_workers._Crew(1)
    assert own.ask(failing) is None
    assert own.ask(Task.of(steps.decode_layers.function, static, arguments)) is None
    own.end()
    assert own.ask(failing) is None


def test_none_is_started_for_few_programs_nor_for_a_device_that_they_do_not_know():
    workers = LoweringWorkers()
    with workers.running(1), workers.running(100):  # this is a CPU
        assert workers._crew is None
        assert workers.lower(steps.decode_layers.function, {"kernels": REFERENCE}, (), jax.jit) is None
