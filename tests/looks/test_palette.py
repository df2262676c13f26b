"""One word and one colour for each thing, wherever people see it."""

from __future__ import annotations

import memory as paper_memory
import rates as paper_rates

from jaxpaged.cli.compare_table import _rows
from jaxpaged.config import KV_CACHES
from jaxpaged.host.account.memory_account import CATEGORIES
from jaxpaged.looks.palette import MARKERS, PAPER_NAMES, PARTS, SHARED, SYSTEMS


def test_every_part_of_a_pool_and_every_system_has_a_word_a_colour_and_no_other_has_it():
    assert tuple(PARTS) == CATEGORIES and sorted(SYSTEMS) == sorted(KV_CACHES)
    for looks in ([*PARTS.values(), SHARED], SYSTEMS.values()):
        assert len({look.colour for look in looks}) == len({look.word for look in looks}) == len(looks)
    assert len(set(MARKERS.values())) == len(SYSTEMS)


def test_the_words_are_those_of_the_papers_figure():
    words = {part: look.word for part, look in PARTS.items()}
    assert words == {
        "used": "token states", "reserved": "reservation", "internal": "internal fragmentation",
        "rounding": "external fragmentation", "cached": "cached", "free": "free",
    }  # fmt: skip
    names = [row.name for row in _rows()]
    assert [f"{word}, %" for word in words.values()] == [name for name in names if name.endswith(", %")]


def test_the_papers_names_stand_for_the_same_systems_in_its_figures_of_memory_and_of_speed():
    by_name = {name: kv_cache for kv_cache, name in PAPER_NAMES.items()}
    for systems in (paper_memory.SYSTEMS, paper_rates.SYSTEMS):
        assert all(by_name[name] == kv_cache for name, kv_cache in systems.items())
