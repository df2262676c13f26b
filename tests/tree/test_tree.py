"""`llm.tree()`: what its calls cost and return on a real model, and what they refuse."""

from __future__ import annotations

import dataclasses
import gc

import jax.numpy as jnp
import numpy as np
import pytest
from beam_reference import log_softmax
from helpers import full_logits
from toy import TOY, make_group, random_prompts, run_tokens, save_toy_checkpoint, toy_engine, toy_params

from jaxpaged import LLM, SamplingParams
from jaxpaged.device import steps
from jaxpaged.tree.on_engine import EngineSteps
from jaxpaged.tree.tree import OutOfPagesError, Tree

PROMPT = [5, 17, 3, 88, 41, 9]  # at page size 4: one full page, and two tokens on the next


@pytest.fixture(scope="module")
def engine():
    return toy_engine(num_pages=33, page_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64)


@pytest.fixture
def tree(engine):
    with Tree(EngineSteps(engine)) as tree:
        yield tree
        tree.check_invariants()


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("toy"))
    return LLM(directory, page_size=4, num_pages=40, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64)


def truth(tokens: list[int]) -> np.ndarray:
    """Log-probabilities f32[T, V] behind every token, without a cache."""
    return log_softmax(np.asarray(full_logits(toy_params(), TOY, jnp.asarray(tokens, jnp.int32))))


def close_to(expected):
    return pytest.approx(np.asarray(expected), abs=2e-4)


# What calls return


def test_open_computes_a_prompt_once_and_keeps_what_comes_next(tree):
    root = tree.open(PROMPT)
    assert tree.next_tokens(root).logprobs[0] == close_to(truth(PROMPT)[-1])
    assert tree.stats().computed_tokens == len(PROMPT)
    kids = tree.fork(root, 3)
    assert tree.next_tokens(kids).logprobs == close_to([truth(PROMPT)[-1]] * 3)
    assert tree.stats().computed_tokens == len(PROMPT)


def test_several_prompts_are_opened_together(tree):
    prompts = random_prompts(7, 1, 20)
    nodes = tree.open(prompts)
    assert [node.tokens for node in nodes] == prompts
    assert tree.next_tokens(nodes).logprobs == close_to([truth(prompt)[-1] for prompt in prompts])


def test_append_of_one_token_each_and_of_ragged_lists(tree):
    a, b = tree.fork(tree.open(PROMPT), 2)
    out = tree.append([a, b], [1, 2])
    assert out.logprobs == close_to([truth([*PROMPT, 1])[-1], truth([*PROMPT, 2])[-1]])
    out = tree.append([a, b], [[3, 4, 5], [6]])
    expected = truth([*PROMPT, 1, 3, 4, 5])
    assert out.logprobs == close_to([expected[-1], truth([*PROMPT, 2, 6])[-1]])
    assert out.token_logprobs[0] == close_to([expected[6, 3], expected[7, 4], expected[8, 5]])
    assert [len(row) for row in out.token_logprobs] == [3, 1]
    assert out.sums == close_to([row.sum() for row in out.token_logprobs])


def test_an_append_can_come_as_an_array(tree):
    nodes = tree.fork(tree.open(PROMPT), 2)
    tree.append(nodes, np.array([[1, 2], [3, 4]]))
    tree.append(nodes[0], np.int64(5))
    assert [node.tokens[6:] for node in nodes] == [[1, 2, 5], [3, 4]]


def test_ranks_say_whether_greedy_decoding_would_have_chosen_a_token(tree):
    """What a speculative check needs: how much of a draft to keep, and what comes behind it."""
    greedy = truth(PROMPT)[-1].argmax()
    second = truth([*PROMPT, greedy])[-1].argmax()
    wrong = truth([*PROMPT, greedy, second])[-1].argmin()
    node = tree.open(PROMPT)
    out = tree.append(node, [greedy, second, wrong, 0])
    assert out.token_ranks[0][:3].tolist() == [1, 1, TOY.vocab_size]
    tree.truncate(node, len(PROMPT) + 2)
    assert tree.next_tokens(node).logprobs[0] == close_to(truth([*PROMPT, greedy, second])[-1])


@pytest.mark.parametrize("k", [1, 3, 5, 30, TOY.vocab_size])
def test_the_likeliest_are_those_of_the_whole_vocabulary(tree, k):
    node = tree.open(PROMPT, top=k)
    out = tree.append(node, 7, top=k)
    expected = truth([*PROMPT, 7])[-1]
    assert out.token_ids.tolist() == [np.argsort(-expected, kind="stable")[:k].tolist()]
    assert out.logprobs[0] == close_to(np.sort(expected)[::-1][:k])


def test_a_token_outside_the_likeliest_is_scored_all_the_same(tree):
    node = tree.open(PROMPT, top=2)
    unlikely = int(truth(PROMPT)[-1].argmin())
    out = tree.append(node, unlikely, top=2)
    assert out.token_logprobs[0] == close_to([truth(PROMPT)[-1].min()])
    assert out.token_ranks[0].tolist() == [TOY.vocab_size]
    assert tree.stats().computed_tokens == len(PROMPT) + 2  # the last token of the prompt twice


def test_what_is_returned_cannot_be_changed_behind_the_tree(tree):
    out = tree.append(tree.open(PROMPT), 1)
    with pytest.raises(ValueError, match="read-only"):
        out.logprobs[0, 3] = 0


def test_score_leaves_the_nodes_as_they_are_and_takes_no_page_for_single_tokens(tree):
    root = tree.open(PROMPT)
    before = tree.stats()
    scores = tree.score(root, [[1], [2], [3]])
    assert scores.sums == close_to(truth(PROMPT)[-1][[1, 2, 3]])
    assert (tree.stats().peak, tree.stats().copies) == (before.peak, 0)
    scores = tree.score(root, [[1, 2, 3], [4, 5]])
    assert scores.token_logprobs[0] == close_to(truth([*PROMPT, 1, 2])[[5, 6, 7], [1, 2, 3]])
    assert scores.sums[1] == close_to(truth([*PROMPT, 4])[[5, 6], [4, 5]].sum())
    assert (tree.stats().nodes, tree.stats().physical) == (1, before.physical)


def test_more_continuations_than_the_pool_holds_are_scored_in_turns(tree):
    root = tree.open(PROMPT)
    continuations = random_prompts(40, 9, 12, seed=3)  # two or three pages each, in a pool of 32
    scores = tree.score(root, continuations)
    expected = []
    for row in continuations:
        logprobs = truth(PROMPT + row)
        expected.append(sum(logprobs[5 + i, token] for i, token in enumerate(row)))
    np.testing.assert_allclose(scores.sums, expected, atol=2e-3)
    assert tree.stats().nodes == 1


def test_calls_with_no_nodes_do_nothing(tree):
    assert tree.open([]) == tree.fork([]) == tree.reorder([], []) == []
    assert tree.append([], []).logprobs.shape == (0, TOY.vocab_size)
    assert tree.next_tokens([], top=3).token_ids.shape == (0, 3)
    assert tree.score([], []).sums.tolist() == tree.score(tree.open(PROMPT), []).sums.tolist() == []
    tree.free([])
    tree.pin([])


def test_nodes_show_themselves(tree):
    node = tree.open(PROMPT)
    assert repr(node) == f"<Node {node._number}: 6 tokens>"
    tree.pin(node)
    tree.free(node)
    assert repr(node).endswith("6 tokens, pinned, freed>")
    assert (node.length, len(node), node.tokens) == (6, 6, PROMPT)
    assert repr(tree) == "<Tree: 0 nodes on 0 of 32 pages>"


# Pages


def test_a_fork_takes_no_page_and_never_fails_even_in_a_full_pool(tree):
    node = tree.open(list(range(64)))
    tree.append(tree.open(list(range(60))), [1, 2, 3, 4])
    assert tree.stats().free == 0
    kids = tree.fork(node, 100)
    stats = tree.stats()
    assert (stats.nodes, stats.logical, stats.physical, stats.shared) == (102, 16 * 102, 32, 16 * 100)
    assert tree.next_tokens(kids[-1]).logprobs[0] == close_to(truth(node.tokens)[-1])


def test_n_children_cost_n_minus_1_copies_when_their_parent_is_gone_and_n_when_it_stays(tree):
    root = tree.open(PROMPT)
    tree.append(tree.fork(root, 4), [1, 2, 3, 4])
    assert tree.stats().copies == 4
    other = tree.open(PROMPT)
    kids = tree.fork(other, 4)
    tree.free(other)
    tree.append(kids, [1, 2, 3, 4])
    assert tree.stats().copies == 4 + 3


def test_reorder_lets_the_first_child_keep_its_parents_place(tree):
    beams = tree.fork(tree.open(PROMPT), 4)
    tree.append(beams, [1, 2, 3, 4])
    copies = tree.stats().copies
    children = tree.reorder(beams, [2, 0, 2, 2])
    assert (children[0], children[1]) == (beams[2], beams[0])
    assert (beams[1].is_free, beams[3].is_free) == (True, True)
    tree.append(children, [5, 6, 7, 8])
    assert [child.tokens[6:] for child in children] == [[3, 5], [1, 6], [3, 7], [3, 8]]
    assert tree.stats().copies == copies + 2  # of the three that write to one page, two copy it


def test_reorder_forks_pinned_nodes_and_leaves_them(tree):
    root = tree.open(PROMPT)
    tree.pin(root)
    children = tree.reorder([root], [0, 0])
    assert root not in children and not root.is_free
    tree.append(children, [1, 2])


def test_truncate_copies_nothing_and_the_next_append_copies_what_is_still_shared(tree):
    root = tree.open(PROMPT)
    kid = tree.fork(root)
    tree.truncate(kid, 5)  # the page is now seen with two tokens by one node and with one by the other
    assert tree.stats().copies == 0
    tree.append(kid, [60])
    assert tree.stats().copies == 1
    tree.append(root, [61])
    assert tree.next_tokens([kid, root]).logprobs == close_to(
        [truth([*PROMPT[:5], 60])[-1], truth([*PROMPT, 61])[-1]]
    )  # fmt: skip
    assert tree.stats().copies == 1  # the other one was alone on the page by then


def test_append_is_all_or_nothing_for_the_whole_call(tree):
    root, _ = tree.open([list(range(30)), list(range(40))])
    kids = tree.fork(root, 3)
    expected = tree.next_tokens(kids).logprobs
    before = tree.stats()
    with pytest.raises(OutOfPagesError) as error:
        tree.append(kids, [[1] * 34, [2] * 34, [3] * 3])
    assert str(error.value).startswith(
        "append: 71 tokens on 3 nodes need 17 new pages of 4 tokens and 3 for copies of shared ones, "
        "and 14 of 32 pages are free; nothing was changed"
    )
    assert tree.stats() == before
    assert [kid.tokens for kid in kids] == [root.tokens] * 3
    np.testing.assert_array_equal(tree.next_tokens(kids).logprobs, expected)


def test_physical_ids_do_not_influence_results(engine):
    results = []
    for order in (list(range(1, 33)), list(range(32, 0, -1)), [*range(1, 33, 2), *range(2, 33, 2)]):
        with Tree(EngineSteps(engine)) as tree:
            engine.scheduler.allocator._free = order
            kids = tree.fork(tree.open(PROMPT), 5)
            out = tree.append(kids, [[1], [2, 3], [4], [5, 6, 7], [8]])
            results.append((out.logprobs, np.concatenate(out.token_logprobs)))
    for other in results[1:]:
        np.testing.assert_array_equal(other[0], results[0][0])
        np.testing.assert_array_equal(other[1], results[0][1])


# Steps


def test_calls_are_cut_to_the_limits_and_as_few_steps_as_they_allow(engine, tree, monkeypatch):
    batches = []
    prepare = engine.runner.prepare_batch
    monkeypatch.setattr(
        engine.runner, "prepare_batch", lambda batch, features: batches.append(batch) or prepare(batch, features)
    )
    root = tree.open(list(range(40)))  # 16 tokens a step at most
    assert [int((batch.inputs.query_lens).sum()) for batch in batches] == [16, 16, 8]
    del batches[:]
    kids = tree.fork(root, 10)
    tree.append(kids, [1] * 10)  # 4 sequences a step at most
    assert [int((batch.inputs.context_lens > 0).sum()) for batch in batches] == [4, 4, 2]


@pytest.mark.slow
def test_nothing_is_compiled_after_warm_up():
    engine = toy_engine(num_pages=34, page_size=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64)
    with Tree(EngineSteps(engine)) as tree:
        tree.warm_up(top=3)
        compiled = steps.num_programs()
        for seed in range(3):
            nodes = tree.open(random_prompts(3, 1, 20, seed), top=3)
            kids = tree.fork([nodes[0]] * 5)
            tree.append(kids, tree.next_tokens(kids, top=3).sample(seed)[0], top=3)
            tree.append(kids, random_prompts(5, 1, 6, seed), top=3)
            tree.score(nodes[1], random_prompts(4, 1, 6, seed))
            tree.truncate(kids[0], 2)
            tree.next_tokens(kids[0], top=2)
            tree.free([*nodes, *kids])
        assert steps.num_programs() == compiled
        tree.open(PROMPT)  # the whole vocabulary is another program: the counter counts
        assert steps.num_programs() > compiled


def test_an_interrupted_append_is_undone(engine, tree, monkeypatch):
    kids = tree.fork(tree.open(PROMPT), 6)
    before = tree.stats()
    real = engine.runner.run
    calls = []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 2:  # in the second of two steps: the first one has written
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tree.append(kids, [1, 2, 3, 4, 5, 6])
    assert [kid.tokens for kid in kids] == [PROMPT] * 6
    assert tree.stats().nodes == before.nodes
    tree.check_invariants()
    out = tree.append(kids, [1, 2, 3, 4, 5, 6])
    assert out.logprobs == close_to([truth([*PROMPT, token])[-1] for token in range(1, 7)])


def test_an_append_that_fails_before_the_copies_leaves_every_page_as_it_was(engine, tree, monkeypatch):
    kids = tree.fork(tree.open(PROMPT), 3)
    before = tree.stats()
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "copy_pages", lambda copies: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tree.append(kids, [[1] * 9, [2], [3]])
    assert tree.stats() == dataclasses.replace(before, peak=tree.stats().peak)
    tree.check_invariants()
    assert tree.append(kids, [1, 2, 3]).logprobs == close_to([truth([*PROMPT, t])[-1] for t in (1, 2, 3)])


def test_a_step_that_took_the_pool_with_it_is_reported_and_the_engine_recovers(monkeypatch):
    engine = toy_engine(num_pages=33, page_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64)
    tree = Tree(EngineSteps(engine))
    root = tree.open(PROMPT)

    def fail(*args):
        for pool in engine.runner.pool.k:
            pool.delete()
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            tree.append(root, 1)
    with pytest.raises(RuntimeError, match="nodes of this tree are lost; close it and open another"):
        tree.fork(root)
    tree.close()
    with Tree(EngineSteps(engine)) as tree:
        assert tree.next_tokens(tree.open(PROMPT)).logprobs[0] == close_to(truth(PROMPT)[-1])


# Who owns the pool


def test_a_tree_owns_the_pool_until_it_is_closed(llm):
    params = SamplingParams(temperature=0, max_tokens=3)
    expected = llm.generate("abc", params)[0].outputs[0].token_ids
    with llm.tree() as tree:
        tree.open("abc")
        with pytest.raises(RuntimeError, match="a tree is open and owns the page pool: close it first"):
            llm.generate("abc", params)
        with pytest.raises(RuntimeError, match="a tree is open"):
            llm.tree()
        assert tree.stats().nodes == 1  # nothing was lost
    assert llm.engine.scheduler.allocator.num_used == 0
    assert llm.generate("abc", params)[0].outputs[0].token_ids == expected


def test_no_tree_is_opened_while_a_run_is_in_progress(llm):
    results = llm.generate_iter(["abc", "defg"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=9)])
    next(results)
    with pytest.raises(RuntimeError, match="another run is in progress"):
        llm.tree()
    assert len(list(results)) == 1
    llm.tree().close()


def test_a_closed_tree_says_so_and_closing_twice_is_fine(llm):
    with llm.tree() as tree:
        root = tree.open("abc")
    tree.close()
    assert (repr(tree), root.is_free) == ("<Tree, closed>", True)
    for call in (
        lambda: tree.open("abc"), lambda: tree.fork(root), lambda: tree.append(root, 1), lambda: tree.free(root),
        lambda: tree.truncate(root, 1), lambda: tree.pin(root), lambda: tree.score(root, [1]),
        lambda: tree.next_tokens(root), lambda: tree.reorder([root], [0]), lambda: tree.warm_up(),
        lambda: tree.__enter__(),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="this tree is closed"):
            call()


def test_an_error_in_the_block_closes_the_tree(llm):
    with pytest.raises(ZeroDivisionError), llm.tree() as tree:
        tree.open("abc")
        1 / 0  # noqa: B018
    assert llm.engine.scheduler.allocator.num_used == 0
    llm.generate("abc", SamplingParams(max_tokens=1))


def test_a_tree_that_is_dropped_gives_the_pool_back(llm):
    tree = llm.tree()
    tree.open("abc")
    del tree
    gc.collect()
    llm.tree().close()


@pytest.mark.slow
def test_the_engine_runs_as_before_beside_the_use_of_trees():
    prompts = random_prompts(4, 3, 12, seed=5)

    def groups():
        return [make_group(p, SamplingParams(n=2, seed=i, max_tokens=6), str(i)) for i, p in enumerate(prompts)]

    engine = toy_engine(num_pages=35)
    expected = run_tokens(engine, groups())
    with Tree(EngineSteps(engine)) as tree:
        tree.append(tree.fork(tree.open(PROMPT), 4), [1, 2, 3, 4])
    assert run_tokens(engine, groups()) == expected


# What is refused, before anything changes


def refusals(tree, other):
    """(call, part of the message), where node 0 is live, node 1 pinned and node 2 freed."""
    live, pinned, freed = tree.open([PROMPT] * 3)
    foreign = other.open([1, 2])
    tree.pin(pinned)
    tree.free(freed)
    return [
        (lambda: tree.append(freed, 1), "append: <Node 2: 6 tokens, freed> has no pages any more"),
        (lambda: tree.fork(freed, 2), "fork: <Node 2: 6 tokens, freed> has no pages any more"),
        (lambda: tree.free([live, freed]), "free: <Node 2: 6 tokens, freed> has no pages any more"),
        (lambda: tree.score(freed, [1]), "freed> has no pages"),
        (lambda: tree.append(foreign, 1), "belongs to another tree"),
        (lambda: tree.fork([live, foreign]), "belongs to another tree"),
        (lambda: tree.append("live", [1]), "append takes nodes of a tree, got 'l'"),
        (lambda: tree.append([live, pinned], [1, 2]), "append: <Node 1: 6 tokens, pinned> is pinned, which makes it"),
        (lambda: tree.truncate(pinned, 2), "is pinned"),
        (lambda: tree.append([live, live], [1, 2]), "append: <Node 0: 6 tokens> is given 2 times: fork it first"),
        (lambda: tree.free([live, live]), "given twice"),
        (lambda: tree.reorder([live, live], [0]), "given twice"),
        (lambda: tree.reorder([live], [1]), "parents [1] are not all in 0 to 0"),
        (lambda: tree.append(live, 97), "token id 97 is outside the vocabulary, which has ids 0 to 96"),
        (lambda: tree.append([live], [-1]), "token id -1 is outside"),
        (lambda: tree.open([97]), "token id 97 is outside"),
        (lambda: tree.score(live, [[1], [97]]), "token id 97 is outside"),
        (lambda: tree.append([live], [1, 2]), "tokens for 2 nodes, but 1 nodes"),
        (lambda: tree.append([live], [[]]), "no tokens for node 0 of the call"),
        (lambda: tree.append(live, [1.5]), "token ids are integers, got 1.5"),
        (lambda: tree.append(live, True), "append takes token ids, one or a list of them for each node, got True"),
        (lambda: tree.append(live, "ab"), "append takes token ids, got text: tree.encode(node, text) gives its ids"),
        (lambda: tree.score([live], [[1], [2]]), "2 continuations for 1 nodes"),
        (lambda: tree.score(live, 5), "score takes token ids"),
        (lambda: tree.append(live, [1] * 59), "append: 59 tokens behind 6 make 65, max_model_len is 64"),
        (lambda: tree.open([1] * 65), "open: 65 tokens behind 0 make 65, max_model_len is 64"),
        (lambda: tree.score(live, [[1] * 60]), "max_model_len is 64"),
        (lambda: tree.truncate(live, 7), "length 7 of <Node 0: 6 tokens> is not in 1 to 6"),
        (lambda: tree.truncate(live, 0), "length 0 of"),
        (lambda: tree.append(live, 1, top=0), "top must be None (all) or an integer from 1 to 97, got 0"),
        (lambda: tree.open([1], top=98), "got 98"),
        (lambda: tree.fork(live, -1), "n must be an integer of at least 0, got -1"),
        (lambda: tree.fork([live], 2), "give one node with n, or a list of nodes"),
        (lambda: tree.open("text"), "a text prompt needs a tokenizer"),
        (lambda: tree.text(live), "text needs a tokenizer"),
        (lambda: tree.encode(live, "a"), "encode needs a tokenizer"),
        (lambda: tree.open(""), "the prompt is empty"),
        (lambda: tree.open([[1], []]), "prompt 1: the prompt has no tokens"),
    ]


def test_what_cannot_work_is_refused_with_the_reason_and_changes_nothing(engine):
    with Tree(EngineSteps(engine)) as tree:
        second = toy_engine(num_pages=33, page_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64)
        with Tree(EngineSteps(second)) as other:
            calls = refusals(tree, other)
            before = tree.stats(), {node: node.tokens for node in tree.nodes}
            for call, reason in calls:
                with pytest.raises(ValueError) as error:
                    call()
                assert reason in str(error.value)
                assert (tree.stats(), {node: node.tokens for node in tree.nodes}) == before


def test_a_continuation_that_no_free_page_can_hold_is_refused_with_the_numbers(tree):
    root = tree.open(PROMPT)
    tree.open([list(range(60)), list(range(60))])
    with pytest.raises(OutOfPagesError, match="9 tokens behind 6 needs 3 pages of 4 tokens, and 0 of 32"):
        tree.score(root, [[1], list(range(9))])
    assert tree.score(root, [[1], [2]]).sums == close_to(truth(PROMPT)[-1][[1, 2]])


# Text


def test_text_prompts_and_texts(llm):
    with llm.tree() as tree:
        root, other = tree.open(["abc", {"prompt_token_ids": [40, 41]}])
        assert root.tokens == llm.tokenizer.encode("abc")
        node = tree.fork(root)
        tree.append(node, tree.encode(root, "de"))
        assert (tree.text(node), tree.text(root, [70, 71]), other.length) == ("abcde", "de", 2)
        assert tree.eos_token_ids == {1}
