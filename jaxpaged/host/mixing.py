"""Mixed steps: sequences that decode go on while prompts are computed, in one step under one budget of tokens.

Where steps are not mixed, all who decode stand still until the prompts that were admitted are computed. In a mixed step
they come first, a token each, and prompts fill what is left of `max_num_batched_tokens`. Reading the weights, which is
most of a decode step, is done for both at once: a mixed step takes little longer than one of its prompts alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.decoding import place_tokens
from jaxpaged.host.pages.page_allocator import OutOfPagesError
from jaxpaged.host.prefill_queue import PrefillQueue
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.step.batching import Buckets
from jaxpaged.host.step.step_plan import PlanRow, Sample, StepPlan
from jaxpaged.host.systems.roles import Memory

#: How much of the size to which they are padded the prompts' tokens must fill. What fills it less waits, but for what
#: fills a smaller size: padding is computed as tokens are, and the next step is mixed too.
MIN_FILL = 0.75
#: Share of the budget that must be left for prompts.
MIN_PROMPT_SHARE = 0.5


class Mixing:
    """Plans mixed steps, for an engine with these limits."""

    def __init__(self, limits: EngineConfig, cache: CacheConfig):
        self._limits = limits
        self._sizes = Buckets.for_limits(limits, cache).mixed_tokens

    def plan(
        self, samples: list[Sample], running: Iterable[SequenceGroup], prompts: PrefillQueue, memory: Memory
    ) -> StepPlan | None:
        """A step of all who decode, `samples`, and of prompts that wait. None where these are to be computed alone.

        Also where pages are short: prompts have theirs. When they are computed, someone may give way.
        """
        if not is_mixed(self._limits, len(samples), running, prompts.groups):
            return None
        try:
            starts, copies = place_tokens(samples, memory)
        except OutOfPagesError:
            return None
        pairs = zip(samples, starts, strict=True)
        rows = [PlanRow(group, sequence, start, 1) for (group, sequence, _), start in pairs]
        plan = StepPlan(is_prefill=True, num_decoding=len(rows), listed=rows, samples=samples, copies=copies)
        num_left = self._limits.max_num_batched_tokens - len(rows)
        prompts.fill(plan, num_prompt_tokens(prompts.num_tokens, num_left, self._sizes))
        return plan


def is_mixed(
    limits: EngineConfig, num_decoding: int, running: Iterable[SequenceGroup], waiting: Iterable[SequenceGroup]
) -> bool:
    """Whether the prompts of the `waiting` groups, which are `running` too, are computed together with the
    `num_decoding` sequences that decode now."""
    if not limits.can_mix_steps or not num_decoding:
        return False
    # Else prompts would be cut in slivers, each of which reads all that was computed of the prompt before.
    if num_decoding > (1 - MIN_PROMPT_SHARE) * limits.max_num_batched_tokens:
        return False
    # The host chooses for beams between two steps, from what whole searches had side by side in one of them.
    if any(group.beams for group in running):
        return False
    # Log-probabilities of a prompt are made of every token that its step computes, and of no others.
    return all(group.params.prompt_logprobs is None for group in waiting)


def num_prompt_tokens(num_waiting: int, num_left: int, sizes: tuple[int, ...]) -> int:
    """How many of `num_waiting` tokens of prompts a mixed step computes that has room for `num_left`, and whose prompts
    are padded to one of `sizes`."""
    most = min(num_waiting, num_left)
    filled = [size for size in sizes if most >= MIN_FILL * size]
    return min(most, filled[-1]) if filled else most
