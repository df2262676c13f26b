"""The sampling parameters of a step's rows as arrays; only those that the run's features call for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import numpy as np

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.request_params import LOGIT_BIAS_LIMIT
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.host.beams.beam_state import BeamState
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.step.constraint_batch import with_limits
from jaxpaged.host.step.features import SamplingFeatures, penalties, processor_places
from jaxpaged.host.step.step_plan import Sample, SearchRows, StepPlan
from jaxpaged.step_io import NULL_PAGE, DecodeBatch, SamplingInputs, StepBatch

#: How a beam's row is sampled from, which nobody reads.
UNDRAWN = SamplingParams(temperature=0)


def make_sampling_inputs(
    samples: list[Sample],
    num_rows: int,
    history_len: int,
    vocab_size: int,
    features: SamplingFeatures,
    searches: SequenceOf[SearchRows] = (),
) -> SamplingInputs:
    """Arrays of `num_rows` rows, of which the first are those of the samples, and then of the searches; the others are
    greedy and unread."""
    params = [sample.group.params for sample in samples]
    draws = [p if isinstance(p, SamplingParams) else UNDRAWN for p in params] if features.is_random else []
    seeded = samples if features.needs_seeds else []
    inputs = SamplingInputs(
        seeds=_rows([_seed_words(s.group.seed) for s in seeded], (num_rows, 2), np.uint32).view(np.int32),
        sample_indices=_rows([s.sequence.sample_index for s in seeded], (num_rows,), np.int32),
        positions=_rows([s.sequence.num_tokens for s in seeded], (num_rows,), np.int32),
    )
    if features.num_candidates and features.draws_tokens:
        inputs = inputs._replace(is_beam=_rows([bool(s.group.beams) for s in samples], (num_rows,), np.int32))
    if features.num_candidates:
        inputs = inputs._replace(running_scores=_running_scores(samples, num_rows))
    if features.draws_beams:
        drawn = [isinstance(p, BeamSearchParams) and p.do_sample for p in params]
        temperatures = [p.temperature if is_drawn else 0.0 for p, is_drawn in zip(params, drawn, strict=True)]
        inputs = inputs._replace(beam_temperatures=_rows(temperatures, (num_rows,), np.float32))
    if features.is_random:
        inputs = inputs._replace(temperatures=_rows([p.temperature for p in draws], (num_rows,), np.float32))
    if features.is_filtered:
        inputs = inputs._replace(
            top_ps=_rows([p.top_p for p in draws], (num_rows,), np.float32, 1.0),
            top_ks=_rows(
                [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in draws], (num_rows,), np.int32, 1
            ),
            min_ps=_rows([p.min_p for p in draws], (num_rows,), np.float32),
        )
    if features.is_penalised:
        inputs = inputs._replace(penalties=_rows([penalties(p) for p in params], (num_rows, 3), np.float32, 1.0))
    if features.processors:
        uses = np.zeros((num_rows, len(features.processors)), np.int32)
        for row, p in enumerate(params):
            uses[row, processor_places(features.processors, p)] = 1
        inputs = inputs._replace(uses_processor=uses)
    if features.needs_history:
        inputs = _with_history(inputs, samples, num_rows, history_len)
    if features.max_edits:
        inputs = with_edits(inputs, samples, num_rows, features, searches)
    if features.tries is not None or features.has_masks:
        inputs = with_limits(inputs, samples, num_rows, vocab_size, features, searches)
    if features.max_allowed:
        inputs = _with_allowed(inputs, samples, num_rows, num_rows * features.max_allowed, searches)
    _add_searches(inputs, searches, vocab_size, features)
    return inputs


def with_groups(inputs: SamplingInputs, plan: StepPlan, num_rows: int, features: SamplingFeatures) -> SamplingInputs:
    """The inputs of a step that merges the rows of each group of beams: which these are, i32[G, W], in the order in
    which they come, and by what a group chooses. As many groups as may fit the rows."""
    assert features.merged_widths is not None, "these beams choose one after the other"
    least, most = features.merged_widths
    num_groups = max(1, num_rows // least)
    beam_rows = np.full((num_groups, most), -1, np.int32)
    end_ids = np.full((num_groups, features.max_ends), -2, np.int32)
    counts = np.zeros(num_groups, np.int32)
    for i, (state, row) in enumerate(_states_of(plan)):
        beam_rows[i, : state.width] = np.arange(row, row + state.width)
        end_ids[i, : len(state.end_ids)] = state.end_ids
        counts[i] = state.num_candidates
    return inputs._replace(beam_rows=beam_rows, end_ids=end_ids, beam_counts=counts)


def _states_of(plan: StepPlan) -> Iterator[tuple[BeamState, int]]:
    """Every group of beams of a decode step, with its first row."""
    samples, row = plan.samples, 0
    while row < len(samples):
        group = samples[row].group
        for state in group.running_beams:
            yield state, row
            row += state.width
        row += 0 if group.beams else 1
    for group, row, _, _ in plan.searches:
        yield group.beams[0], row


def _add_searches(
    inputs: SamplingInputs, searches: SequenceOf[SearchRows], vocab_size: int, features: SamplingFeatures
) -> None:
    """Fill in the rows of searches whose beams are arrays."""
    for group, row, width, position in searches:
        rows, params, state = slice(row, row + width), group.params, group.beams[0]
        assert isinstance(params, BeamSearchParams)
        if features.needs_seeds:
            inputs.seeds[rows] = np.array(_seed_words(group.seed), np.uint32).view(np.int32)
            inputs.sample_indices[rows] = np.arange(width)
            inputs.positions[rows] = position + 1
        inputs.running_scores[rows] = state.running_scores
        if inputs.is_beam is not None:
            inputs.is_beam[rows] = 1
        if inputs.beam_temperatures is not None:
            inputs.beam_temperatures[rows] = params.temperature if params.do_sample else 0.0
        if inputs.top_ks is not None:
            inputs.top_ks[rows] = vocab_size
        if inputs.penalties is not None:
            inputs.penalties[rows] = penalties(params)
        if inputs.uses_processor is not None:
            inputs.uses_processor[rows, processor_places(features.processors, params)] = 1
        if inputs.history is not None:
            prompt = group.sequences[0].token_ids
            inputs.history[rows, : len(prompt)] = prompt
            inputs.history[rows, len(prompt) : position + 1] = state.running_token_ids()
            inputs.history_lens[rows] = position + 1
            inputs.prompt_lens[rows] = len(prompt)
        if inputs.is_restricted is not None:
            inputs.is_restricted[rows] = params.allowed_token_ids is not None


def with_carried_beams(batch: DecodeBatch, table_width: int) -> DecodeBatch:
    """The batch for a device that has the tables and sums of its beams, and their histories, from the step before."""
    inputs = batch.inputs._replace(
        slot_mapping=None, copies=None, block_tables=np.zeros((0, table_width), np.int32),
        fresh_pages=np.full(len(batch.inputs.tokens), NULL_PAGE, np.int32),
    )  # fmt: skip
    sampling = batch.sampling._replace(running_scores=batch.sampling.running_scores[:0])
    if sampling.history is not None:
        page_size = sampling.history.shape[1] // batch.inputs.block_tables.shape[1]
        sampling = sampling._replace(history=np.zeros((0, table_width * page_size), np.int32))
    return DecodeBatch(inputs, sampling)


def without_history(batch: DecodeBatch) -> DecodeBatch:
    """The batch for a device that has its history from the step before."""
    sampling = batch.sampling
    return batch._replace(sampling=sampling._replace(history=sampling.history[:0]))


def has_kept_history(batch: StepBatch) -> bool:
    """Whether the device is to take over the history of the step before."""
    return batch.sampling.history is not None and not len(batch.sampling.history)


def _running_scores(samples: list[Sample], num_rows: int) -> np.ndarray:
    """f32[R]: sums of log-probabilities of beams that have begun; 0 for a prompt of beams, and for samples."""
    scores = np.zeros(num_rows, np.float32)
    row = 0
    while row < len(samples):
        group = samples[row].group
        if not group.beams or not group.is_forked:
            row += 1
            continue
        for state in group.running_beams:
            scores[row : row + state.width] = state.running_scores
            row += state.width
    return scores


def _with_history(inputs: SamplingInputs, samples: list[Sample], num_rows: int, length: int) -> SamplingInputs:
    history = np.full((num_rows, length), -1, np.int32)
    for i, (group, sequence, _) in enumerate(samples):
        # Beams take over one another's tokens.
        history[i, : len(sequence.token_ids)] = sequence.token_ids if group.beams else sequence.pack_ids()
    return inputs._replace(
        history=history,
        history_lens=_rows([s.sequence.num_tokens for s in samples], (num_rows,), np.int32),
        prompt_lens=_rows([s.sequence.prompt_len for s in samples], (num_rows,), np.int32),
    )


def with_edits(
    inputs: SamplingInputs,
    samples: list[Sample],
    num_rows: int,
    features: SamplingFeatures,
    searches: SequenceOf[SearchRows] = (),
) -> SamplingInputs:
    size = num_rows * features.max_edits
    edits = [(i, 1, _edits(group, one, one.num_generated)) for i, (group, one, _) in enumerate(samples)]
    for group, row, width, position in searches:
        prompt = group.sequences[0]
        edits.append((row, width, _edits(group, prompt, position + 1 - prompt.prompt_len)))
    rows, values = _spread_over_rows([(row, count, of_row) for row, count, of_row in edits if of_row])
    return inputs._replace(
        edit_rows=_rows(rows, (size,), np.int32, num_rows),  # a row that is out of range is dropped
        edit_tokens=_rows(values[:, 0], (size,), np.int32),
        edit_values=_rows(values[:, 1], (size,), np.float32),
    )


def _spread_over_rows(entries: list[tuple[int, int, list]]) -> tuple[np.ndarray, np.ndarray]:
    """Of (first row, number of rows, what each of them has): a row number for each, and what it has, f64[n, 2]."""
    rows = [np.repeat(np.arange(row, row + count), len(values)) for row, count, values in entries]
    values = [np.tile(np.array(values, np.float64), (count, 1)) for _, count, values in entries]
    return np.concatenate([np.zeros(0, int), *rows]), np.concatenate([np.zeros((0, 2)), *values])


def _edits(group: SequenceGroup, sequence: Sequence, num_generated: int) -> list[tuple[int, float]]:
    """(token, number to add to its logit) for one row: bias, banned words, and no end before min_tokens."""
    bias = group.params.logit_bias or {}
    edits = [(token, min(max(value, -LOGIT_BIAS_LIMIT), LOGIT_BIAS_LIMIT)) for token, value in bias.items()]
    if num_generated < group.params.min_tokens:
        edits += [(token, -math.inf) for token in sorted(group.eos_ids | group.stop_ids)]
    for word in group.banned_words:
        *before, last = word
        output = sequence.token_ids[max(sequence.prompt_len, sequence.num_tokens - len(before)) :]
        if not before or output == before:
            edits.append((last, -math.inf))
    return edits


def _with_allowed(
    inputs: SamplingInputs, samples: list[Sample], num_rows: int, size: int, searches: SequenceOf[SearchRows]
) -> SamplingInputs:
    where = [(i, 1, s.group) for i, s in enumerate(samples)]
    where += [(row, width, group) for group, row, width, _ in searches]
    allowed = [
        (row, count, [(token, 0) for token in group.params.allowed_token_ids])
        for row, count, group in where
        if group.params.allowed_token_ids
    ]
    rows, tokens = _spread_over_rows(allowed)
    restricted = [s.group.params.allowed_token_ids is not None for s in samples]
    return inputs._replace(
        is_restricted=_rows(restricted, (num_rows,), np.int32),
        allowed_rows=_rows(rows, (size,), np.int32, num_rows),
        allowed_tokens=_rows(tokens[:, 0], (size,), np.int32),
    )


def _seed_words(seed: int) -> tuple[int, int]:
    """The high and low 32 bits of a seed."""
    return seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF


def _rows(values, shape: tuple[int, ...], dtype, fill: float = 0) -> np.ndarray:
    array = np.full(shape, fill, dtype)
    if len(values):
        array[: len(values)] = values
    return array
