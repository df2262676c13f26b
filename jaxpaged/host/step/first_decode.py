"""The decode step that a run will need, known before its first prompt is computed: its program can be compiled beside
that of the prompts."""

from __future__ import annotations

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.pages.block_table import num_pages_for
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.step.batching import Buckets, StepShape, fit


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
