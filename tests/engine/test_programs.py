"""Compiled programs: one for everything that computes the same, so many kept, and none that is not the right one."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import TOY, make_group, run_tokens, toy_params

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.config import CacheConfig, EngineConfig, PreemptionConfig
from jaxpaged.device import programs, steps
from jaxpaged.device.attention import REFERENCE
from jaxpaged.device.processors import what_they_compute
from jaxpaged.device.programs import PROGRAMS, Step, num_maps, reads_cache
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.lowering import step_to_make
from jaxpaged.engine.runner import StepRunner
from jaxpaged.host.step.batching import StepShape
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.step_io import DecodeBatch, DecodeInputs, SamplingInputs, pack

HAS_MAPS = pytest.mark.skipif(not programs.MAPS.exists(), reason="the system does not say which maps a process has")


@pytest.fixture
def store(monkeypatch):
    """A store of programs without any."""
    made = programs.Programs()
    monkeypatch.setattr(programs, "PROGRAMS", made)
    return made


@reads_cache
def scaled(cache, *, factor):
    return jnp.sort(cache * factor)


def run_each(step: Step, factors) -> list[float]:
    """In a run each; programs are of ever new factors."""
    found = []
    for factor in factors:
        programs.PROGRAMS.begin_run()
        found.append(float(step(jnp.ones(3), factor=factor)[0]))
    return found


def test_so_many_programs_are_kept_and_the_counter_goes_on(store):
    store.max_programs = 4
    assert run_each(scaled, range(12)) == list(range(12))
    assert len(store) <= 4
    assert store.num_made == 12
    run_each(scaled, [11, 0])
    assert store.num_made == 13


@HAS_MAPS
def test_the_maps_of_programs_that_go_are_given_back(store):
    store.max_programs = 4
    run_each(scaled, range(20, 26))
    before = num_maps()
    run_each(scaled, range(26, 56))
    assert num_maps() - before < 60  # 30 programs kept would have some 200


@HAS_MAPS
def test_programs_go_where_maps_run_short(store):
    store.max_maps = num_maps() + 60
    run_each(scaled, range(60, 90))
    assert 0 < len(store) < 20
    assert num_maps() < store.max_maps + 60


def test_all_may_be_given_back_and_are_made_again(store):
    run_each(scaled, [1, 2])
    store.give_back_all()
    assert len(store) == 0
    assert run_each(scaled, [2]) == [2] and store.num_made == 3


def test_what_the_run_in_progress_has_used_stays(store):
    store.max_programs = 2
    store.begin_run()
    for factor in (1, 2, 3, 4, 5):
        scaled(jnp.ones(3), factor=factor)
    for factor in (1, 2, 3, 4, 5):
        scaled(jnp.ones(3), factor=factor)
    assert store.num_made == 5
    run_each(scaled, [6])
    assert len(store) == 1


def test_pools_of_different_sizes_have_programs_of_their_own_which_go_too(store):
    store.max_programs = 4
    for size in range(1, 10):
        store.begin_run()
        assert scaled(jnp.ones(size), factor=2).shape == (size,)
    assert store.num_made == 9
    assert len(store) <= 4


def layout_of(history_len: int):
    zeros = np.zeros(2, np.int32)
    sampling = SamplingInputs(np.zeros((2, 2), np.int32), zeros, zeros, history=np.zeros((2, history_len), np.int32))
    return pack(DecodeBatch(DecodeInputs(zeros, zeros, zeros, np.zeros((2, 4), np.int32), zeros), sampling))[1]


def same(one, other, history_len=8) -> bool:
    first, second = (what_they_compute((f,), layout_of(history_len), TOY.vocab_size) for f in (one, other))
    return first == second


def adds(value):
    return lambda token_ids, num_tokens, logits: logits + value


def test_functions_made_anew_of_equal_values_compute_the_same():
    for value in (2.5, 7, np.arange(97, dtype=np.float32), jnp.arange(97, dtype=jnp.float32)):
        assert same(adds(value), adds(value))
    assert same(functools.partial(forbid, token=3), functools.partial(forbid, token=3))


def forbid(token_ids, num_tokens, logits, token):
    return logits.at[token].set(-jnp.inf)


def test_functions_of_other_values_do_not():
    assert not same(adds(2.5), adds(2.5000002))
    assert not same(adds(0.0), adds(-0.0))
    ones = np.ones(97, np.float32)
    assert not same(adds(ones), adds(ones + (np.arange(97) == 50)))
    assert not same(functools.partial(forbid, token=3), functools.partial(forbid, token=4))


def test_functions_that_differ_for_longer_histories_alone_differ_there():
    def short(token_ids, num_tokens, logits):
        return logits

    def long(token_ids, num_tokens, logits):
        return logits + 1 if len(token_ids) > 100 else logits

    assert same(short, long, history_len=8)
    assert not same(short, long, history_len=128)


def test_calls_into_python_are_the_same_only_if_the_function_is():
    def calls(function):
        shape = jax.ShapeDtypeStruct((97,), jnp.float32)
        return lambda _ids, _num, logits: jax.pure_callback(function, shape, logits, vmap_method="sequential")

    one, other = calls(lambda logits: logits + np.float32(1)), calls(lambda logits: logits - np.float32(1))
    assert same(one, one)
    assert not same(one, other)


def in_a_loop(function, shape):
    def call(logits):
        return jax.pure_callback(function, shape, logits, vmap_method="sequential")

    return lambda _ids, num, logits: jax.lax.cond(num > 3, lambda x: jax.lax.map(call, x[None])[0], call, logits)


def test_calls_into_python_are_compared_wherever_they_stand():
    def one(logits):
        return logits

    def other(logits):
        return -logits

    shape = jax.ShapeDtypeStruct((97,), jnp.float32)
    assert same(in_a_loop(one, shape), in_a_loop(one, shape))
    assert not same(in_a_loop(one, shape), in_a_loop(other, shape))


@pytest.mark.parametrize("result, given", [
    (lambda logits: logits[:1], r"float32\[1\]"), (lambda logits: logits.max(), r"float32\[\]"),
    (lambda logits: logits > 0, r"bool\[97\]"), (lambda logits: jax.lax.complex(logits, logits), r"complex64\[97\]"),
    (lambda logits: logits[:, None], r"float32\[97, 1\]"), (lambda logits: None, "None"),
    (lambda logits: (logits,), "ShapeDtypeStruct"),
])  # fmt: skip
def test_a_processor_that_does_not_return_the_logits_is_refused(result, given):
    with pytest.raises(ValueError, match=rf"logits_processors: .* returns .*{given}.* must return .*float32\[97\]"):
        what_they_compute((lambda _ids, _num, logits: result(logits),), layout_of(8), TOY.vocab_size)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
def test_a_processor_may_return_numbers_of_another_kind(dtype):
    what_they_compute((lambda _ids, _num, logits: logits.astype(dtype),), layout_of(8), TOY.vocab_size)


@pytest.fixture(scope="module")
def small():
    """An engine with one small program for each processor: it only prefills."""
    model = dataclasses.replace(TOY, num_layers=1)
    limits = EngineConfig(32, 1, 16, preemption=PreemptionConfig())
    return Engine(
        StepRunner(toy_params(model), model, CacheConfig(4, 16, "float32"), limits, REFERENCE, jax.devices()[0])
    )


def first_token(engine, processor) -> int:
    params = SamplingParams(temperature=0, max_tokens=1, logits_processors=[processor])
    return run_tokens(engine, [make_group([5, 6], params, max_model_len=32)])["0"][0][0]


def wants(*tokens):
    return lambda token_ids, num_tokens, logits: logits.at[jnp.array(tokens)].add(100.0)


def test_a_processor_made_anew_in_each_call_is_compiled_once(small):
    assert first_token(small, wants(11)) == 11
    for _ in range(5):
        assert first_token(small, wants(11)) == 11
        assert small.stats.programs_made == 0
    assert first_token(small, wants(12)) == 12
    assert small.stats.programs_made == 1


def test_what_a_processor_holds_may_change_between_runs(small):
    wanted = [21]

    def processor(token_ids, num_tokens, logits):
        return logits.at[wanted[0]].add(100.0)

    assert first_token(small, processor) == 21
    wanted[0] = 22
    assert first_token(small, processor) == 22


def decomposes(logits):
    return logits + jnp.linalg.cholesky(jnp.eye(2))[0, 1]  # 0, by a call of LAPACK


def test_what_a_processor_that_calls_other_code_holds_may_change_too(small):
    wanted = [21]

    def processor(token_ids, num_tokens, logits):
        return decomposes(logits).at[wanted[0]].add(100.0)

    assert first_token(small, processor) == 21
    wanted[0] = 22
    assert first_token(small, processor) == 22


def test_a_processor_that_calls_into_python_is_another_when_what_it_holds_has_changed():
    """Traced alone: XLA on a CPU may wait for ever for a function that it calls back."""
    functions, shift = [np.negative, np.positive], [0]

    def processor(token_ids, num_tokens, logits):
        called = jax.pure_callback(functions[0], logits, logits, vmap_method="expand_dims")
        return called + shift[0]

    def computes():
        return what_they_compute((processor,), layout_of(8), TOY.vocab_size)

    first = computes()
    assert computes() == first
    functions.reverse()
    other = computes()
    shift[0] = 1
    assert len({first, other, computes()}) == 3


class Wants:
    """Equal to all of its class, whatever it wants."""

    def __init__(self, token):
        self.token = token

    def __eq__(self, other):
        return isinstance(other, Wants)

    def __hash__(self):
        return 0

    def __call__(self, token_ids, num_tokens, logits):
        return logits.at[self.token].add(100.0)

    def method(self, token_ids, num_tokens, logits):
        return self(token_ids, num_tokens, logits)


def wanted_tokens(engine, processors) -> list[int]:
    """The first token of a request with each, in one run."""
    params = [SamplingParams(temperature=0, max_tokens=1, logits_processors=[one]) for one in processors]
    groups = [make_group([5, 6], one, str(i), max_model_len=32) for i, one in enumerate(params)]
    return [tokens[0][0] for _, tokens in sorted(run_tokens(engine, groups).items())]


def test_processors_that_call_themselves_equal_are_applied_each(small):
    assert wanted_tokens(small, [Wants(31), Wants(32)]) == [31, 32]
    one = Wants(33)
    assert wanted_tokens(small, [one, one, one.method, one.method]) == [33] * 4
    params = [SamplingParams(logits_processors=[given]) for given in (one, one, one.method, one.method)]
    features = SamplingFeatures.of([make_group([5, 6], given) for given in params], TOY.vocab_size)
    assert list(features.processors) == [one, one.method]


@pytest.mark.slow
@HAS_MAPS
def test_a_process_may_make_any_number_of_processors(small, monkeypatch):
    """By the system's own limit three quarters of them would be kept: a smaller one is as good."""
    monkeypatch.setattr(PROGRAMS, "max_maps", num_maps() + 5_000)
    before, compiled = num_maps(), steps.num_programs()
    for number in range(300):
        token, bonus = number % TOY.vocab_size, 100.0 + number
        assert first_token(small, lambda _ids, _num, logits, t=token, b=bonus: logits.at[t].add(b)) == token
        assert num_maps() < before + 6_000
    assert steps.num_programs() == compiled + 300


def test_what_layers_have_in_common_is_traced_once_a_program():
    """The loops over a context, which every layer has: a deeper model has no more of them."""
    for shape, loops in ((StepShape(4, 8), 1), (StepShape(4, 8, 16), 3)):
        assert [num_loops(shape, num_layers) for num_layers in (1, 5)] == [loops, loops]


def num_loops(shape: StepShape, num_layers: int) -> int:
    model = dataclasses.replace(TOY, num_layers=num_layers)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    cache = CacheConfig(4, 100, "float32")
    lowered = step_to_make(shape, model, "float32", cache, REFERENCE, SamplingFeatures(), sharding).lower()
    return lowered.as_text().count("stablehlo.while")
