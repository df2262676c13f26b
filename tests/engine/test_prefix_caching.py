"""Pages found from run to run of one engine, and from call to call of one LLM: the tokens are those of a pool that
knows nothing, and what cannot be relied on is forgotten."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from scripted_device import most_pages_of
from toy import TOY, beam_group, few_programs, make_group, random_prompts, run_checked, toy_engine, toy_params

from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.checkpoint import save_checkpoint
from jaxpaged.config import PreemptionConfig
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.tree.on_engine import EngineSteps
from jaxpaged.tree.tree import OutOfPagesError, Tree

STEMS = random_prompts(2, low=21, high=22, seed=7)
KINDS = [
    SamplingParams(temperature=0, max_tokens=9),
    SamplingParams(n=3, top_p=0.9, max_tokens=7, stop_token_ids=[*range(30)]),
    BeamSearchParams(beam_width=3, max_tokens=6),
    SamplingParams(temperature=0, max_tokens=5, repetition_penalty=1.5),
]


def requests_of(call: int, count=7):
    """Prompts that begin alike, within a call and with those of other calls."""
    groups = []
    for i, own in enumerate(random_prompts(count, low=1, high=6, seed=call // 2)):  # every prompt comes in two calls
        params, prompt = KINDS[(i + call) % len(KINDS)], STEMS[i % 2] + own
        name = f"{call}.{i}"
        is_search = isinstance(params, BeamSearchParams)
        groups.append(beam_group(prompt, params, (), name) if is_search else make_group(prompt, params, name, seed=i))
    return groups


def some_engine(**options):
    return few_programs(toy_engine(**{"num_pages": 300, "prefix_caching": True, **options}))


def run_calls(engine, count=4):
    found, results = [], {}
    for call in range(count):
        results |= run_checked(engine, requests_of(call))
        found.append(engine.stats.cached_tokens)
    return results, found


@pytest.fixture(scope="module")
def engine():
    return some_engine()


@pytest.fixture(scope="module")
def expected():
    results, found = run_calls(some_engine(prefix_caching=False))
    assert found == [0] * 4
    return results


def known_pages(engine) -> int:
    return len(engine.scheduler.allocator.known.hashes)


@pytest.mark.parametrize(
    "preemption",
    [PreemptionConfig(), pytest.param(PreemptionConfig("swap", 60, transfer_pages=8), marks=pytest.mark.slow)],
)
def test_tokens_are_the_same_with_room_for_all_and_for_hardly_any(engine, expected, preemption):
    engine.forget_pages()
    results, found = run_calls(engine)
    assert results == expected
    assert found[0] < found[1] and min(found[1:]) >= 7 * 20  # all but the last token or two of every stem

    pages = most_pages_of([group for call in range(4) for group in requests_of(call)], 4) + 1
    tight = some_engine(num_pages=pages, preemption=preemption)
    num_preempted = 0
    for call in range(4):
        results = run_checked(tight, requests_of(call))
        assert results == {name: expected[name] for name in results}
        num_preempted += tight.stats.preemptions
        memory = tight.stats.memory
        total = memory.used + memory.reserved + memory.internal + memory.rounding + memory.cached + memory.free
        assert (total == memory.num_slots).all() and memory.cached.any()
    assert num_preempted > 3


@pytest.mark.slow
def test_fp8_pages_are_found_like_others():
    results, found = run_calls(some_engine(kv_dtype="float8_e4m3fn"), 2)
    without, _ = run_calls(some_engine(kv_dtype="float8_e4m3fn", prefix_caching=False), 2)
    assert results == without and found[1] > 100


def test_a_run_that_is_left_early_keeps_what_it_knows(engine, expected):
    engine.forget_pages()
    for leave_after in (1, 2, 4):
        run = engine.run_steps(requests_of(0))
        for _ in range(leave_after):
            next(run)
        run.close()
        assert engine.scheduler.allocator.num_used == 0 and known_pages(engine) > 0
        engine.scheduler.check_invariants()
    results = run_checked(engine, requests_of(1))
    assert engine.stats.cached_tokens > 100
    assert results == {name: expected[name] for name in results}


@pytest.mark.parametrize("method", ["prepare", "launch", "fetch"])
def test_a_run_that_an_error_ends_leaves_nothing_to_find(engine, expected, monkeypatch, method):
    run_checked(engine, requests_of(0))
    assert known_pages(engine) > 0

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.runner, method, fail)
        run_checked(engine, requests_of(1))
    assert known_pages(engine) == 0
    results = run_checked(engine, requests_of(1))
    assert results == {name: expected[name] for name in results}


def test_a_pool_that_is_made_anew_knows_nothing(engine, expected):
    run_checked(engine, requests_of(0))
    jax.tree.map(lambda leaf: leaf.delete(), engine.runner.pool)  # as a step that was interrupted leaves it
    results = run_checked(engine, requests_of(0))
    assert results == {name: expected[name] for name in results}


def test_other_weights_find_nothing(engine):
    run_checked(engine, requests_of(0))
    engine.runner.params = dataclasses.replace(engine.params)
    run = engine.run_steps(requests_of(1))
    next(run)
    assert engine.scheduler.num_cached_tokens == 0
    run.close()


def test_a_scheduler_from_elsewhere_leaves_nothing_to_find(engine):
    """Its own books say which pages it wrote to."""
    run_checked(engine, requests_of(0))
    other = type(engine.scheduler)(engine.cache_config, engine.limits)
    groups = [make_group(STEMS[0], KINDS[0])]
    with engine.step_by_hand(SamplingFeatures.of(groups, TOY.vocab_size), other) as loop:
        other.add(groups[0])
        while loop.has_work:
            loop.step()
    assert known_pages(engine) == 0


def test_trees_and_runs_find_what_the_other_has_computed(engine):
    engine.forget_pages()
    prompt = STEMS[0][:20]
    run_checked(engine, [make_group(prompt, SamplingParams(temperature=0, max_tokens=1))])
    with Tree(EngineSteps(engine)) as tree:
        root = tree.open(prompt)
        assert tree.stats().computed_tokens == 4  # of five full pages the last one gives what comes next
        known = tree.next_tokens(root).logprobs
        kid = tree.fork(root)
        tree.append(kid, [1, 2, 3, 4, 5])
        tree.truncate(kid, 22)
        tree.append(kid, [6, 7, 8])  # in place of tokens whose page was known
        tree.check_invariants()
    with Tree(EngineSteps(engine)) as tree:
        again = tree.open([*prompt, 1, 2, 6, 7, 8])
        assert tree.stats().computed_tokens == 1
        assert tree.next_tokens(tree.open([*prompt, 1, 2, 3, 4, 5])).logprobs.shape == known.shape
        assert tree.stats().computed_tokens == 6  # that page was overwritten
        tree.check_invariants()
        tree.free(again)
    results = run_checked(engine, [make_group([*prompt, 1, 2, 6, 7, 8], KINDS[0])])
    assert engine.stats.cached_tokens == 24
    engine.forget_pages()
    assert run_checked(engine, [make_group([*prompt, 1, 2, 6, 7, 8], KINDS[0])]) == results


def test_prompts_that_do_not_fit_a_tree_are_refused_and_hold_nothing():
    engine = some_engine(num_pages=9)
    with Tree(EngineSteps(engine)) as tree:
        tree.free(tree.open(STEMS[0][:16]))
        with pytest.raises(OutOfPagesError, match="46 tokens on 2 nodes need 12 new pages .* 8 of 8 pages are free"):
            tree.open([STEMS[0][:16] + [1] * 14, STEMS[0][:16]])
        assert tree.stats().physical == 0
        tree.check_invariants()


# Of an LLM


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    model = dataclasses.replace(TOY, sliding_window=7, sliding_layers=(True, False), dtype="float32")
    save_checkpoint(directory := tmp_path_factory.mktemp("toy"), model, toy_params())
    return LLM(directory, page_size=4, num_pages=90, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64)


def test_the_turns_of_a_conversation_are_found_and_a_reset_forgets_them(llm):
    params, text, counts = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), STEMS[0], []
    for _ in range(3):
        (output,) = llm.generate([text], params)
        assert output.kv.cached_tokens == llm.last_run.cached_tokens
        counts.append((len(text), output.kv.cached_tokens))
        text = [*text, *output.outputs[0].token_ids, 40]
    length = len(STEMS[0])
    # Of each turn all but the last token was computed, and is found in full pages.
    assert counts == [(length, 0)] + [(length + 9 * i, (length + 9 * i - 2) // 4 * 4) for i in (1, 2)]
    assert llm.last_run.cached_share == counts[2][1] / counts[2][0]
    llm.reset_prefix_cache()
    text = text[: counts[2][0]]
    (fresh,) = llm.generate([text], params)
    assert fresh.kv.cached_tokens == 0 and fresh.outputs[0].token_ids == output.outputs[0].token_ids


def test_another_shared_prefix_and_the_same_again(llm):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    results = [llm.generate([[3], [4, 5]], params, shared_prefix=stem) for stem in (*STEMS, STEMS[0])]
    assert llm.last_run.cached_tokens == len(STEMS[0]) // 4 * 4
    tokens = [[output.outputs[0].token_ids for output in run] for run in results]
    assert tokens[0] == tokens[2] and tokens[0] != tokens[1]
    whole = llm.generate([STEMS[0] + [3], STEMS[0] + [4, 5]], params)
    assert [output.outputs[0].token_ids for output in whole] == tokens[0]


def test_log_probabilities_of_a_prompt_are_all_there(llm):
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)
    first, second = (llm.generate([STEMS[1]], params)[0] for _ in range(2))
    assert second.prompt_logprobs == first.prompt_logprobs and len(first.prompt_logprobs) == len(STEMS[1])
    assert second.kv.cached_tokens == 0


def test_a_reset_waits_for_whoever_has_the_pool(llm):
    with llm.tree(), pytest.raises(RuntimeError, match="a tree is open and owns the page pool"):
        llm.reset_prefix_cache()
    llm.reset_prefix_cache()


def test_an_engine_that_is_built_anew_knows_nothing(llm):
    params = SamplingParams(temperature=0, max_tokens=2)
    llm.generate([STEMS[0]], params)
    llm.rebuild()
    assert llm.generate([STEMS[0]], params)[0].kv.cached_tokens == 0
    assert llm.generate([STEMS[0]], params)[0].kv.cached_tokens > 0
    llm.rebuild(prefix_caching=False)
    llm.generate([STEMS[0]], params)
    assert llm.generate([STEMS[0]], params)[0].kv.cached_tokens == 0
