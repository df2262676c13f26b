"""The same tokens in any batch, whatever else runs, however memory is kept: random runs against each request alone.

What must be equal: tokens, their number, texts, reasons for ending, and the order of samples and beams; what must agree
to rounding: log-probabilities, their sums and the scores of beams.
"""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from contract_runs import (
    ENGINES,
    KINDS,
    MODELS,
    PAGE_SIZES,
    RUNS_OF_ENGINE,
    SYSTEMS,
    Checker,
    Tally,
    difference_of,
    letter_tokenizer,
    random_runs,
)

from jaxpaged import BeamSearchParams

#: What is not drawn of the runs of `make test`: kinds that have most to do with one another, and a pool that holds the
#: largest of them.
QUICK_KINDS = ("diverse", "diverse", "drawn")
QUICK_OPTIONS = dict(
    page_size=2, num_pages=40, kv_cache="paged", preemption="recompute", max_num_seqs=16, max_num_batched_tokens=16,
    watermark=0.0,
)  # fmt: skip
MANY_MEMORY_MAPS = 25_000


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("letters") / "tokenizer.json"
    letter_tokenizer().save(str(path))
    return path


def drop_programs() -> None:
    """XLA keeps memory maps for each program, of which Linux gives a process 65,530."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MEMORY_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def qwen3(tokenizer_file) -> Checker:
    return Checker("qwen3", tokenizer_file)


def test_a_request_gives_the_same_alone_and_in_a_few_runs(qwen3):
    differences = list(qwen3.check(random_runs("qwen3", 0, qwen3.alone, QUICK_KINDS, QUICK_OPTIONS)))
    assert not differences, "\n\n".join(differences)
    assert qwen3.tally.runs == 4 and qwen3.tally.counts["preemptions"] and qwen3.tally.counts["copies"]


def test_diverse_beams_are_the_same_beside_drawn_ones(qwen3):
    """Their penalty counts though a drawn search has the step's candidates ranked by keys, not by sums."""
    diverse = BeamSearchParams(beam_width=4, num_beam_groups=2, diversity_penalty=0.8, max_tokens=8)
    found = [
        [41, 37, 39, 39, 39, 39, 39, 39], [41, 37, 39, 39, 39, 39, 39, 5],
        [94, 18, 37, 18, 18, 18, 39, 39], [94, 18, 37, 18, 18, 58, 79, 114],
    ]  # fmt: skip
    (alone,) = qwen3.alone.generate([[77]], diverse, progress=False)
    assert [beam.token_ids for beam in alone.outputs] == found
    drawn = BeamSearchParams(beam_width=2, do_sample=True, seed=0, max_tokens=16)
    beside = qwen3.beside.generate([[77], [1, 2, 3]], [diverse, drawn], progress=False)[0]
    assert difference_of(alone, beside) is None


@pytest.fixture(scope="module")
def total() -> Tally:
    return Tally()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_request_gives_the_same_alone_and_in_any_run(tokenizer_file, total, model):
    checker = Checker(model, tokenizer_file)
    differences = []
    for engine_seed in range(ENGINES):
        differences += checker.check(random_runs(model, engine_seed, checker.alone))
        drop_programs()
    print(f"{model}: {checker.tally}")
    total.add_all(checker.tally)
    assert not differences, "\n\n".join(differences)


@pytest.mark.slow
def test_the_runs_did_what_the_contract_is_about(total):
    if total.runs < len(MODELS) * ENGINES * RUNS_OF_ENGINE:
        pytest.skip("counts the runs of all models, and not all ran")
    print(total)
    assert total.runs >= 200
    events = ("preemptions", "swaps", "recomputations", "swap overflows", "copies", "prefix", "arrivals")
    places = [f"page size {size}" for size in PAGE_SIZES] + ["paged", *SYSTEMS]
    befores = [f"before: {before}" for before in ("nothing", "warm_up", "dropped run")]
    assert [name for name in [*events, *places, *befores, *KINDS] if not total.counts[name]] == []
