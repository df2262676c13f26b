"""The benchmark and the example of constrained beams, in small."""

from __future__ import annotations

import json

import numpy as np
import pytest
from catalogue import Catalogue


def test_items_of_the_catalogue_are_different_and_their_codes_at_the_end_of_the_vocabulary():
    items = Catalogue(5000, vocab_size=2000).items
    assert len(np.unique(items, axis=0)) == len(items) > 2000
    levels = items - (2000 - 4 * 256)
    assert all(np.all((levels[:, i] // 256) == i) for i in range(4))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["constraints", "recommend"])
def test_all_that_is_found_in_the_trie_is_an_item(script, capsys):
    few = ["--items=2000", "--history=4", "--repeats=1"]
    if script == "recommend":
        import recommend

        assert recommend.main([*few, "--users=2", "--width=4"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["fewest_found"] == 4
    else:
        import constraints

        assert constraints.main([*few, "--widths", "4", "--rows=2"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["beams"][0]["in_trie_illegal"] == 0 < found["beams"][0]["free_illegal"]
