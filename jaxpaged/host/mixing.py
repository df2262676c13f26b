"""Mixed steps: sequences that decode go on while prompts are computed, in one step under one budget of tokens.

Where steps are not mixed, all who decode stand still until the prompts that were admitted are computed. In a mixed step
they come first, a token each, and prompts fill what is left of `max_num_batched_tokens`. Reading the weights, which is
most of a decode step, is done for both at once: a mixed step takes little longer than one of its prompts alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxpaged.config import EngineConfig
from jaxpaged.host.sequence import SequenceGroup

#: How much of the size to which they are padded the prompts' tokens must fill. What fills it less waits, but for what
#: fills a smaller size: padding is computed as tokens are, and the next step is mixed too.
MIN_FILL = 0.75
#: Share of the budget that must be left for prompts.
MIN_PROMPT_SHARE = 0.5


def is_mixed(limits: EngineConfig, running: Iterable[SequenceGroup], num_decoding: int) -> bool:
    """Whether prompts that wait are computed together with the `num_decoding` sequences that decode now."""
    if not limits.can_mix_steps or not num_decoding:
        return False
    # Else prompts would be cut in slivers, each of which reads all that was computed of the prompt before.
    if num_decoding > (1 - MIN_PROMPT_SHARE) * limits.max_num_batched_tokens:
        return False
    return not any(map(_needs_own_steps, running))


def _needs_own_steps(group: SequenceGroup) -> bool:
    # The host chooses for beams between two steps, from what whole searches had side by side in one of them; and
    # log-probabilities of a prompt come with the step that computes it, as of every token that this computes.
    return bool(group.beams) or group.params.prompt_logprobs is not None


def num_prompt_tokens(num_waiting: int, num_left: int, sizes: tuple[int, ...]) -> int:
    """How many of `num_waiting` tokens of prompts a mixed step computes that has room for `num_left`, and whose prompts
    are padded to one of `sizes`."""
    most = min(num_waiting, num_left)
    filled = [size for size in sizes if most >= MIN_FILL * size]
    return min(most, filled[-1]) if filled else most
