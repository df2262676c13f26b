"""Candidates of beams on the device: merged as the host merges, with the log-probabilities that the model gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.device.beam_candidates import beam_columns, group_candidates, model_logprobs
from jaxpaged.device.top_candidates import top_candidates
from jaxpaged.host.beams.beam import merge_candidates
from jaxpaged.step_io import RowCandidates, SamplingInputs, Wanted, unpack_outputs


def sampling_inputs(rows: int, **fields) -> SamplingInputs:
    return SamplingInputs(
        np.zeros((rows, 2), np.int32), np.arange(rows, dtype=np.int32), np.zeros(rows, np.int32), **fields
    )


@pytest.mark.parametrize("num_values", [2, 1000])
@pytest.mark.parametrize("has_keys", [False, True])
def test_groups_are_merged_on_the_device_as_on_the_host(num_values, has_keys):
    rng = np.random.default_rng(num_values)
    widths, count = [3, 1, 4], 8
    sums = -rng.integers(0, num_values, (sum(widths), 60)).astype(np.float32)
    keys = sums - rng.integers(0, 3, sums.shape).astype(np.float32) if has_keys else None
    ranked, tokens = map(np.asarray, top_candidates(jnp.asarray(sums if keys is None else keys), count))
    scores = np.take_along_axis(sums, tokens, axis=1)
    rows = np.array([[0, 1, 2, -1], [3, -1, -1, -1], [4, 5, 6, 7]], np.int32)
    expected = merge_candidates(scores, tokens, rows, np.array([count] * 3), ranked if has_keys else None)
    candidates = RowCandidates(scores, tokens, ranked if has_keys else None)
    merged = jax.jit(group_candidates, static_argnums=2)(candidates, rows, count)
    np.testing.assert_array_equal(np.asarray(merged.scores), expected.scores)
    np.testing.assert_array_equal(np.asarray(merged.parents), expected.parents)
    np.testing.assert_array_equal(np.asarray(merged.tokens), expected.tokens)


def test_a_narrow_group_beside_a_wide_one_has_fewer_candidates():
    values, tokens = np.array([[-1, -2], [-3, -4], [-5, -6]], np.float32), np.arange(6, dtype=np.int32).reshape(3, 2)
    rows = np.array([[0, 1], [2, -1]], np.int32)
    merged = group_candidates(RowCandidates(values, tokens), rows, 4)
    assert np.asarray(merged.tokens).tolist() == [[0, 1, 2, 3], [4, 5, -1, -1]]
    assert np.asarray(merged.parents).tolist() == [[0, 0, 1, 1], [0, 0, -1, -1]]
    assert np.asarray(merged.scores)[1, 2:].tolist() == [-np.inf, -np.inf]


def test_log_probabilities_and_ranks_are_those_of_the_named_rows():
    logits = np.random.default_rng(0).normal(0, 3, (4, 50)).astype(np.float32)
    rows, tokens = np.array([[0, 3, 1], [2, 2, 0]]), np.array([[5, 6, 7], [8, 49, 0]])
    logprobs, ranks = model_logprobs(jnp.asarray(logits), rows, tokens)
    expected = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))[rows, tokens]
    np.testing.assert_allclose(np.asarray(logprobs), expected, atol=1e-5)
    assert np.asarray(ranks).tolist() == [
        [1 + int((logits[r] > logits[r, t]).sum()) for r, t in zip(*pair, strict=True)]
        for pair in zip(rows.tolist(), tokens.tolist(), strict=True)
    ]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("with_logprobs", [False, True])
def test_what_the_device_packs_the_host_unpacks(merged, drawn, with_logprobs):
    rows, vocab, count = 5, 40, 6
    logits = np.random.default_rng(1).normal(0, 2, (rows, vocab)).astype(np.float32)
    logprobs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    beam_rows = np.array([[0, 1, 2], [3, 4, -1], [-1, -1, -1]], np.int32)
    inputs = sampling_inputs(
        rows, running_scores=np.zeros(rows, np.float32),
        beam_temperatures=np.ones(rows, np.float32) if drawn else None, beam_rows=beam_rows if merged else None,
    )  # fmt: skip
    wanted = Wanted(False, None, count, drawn, with_logprobs)
    columns = np.asarray(beam_columns(jnp.asarray(logits), jnp.asarray(logprobs), inputs, wanted))
    found = unpack_outputs(columns, wanted, len(beam_rows) if merged else 0).candidates
    assert found is not None and found.scores.shape == (3 if merged else rows, count)
    assert (found.logprobs is not None) == (found.ranks is not None) == with_logprobs
    for place in np.ndindex(found.tokens.shape):
        if merged and found.parents[place] < 0:
            assert found.tokens[place] == -1 and place[0] == 2
            continue
        row = beam_rows[place[0], found.parents[place]] if merged else place[0]
        token = found.tokens[place]
        assert found.scores[place] == pytest.approx(logprobs[row, token], abs=1e-5)
        if with_logprobs:
            assert found.logprobs[place] == pytest.approx(logprobs[row, token], abs=1e-5)
            assert found.ranks[place] == 1 + (logits[row] > logits[row, token]).sum()
