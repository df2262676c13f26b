"""Sampling on the device against the same rules written with a sort in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import make_group

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.device.sampling import _cut, _largest_threshold, process_logits, sample_tokens, token_logprobs
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.sampling_batch import make_sampling_inputs
from jaxpaged.host.step.step_plan import Sample
from jaxpaged.step_io import WHOLE_VOCABULARY, SamplingInputs, unpack_logprobs

ROWS, VOCAB = 4, 50


def base(rows=ROWS, **fields) -> SamplingInputs:
    inputs = SamplingInputs(
        seeds=np.zeros((rows, 2), np.int32), sample_indices=np.zeros(rows, np.int32), positions=np.zeros(rows, np.int32)
    )
    return inputs._replace(**{name: np.asarray(value) for name, value in fields.items()})


def random_logits(seed=0, rows=ROWS, vocab=VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, vocab)).astype(np.float32)


def sorted_filter(logits, top_p, top_k, min_p) -> np.ndarray:
    """The set of kept tokens of one row, by sorting."""
    kept = logits - logits.max() >= (np.log(min_p) if min_p > 0 else -np.inf)
    by_value = np.sort(np.where(kept, logits, -np.inf))[::-1]
    kept &= logits >= by_value[min(top_k, len(logits)) - 1]
    weights = np.where(kept, np.exp(logits.astype(np.float64) - logits.max()), 0)
    order = np.argsort(-logits, kind="stable")
    mass = np.cumsum(weights[order]) / weights.sum()
    needed = int(np.searchsorted(mass, top_p - 1e-9)) + 1
    return kept & (logits >= logits[order[needed - 1]]) if top_p < 1 else kept


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.integers(1, VOCAB), st.floats(0.0, 0.5))
def test_filters_keep_what_a_sort_would_keep(seed, top_p, top_k, min_p):
    logits = random_logits(seed)
    inputs = base(
        top_ps=np.full(ROWS, top_p, np.float32),
        top_ks=np.full(ROWS, top_k, np.int32),
        min_ps=np.full(ROWS, min_p, np.float32),
    )
    cut = np.asarray(jax.jit(_cut)(logits, inputs))
    for row in range(ROWS):
        expected = sorted_filter(logits[row], np.float32(top_p), top_k, np.float32(min_p))
        np.testing.assert_array_equal(logits[row] >= cut[row], expected)


def test_top_k_keeps_ties_and_top_p_of_1_keeps_everything():
    logits = np.array([[3.0, 1.0, 1.0, 0.0, -np.inf]], np.float32)
    inputs = base(1, top_ps=np.float32([1]), top_ks=np.int32([2]), min_ps=np.float32([0]))
    assert _cut(logits, inputs).tolist() == [1.0]
    everything = inputs._replace(top_ks=np.int32([5]))
    assert _cut(logits, everything).tolist() == [0.0]


def test_threshold_by_bisection_is_exact_for_negative_and_equal_values():
    values = np.array([[-3.5, -0.0, 0.0, 2.0, -1e30]], np.float32)

    def at_least(count):
        return lambda kept: kept.sum(-1) >= count

    assert [float(_largest_threshold(values, at_least(k))[0]) for k in (1, 3, 4, 5)] == [
        2.0,
        0.0,
        -3.5,
        np.float32(-1e30),
    ]


def test_greedy_is_the_argmax_and_rows_may_mix():
    logits = random_logits()
    temperatures = np.array([0, 1, 0, 1], np.float32)
    tokens = np.asarray(sample_tokens(logits, base(temperatures=temperatures)))
    np.testing.assert_array_equal(tokens[[0, 2]], logits.argmax(-1)[[0, 2]])
    np.testing.assert_array_equal(np.asarray(sample_tokens(logits, base())), logits.argmax(-1))


def test_a_tiny_temperature_is_greedy_and_overflows_nothing():
    logits = random_logits()
    inputs = base(
        temperatures=np.full(ROWS, 1e-38, np.float32), top_ps=np.full(ROWS, 0.9, np.float32),
        top_ks=np.full(ROWS, 5, np.int32), min_ps=np.zeros(ROWS, np.float32),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(sample_tokens(logits, inputs)), logits.argmax(-1))


def test_samples_follow_the_distribution():
    rows = 4000
    logits = np.tile(np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)), (rows, 1))
    inputs = base(rows, temperatures=np.ones(rows, np.float32), positions=np.arange(rows, dtype=np.int32))
    counts = np.bincount(np.asarray(sample_tokens(logits, inputs)), minlength=4) / rows
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)  # four standard deviations


def test_a_draw_depends_on_seed_sample_and_position_and_not_on_the_row():
    logits = np.zeros((4, 1000), np.float32)
    inputs = base(
        temperatures=np.ones(4, np.float32),
        seeds=np.array([[0, 5], [0, 5], [1, 5], [0, 5]], np.int32),
        sample_indices=np.array([0, 1, 0, 0], np.int32),
        positions=np.array([7, 7, 7, 8], np.int32),
    )
    tokens = np.asarray(sample_tokens(logits, inputs))
    assert len(set(tokens.tolist())) == 4
    order = np.array([3, 1, 0, 2])
    shuffled = SamplingInputs(*(None if field is None else field[order] for field in inputs))
    np.testing.assert_array_equal(np.asarray(sample_tokens(logits, shuffled)), tokens[order])


def test_penalties_follow_vllm():
    history = np.full((2, 64), -1, np.int32)
    history[0, :4] = [1, 2, 2, 3]  # prompt 1, 2; generated 2, 3
    history[1, :4] = [1, 2, 2, 3]
    inputs = base(
        2, history=history, history_lens=np.int32([4, 4]), prompt_lens=np.int32([2, 2]),
        penalties=np.float32([[2.0, 0, 0], [1.0, 0.5, 0.25]]),
    )  # fmt: skip
    logits = np.array([[1.0, 4.0, -4.0, 4.0, 1.9], [1.0, 4.0, 4.0, 4.0, 3.9]], np.float32)
    processed = np.asarray(process_logits(jnp.asarray(logits), inputs, ()))
    np.testing.assert_allclose(processed[0], [1.0, 2.0, -8.0, 2.0, 1.9])
    np.testing.assert_allclose(processed[1], [1.0, 4.0, 3.25, 3.25, 3.9])  # generated tokens only


def test_each_request_has_its_processors_in_its_own_order_and_number():
    """Whatever order other requests of the run ask for, of functions that do not commute."""

    def halved(token_ids, num_tokens, logits):
        return logits / 2

    def raised(token_ids, num_tokens, logits):
        return logits + 3

    orders = [[raised, halved], [halved, raised], [halved], [raised, raised], []]
    groups = [make_group([1], SamplingParams(logits_processors=order), str(i)) for i, order in enumerate(orders)]
    features = SamplingFeatures.of(groups, VOCAB)
    samples = [Sample(group, group.sequences[0], i) for i, group in enumerate(groups)]
    inputs = make_sampling_inputs(samples, 8, 4, VOCAB, features)
    processed = process_logits(jnp.ones((8, VOCAB)), inputs, features.processors)
    assert processed[:, 0].tolist() == [2.0, 3.5, 0.5, 7.0, 1.0, 1.0, 1.0, 1.0]


def test_allowed_tokens_edits_and_processors():
    logits = np.zeros((3, 6), np.float32)
    logits[:, 5] = 9

    def ban_last_token(token_ids, num_tokens, logits):
        return logits.at[token_ids[num_tokens - 1]].set(-jnp.inf)

    history = np.full((3, 64), -1, np.int32)
    history[:, 0] = 5
    inputs = base(
        3,
        is_restricted=np.int32([1, 0, 0]), allowed_rows=np.int32([0, 0, 3]), allowed_tokens=np.int32([2, 3, 0]),
        edit_rows=np.int32([0, 1, 3]), edit_tokens=np.int32([3, 4, 0]), edit_values=np.float32([1.0, 20.0, 99]),
        history=history, history_lens=np.int32([1, 1, 1]), prompt_lens=np.int32([1, 1, 1]),
        uses_processor=np.int32([[0], [0], [1]]),
    )  # fmt: skip
    tokens = np.asarray(sample_tokens(process_logits(jnp.asarray(logits), inputs, (ban_last_token,)), inputs))
    assert tokens.tolist() == [3, 4, 0]


@pytest.mark.parametrize("num_logprobs", [None, 0, 3, WHOLE_VOCABULARY])
def test_logprobs_ranks_and_the_likeliest(num_logprobs):
    logits = random_logits(3)
    tokens = np.array([1, 7, 9, 30], np.int32)
    result = unpack_logprobs(
        np.asarray(token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), num_logprobs)), num_logprobs
    )
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(result.logprobs, expected[np.arange(ROWS), tokens], atol=1e-5)
    if num_logprobs is None:
        assert result.ranks is None
        return
    order = np.argsort(-logits, axis=-1)
    np.testing.assert_array_equal(result.ranks, [1 + order[i].tolist().index(tokens[i]) for i in range(ROWS)])
    if num_logprobs == WHOLE_VOCABULARY:
        assert result.top_ids is None
        np.testing.assert_allclose(result.top_logprobs, expected, atol=1e-5)
        return
    np.testing.assert_array_equal(result.top_ids, order[:, :num_logprobs])
