"""Positions of a tree search, and which of them to visit next: PUCT (Silver et al., 2017), with virtual losses.

A path's visits count when it is chosen, its worth when it is known: until then it counts as worth 0, so that paths
which are chosen before that go elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from jaxpaged.tree.tree import Node


@dataclass(eq=False, slots=True)
class Place:
    """A position of the tree: what the policy says of it, and what was learnt of it and below."""

    tokens: tuple[int, ...]
    prior: float
    node: Node | None = None  # from the first visit on, pinned
    worth: float = 0.0  # its value, asked at the first visit
    visits: int = 0
    total: float = 0.0
    children: list[Place] = field(default_factory=list)  # the likeliest first

    @property
    def mean(self) -> float:
        return self.total / self.visits if self.visits else 0.0


def select(place: Place, exploration: float) -> Place:
    """The child to visit: what is known of it, and what its prior promises for as long as little is known."""
    scale = exploration * math.sqrt(place.visits + 1)
    return max(place.children, key=lambda child: child.mean + scale * child.prior / (1 + child.visits))


def go_down(start: Place, exploration: float) -> list[Place]:
    """The path by PUCT to a position without children; its visit is counted, and its worth to be told later."""
    path = [start]
    while path[-1].children:
        path.append(select(path[-1], exploration))
    for place in path:
        place.visits += 1
    return path


def most_visited(place: Place) -> tuple[int, ...]:
    """Tokens from a position along the children with the most visits."""
    while visited := [child for child in place.children if child.visits]:
        place = max(visited, key=lambda child: child.visits)
    return place.tokens
