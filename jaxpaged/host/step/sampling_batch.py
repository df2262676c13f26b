"""The sampling parameters of a step's rows as arrays; only those that the run's features call for."""

from __future__ import annotations

import math

import numpy as np

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.request_params import LOGIT_BIAS_LIMIT
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.host.step.constraint_batch import with_limits
from jaxpaged.host.step.features import SamplingFeatures, penalties, processor_places
from jaxpaged.host.step.step_plan import Sample
from jaxpaged.step_io import DecodeBatch, SamplingInputs, StepBatch

#: How a beam's row is sampled from, which nobody reads.
UNDRAWN = SamplingParams(temperature=0)


def make_sampling_inputs(
    samples: list[Sample], num_rows: int, history_len: int, vocab_size: int, features: SamplingFeatures
) -> SamplingInputs:
    """Arrays of `num_rows` rows, of which the first `len(samples)` are real; the others are greedy and unread."""
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
        inputs = with_edits(inputs, samples, num_rows, features)
    if features.tries is not None or features.has_masks:
        inputs = with_limits(inputs, samples, num_rows, vocab_size, features)
    if features.max_allowed:
        inputs = _with_allowed(inputs, samples, num_rows, num_rows * features.max_allowed)
    return inputs


def make_beam_rows(samples: list[Sample], num_rows: int, widths: tuple[int, int]) -> np.ndarray:
    """i32[G, W]: rows of each group of beams in the order in which they come; as many groups as may fit the rows."""
    least, most = widths
    beam_rows = np.full((max(1, num_rows // least), most), -1, np.int32)
    row = num_groups = 0
    while row < len(samples):
        group = samples[row].group
        for state in group.running_beams:
            beam_rows[num_groups, : state.width] = np.arange(row, row + state.width)
            num_groups, row = num_groups + 1, row + state.width
        row += 0 if group.beams else 1
    return beam_rows


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
    inputs: SamplingInputs, samples: list[Sample], num_rows: int, features: SamplingFeatures
) -> SamplingInputs:
    size = num_rows * features.max_edits
    edits = [(i, *edit) for i, sample in enumerate(samples) for edit in _edits(sample)]
    rows, tokens, values = zip(*edits, strict=True) if edits else ((), (), ())
    return inputs._replace(
        edit_rows=_rows(rows, (size,), np.int32, num_rows),  # a row that is out of range is dropped
        edit_tokens=_rows(tokens, (size,), np.int32),
        edit_values=_rows(values, (size,), np.float32),
    )


def _edits(sample: Sample) -> list[tuple[int, float]]:
    """(token, number to add to its logit) for one row: bias, banned words, and no end before min_tokens."""
    group, sequence = sample.group, sample.sequence
    bias = group.params.logit_bias or {}
    edits = [(token, min(max(value, -LOGIT_BIAS_LIMIT), LOGIT_BIAS_LIMIT)) for token, value in bias.items()]
    if sequence.num_generated < group.params.min_tokens:
        edits += [(token, -math.inf) for token in sorted(group.eos_ids | group.stop_ids)]
    for word in group.banned_words:
        *before, last = word
        output = sequence.token_ids[max(sequence.prompt_len, sequence.num_tokens - len(before)) :]
        if not before or output == before:
            edits.append((last, -math.inf))
    return edits


def _with_allowed(inputs: SamplingInputs, samples: list[Sample], num_rows: int, size: int) -> SamplingInputs:
    allowed = [(i, token) for i, s in enumerate(samples) for token in s.group.params.allowed_token_ids or ()]
    rows, tokens = zip(*allowed, strict=True) if allowed else ((), ())
    restricted = [s.group.params.allowed_token_ids is not None for s in samples]
    return inputs._replace(
        is_restricted=_rows(restricted, (num_rows,), np.int32),
        allowed_rows=_rows(rows, (size,), np.int32, num_rows),
        allowed_tokens=_rows(tokens, (size,), np.int32),
    )


def _seed_words(seed: int) -> tuple[int, int]:
    """The high and low 32 bits of a seed."""
    return seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF


def _rows(values, shape: tuple[int, ...], dtype, fill: float = 0) -> np.ndarray:
    array = np.full(shape, fill, dtype)
    if len(values):
        array[: len(values)] = values
    return array
