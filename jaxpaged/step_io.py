"""The door between host and device: the arrays that cross it, and how they cross in one transfer.

The host fills NamedTuples of numpy arrays; `pack` lays them end to end in one int32 array (float bits reinterpreted),
the device unpacks by the `Layout`, which is static to jit. An array that a step does not need is None: it takes no
bytes, and the compiled step has no code for it. Axis letters: B rows, T packed new tokens, R rows to sample, P pages
a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.cascade_groups import CascadeGroups as CascadeGroups

#: Never allocated. Padding entries of block tables name it, padding rows write to it; its contents reach no output.
NULL_PAGE = 0

#: As a number of log-probabilities: those of every token of the vocabulary, in the order of their ids.
WHOLE_VOCABULARY = -1

#: In place of a token, why a row has none: all are forbidden (or a group of beams has no more of them); the model's
#: logits are not finite; those that processing left have NaN or +inf.
NO_TOKEN, BAD_LOGITS, BAD_PROCESSED = -1, -2, -3


#: Of the tries of a run: what limits nothing, and what nothing comes behind.
FREE_NODE, DEAD_NODE = 1, 0


def of_row(row: int) -> int:
    """In place of a token: the one that row `row` of the step before has chosen. Its own reverse."""
    return -1 - row


class DecodeInputs(NamedTuple):
    """One new token a row. Padding rows have context length 0 and write to NULL_PAGE."""

    tokens: Any  # i32[B] ids; below 0 (`of_row`) where the host does not know yet what the step before chose
    positions: Any  # i32[B]
    slot_mapping: Any  # i32[B] where each new token's K and V go: page * page_size + offset; None with `fresh_pages`
    block_tables: Any  # i32[B, P]; with `fresh_pages` i32[0, P]
    context_lens: Any  # i32[B] tokens readable in this step, the new one included
    copies: Any = None  # i32[2, B] source and destination pages, copied before anything is written; None: no list
    cascade_groups: CascadeGroups | None = None  # what is read once for several rows; None: nothing
    # i32[B] of rows that begin a page, which one; 0 for others. The device has the tables from the step before, whose
    # rows were the same, and gives them to the beams that go on.
    fresh_pages: Any = None


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


class TrieTables(NamedTuple):
    """The tries of a run. The children of a node lie side by side, in order of their tokens."""

    first: Any  # i32[N] the first child of each node
    counts: Any  # i32[N] children
    tokens: Any  # i32[N] the token that leads to each node
    bit_rows: Any  # i32[N] row of `bits` that has its children's tokens; DEAD_NODE where the node only lists them
    bits: Any  # i32[B, V / 32]; nothing in row DEAD_NODE, everything in row FREE_NODE
    places: Any  # i32[C] 0, 1, ... for the most children that a node lists


StepInputs = DecodeInputs | PrefillInputs


class MixedInputs(NamedTuple):
    """B rows of one new token, and behind them T packed tokens of other rows, B + T tokens in all."""

    decode: DecodeInputs  # without copies and groups; as many rows as are sampled from, B = R
    prefill: PrefillInputs  # `sample_from` counts the tokens of `decode`, too


class SamplingInputs(NamedTuple):
    """How each of the R rows chooses its token, or a beam its candidates. All-None but the first three is greedy."""

    seeds: Any  # i32[R, 2] high and low word
    sample_indices: Any  # i32[R] which sample of its request
    positions: Any  # i32[R] of the token to be chosen
    # f32[R] what a beam's next log-probabilities are added to; only where beams run. f32[0]: the device has them.
    running_scores: Any = None
    is_beam: Any = None  # i32[R], 0 or 1; only where beams and samples run together
    beam_temperatures: Any = None  # f32[R] of beams that are drawn; 0: the best are taken
    beam_rows: Any = None  # i32[G, W] rows of each group of beams, whose candidates are merged; padded with -1
    end_ids: Any = None  # i32[G, E] tokens that end a beam, padded with -2; with `beam_rows`
    beam_counts: Any = None  # i32[G] candidates that a group chooses from
    temperatures: Any = None  # f32[R]; 0 is greedy
    top_ps: Any = None  # f32[R]
    top_ks: Any = None  # i32[R]; V when all are kept
    min_ps: Any = None  # f32[R]
    # Tokens so far, for penalties and logits processors. A decode step adds the one that it computes. No rows,
    # i32[0, L]: the device has them from the step before, whose rows were the same.
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
    # What a constraint limits each row to: a node of the run's tries, and the bits of the tokens that are allowed
    nodes: Any = None  # i32[R] node; below 0 (`of_row`) the one that the row of the step before has come to
    masks: Any = None  # i32[R, V / 32], token v is bit v % 32 of word v / 32


class DecodeBatch(NamedTuple):
    inputs: DecodeInputs
    sampling: SamplingInputs


class PrefillBatch(NamedTuple):
    inputs: PrefillInputs
    sampling: SamplingInputs


class MixedBatch(NamedTuple):
    inputs: MixedInputs
    sampling: SamplingInputs


StepBatch = DecodeBatch | PrefillBatch | MixedBatch


class TokenLogprobs(NamedTuple):
    """Log-probabilities at some positions: of the token that is there, and of the k likeliest."""

    logprobs: np.ndarray  # f32[R]
    ranks: np.ndarray | None = None  # i32[R]
    top_ids: np.ndarray | None = None  # i32[R, k]; None beside `top_logprobs`: column v is token v
    top_logprobs: np.ndarray | None = None  # f32[R, k]


class RowCandidates(NamedTuple):
    """The likeliest continuations of every row, best first."""

    scores: Any  # f32[R, k] sums of log-probabilities; -inf where nothing that is possible is left
    tokens: Any  # i32[R, k]; BAD_LOGITS or BAD_PROCESSED in all of a row that can choose nothing
    keys: Any = None  # f32[R, k] what they are ranked by, where some beams are drawn; None: the scores
    logprobs: Any = None  # f32[R, k] of the tokens, under the model alone; None where nobody asks
    ranks: Any = None  # i32[R, k] of the tokens among the whole vocabulary; with `logprobs`


class GroupCandidates(NamedTuple):
    """The best continuations of all beams of each group: best first, or in the order in which they were drawn."""

    scores: Any  # f32[G, C]; -inf where nothing that is possible is left
    parents: Any  # i32[G, C] beam of the group that is continued; -1 where a group has no more
    tokens: Any  # i32[G, C]; NO_TOKEN there, BAD_LOGITS or BAD_PROCESSED in all where one of its rows has these
    logprobs: Any = None  # f32[G, C]
    ranks: Any = None  # i32[G, C]


class Wanted(NamedTuple):
    """What the host wants to learn of a step: static to jit, and how both sides know the columns of the result."""

    draws_tokens: bool = True  # a token of every row; False where all rows are beams
    num_logprobs: int | None = None  # likeliest tokens of every row; None: not even the rank of a drawn one
    num_candidates: int = 0  # of a row or group; 0: no beams
    draws_beams: bool = False
    beam_logprobs: bool = False  # log-probabilities and ranks of candidates
    num_prompt_logprobs: int | None = None


TOKENS_ALONE = Wanted()


class StepOutputs(NamedTuple):
    """What the host learns from a step."""

    tokens: np.ndarray  # i32[R], below 0 why there is none; empty where no row draws
    token_logprobs: TokenLogprobs
    candidates: RowCandidates | GroupCandidates | None = None  # where beams run
    prompt_logprobs: TokenLogprobs | None = None  # over the T packed tokens


_DTYPE_NAMES = {np.dtype(np.int32): "int32", np.dtype(np.float32): "float32"}  # asking numpy for a name takes long

#: Class of the NamedTuple, then for each field its layout: nested, None, or (dtype name, shape).
Layout = tuple[type, tuple[Any, ...]]


def pack(batch: NamedTuple) -> tuple[np.ndarray, Layout]:
    """All int32 and float32 arrays of a (nested) NamedTuple in one int32 array, and the layout that takes it apart."""
    arrays: list[np.ndarray] = []
    layout = _layout(batch, arrays)
    return np.concatenate([array.reshape(-1).view(np.int32) for array in arrays]), layout


def _layout(batch: Any, arrays: list[np.ndarray]) -> Layout:
    fields = []
    for value in batch:
        if value is None:
            fields.append(None)
        elif isinstance(value, tuple):
            fields.append(_layout(value, arrays))
        else:
            arrays.append(value)
            fields.append((_DTYPE_NAMES[value.dtype], value.shape))
    return type(batch), tuple(fields)


def num_merged_groups(layout: Layout) -> int:
    """Groups of beams whose candidates the device merges in a step of this layout; 0: it gives them row by row."""
    _, (_, (kind, fields)) = layout
    rows = fields[kind._fields.index("beam_rows")]
    return 0 if rows is None else rows[1][0]


def unpack_logprobs(columns: np.ndarray, num_logprobs: int | None, has_tokens: bool = True) -> TokenLogprobs:
    """The i32[R, n] columns of a step: log-probability bits of tokens and (unless `num_logprobs` is None) their ranks,
    if there are tokens; then the k likeliest tokens and their log-probability bits, or for WHOLE_VOCABULARY the bits of
    all V log-probabilities.
    """
    own = (1 if num_logprobs is None else 2) if has_tokens else 0
    logprobs = columns[:, :own][:, :1].copy().view(np.float32)[:, 0] if own else np.empty(0, np.float32)
    if num_logprobs is None:
        return TokenLogprobs(logprobs)
    ranks = columns[:, 1] if own else None
    if num_logprobs == WHOLE_VOCABULARY:
        return TokenLogprobs(logprobs, ranks, None, _floats(columns[:, own:]))
    top_ids = columns[:, own : own + num_logprobs]
    top_logprobs = _floats(columns[:, own + num_logprobs : own + 2 * num_logprobs])
    return TokenLogprobs(logprobs, ranks, top_ids, top_logprobs)


def unpack_outputs(columns: np.ndarray, wanted: Wanted, num_groups: int) -> StepOutputs:
    """A step's i32[R, n] columns: drawn tokens, `unpack_logprobs`' columns, then those of the candidates."""
    tokens = columns[:, 0] if wanted.draws_tokens else np.empty(0, np.int32)
    start = int(wanted.draws_tokens)
    # Of beams alone the likeliest tokens are returned only where some request keeps log-probabilities.
    num_logprobs = wanted.num_logprobs if wanted.draws_tokens or wanted.beam_logprobs else None
    if num_logprobs == WHOLE_VOCABULARY:
        assert not wanted.num_candidates, "beams keep likeliest tokens, never the whole vocabulary"
        end = columns.shape[1]
    else:
        end = start + (wanted.draws_tokens * (1 if num_logprobs is None else 2)) + 2 * (num_logprobs or 0)
    outputs = StepOutputs(tokens, unpack_logprobs(columns[:, start:end], num_logprobs, wanted.draws_tokens))
    if not wanted.num_candidates:
        return outputs
    rest = columns[:, end:]
    if num_groups:
        count = 5 if wanted.beam_logprobs else 3
        flat = rest.ravel()[: num_groups * count * wanted.num_candidates]
        fields = np.split(flat.reshape(num_groups, -1), count, axis=1)
        extra = (_floats(fields[3]), fields[4]) if wanted.beam_logprobs else ()
        return outputs._replace(candidates=GroupCandidates(_floats(fields[0]), fields[1], fields[2], *extra))
    fields = np.split(rest, 2 + wanted.draws_beams + 2 * wanted.beam_logprobs, axis=1)
    keys = _floats(fields[2]) if wanted.draws_beams else None
    extra = (_floats(fields[-2]), fields[-1]) if wanted.beam_logprobs else ()
    return outputs._replace(candidates=RowCandidates(_floats(fields[0]), fields[1], keys, *extra))


def _floats(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.float32)
