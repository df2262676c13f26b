"""What a step gets of its rows' limits: the node of each that is in a trie, the tokens that each other one allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxpaged.host.constraints.in_text import FillMasks, TextBeams, TextMatcher, TextPlace
from jaxpaged.host.constraints.in_trie import TrieBeams, TrieLimit, TriePlace
from jaxpaged.host.constraints.trie_set import TrieSet
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.step_plan import Sample, SearchRows
from jaxpaged.step_io import DEAD_NODE, FREE_NODE, SamplingInputs, of_row


def with_limits(
    inputs: SamplingInputs,
    samples: list[Sample],
    num_rows: int,
    vocab_size: int,
    features: SamplingFeatures,
    searches: Sequence[SearchRows] = (),
) -> SamplingInputs:
    """Texts are of samples, and of beams that have sequences; searches whose beams are arrays are in tries alone."""
    if features.tries is not None:
        nodes = _nodes(samples, num_rows, features.tries)
        for group, row, width, _ in searches:
            _fill_nodes(nodes, row, width, group.beams[0].places, features.tries)
        inputs = inputs._replace(nodes=nodes)
    if features.has_masks:
        inputs = inputs._replace(masks=_masks(samples, num_rows, vocab_size))
    return inputs


def _nodes(samples: list[Sample], num_rows: int, tries: TrieSet) -> np.ndarray:
    """i32[R]: the node that each row stands at; below 0 (`of_row`) where it is behind what the step before chooses."""
    nodes = np.full(num_rows, FREE_NODE, np.int32)
    roots = {trie: tries.root(trie) for trie in tries.tries}
    for row, (group, sequence, _) in enumerate(samples):
        if not isinstance(group.limit, TrieLimit) or (group.beams and group.is_forked):
            continue
        place = sequence.place
        if sequence.num_pending:
            nodes[row] = of_row(sequence.pending_row)
        else:
            nodes[row] = roots[group.limit.trie] + (place.node if isinstance(place, TriePlace) else 0)
    for row, width, places in _running_beams(samples):
        _fill_nodes(nodes, row, width, places, tries)
    return nodes


def _fill_nodes(nodes: np.ndarray, row: int, width: int, places: object, tries: TrieSet) -> None:
    """Of the beams of one search, as far as they are in a trie."""
    if isinstance(places, TrieBeams):
        found = places.nodes[:width]  # below 0 in places without a beam
        nodes[row : row + width] = np.where(found < 0, DEAD_NODE, found + tries.root(places.trie))


def _masks(samples: list[Sample], num_rows: int, vocab_size: int) -> np.ndarray:
    """i32[R, V / 32]: bits of the tokens that each row allows; all of them where nothing but a trie limits it."""
    masks = np.full((num_rows, -(-vocab_size // 32)), -1, np.int32)
    asked: dict[FillMasks, list[tuple[int, TextMatcher]]] = {}
    for row, (group, sequence, _) in enumerate(samples):
        if isinstance(place := sequence.place, TextPlace) and not group.beams:
            asked.setdefault(place.fill_masks, []).append((row, place.matcher))
    for row, width, places in _running_beams(samples):
        if isinstance(places, TextBeams):
            matchers = list(enumerate(places.matchers[:width], start=row))
            asked.setdefault(places.fill_masks, []).extend(matchers)
    for fill_masks, matchers in asked.items():
        fill_masks(matchers, masks)
    return masks


def _running_beams(samples: list[Sample]) -> Iterator[tuple[int, int, object]]:
    """First row, number of rows and places of each search in the step; of one that has not begun the prompt's row."""
    row = 0
    while row < len(samples):
        group = samples[row].group
        if not group.beams:
            row += 1
            continue
        if not group.is_forked:
            yield row, 1, group.beams[0].places
            row += 1
            continue
        for state in group.running_beams:
            yield row, state.width, state.places
            row += state.width
