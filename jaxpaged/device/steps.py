"""The compiled steps: everything that runs on the device between two decisions of the host.

Each takes the cache by donation and returns its successor, so the pool is updated in place. Static are the model, the
attention kernels and the layout of the packed inputs (hence the bucket); everything else is data. A step returns what
the host must learn in one int32 array, and the tokens that it chose in another that stays on the device, so that the
next step can be launched before the host has learnt anything. programs.py keeps what is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.api.request_params import LogitsProcessor
from jaxpaged.config import ModelConfig
from jaxpaged.device.attention import AttentionKernels
from jaxpaged.device.beam_candidates import (
    NextBeams,
    beam_columns,
    choose_beams,
    group_candidates,
    group_columns,
    with_logprobs,
)
from jaxpaged.device.beam_tables import CarriedBeams, carry, descend, of_parents
from jaxpaged.device.cache import CopiesPages, KVCache, PagedCache
from jaxpaged.device.constraints import next_nodes, with_masks
from jaxpaged.device.heads import Heads
from jaxpaged.device.mesh import MOVED_PAGES, POOL, first_replaced, mesh_of
from jaxpaged.device.model import Attend, compute_logits, embed, finish, forward, run_layers
from jaxpaged.device.param_nodes import Params
from jaxpaged.device.programs import PROGRAMS, ProgramToMake, reads_cache, takes_cache
from jaxpaged.device.sampling import likeliest_tokens, process_logits, row_failures, sample_tokens, token_logprobs
from jaxpaged.step_io import (
    NO_TOKEN,
    TOKENS_ALONE,
    DecodeBatch,
    DecodeInputs,
    Layout,
    MixedBatch,
    PrefillBatch,
    PrefillInputs,
    SamplingInputs,
    StepInputs,
    TrieTables,
    Wanted,
    of_row,
)

Array = jax.Array
Cache = TypeVar("Cache", bound=KVCache)

#: From that many layers on a decode step that the host waits for is two programs, and the share of them in the first.
#: Measured on an H100 with 32 layers: with 6 in the first program a step takes 9.2 ms, with 10 9.5, with 2 10.3, and as
#: one program 10.1.
DEEP, FIRST_SHARE = 16, 0.2

#: Packed tokens whose prompt log-probabilities are computed at a time: bounds the logits in memory.
LOGPROB_TILE = 128


class Carried(NamedTuple):
    """What a step leaves on the device for the next one."""

    tokens: Array  # i32[M] that each row has drawn, which the next step begins with; 0 where there is none
    history: Array | None = None  # i32[R, L] tokens of each row of a decode step, if some request asks for them
    nodes: Array | None = None  # i32[M] where rows have come to in the tries of a run that has some
    tries: TrieTables | None = None  # those tries; whoever launches a step adds them
    beams: CarriedBeams | None = None  # of a decode step whose candidates are merged


class StepResults(NamedTuple):
    """What a step leaves behind besides the cache."""

    columns: Array  # i32[R, columns] in host memory, which `step_io.unpack_outputs` takes apart
    carried: Carried
    prompt_columns: Array | None = None  # i32[T, columns] in host memory, if the prompt's log-probabilities are wanted


class DecodePart(NamedTuple):
    """Layers that are one program of a decode step, and the parameters with these alone."""

    layers: tuple[int, int]  # from the first up to the second
    params: Params


def decode_parts(params: Params, config: ModelConfig, is_async: bool) -> tuple[DecodePart, ...]:
    """A model as `decode_step` takes it: cut once, and not in every step.

    Where the host waits for a step before it launches the next, a deep model is two programs. The host needs a
    millisecond or two to launch some 14 kernels a layer, although they are one CUDA graph, and nothing runs before it
    is done: so a short first program keeps the device busy while the second is launched. Where the next step is
    launched while one runs (`is_async`), the device is busy anyway, and one launch costs the host less than two.
    """
    first = round(config.num_layers * FIRST_SHARE) if config.num_layers >= DEEP and not is_async else 0
    return tuple(
        DecodePart((start, end), dataclasses.replace(params, layers=params.layers[start:end]))
        for start, end in ((0, first), (first, config.num_layers))
        if start < end
    )


def decode_step(
    parts: tuple[DecodePart, ...],
    cache: Cache,
    carried: Carried,
    packed: Array | np.ndarray,
    *,
    config: ModelConfig,
    kernels: AttentionKernels,
    layout: Layout,
    wanted: Wanted = TOKENS_ALONE,
    processors: tuple[LogitsProcessor, ...] = (),
) -> tuple[StepResults, Cache]:
    """Advance every row by one token; padding rows write to NULL_PAGE and read nothing.

    `parts` are all `decode_parts` of a model, `packed` is a packed `DecodeBatch`, `carried` what the step before left,
    with its history only where this batch has none -> results, whose columns are tokens, their log-probabilities, the
    likeliest continuations of beams, as far as they are `wanted`; the new cache.
    """
    x, kept = None, []
    for part in parts:
        static = _static_of(part, config, kernels, layout, wanted, processors)
        x, rest = decode_layers(part.params, cache.part(*part.layers), x, carried, packed, **static)
        kept.append(rest)
    assert isinstance(x, StepResults), "a model without layers"
    return x, cache.joined(kept)


def decode_programs(
    parts: tuple[DecodePart, ...], cache: KVCache, carried: Carried, packed: np.ndarray, *,
    config: ModelConfig, kernels: AttentionKernels, layout: Layout, wanted: Wanted = TOKENS_ALONE,
    processors: tuple[LogitsProcessor, ...] = (),
) -> list[ProgramToMake]:  # fmt: skip
    """The programs that `decode_step` launches for these arguments. Nothing is run, and no cache is taken."""
    batch: DecodeBatch = jax.eval_shape(functools.partial(unpack, layout=layout), packed)
    shape = (len(batch.inputs.tokens), config.hidden_size)
    layout_of_hidden = carried.tokens.sharding if mesh_of(carried.tokens) is not None else None
    hidden = jax.ShapeDtypeStruct(shape, parts[0].params.embedding.dtype, sharding=layout_of_hidden)
    programs = []
    for x, part in zip((None, *[hidden] * len(parts)), parts, strict=False):
        static = _static_of(part, config, kernels, layout, wanted, processors)
        cache_part = cache.part(*part.layers)
        programs.append(decode_layers.to_make(part.params, cache_part, x, carried, packed, **static))
    return programs


def _static_of(
    part: DecodePart, config: ModelConfig, kernels: AttentionKernels, layout: Layout, wanted: Wanted,
    processors: tuple[LogitsProcessor, ...],
) -> dict[str, Any]:  # fmt: skip
    """What a program of a decode step is compiled for: only the last one chooses tokens."""
    static: dict[str, Any] = {"config": config, "kernels": kernels, "layout": layout, "layers": part.layers}
    if part.layers[1] == config.num_layers:
        static |= {"wanted": wanted, "processors": processors}
    return static


@takes_cache
def decode_layers(
    params: Params,
    cache: KVCache,
    x: Array | None,
    carried: Carried,
    packed: Array,
    *,
    config: ModelConfig,
    kernels: AttentionKernels,
    layout: Layout,
    layers: tuple[int, int],
    wanted: Wanted = TOKENS_ALONE,
    processors: tuple[LogitsProcessor, ...] = (),
) -> tuple[Array | StepResults, KVCache]:
    """The layers from `layers[0]` up to `layers[1]` of a decode step, with parameters and cache of these alone.

    The first ones begin with the tokens (x is None), later ones with hidden x [B, E]; the last ones end with the
    results of `decode_step`, earlier ones with hidden [B, E].
    """
    batch: DecodeBatch = unpack(packed, layout)
    inputs = batch.inputs
    if inputs.fresh_pages is not None:
        batch, carried = _descended(batch, carried, cache)
        inputs = batch.inputs
    if inputs.copies is not None:
        assert isinstance(cache, CopiesPages), f"copies for a {type(cache).__name__}, which keeps no pages"
        cache = cache.copy_pages(inputs.copies[0], inputs.copies[1], kernels)
    tokens = _known(inputs.tokens, carried)
    if x is None:
        x = embed(params, config, tokens, inputs.positions)
    attend = _attend(inputs, config, kernels, layers[0])
    x, cache = run_layers(params.layers, config, x, inputs.positions, cache, attend, kernels.add_norm, layers[0])
    if layers[1] == config.num_layers:
        sampling = with_masks(_with_history(batch, tokens, carried.history), carried.tries, carried.nodes)
        hidden = finish(params, config, x)
        columns, beams = _choose(params, config, hidden, sampling, wanted, processors, carried.tries)
        drawn, kept, parents = _drawn(columns, wanted, len(carried.tokens)), None, None
        if beams is not None:
            kept, chosen = carry(inputs, beams, sampling.beam_rows)
            drawn = first_replaced(drawn, jnp.where(chosen == NO_TOKEN, drawn[: len(chosen)], chosen))
            parents = kept.parents
        nodes = next_nodes(sampling, carried.tries, drawn, parents)
        return StepResults(_for_host(columns), Carried(drawn, sampling.history, nodes, beams=kept)), cache.kept()
    return x, cache.kept()


def _descended(batch: DecodeBatch, carried: Carried, cache: KVCache) -> tuple[DecodeBatch, Carried]:
    """The batch whose beams go on from those of the step before, and what is carried for its rows."""
    assert isinstance(cache, PagedCache) and carried.beams is not None, "no step of beams came before"
    inputs = descend(batch.inputs, carried.beams, cache.k[0].shape[1])
    history = of_parents(carried.history, carried.beams)
    if history is not None:  # which is as long as a table is wide
        longer = batch.sampling.history.shape[1] - history.shape[1]
        history = jnp.pad(history, ((0, 0), (0, longer)), constant_values=-1)
    sampling = batch.sampling._replace(running_scores=carried.beams.scores)
    return batch._replace(inputs=inputs, sampling=sampling), carried._replace(history=history)


def _known(tokens: Any, carried: Carried) -> Array:
    """i32[B]: the tokens that rows compute, with those that the step before has chosen."""
    chosen = carried.tokens.at[jnp.maximum(of_row(tokens), 0)].get(mode="promise_in_bounds")
    return jnp.where(tokens < 0, chosen, tokens)


def _with_history(batch: DecodeBatch, tokens: Array, carried: Array | None) -> SamplingInputs:
    """The history i32[R, L] that this batch brings, or the carried one, with the tokens i32[R] that it computes."""
    sampling = batch.sampling
    if sampling.history is None:
        return sampling
    history = sampling.history if len(sampling.history) else carried
    assert history is not None, "a batch without its history follows none"
    rows = jnp.arange(len(tokens))
    return sampling._replace(history=history.at[rows, batch.inputs.positions].set(tokens, mode="promise_in_bounds"))


@takes_cache
def prefill_step(
    params: Params,
    cache: KVCache,
    carried: Carried,
    packed: Array,
    *,
    config: ModelConfig,
    kernels: AttentionKernels,
    layout: Layout,
    wanted: Wanted = TOKENS_ALONE,
    processors: tuple[LogitsProcessor, ...] = (),
) -> tuple[StepResults, KVCache]:
    """Compute many tokens a row and choose the next token for the rows in `sample_from`.

    `packed` is a packed `PrefillBatch`, of `carried` only the length counts -> results as of `decode_step`; the new
    cache.
    """
    batch: PrefillBatch = unpack(packed, layout)
    inputs = batch.inputs
    attend = _attend(inputs, config, kernels)
    hidden, cache = forward(params, config, inputs.tokens, inputs.positions, cache, attend, kernels.add_norm)
    cache = cache.kept()
    hidden_last = hidden[batch.inputs.sample_from]
    sampling = with_masks(batch.sampling, carried.tries, carried.nodes)
    columns, _ = _choose(params, config, hidden_last, sampling, wanted, processors)
    results = StepResults(_for_host(columns), _left(columns, sampling, carried, wanted))
    if batch.inputs.next_tokens is None:
        return results, cache
    prompt = _prompt_logprobs(params, config, hidden, batch.inputs.next_tokens, wanted.num_prompt_logprobs)
    return results._replace(prompt_columns=_for_host(prompt)), cache


@takes_cache
def mixed_step(
    params: Params,
    cache: KVCache,
    carried: Carried,
    packed: Array,
    *,
    config: ModelConfig,
    kernels: AttentionKernels,
    layout: Layout,
    wanted: Wanted = TOKENS_ALONE,
    processors: tuple[LogitsProcessor, ...] = (),
) -> tuple[StepResults, KVCache]:
    """A decode step and a prefill step in one: what has weights sees the tokens of both side by side.

    `packed` is a packed `MixedBatch`; `carried`, results and the new cache as of `decode_step`. The next step brings
    its history, if it needs one.
    """
    batch: MixedBatch = unpack(packed, layout)
    decode, prefill = batch.inputs
    known = _known(decode.tokens, carried)
    tokens = jnp.concatenate([known, prefill.tokens])
    positions = jnp.concatenate([decode.positions, prefill.positions])
    attend = _attend_apart(decode, prefill, config, kernels)
    hidden, cache = forward(params, config, tokens, positions, cache, attend, kernels.add_norm)
    sampling = with_masks(_with_pending(batch, known), carried.tries, carried.nodes)
    columns, _ = _choose(params, config, hidden[prefill.sample_from], sampling, wanted, processors)
    return StepResults(_for_host(columns), _left(columns, sampling, carried, wanted)), cache.kept()


def _attend_apart(
    decode: DecodeInputs, prefill: PrefillInputs, config: ModelConfig, kernels: AttentionKernels
) -> Attend[KVCache]:
    """Attention of rows of one token, and of those behind them: each by the kernel that is made for it."""
    slots, ends = jnp.concatenate([decode.slot_mapping, prefill.slot_mapping]), len(decode.tokens)

    def attend(cache: KVCache, layer: int, heads: Heads) -> tuple[Array, KVCache]:
        q, cache = cache.write_heads(layer, heads, slots, kernels)
        options = config.attention_options(layer)
        parts = (q[:ends], decode), (q[ends:], prefill)
        outs = [cache.attend(layer, part, inputs, options, kernels) for part, inputs in parts]
        return jnp.concatenate(outs), cache

    return attend


def _with_pending(batch: MixedBatch, tokens: Array) -> SamplingInputs:
    """The batch's history i32[R, L], if it has one, with those of the tokens i32[R] that the host does not know yet.

    They are of sequences that decode, which are first among rows and samples alike.
    """
    sampling, decode = batch.sampling, batch.inputs.decode
    if sampling.history is None:
        return sampling
    places = jnp.where(decode.tokens < 0, decode.positions, sampling.history.shape[1])  # of others none: out of range
    history = sampling.history.at[jnp.arange(len(tokens)), places].set(tokens, mode="drop")
    return sampling._replace(history=history)


@functools.partial(takes_cache, divided=POOL)
def copy_pages(cache: CopiesPages, copies: Array, *, kernels: AttentionKernels) -> CopiesPages:
    """copies i32[2, C]: source and destination pages; copy-on-write for all layers in one launch."""
    return cache.copy_pages(copies[0], copies[1], kernels)


@functools.partial(reads_cache, divided=MOVED_PAGES)
def gather_pages(cache: PagedCache, page_ids: Array) -> Array:
    """Pages i32[C] of all layers, keys and then values, in one array [2 * layers, C, S, K, D], ready to leave."""
    return cache.gather_pages(page_ids)


@functools.partial(takes_cache, divided=POOL)
def scatter_pages(cache: PagedCache, page_ids: Array, pages: Array) -> PagedCache:
    """What `gather_pages` took, [2 * layers, C, S, K, D], into the pages i32[C]."""
    return cache.scatter_pages(page_ids, pages)


def num_programs() -> int:
    """Programs that this process has compiled for the steps above, or read from files; those given back count, too."""
    return PROGRAMS.num_made


def num_read() -> int:
    """Those of them that were read."""
    return PROGRAMS.num_read


def begin_run() -> None:
    """Whoever runs steps says so first: what they use from here on is kept until the next run."""
    PROGRAMS.begin_run()


def unpack(packed: Array, layout: Layout) -> Any:
    """Take `step_io.pack`'s array apart again, on the device."""

    def take(layout: Layout, start: int) -> tuple[Any, int]:
        kind, fields = layout
        values = []
        for field in fields:
            if field is None:
                values.append(None)
            elif isinstance(field[0], type):
                value, start = take(field, start)
                values.append(value)
            else:
                dtype, shape = field
                size = math.prod(shape)
                flat = packed[start : start + size].reshape(shape)
                values.append(flat if dtype == "int32" else jax.lax.bitcast_convert_type(flat, dtype))
                start += size
        return kind(*values), start

    return take(layout, 0)[0]


def _for_host(columns: Array) -> Array:
    """In pinned memory of the host when the step ends, so that reading them takes no further transfer."""
    return jax.device_put(columns, jax.memory.Space.Host)


def _left(columns: Array, sampling: SamplingInputs, carried: Carried, wanted: Wanted) -> Carried:
    """What the rows of a step have drawn, and where that leads in tries."""
    drawn = _drawn(columns, wanted, len(carried.tokens))
    return Carried(drawn, nodes=next_nodes(sampling, carried.tries, drawn))


def _drawn(columns: Array, wanted: Wanted, size: int) -> Array:
    """i32[size]: the tokens that the rows have drawn."""
    tokens = jnp.maximum(columns[:, 0] if wanted.draws_tokens else columns[:0, 0], 0)
    return first_replaced(jnp.zeros(size, jnp.int32), tokens)


def _attend(inputs: StepInputs, config: ModelConfig, kernels: AttentionKernels, first: int = 0) -> Attend[KVCache]:
    """Attention of layers from `first` on over the cache of these layers."""

    def attend(cache: KVCache, layer: int, heads: Heads) -> tuple[Array, KVCache]:
        q, cache = cache.write_heads(layer - first, heads, inputs.slot_mapping, kernels)
        return cache.attend(layer - first, q, inputs, config.attention_options(layer), kernels), cache

    return attend


def _choose(
    params: Params,
    config: ModelConfig,
    hidden: Array,
    sampling: SamplingInputs,
    wanted: Wanted,
    processors: tuple[LogitsProcessor, ...],
    tries: TrieTables | None = None,
) -> tuple[Array, NextBeams | None]:
    """What the host must learn, as columns; and the beams that go on, where the groups' candidates are merged."""
    is_merged = bool(wanted.num_candidates) and sampling.beam_rows is not None
    if is_merged and not (wanted.draws_tokens or wanted.beam_logprobs):

        def of_hidden(rows: Array, inputs: SamplingInputs) -> tuple[Array, Array]:
            logits = compute_logits(params, config, hidden[rows])
            return logits, process_logits(jax.nn.log_softmax(logits), inputs, processors)

        with jax.named_scope("sample"):
            merged = group_candidates(of_hidden, sampling, wanted.num_candidates, config.vocab_size)
            return group_columns(merged, len(hidden)), choose_beams(merged, sampling, tries)
    logits = compute_logits(params, config, hidden)
    with jax.named_scope("sample"):
        processed = process_logits(_logits_to_process(logits, sampling, wanted), sampling, processors)
        columns = []
        if wanted.draws_tokens:
            tokens, failures = sample_tokens(processed, sampling), row_failures(logits, processed)
            logprobs = token_logprobs(logits, jnp.maximum(tokens, 0), wanted.num_logprobs)
            columns += [jnp.where(failures < 0, failures, tokens)[:, None], logprobs]
        elif wanted.beam_logprobs and wanted.num_logprobs:
            columns.append(likeliest_tokens(logits, wanted.num_logprobs))
        if not wanted.num_candidates:
            return jnp.concatenate(columns, axis=1), None
        if not is_merged:
            return jnp.concatenate([*columns, beam_columns(logits, processed, sampling, wanted)], axis=1), None
        merged = group_candidates(
            lambda rows, _: (logits[rows], processed[rows]), sampling, wanted.num_candidates, config.vocab_size
        )
        assert sampling.beam_rows is not None, "merged beams have rows"
        known = with_logprobs(merged, logits, sampling.beam_rows) if wanted.beam_logprobs else merged
        columns.append(group_columns(known, len(logits)))
        return jnp.concatenate(columns, axis=1), choose_beams(merged, sampling, tries)


def _logits_to_process(logits: Array, sampling: SamplingInputs, wanted: Wanted) -> Array:
    """Logits of samples, log-probabilities of beams: so whatever processes them runs once."""
    if not wanted.num_candidates:
        return logits
    logprobs = jax.nn.log_softmax(logits)
    return logprobs if sampling.is_beam is None else jnp.where(sampling.is_beam[:, None] == 1, logprobs, logits)


def _prompt_logprobs(
    params: Params, config: ModelConfig, hidden: Array, next_tokens: Array, num_logprobs: int | None
) -> Array:
    num_tokens, tile = hidden.shape[0], min(LOGPROB_TILE, hidden.shape[0])
    padding = -num_tokens % tile
    hidden, next_tokens = jnp.pad(hidden, ((0, padding), (0, 0))), jnp.pad(next_tokens, (0, padding))

    def of_tile(tile_inputs: tuple[Array, Array]) -> Array:
        return token_logprobs(compute_logits(params, config, tile_inputs[0]), tile_inputs[1], num_logprobs)

    columns = jax.lax.map(of_tile, (hidden.reshape(-1, tile, hidden.shape[1]), next_tokens.reshape(-1, tile)))
    return columns.reshape(num_tokens + padding, -1)[:num_tokens]
