"""Candidates of beams on the device: merged as the host merges, with the log-probabilities that the model gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.device import beam_candidates
from jaxpaged.device.beam_candidates import (
    beam_columns,
    choose_beams,
    group_candidates,
    group_columns,
    model_logprobs,
    with_logprobs,
)
from jaxpaged.device.top_candidates import top_candidates
from jaxpaged.host.beams.beam import BeamRules, Beams, Candidates, Finished, merge_candidates, select_beams
from jaxpaged.step_io import GroupCandidates, SamplingInputs, Wanted, unpack_outputs


def sampling_inputs(rows: int, **fields) -> SamplingInputs:
    return SamplingInputs(
        np.zeros((rows, 2), np.int32), np.arange(rows, dtype=np.int32), np.zeros(rows, np.int32), **fields
    )


def merged_candidates(sums: np.ndarray, rows: np.ndarray, count: int, keys: np.ndarray | None = None):
    """The candidates of groups whose sums f32[R, V] are these, drawn by `keys` if there are any."""
    inputs = sampling_inputs(len(sums), running_scores=np.zeros(len(sums), np.float32), beam_rows=rows)
    known = jnp.asarray(sums)
    noise = None if keys is None else jnp.asarray(keys - sums)

    def of_rows(places, inputs):
        return known[places], known[places]

    def noise_of(inputs, vocab_size):
        return noise[inputs.sample_indices]  # row i is sample i here

    with pytest.MonkeyPatch.context() as patch:
        if keys is not None:
            inputs = inputs._replace(beam_temperatures=np.ones(len(sums), np.float32))
            patch.setattr(beam_candidates, "gumbel_noise", noise_of)
        return jax.jit(lambda: group_candidates(of_rows, jax.tree.map(jnp.asarray, inputs), count, sums.shape[1]))()


@pytest.mark.parametrize("tile", [512, 3, 2])
@pytest.mark.parametrize("num_values", [2, 1000])
@pytest.mark.parametrize("has_keys", [False, True])
def test_groups_are_merged_on_the_device_as_on_the_host(monkeypatch, tile, num_values, has_keys):
    """Whether a tile has several groups, or a group several tiles."""
    monkeypatch.setattr(beam_candidates, "TILE", tile)
    rng = np.random.default_rng(num_values)
    widths, count = [3, 1, 4], 8
    sums = -rng.integers(0, num_values, (sum(widths), 60)).astype(np.float32)
    keys = sums - rng.integers(0, 3, sums.shape).astype(np.float32) if has_keys else None
    ranked, tokens = map(np.asarray, top_candidates(jnp.asarray(sums if keys is None else keys), count))
    scores = np.take_along_axis(sums, tokens, axis=1)
    rows = np.array([[0, 1, 2, -1], [3, -1, -1, -1], [4, 5, 6, 7]], np.int32)
    expected = merge_candidates(scores, tokens, rows, np.array([count] * 3), ranked if has_keys else None)
    merged = merged_candidates(sums, rows, count, keys)
    np.testing.assert_array_equal(np.asarray(merged.scores), expected.scores)
    np.testing.assert_array_equal(np.asarray(merged.parents), expected.parents)
    np.testing.assert_array_equal(np.asarray(merged.tokens), expected.tokens)


@pytest.mark.parametrize("tile", [512, 1])
def test_a_narrow_group_beside_a_wide_one_has_fewer_candidates(monkeypatch, tile):
    monkeypatch.setattr(beam_candidates, "TILE", tile)
    sums = np.array([[-1, -2], [-3, -4], [-5, -6]], np.float32)
    merged = merged_candidates(sums, np.array([[0, 1], [2, -1]], np.int32), 4)
    assert np.asarray(merged.tokens).tolist() == [[0, 1, 0, 1], [0, 1, -1, -1]]
    assert np.asarray(merged.parents).tolist() == [[0, 0, 1, 1], [0, 0, -1, -1]]
    assert np.asarray(merged.scores)[1, 2:].tolist() == [-np.inf, -np.inf]


def test_where_there_are_fewer_continuations_than_asked_for_there_are_no_more():
    merged = merged_candidates(np.array([[-1, -2], [-3, -4]], np.float32), np.array([[0, 1]], np.int32), 6)
    assert np.asarray(merged.tokens).tolist() == [[0, 1, 0, 1, -1, -1]]
    assert np.asarray(merged.scores)[0, 4:].tolist() == [-np.inf, -np.inf]


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


def columns_of(logits, logprobs, inputs, wanted):
    if inputs.beam_rows is None:
        return beam_columns(logits, logprobs, inputs, wanted)
    count, vocab_size = wanted.num_candidates, logits.shape[1]
    inputs = jax.tree.map(jnp.asarray, inputs)
    merged = group_candidates(lambda rows, _: (logits[rows], logprobs[rows]), inputs, count, vocab_size)
    merged = with_logprobs(merged, logits, inputs.beam_rows) if wanted.beam_logprobs else merged
    return group_columns(merged, len(logits))


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
    columns = np.asarray(columns_of(jnp.asarray(logits), jnp.asarray(logprobs), inputs, wanted))
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


def test_the_device_chooses_the_beams_that_the_host_chooses():
    """Ends among the candidates, in order or drawn; fewer candidates than beams; and none that can go on."""
    rng = np.random.default_rng(3)
    width, count, ends = 4, 12, np.array([[7, 3], [-2, -2], [0, 1], [5, -2]], np.int32)
    scores = -rng.random((4, count)).astype(np.float32).round(1)
    scores[:2] = np.sort(scores[:2], axis=1)[:, ::-1]
    parents, tokens = rng.integers(0, [[[width]], [[9]]], (2, 4, count)).astype(np.int32)
    scores[1, 3:], parents[1, 3:], tokens[1, 3:] = -np.inf, -1, -1
    tokens[3] = 5
    counts = np.array([12, 8, 12, 12], np.int32)
    candidates = Candidates(scores, parents, tokens, (tokens[:, :, None] == ends[:, None]).any(-1))
    nothing, zeros = np.full((4, width), -np.inf, np.float32), np.zeros((4, width), np.int32)
    finished = Finished(nothing, zeros > 0, nothing, zeros, zeros, zeros)
    beams = Beams(np.ones(4, np.int32), np.zeros((4, width), np.float32), np.ones(4, bool), finished)
    widths, no = np.full(4, width), np.zeros(4, bool)
    rules = BeamRules(widths, np.full(4, 9), np.ones(4), no, no, widths)
    expected = select_beams(beams, candidates, rules)

    inputs = sampling_inputs(16, beam_rows=np.arange(16).reshape(4, 4), end_ids=ends, beam_counts=counts)
    found = jax.jit(choose_beams)(GroupCandidates(scores, parents, tokens), inputs)
    np.testing.assert_array_equal(np.asarray(found.scores), expected.beams.running_scores)
    runs = expected.beams.running_scores[:, 0] > -np.inf
    assert runs.tolist() == [True, True, True, False]
    np.testing.assert_array_equal(np.asarray(found.parents)[runs], expected.parents[runs])
    np.testing.assert_array_equal(np.asarray(found.tokens)[runs], expected.tokens[runs])
