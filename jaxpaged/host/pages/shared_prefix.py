"""A prefix that all requests of a run have in common: computed once, its pages held until the run is over.

To the scheduler it is a group that is prefilled like others, but chooses no token, never gives way and never ends. A
request's first sequence forks its table when the request is placed, all of its tokens, so the request computes what
lies behind them alone. Where the last page of the prefix is part-filled, that one is copied on this first write, since
the prefix still holds it: one page copy a request. Nobody is admitted before the prefix is computed, since a page that
is still being filled cannot be copied. Full pages that an earlier run has left are found (known_pages.py), so of a
prefix that comes again only the last tokens are computed.
"""

from __future__ import annotations

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.host.sequence import Sequence, SequenceGroup, SequenceStatus


def make_prefix(token_ids: list[int]) -> SequenceGroup:
    """The group that stands for the prefix."""
    count = len(token_ids)
    sequence = Sequence(0, list(token_ids), count, status=SequenceStatus.RUNNING)
    return SequenceGroup("shared prefix", None, SamplingParams(temperature=0), 0, [sequence], count, prefix_len=count)


def prefix_of(groups: list[SequenceGroup]) -> list[int]:
    """The tokens that these groups, all of one run, are to share; empty where they share none."""
    if not groups or not groups[0].prefix_len:
        return []
    prefix = groups[0].sequences[0].token_ids[: groups[0].prefix_len]
    for group in groups:
        assert group.sequences[0].token_ids[: group.prefix_len] == prefix, "a run has one shared prefix"
        assert group.prompt_len > group.prefix_len, "a prompt has tokens of its own behind the prefix"
    return prefix
