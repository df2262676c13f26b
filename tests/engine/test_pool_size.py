"""The pool fills what the weights and the largest step leave, both as measured; what cannot fit is refused."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from toy import TOY, toy_params

from jaxpaged.config import CacheConfig, EngineConfig, PreemptionConfig
from jaxpaged.device.attention import REFERENCE, AttentionKernels
from jaxpaged.engine import pool_size
from jaxpaged.engine.lowering import largest_steps
from jaxpaged.engine.pool_size import PoolSizer, coarse, transient_bytes

MIB = 1 << 20
LIMITS = EngineConfig(max_model_len=256, max_num_seqs=64, max_num_batched_tokens=256)


def make_sizer(memory: int, model=TOY, page_size=16, limits=LIMITS, kernels=REFERENCE, kv_dtype="float32"):
    return PoolSizer(model, "float32", kv_dtype, page_size, limits, kernels, jax.devices("cpu")[0], memory)


@pytest.fixture(scope="module")
def step_bytes():
    return make_sizer(MIB).measured_step_bytes()


@pytest.mark.slow
def test_what_a_step_takes_does_not_depend_on_the_size_of_the_pool():
    def transient(num_pages):
        cache = CacheConfig(16, num_pages, "float32")
        sizer = make_sizer(MIB)
        persistent = sizer.weight_bytes + num_pages * sizer.page_bytes
        programs = largest_steps(TOY, "float32", cache, LIMITS, REFERENCE, jax.devices("cpu")[0])
        return [transient_bytes(lowered.compile(), persistent) for lowered in programs]

    assert transient(100) == transient(10_000)


def test_pool_weights_and_step_fill_the_share_they_may_use(step_bytes):
    """64 sequences of 16 pages could use 1024; the memory is for fewer."""
    sizer = make_sizer(memory=step_bytes + 3 * MIB)
    num_pages = sizer.choose(toy_params()).num_pages
    assert num_pages < 64 * 16
    taken = num_pages * sizer.page_bytes + sizer.weight_bytes + step_bytes
    assert 0.95 * sizer.memory < taken <= sizer.memory


def test_a_few_pages_more_or_less_give_a_pool_of_the_same_size(step_bytes):
    """So that programs, of which the pool's shape is a part, are found again by the next process."""
    num_pages = make_sizer(step_bytes + 3 * MIB).choose(toy_params()).num_pages
    assert 512 <= num_pages < 1024 and num_pages % 8 == 0
    assert [coarse(pages) for pages in (2, 63, 127, 128, 129, 36_800, 36_864, 37_375)] == [
        2, 63, 127, 128, 128, 36_352, 36_864, 36_864
    ]  # fmt: skip
    assert all(coarse(pages) > 63 / 64 * pages for pages in range(2, 5000))


def test_what_an_earlier_process_has_measured_and_chosen_is_taken_again(step_bytes, monkeypatch):
    """The same size for a little less memory and for a little more, nothing compiled; another one for much more."""
    known = {}
    monkeypatch.setattr(pool_size, "recall", known.get)
    monkeypatch.setattr(pool_size, "remember", known.__setitem__)
    monkeypatch.setattr(PoolSizer, "_compiled_step_bytes", iter([step_bytes]).__next__)  # once, and never again

    def choose(extra_pages: int) -> int:
        memory = step_bytes + 3 * MIB + int(extra_pages * make_sizer(MIB).page_bytes / 0.995)
        return make_sizer(memory).choose(toy_params()).num_pages

    first = choose(0)
    assert [choose(extra) for extra in range(0, 12, 3)] == [first] * 4
    assert choose(100) > first + 90


def test_no_more_pages_than_sequences_can_use_and_nothing_is_compiled_to_know_it():
    unusable = AttentionKernels("none", pytest.fail, pytest.fail)
    assert make_sizer(memory=1 << 34, kernels=unusable).choose(toy_params()).num_pages == 64 * 16 + 1


def test_twice_as_many_fp8_pages_as_16_bit_ones_fit():
    fp8, half = (make_sizer(4 * MIB, kv_dtype=kv_dtype) for kv_dtype in ("float8_e4m3fn", "bfloat16"))
    assert (fp8.page_bytes, half.page_bytes) == (1024, 2048)
    assert fp8.weight_bytes == half.weight_bytes
    assert fp8._room(MIB, MIB) // 2 == half._room(MIB, MIB)


def test_the_generous_estimate_is_above_what_is_measured(step_bytes):
    assert step_bytes < make_sizer(MIB)._most_step_bytes()
    assert make_sizer(MIB)._least_step_bytes() < step_bytes


def test_a_transfer_of_swapped_pages_larger_than_any_step_is_accounted_for(step_bytes):
    way = PreemptionConfig("swap", swap_pages=10_000, transfer_pages=5000)
    sizer = make_sizer(1 << 34, limits=dataclasses.replace(LIMITS, preemption=way))
    assert sizer.measured_step_bytes() == 3 * 5000 * sizer.page_bytes > step_bytes


def test_what_cannot_fit_is_refused_before_weights_are_read(step_bytes):
    with pytest.raises(ValueError, match="no page of 4096 bytes fits beside them: raise memory_utilization"):
        make_sizer(memory=100_000).check(None)
    with pytest.raises(ValueError, match="num_pages=500 pages take .* at most about 2.. pages fit"):
        make_sizer(memory=MIB).check(500)
    with pytest.raises(ValueError, match="num_pages=1: a pool needs page 0"):
        make_sizer(memory=MIB).check(1)
    make_sizer(memory=MIB).check(200)
    make_sizer(memory=step_bytes).check(None)


def test_a_step_larger_than_could_be_foreseen_is_refused_when_it_is_known(step_bytes):
    with pytest.raises(ValueError, match="the weights take .* and the largest step .* GiB of .*: raise memory_util"):
        make_sizer(memory=step_bytes).choose(toy_params())


def test_a_page_has_the_keys_and_values_of_all_layers():
    deeper = dataclasses.replace(TOY, num_layers=6)
    assert make_sizer(MIB, model=deeper, page_size=32).page_bytes == 6 * 32 * 2 * 2 * 8 * 4
