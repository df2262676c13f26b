"""The candidates of a beam step: of every row its likeliest continuations, or of every group of beams its best.

Merged on the device, W beams bring C candidates to the host where they would bring W * C. Which of the two a step does
is decided by its inputs: `SamplingInputs.beam_rows` says which rows belong together.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxpaged.device import vocabulary
from jaxpaged.device.sampling import MIN_TEMPERATURE, bits, gumbel_noise, row_failures
from jaxpaged.device.top_candidates import top_candidates
from jaxpaged.step_io import GroupCandidates, RowCandidates, SamplingInputs, Wanted

Array = jax.Array
Candidates = TypeVar("Candidates", RowCandidates, GroupCandidates)


def beam_columns(logits: Array, logprobs: Array, inputs: SamplingInputs, wanted: Wanted) -> Array:
    """Candidates as int32 columns of R rows (step_io.unpack_outputs).

    logits f32[R, V] are the model's, logprobs f32[R, V] what requests made of them, of which the sums are.
    """
    is_beam = inputs.running_scores > -jnp.inf  # what a place without a beam computes, be it NaN, concerns nobody
    failures = jnp.where(is_beam, row_failures(logits, logprobs), 0)
    logprobs = jnp.where(is_beam[:, None], logprobs, -jnp.inf)
    candidates = row_candidates(logprobs, inputs, wanted.num_candidates)
    if inputs.beam_rows is None:
        if wanted.beam_logprobs:
            rows = jnp.broadcast_to(jnp.arange(len(logits))[:, None], candidates.tokens.shape)
            known, ranks = model_logprobs(logits, rows, candidates.tokens)
            candidates = candidates._replace(logprobs=known, ranks=ranks)
        return _columns(_with_failures(candidates, failures))
    merged = group_candidates(candidates, inputs.beam_rows, wanted.num_candidates)
    if wanted.beam_logprobs:
        rows = jnp.take_along_axis(inputs.beam_rows, jnp.maximum(merged.parents, 0), axis=1)
        known, ranks = model_logprobs(logits, jnp.maximum(rows, 0), jnp.maximum(merged.tokens, 0))
        merged = merged._replace(logprobs=known, ranks=ranks)
    failures = jnp.where(inputs.beam_rows >= 0, failures[inputs.beam_rows], 0).min(axis=1)
    flat = _columns(_with_failures(merged, failures)).reshape(-1)
    return jnp.pad(flat, (0, -flat.size % len(logits))).reshape(len(logits), -1)


def row_candidates(logprobs: Array, inputs: SamplingInputs, count: int) -> RowCandidates:
    """The `count` continuations of every row with the highest sums of log-probabilities, or drawn without replacement.

    The sums are taken before the best are: rounding makes some of them equal, and of equals the lowest token wins.
    """
    if inputs.beam_temperatures is None:
        return RowCandidates(*top_candidates(logprobs + inputs.running_scores[:, None], count))
    is_drawn = inputs.beam_temperatures[:, None] > 0
    temperatures = jnp.where(is_drawn, jnp.maximum(inputs.beam_temperatures[:, None], MIN_TEMPERATURE), 1.0)
    logprobs = logprobs / temperatures
    sums = logprobs + inputs.running_scores[:, None]
    # The largest sums with Gumbel noise are a draw without replacement from their softmax (Kool et al., 2019).
    noise = gumbel_noise(inputs, logprobs.shape[-1])
    keys, tokens = top_candidates(jnp.where(is_drawn, sums + noise, sums), count)
    return RowCandidates(jnp.take_along_axis(sums, tokens, axis=1), tokens, keys)


def group_candidates(candidates: RowCandidates, rows: Array, count: int) -> GroupCandidates:
    """The `count` best of each group of rows: what `merge_candidates` does on the host, with less to bring there.

    rows i32[G, W] has the row of each of a group's beams, -1 behind its last. Best first, the lowest
    parent * V + token first among equals; parent and token are -1 where a group has no more.
    """
    ranked = candidates.scores if candidates.keys is None else candidates.keys
    num_groups, k = len(rows), ranked.shape[1]
    flat = jnp.where((rows >= 0)[:, :, None], ranked[rows], -jnp.inf).reshape(num_groups, -1)
    values, places = top_candidates(flat, count)
    row = jnp.take_along_axis(rows, places // k, axis=1)
    scores = values if candidates.keys is None else candidates.scores[row, places % k]
    return GroupCandidates(
        scores=jnp.where(row >= 0, scores, -jnp.inf),
        parents=jnp.where(row >= 0, places // k, -1),
        tokens=jnp.where(row >= 0, candidates.tokens[row, places % k], -1),
    )


def model_logprobs(logits: Array, rows: Array, tokens: Array) -> tuple[Array, Array]:
    """Log-probabilities f32[A, C] and ranks i32[A, C] of tokens i32[A, C], each under the logits of its row."""
    normaliser = vocabulary.logsumexp(logits)
    chosen = logits[rows, tokens]

    def rank(column: tuple[Array, Array]) -> Array:
        row, value = column
        return 1 + jnp.sum(logits[row] > value[:, None], axis=-1, dtype=jnp.int32)

    # A column at a time, or A * C rows of the vocabulary would lie in memory together.
    ranks = jax.lax.map(rank, (rows.T, chosen.T)).T
    return chosen - normaliser[rows], ranks


def _with_failures(candidates: Candidates, failures: Array) -> Candidates:
    """Rows, or groups, that can choose nothing say so in place of their tokens."""
    failures = failures[:, None]
    return candidates._replace(tokens=jnp.where(failures < 0, failures, candidates.tokens))


def _columns(candidates: RowCandidates | GroupCandidates) -> Array:
    columns = [field if field.dtype == jnp.int32 else bits(field) for field in candidates if field is not None]
    return jnp.concatenate(columns, axis=1)
