"""Requests whose parameters leave no token to choose: refused where that can be seen before they run."""

from __future__ import annotations

from collections.abc import Iterable

from jaxpaged.host.sequence import SequenceGroup

SHOWN_IDS = 8


def check_some_token(group: SequenceGroup, vocab_size: int) -> None:
    """ValueError where no first token is possible: all are banned words, ends before `min_tokens`, or not allowed, by
    `allowed_token_ids` or a constraint.

    Later ones may only be more, but for what depends on the tokens before: words of several tokens, logits processors.
    """
    params, allowed = group.params, group.params.allowed_token_ids
    ends = group.eos_ids | group.stop_ids if params.min_tokens else frozenset()
    words = {word[0] for word in group.banned_words if len(word) == 1}
    limited = None if group.limit is None else group.limit.first_tokens(vocab_size)
    num_possible = vocab_size if limited is None else len(limited)
    if allowed is None and len(ends) + len(words) < num_possible:
        return
    possible = set(range(vocab_size) if limited is None else limited.tolist())
    reasons = [] if limited is None else [f"the constraint begins with {_shown(possible)}"]
    if allowed is not None:
        possible &= set(allowed)
        reasons.append(f"allowed_token_ids has {_shown(allowed)}")
    if possible & ends:
        reasons.append(f"min_tokens={params.min_tokens} forbids {_shown(possible & ends)}, which end the output")
    if possible & words:
        reasons.append(f"bad_words forbid {_shown(possible & words)}")
    possible -= ends | words
    if not possible:
        raise ValueError(f"no token can be chosen: {', and '.join(reasons)}: change one of these parameters")


def restrictions(group: SequenceGroup) -> str:
    """Names of the parameters that forbid tokens of this request, for messages."""
    params = group.params
    forbids = {
        "constraint": params.constraint is not None,
        "allowed_token_ids": params.allowed_token_ids is not None,
        "min_tokens": params.min_tokens > 0,
        "bad_words": bool(group.banned_words),
        "logits_processors": bool(params.logits_processors),
    }
    return ", ".join(name for name, is_used in forbids.items() if is_used) or "the model"


def _shown(token_ids: Iterable[int]) -> str:
    ids = sorted(token_ids)
    return f"[{', '.join(map(str, ids[:SHOWN_IDS]))}{', ...' if len(ids) > SHOWN_IDS else ''}]"
