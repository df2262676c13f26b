"""Beams as a tree: what they have in common is written once, and each ends in a leaf. Plain lines, for any terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: Characters of one branch that are shown; of a longer one its two ends.
LONGEST_BRANCH = 60

#: `text_of(tokens before, tokens)`: what the tokens add to the text.
TextOf = Callable[[list[int], list[int]], str]


@dataclass(slots=True)
class Branch:
    """Tokens that some beams have in common, up to where they part or end."""

    before: list[int]  # tokens from the root to here
    token_ids: list[int]
    labels: list[str] = field(default_factory=list)  # of the beams that end here
    children: list[Branch] = field(default_factory=list)


def grow_branches(beams: Sequence[tuple[list[int], str]], start: int = 0) -> list[Branch]:
    """The branches of beams (token ids, label) that agree on their first `start` tokens, in the order of the beams."""
    groups: dict[int, list[tuple[list[int], str]]] = {}
    for beam in beams:
        if len(beam[0]) > start:
            groups.setdefault(beam[0][start], []).append(beam)
    return [_grow(group, start) for group in groups.values()]


def _grow(beams: list[tuple[list[int], str]], start: int) -> Branch:
    first = beams[0][0]
    shortest = min(len(token_ids) for token_ids, _ in beams)
    end = start + 1
    while end < shortest and all(token_ids[end] == first[end] for token_ids, _ in beams):
        end += 1
    ended = [label for token_ids, label in beams if len(token_ids) == end]
    return Branch(first[:start], first[start:end], ended, grow_branches(beams, end))


def tree_lines(branches: Sequence[Branch], text_of: TextOf, indent: str = "") -> list[str]:
    """One line a branch, children below their parent; labels at the end of the line."""
    lines = []
    for i, branch in enumerate(branches):
        is_last = i == len(branches) - 1
        text = shown(text_of(branch.before, branch.token_ids))
        lines.append(f"{indent}{'└─' if is_last else '├─'} {text}{''.join('   ' + label for label in branch.labels)}")
        lines += tree_lines(branch.children, text_of, indent + ("   " if is_last else "│  "))
    return lines


def shown(text: str, longest: int = LONGEST_BRANCH) -> str:
    """Text in one line, quoted; of a long one its two ends."""
    quoted = repr(text)
    half = longest // 2
    return quoted if len(quoted) <= longest else f"{quoted[:half]} ... {quoted[-half:]}"
