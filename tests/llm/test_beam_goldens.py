"""Beam search finds what `generate` of transformers finds, for every family (scripts/make/beam_goldens.py)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import all_but_slow
from paths import GOLDENS

from jaxpaged import LLM, BeamSearchParams

NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/beams.json"))
MAX_TOKENS = 10


def test_every_golden_has_beams():
    assert NAMES == sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", all_but_slow(NAMES, "gemma2"))
def test_all_searches_of_a_family_in_one_batch(name):
    searches = json.loads((GOLDENS / name / "beams.json").read_text())
    arrays = np.load(GOLDENS / name / "logits.npz")
    llm = LLM(GOLDENS / name, dtype="float32", page_size=4, num_pages=150, max_num_seqs=16, max_num_batched_tokens=64)
    params = [
        BeamSearchParams(
            beam_width=search["beam_width"], max_tokens=MAX_TOKENS, early_stopping=search["early_stopping"],
            length_penalty=search["length_penalty"], stop_token_ids=search["end_ids"], ignore_eos=True,
        )
        for search in searches
    ]  # fmt: skip
    outputs = llm.beam_search([arrays[f"prompt_{search['prompt']}"].tolist() for search in searches], params)
    for search, output in zip(searches, outputs, strict=True):
        assert [beam.token_ids for beam in output.outputs] == search["sequences"], search
        np.testing.assert_allclose([beam.score for beam in output.outputs], search["scores"], rtol=1e-5, atol=1e-4)
