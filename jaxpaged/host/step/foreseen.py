"""The steps that a run will need, as far as they are known before its first prompt is computed: their programs can be
compiled while it goes on."""

from __future__ import annotations

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.pages.block_table import num_pages_for
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.step.batching import Buckets, StepShape, fit


def foreseen_shapes(
    groups: list[SequenceGroup], buckets: Buckets, limits: EngineConfig, cache: CacheConfig
) -> list[StepShape]:
    """The shapes that steps of these requests can have, the likeliest first, but for the first one of prompts, which
    nobody can prepare for.

    Requests end one after the other, so a run comes by all numbers of rows below its largest; and by the narrower
    tables, if it begins with them.
    """
    if limits.kv_cache != "paged" or not groups:
        return []
    first = first_decode_shape(groups, buckets, limits, cache)
    num_rows = min(sum(group.params.num_samples for group in groups), limits.max_num_seqs)
    narrow, wide = (fit(num_pages_for(length, cache.page_size), buckets.table_widths) for length in _lengths(groups))
    widths = [width for width in buckets.table_widths if narrow <= width <= wide]
    rows = [size for size in reversed(buckets.decode_rows) if size <= fit(num_rows, buckets.decode_rows)]
    if all(group.beams for group in groups):
        sizes = {fit(count, buckets.decode_rows) for count in _beam_counts(groups) if count <= num_rows}
        rows = [size for size in rows if size in sizes]
    decode = [StepShape(size, width) for width in widths for size in rows]
    shapes = ([] if first is None else [first]) + _with_prompts(groups, buckets, limits, num_rows, widths) + decode
    return list(dict.fromkeys(shapes))


def _beam_counts(groups: list[SequenceGroup]) -> set[int]:
    """Rows that searches can fill: they come and go whole. Of widths that differ all sums are taken for possible."""
    widths = {width for group in groups for state in group.beams for width in state.widths}
    most = sum(group.params.num_samples for group in groups)
    return widths if len(groups) == 1 else set(range(min(widths), most + 1, min(widths) if len(widths) == 1 else 1))


def _lengths(groups: list[SequenceGroup]) -> tuple[int, int]:
    """Tokens of the shortest prompt with the next token, and of the longest sequence that there can be."""
    return min(group.prompt_len + 1 for group in groups), max(group.max_len for group in groups)


def _with_prompts(
    groups: list[SequenceGroup], buckets: Buckets, limits: EngineConfig, num_rows: int, widths: list[int]
) -> list[StepShape]:
    """None where all prompts are computed in one step. Where others decode meanwhile, steps are mixed."""
    budget, total = limits.max_num_batched_tokens, sum(group.prompt_len for group in groups)
    is_one_step = total <= budget and sum(group.params.num_samples for group in groups) <= limits.max_num_seqs
    if len(groups) == 1 or (is_one_step and all(group.arrival_time <= 0 for group in groups)):
        return []
    if buckets.mixed_rows and not any(group.beams for group in groups):
        most = fit(num_rows, buckets.mixed_rows)
        return [shape for shape in reversed(buckets.mixed_shapes()) if _is_within(shape, most, widths)]
    most_rows, most_tokens = fit(num_rows, buckets.prefill_rows), fit(min(total, budget), buckets.prefill_tokens)
    return [
        StepShape(rows, width, tokens)
        for width in widths
        for tokens in reversed(buckets.prefill_tokens)
        for rows in reversed(buckets.prefill_rows)
        if tokens <= most_tokens and rows <= most_rows
    ]


def _is_within(shape: StepShape, most_rows: int, widths: list[int]) -> bool:
    return shape.num_rows <= most_rows and shape.table_width in widths


def first_decode_shape(
    groups: list[SequenceGroup], buckets: Buckets, limits: EngineConfig, cache: CacheConfig
) -> StepShape | None:
    """The shape of the step behind the prompts, where all requests run together from the start and go on after their
    first token; None where that depends on more than their lengths."""
    if limits.kv_cache != "paged" or limits.cascade_attention or not groups:
        return None
    if any(group.beams or group.arrival_time > 0 or group.max_len <= group.prompt_len + 1 for group in groups):
        return None
    num_rows = sum(group.params.num_samples for group in groups)
    widths = [num_pages_for(group.prompt_len + 1, cache.page_size) for group in groups]
    needed = sum(width * group.params.num_samples for width, group in zip(widths, groups, strict=True))
    if num_rows > limits.max_num_seqs or needed > cache.num_usable_pages * (1 - limits.watermark):
        return None
    return StepShape(fit(num_rows, buckets.decode_rows), fit(max(widths), buckets.table_widths))
