"""The door between host and device: the arrays that cross it, and how they cross in one transfer.

The host fills NamedTuples of numpy arrays; `pack` lays them end to end in one int32 array (float bits reinterpreted),
the device unpacks by the `Layout`, which is static to jit. An array that a step does not need is None: it takes no
bytes, and the compiled step has no code for it. Axis letters: B rows, T packed new tokens, R rows to sample, P pages
a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

#: Never allocated. Padding entries of block tables name it, padding rows write to it; its contents reach no output.
NULL_PAGE = 0

#: As a number of log-probabilities: those of every token of the vocabulary, in the order of their ids.
WHOLE_VOCABULARY = -1


class PrefixGroups(NamedTuple):
    """Runs of full pages that several rows of a decode step have in common, each to be read once for all its rows.

    A row belongs to one group at most at each level. Its run of level 1 starts where that of level 0 ends (first the
    prompt, then what some beams have in common), or at its first page if it has none there; from `own_starts` on it
    reads alone. V groups of M members at most, L levels.
    """

    members: Any  # i32[V, M] rows whose queries are stacked, padded with -1; a padding group has only -1
    first_pages: Any  # i32[V] index into the members' block tables where the common run starts
    num_pages: Any  # i32[V] length of the run in pages; 0 for a padding group
    own_starts: Any  # i32[B] first token position that the row reads alone, a multiple of the page size
    parts: Any  # i32[L, B] group * M + column of the row in its group at that level, -1: in none


class DecodeInputs(NamedTuple):
    """One new token a row. Padding rows have context length 0 and write to NULL_PAGE."""

    tokens: Any  # i32[B]
    positions: Any  # i32[B]
    slot_mapping: Any  # i32[B] where each new token's K and V go: page * page_size + offset
    block_tables: Any  # i32[B, P]
    context_lens: Any  # i32[B] tokens readable in this step, the new one included
    prefix_groups: PrefixGroups | None = None  # what is read once for several rows; None: nothing


class PrefillInputs(NamedTuple):
    """Many new tokens a row, packed: row b owns tokens [query_starts[b], query_starts[b] + query_lens[b])."""

    tokens: Any  # i32[T]
    positions: Any  # i32[T]
    slot_mapping: Any  # i32[T]
    block_tables: Any  # i32[B, P]
    query_starts: Any  # i32[B]
    query_lens: Any  # i32[B] 0 for padding rows
    context_lens: Any  # i32[B] tokens readable by the row's last query
    sample_from: Any  # i32[R] index of the packed token whose logits row r samples from
    next_tokens: Any = None  # i32[T] the token after each one; only when prompt log-probabilities are wanted


class SamplingInputs(NamedTuple):
    """How each of the R rows chooses its token. All-None but the first three fields is greedy."""

    seeds: Any  # i32[R, 2] high and low word
    sample_indices: Any  # i32[R] which sample of its request
    positions: Any  # i32[R] of the token to be chosen
    running_scores: Any = None  # f32[R] what a beam's next log-probabilities are added to; only where beams run
    beam_temperatures: Any = None  # f32[R] of beams that are drawn; 0: the best are taken
    temperatures: Any = None  # f32[R]; 0 is greedy
    top_ps: Any = None  # f32[R]
    top_ks: Any = None  # i32[R]; V when all are kept
    min_ps: Any = None  # f32[R]
    # Tokens so far, for penalties and logits processors
    history: Any = None  # i32[R, L], padded with -1
    history_lens: Any = None  # i32[R]
    prompt_lens: Any = None  # i32[R]
    penalties: Any = None  # f32[R, 3] repetition, presence, frequency
    # Sparse edits of single logits: bias, banned words, end tokens before min_tokens
    edit_rows: Any = None  # i32[E], padded with R
    edit_tokens: Any = None  # i32[E]
    edit_values: Any = None  # f32[E], added
    # Restriction to a list of tokens
    is_restricted: Any = None  # i32[R], 0 or 1
    allowed_rows: Any = None  # i32[A], padded with R
    allowed_tokens: Any = None  # i32[A]
    uses_processor: Any = None  # i32[R, number of processors], 0 or 1


class DecodeBatch(NamedTuple):
    inputs: DecodeInputs
    sampling: SamplingInputs


class PrefillBatch(NamedTuple):
    inputs: PrefillInputs
    sampling: SamplingInputs


class TokenLogprobs(NamedTuple):
    """Log-probabilities at some positions: of the token that is there, and of the k likeliest."""

    logprobs: np.ndarray  # f32[R]
    ranks: np.ndarray | None = None  # i32[R]
    top_ids: np.ndarray | None = None  # i32[R, k]; None beside `top_logprobs`: column v is token v
    top_logprobs: np.ndarray | None = None  # f32[R, k]


class RowCandidates(NamedTuple):
    """The likeliest continuations of every row, best first."""

    scores: np.ndarray  # f32[R, k] sums of log-probabilities
    tokens: np.ndarray  # i32[R, k]
    keys: np.ndarray | None = None  # f32[R, k] what they are ranked by, where some beams are drawn; None: the scores


class StepOutputs(NamedTuple):
    """What the host learns from a step."""

    tokens: np.ndarray  # i32[R]
    token_logprobs: TokenLogprobs
    candidates: RowCandidates | None = None  # where beams run
    prompt_logprobs: TokenLogprobs | None = None  # over the T packed tokens


#: Class of the NamedTuple, then for each field its layout: nested, None, or (dtype name, shape).
Layout = tuple[type, tuple[Any, ...]]


def pack(batch: NamedTuple) -> tuple[np.ndarray, Layout]:
    """All int32 and float32 arrays of a (nested) NamedTuple in one int32 array, and the layout that takes it apart."""
    arrays: list[np.ndarray] = []
    layout = _layout(batch, arrays)
    return np.concatenate([array.ravel().view(np.int32) for array in arrays]), layout


def _layout(batch: Any, arrays: list[np.ndarray]) -> Layout:
    fields = []
    for value in batch:
        if value is None:
            fields.append(None)
        elif isinstance(value, tuple):
            fields.append(_layout(value, arrays))
        else:
            assert value.dtype in (np.int32, np.float32), value.dtype
            arrays.append(value)
            fields.append((str(value.dtype), value.shape))
    return type(batch), tuple(fields)


def unpack_logprobs(columns: np.ndarray, num_logprobs: int | None) -> TokenLogprobs:
    """The device's i32[R, 1 or 2 + 2k] columns: log-probability bits, rank, k token ids, k log-probability bits.

    For WHOLE_VOCABULARY i32[R, 2 + V]: no ids.
    """
    logprobs = columns[:, 0].copy().view(np.float32)
    if num_logprobs is None:
        return TokenLogprobs(logprobs)
    if num_logprobs == WHOLE_VOCABULARY:
        return TokenLogprobs(logprobs, columns[:, 1], None, np.ascontiguousarray(columns[:, 2:]).view(np.float32))
    top_ids = columns[:, 2 : 2 + num_logprobs]
    top_logprobs = np.ascontiguousarray(columns[:, 2 + num_logprobs :]).view(np.float32)
    return TokenLogprobs(logprobs, columns[:, 1], top_ids, top_logprobs)


def unpack_candidates(columns: np.ndarray, count: int) -> RowCandidates:
    """The device's i32[R, 2 or 3 times k] columns: k score bits, k token ids, k key bits."""
    scores, tokens, *keys = (np.ascontiguousarray(columns[:, i : i + count]) for i in range(0, columns.shape[1], count))
    return RowCandidates(scores.view(np.float32), tokens, keys[0].view(np.float32) if keys else None)
