"""Chooses tokens from logits, and says how likely they were.

The order of operations is vLLM's: logits processors, constraints, allowed tokens, edits (bias, banned words,
min_tokens), penalties, temperature, min_p, top_k, top_p, then a draw (vocabulary.py). Arrays that are None in
`SamplingInputs` cost nothing. The random numbers of a row are a function of its request's seed, its sample index and
the position alone.

top_k and top_p need a threshold, not an order: it is found by bisection over the bits of the values, 32 passes over the
row whatever k is, and exact. So the vocabulary is never sorted.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpaged.api.request_params import LogitsProcessor
from jaxpaged.device import vocabulary
from jaxpaged.device.constraints import limit
from jaxpaged.device.top_candidates import top_candidates
from jaxpaged.step_io import BAD_LOGITS, BAD_PROCESSED, NO_TOKEN, WHOLE_VOCABULARY, SamplingInputs

Array = jax.Array

#: Fields of `SamplingInputs` that have no row a row of the step.
_OF_GROUPS = ("beam_rows", "end_ids", "beam_counts")
_LISTS = ("edit_rows", "edit_tokens", "edit_values", "allowed_rows", "allowed_tokens")

#: Below this a temperature is as good as greedy.
MIN_TEMPERATURE = 1e-5

#: A likeliest logit that a temperature makes larger is moved to 0 before it is divided, which could overflow.
MAX_SCALED = 1e30


def sample_tokens(logits: Array, inputs: SamplingInputs) -> Array:
    """logits f32[R, V], as `process_logits` leaves them -> token ids i32[R]; NO_TOKEN where all logits are -inf.

    Of rows with NaN or +inf nothing is promised: `row_failures` tells them.
    """
    tokens = greedy = vocabulary.argmax(logits)
    if inputs.temperatures is not None:
        noise = gumbel_noise(inputs, vocabulary.num_random(logits.shape[-1]))
        drawn = vocabulary.draw(logits, _scaling(logits, _at(logits, greedy), inputs), noise)
        tokens = jnp.where(inputs.temperatures == 0, greedy, drawn)
    return jnp.where(_at(logits, tokens) == -jnp.inf, NO_TOKEN, tokens)


def _scaling(logits: Array, highest: Array, inputs: SamplingInputs) -> Callable[[Array], Array]:
    """What makes of logits [R, ...] those that a token is drawn from: over the temperature, -inf where it is cut off.

    The highest f32[R] of a row stays finite however small its temperature is.
    """
    temperatures = jnp.where(inputs.temperatures == 0, 1.0, jnp.maximum(inputs.temperatures, MIN_TEMPERATURE))
    moved = jnp.where(jnp.abs(highest) > MAX_SCALED * temperatures, highest, 0.0)

    def divide(values: Array) -> Array:
        return (values - _over(values, moved)) / _over(values, temperatures)

    if inputs.top_ps is None:
        return divide
    cut = _cut(divide(logits), inputs)

    def divide_and_cut(values: Array) -> Array:
        values = divide(values)
        return jnp.where(values >= _over(values, cut), values, -jnp.inf)

    return divide_and_cut


def _over(values: Array, of_row: Array) -> Array:
    """f32[R], with axes to go with values [R, ...]."""
    return of_row.reshape(-1, *[1] * (values.ndim - 1))


def row_failures(logits: Array, processed: Array) -> Array:
    """i32[R]: BAD_LOGITS or BAD_PROCESSED where a row can choose nothing, else 0.

    `logits` f32[R, V] are the model's, `processed` what requests made of them. One NaN among the model's is found, even
    where processing hides it. Both come out of reductions that a step has anyway; an argmax takes NaN first.
    """
    highest = _at(processed, vocabulary.argmax(processed))
    is_bad = jnp.isnan(highest) | (highest == jnp.inf)
    is_known = jnp.isfinite(vocabulary.logsumexp(logits))
    return jnp.where(is_known, jnp.where(is_bad, BAD_PROCESSED, 0), BAD_LOGITS)


def _at(values: Array, tokens: Array) -> Array:
    """f32[R]: of each row of values [R, V] the one of its token."""
    return jnp.take_along_axis(values, tokens[:, None], axis=1)[:, 0]


def token_logprobs(logits: Array, tokens: Array, num_logprobs: int | None) -> Array:
    """Log-probabilities of `tokens` i32[R] and of the k likeliest, as int32 columns (step_io.unpack_logprobs).

    `num_logprobs` None gives only the tokens' own, k >= 0 also their ranks and the k likeliest, WHOLE_VOCABULARY their
    ranks and every token's. A token's own is NaN where some logit is NaN or +inf, or all are -inf.
    """
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    normaliser = vocabulary.logsumexp(logits)[:, None]
    normaliser = jnp.where(jnp.isfinite(normaliser), normaliser, jnp.nan)
    columns = [bits(chosen - normaliser)]
    if num_logprobs is not None:
        columns.append(1 + jnp.sum(logits > chosen, axis=-1, keepdims=True, dtype=jnp.int32))
        if num_logprobs == WHOLE_VOCABULARY:
            columns.append(bits(logits - normaliser))
        else:
            columns.append(likeliest_tokens(logits, num_logprobs))
    return jnp.concatenate(columns, axis=1)


def likeliest_tokens(logits: Array, count: int) -> Array:
    """The `count` likeliest tokens of each row and the bits of their log-probabilities: i32[R, 2 * count]."""
    if not count:
        return jnp.zeros((len(logits), 0), jnp.int32)
    values, ids = top_candidates(logits, count)
    normaliser = vocabulary.logsumexp(logits)[:, None]
    return jnp.concatenate([ids, bits(values - normaliser)], axis=1)


def sampling_of(inputs: SamplingInputs, rows: Array) -> SamplingInputs:
    """The inputs of rows i32[r] alone, each named once at most; -1 for padding, which is any row."""
    num_rows = len(inputs.seeds)
    of_rows = inputs._replace(**dict.fromkeys(_OF_GROUPS + _LISTS))
    places = jnp.full(num_rows + 1, len(rows))  # where a row is now; others are out of range, and dropped
    places = places.at[jnp.where(rows < 0, num_rows + 1, rows)].set(jnp.arange(len(rows)), mode="drop")
    lists = {name: getattr(inputs, name) for name in _LISTS}
    for name in ("edit_rows", "allowed_rows"):
        lists[name] = None if lists[name] is None else places[lists[name]]
    return jax.tree.map(lambda values: values[jnp.maximum(rows, 0)], of_rows)._replace(**lists)


def bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def gumbel_noise(inputs: SamplingInputs, count: int) -> Array:
    """Gumbel noise f32[R, count]; the largest of sums with it is a draw from their softmax."""
    draw = jax.vmap(_gumbel, in_axes=(0, 0, 0, None))
    return draw(inputs.seeds, inputs.sample_indices, inputs.positions, count)


def _gumbel(seed: Array, sample_index: Array, position: Array, count: int) -> Array:
    """Gumbel noise f32[count] for one row."""
    key = jax.random.wrap_key_data(jax.lax.bitcast_convert_type(seed, jnp.uint32), impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, sample_index), position), (count,))


def process_logits(logits: Array, inputs: SamplingInputs, processors: tuple[LogitsProcessor, ...] = ()) -> Array:
    """What requests ask to be done to logits f32[R, V], or to beams' log-probabilities, before anything is chosen."""
    for i, processor in enumerate(processors):
        processed = jax.vmap(processor)(inputs.history, inputs.history_lens, logits)
        logits = jnp.where(inputs.uses_processor[:, i : i + 1] == 1, processed, logits)
    if inputs.masks is not None:  # behind processors, so that none makes possible what is not
        logits = limit(logits, inputs.masks)
    if inputs.is_restricted is not None:
        allowed = jnp.zeros(logits.shape, bool).at[inputs.allowed_rows, inputs.allowed_tokens].set(True, mode="drop")
        logits = jnp.where(allowed | (inputs.is_restricted == 0)[:, None], logits, -jnp.inf)
    if inputs.edit_rows is not None:
        logits = logits.at[inputs.edit_rows, inputs.edit_tokens].add(inputs.edit_values, mode="drop")
    if inputs.penalties is not None:
        logits = _penalise(logits, inputs)
    return logits


def _penalise(logits: Array, inputs: SamplingInputs) -> Array:
    rows, length = inputs.history.shape
    places = jnp.arange(length)
    exists = places < inputs.history_lens[:, None]
    generated = exists & (places >= inputs.prompt_lens[:, None])

    def count(which: Array) -> Array:
        counts = jnp.zeros(logits.shape, jnp.int32)
        tokens = jnp.where(which, inputs.history, logits.shape[-1])  # out of range: dropped
        return counts.at[jnp.arange(rows)[:, None], tokens].add(1, mode="drop")

    repetition, presence, frequency = (inputs.penalties[:, i, None] for i in range(3))
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(count(exists) > 0, repeated, logits)
    times = count(generated).astype(jnp.float32)
    return logits - jnp.where(times > 0, presence, 0.0) - frequency * times


def _cut(logits: Array, inputs: SamplingInputs) -> Array:
    """f32[R]: the lowest of the logits (already divided by the temperature) that min_p, top_k and top_p, in this order,
    leave."""
    highest = logits.max(-1, keepdims=True)
    logits = jnp.where(logits - highest >= jnp.log(inputs.min_ps)[:, None], logits, -jnp.inf)

    ones = jnp.ones_like(logits)
    kth = _largest_threshold(logits, lambda kept: _sum(ones, kept) >= inputs.top_ks.astype(jnp.float32))
    logits = jnp.where(logits >= kth[:, None], logits, -jnp.inf)

    weights = jnp.exp(logits - highest)
    # A share of 1e-38 is 0 where small floats are flushed; the likeliest tokens are kept whatever top_p is.
    target = jnp.maximum(inputs.top_ps * weights.sum(-1), weights.max(-1))
    cut = _largest_threshold(logits, lambda kept: _sum(weights, kept) >= target)
    # top_p = 1 keeps everything, however the sums round.
    kept = (logits > -jnp.inf) & ((logits >= cut[:, None]) | (inputs.top_ps >= 1)[:, None])
    return jnp.min(jnp.where(kept, logits, jnp.inf), axis=-1)


def _sum(values: Array, kept: Array) -> Array:
    return jnp.sum(jnp.where(kept, values, 0.0), axis=-1)


def _largest_threshold(values: Array, suffices: Callable[[Array], Array]) -> Array:
    """Per row of values [R, V], the largest float t such that keeping `values >= t` suffices; -inf if none does.

    `suffices(kept bool[R, V]) -> bool[R]` must be monotone: keeping more never breaks it. Bisection from the highest
    bit of an integer that orders as the float does.
    """
    keys = _ordered(values)

    def try_bit(i: Array, prefix: Array) -> Array:
        candidate = prefix | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        return jnp.where(suffices(keys >= candidate[:, None]), candidate, prefix)

    key = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(values.shape[0], jnp.uint32))
    # The threshold is one of the values: the smallest that is kept.
    return jnp.min(jnp.where(keys >= key[:, None], values, jnp.inf), axis=-1)


def _ordered(values: Array) -> Array:
    """uint32 that compare as the float32 do: positive floats get the sign bit set, negative ones are inverted."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
