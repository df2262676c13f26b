"""The candidates of a beam step: of every row its likeliest continuations, or of every group of beams its best.

Merged on the device, W beams bring C candidates to the host where they would bring W * C. Which of the two a step does
is decided by its inputs: `SamplingInputs.beam_rows` says which rows belong together. Merged, logits are made and looked
at a tile of rows at a time: of thousands of beams they would fill gigabytes, and no more than C of them matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxpaged.device import vocabulary
from jaxpaged.device.constraints import advance, are_leaves
from jaxpaged.device.sampling import MIN_TEMPERATURE, bits, gumbel_noise, row_failures, sampling_of
from jaxpaged.device.top_candidates import top_candidates
from jaxpaged.step_io import NO_TOKEN, GroupCandidates, RowCandidates, SamplingInputs, TrieTables, Wanted

Array = jax.Array
Candidates = TypeVar("Candidates", RowCandidates, GroupCandidates)

#: Logits f32[r, V] of rows i32[r], and what their requests (the inputs of these rows) make of the log-probabilities.
OfRows = Callable[[Array, SamplingInputs], tuple[Array, Array]]

#: Rows of a tile: their logits over 152k tokens are 311 MB in float32.
TILE = 512

#: Added to the sum of what ends, as on the host (host/beams/beam.py): what runs on goes first.
NOT = -1e30


def beam_columns(logits: Array, logprobs: Array, inputs: SamplingInputs, wanted: Wanted) -> Array:
    """Candidates of every row as int32 columns of R rows (step_io.unpack_outputs).

    logits f32[R, V] are the model's, logprobs f32[R, V] what requests made of them, of which the sums are.
    """
    is_beam = inputs.running_scores > -jnp.inf  # what a place without a beam computes, be it NaN, concerns nobody
    failures = jnp.where(is_beam, row_failures(logits, logprobs), 0)
    logprobs = jnp.where(is_beam[:, None], logprobs, -jnp.inf)
    candidates = row_candidates(logprobs, inputs, min(wanted.num_candidates, logits.shape[1]))
    if wanted.beam_logprobs:
        rows = jnp.broadcast_to(jnp.arange(len(logits))[:, None], candidates.tokens.shape)
        known, ranks = model_logprobs(logits, rows, candidates.tokens)
        candidates = candidates._replace(logprobs=known, ranks=ranks)
    return _columns(_with_failures(candidates, failures))


def group_columns(candidates: GroupCandidates, num_rows: int) -> Array:
    """Candidates of every group as int32 columns of R rows, all end to end."""
    flat = _columns(candidates).reshape(-1)
    return jnp.pad(flat, (0, -flat.size % num_rows)).reshape(num_rows, -1)


def row_candidates(logprobs: Array, inputs: SamplingInputs, count: int) -> RowCandidates:
    """The `count` continuations of every row with the highest sums of log-probabilities, or drawn without replacement.

    The sums are taken before the best are: rounding makes some of them equal, and of equals the lowest token wins.
    """
    sums, keys = _sums(logprobs, inputs)
    if keys is None:
        return RowCandidates(*top_candidates(sums, count))
    keys, tokens = top_candidates(keys, count)
    return RowCandidates(jnp.take_along_axis(sums, tokens, axis=1), tokens, keys)


def _sums(logprobs: Array, inputs: SamplingInputs) -> tuple[Array, Array | None]:
    """f32[R, V]: sums, and what they are ranked by where some beams are drawn."""
    if inputs.beam_temperatures is None:
        return logprobs + inputs.running_scores[:, None], None
    is_drawn = inputs.beam_temperatures[:, None] > 0
    temperatures = jnp.where(is_drawn, jnp.maximum(inputs.beam_temperatures[:, None], MIN_TEMPERATURE), 1.0)
    logprobs = logprobs / temperatures
    sums = logprobs + inputs.running_scores[:, None]
    # The largest sums with Gumbel noise are a draw without replacement from their softmax (Kool et al., 2019).
    return sums, jnp.where(is_drawn, sums + gumbel_noise(inputs, logprobs.shape[-1]), sums)


class _Best(NamedTuple):
    """The best of each group in a tile, or in all of it."""

    ranks: Array  # f32[G, C] by which they are ordered
    scores: Array  # f32[G, C]
    beams: Array  # i32[G, C]; -1 where a group has no more
    tokens: Array  # i32[G, C]
    failures: Array  # i32[G]

    @classmethod
    def nothing(cls, num_groups: int, count: int) -> _Best:
        scores = jnp.full((num_groups, count), -jnp.inf)
        places = jnp.full((num_groups, count), -1)
        return cls(scores, scores, places, places, jnp.zeros(num_groups, jnp.int32))


def group_candidates(of_rows: OfRows, inputs: SamplingInputs, count: int, vocab_size: int) -> GroupCandidates:
    """The `count` best of each group of rows: what `merge_candidates` does on the host, with less to bring there.

    `inputs.beam_rows` i32[G, W] has the row of each of a group's beams, -1 behind its last. Best first, the lowest
    parent * V + token first among equals; parent and token are -1 where a group has no more.
    """
    num_groups = len(inputs.beam_rows)
    tiles, slices = _tiles(inputs.beam_rows)
    together, tile_width = tiles.shape[1:]
    size = min(count, tile_width * vocab_size)

    def of_tile(tile: Array) -> _Best:
        return _best_of_tile(of_rows, inputs, tile, size)

    def of_tile_or_none(tile: Array) -> _Best:
        return jax.lax.cond((tile >= 0).any(), lambda: of_tile(tile), lambda: _Best.nothing(together, size))

    # Many narrow groups beside a wide one leave most tiles empty. Elsewhere nothing is asked: who launches a step would
    # wait for the answer.
    is_sparse = tiles.size > 2 * max(len(inputs.seeds), together * tile_width)
    if len(tiles) == 1:
        best = of_tile(tiles[0])
    else:
        best = _joined(jax.lax.map(of_tile_or_none if is_sparse else of_tile, tiles), slices, tile_width, count)
    best = _Best(*(field[:num_groups] for field in best))
    missing = ((0, 0), (0, count - best.scores.shape[1]))
    found = GroupCandidates(
        jnp.pad(best.scores, missing, constant_values=-jnp.inf),
        jnp.pad(best.beams, missing, constant_values=-1),
        jnp.pad(best.tokens, missing, constant_values=NO_TOKEN),
    )
    return _with_failures(found, best.failures)


def _tiles(rows: Array) -> tuple[Array, int]:
    """rows i32[G, W] in tiles i32[n, g, w] of several groups, or of a slice of one; and how many slices a group has."""
    num_groups, width = rows.shape
    tile_width = min(width, TILE)
    slices, together = -(-width // tile_width), min(num_groups, TILE // tile_width)
    padding = (0, -num_groups % together), (0, slices * tile_width - width)
    padded = jnp.pad(rows, padding, constant_values=-1).reshape(-1, together, slices, tile_width)
    return padded.swapaxes(1, 2).reshape(-1, together, tile_width), slices


def _best_of_tile(of_rows: OfRows, inputs: SamplingInputs, tile: Array, count: int) -> _Best:
    """Of rows i32[g, w], those of g groups."""
    inputs = sampling_of(inputs, tile.reshape(-1))
    logits, logprobs = of_rows(jnp.maximum(tile, 0).reshape(-1), inputs)
    is_beam = (tile.reshape(-1) >= 0) & (inputs.running_scores > -jnp.inf)
    failures = jnp.where(is_beam, row_failures(logits, logprobs), 0).reshape(tile.shape).min(axis=1)
    sums, keys = _sums(jnp.where(is_beam[:, None], logprobs, -jnp.inf), inputs)
    vocab_size = sums.shape[1]
    ranks, places = top_candidates((sums if keys is None else keys).reshape(len(tile), -1), count)
    scores = ranks if keys is None else jnp.take_along_axis(sums.reshape(len(tile), -1), places, axis=1)
    beams = places // vocab_size
    is_there = jnp.take_along_axis(tile, beams, axis=1) >= 0
    return _Best(ranks, scores, jnp.where(is_there, beams, -1), jnp.where(is_there, places % vocab_size, -1), failures)


def _joined(tiles: _Best, slices: int, tile_width: int, count: int) -> _Best:
    """The best of all slices of each group: [tiles, g, C] to [G, count]."""

    def in_groups(field: Array) -> Array:
        """[tiles, g, ...] to [G, slices, ...]."""
        parts = field.reshape(-1, slices, *field.shape[1:]).swapaxes(1, 2)
        return parts.reshape(-1, slices, *field.shape[2:])

    best = _Best(*map(in_groups, tiles))
    first_beams = jnp.arange(slices)[:, None] * tile_width
    best = best._replace(
        beams=jnp.where(best.beams >= 0, best.beams + first_beams, -1), failures=best.failures.min(axis=1)
    )
    if slices == 1:
        return _Best._make([*(field[:, 0] for field in best[:-1]), best.failures])
    flat = [field.reshape(len(field), -1) for field in best[:-1]]
    ranks, places = jax.lax.top_k(flat[0], min(count, flat[0].shape[1]))
    rest = [jnp.take_along_axis(field, places, axis=1) for field in flat[1:]]
    return _Best._make([ranks, *rest, best.failures])


def with_logprobs(candidates: GroupCandidates, logits: Array, beam_rows: Array) -> GroupCandidates:
    """With log-probabilities and ranks under the model alone, whose logits are f32[R, V]."""
    rows = jnp.take_along_axis(beam_rows, jnp.maximum(candidates.parents, 0), axis=1)
    known, ranks = model_logprobs(logits, jnp.maximum(rows, 0), jnp.maximum(candidates.tokens, 0))
    return candidates._replace(logprobs=known, ranks=ranks)


class NextBeams(NamedTuple):
    """The beams that run on, as the host chooses them (`select_beams`), where none but end ids end them."""

    parents: Array  # i32[G, W] running beam that each continues
    tokens: Array  # i32[G, W]
    scores: Array  # f32[G, W]; -inf in places without a beam, which compute what the best one does


def choose_beams(candidates: GroupCandidates, inputs: SamplingInputs, tries: TrieTables | None = None) -> NextBeams:
    """Of the first `inputs.beam_counts` i32[G] candidates; `inputs.end_ids` i32[G, E] are padded with -2."""
    scores, parents, tokens, *_ = candidates
    is_used = (tokens >= 0) & (jnp.arange(tokens.shape[1]) < inputs.beam_counts[:, None])
    ends = (tokens[:, :, None] == inputs.end_ids[:, None, :]).any(axis=-1)
    if tries is not None and inputs.nodes is not None:
        rows = jnp.maximum(jnp.take_along_axis(inputs.beam_rows, jnp.maximum(parents, 0), axis=1), 0)
        behind = advance(tries, inputs.nodes[rows].reshape(-1), tokens.reshape(-1))
        ends |= are_leaves(tries, behind).reshape(ends.shape)
    ranks = jnp.where(is_used, scores + jnp.where(ends, NOT, 0.0), -jnp.inf)
    ranks = jnp.where(ranks == 0, 0.0, ranks)  # -0.0 too, which top_k puts behind 0.0, and the host does not
    width = inputs.beam_rows.shape[1]
    ranks = jnp.pad(ranks, ((0, 0), (0, max(0, width - ranks.shape[1]))), constant_values=-jnp.inf)
    ranks, chosen = jax.lax.top_k(ranks, width)
    chosen = jnp.where(ranks > -jnp.inf, chosen, chosen[:, :1])
    return NextBeams(
        parents=jnp.maximum(jnp.take_along_axis(parents, chosen, axis=1), 0),
        tokens=jnp.maximum(jnp.take_along_axis(tokens, chosen, axis=1), 0),
        scores=jnp.where(jnp.take_along_axis(ends, chosen, axis=1), -jnp.inf, ranks),
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
