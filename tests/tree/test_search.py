"""The searches against enumeration and hand-made expectations on toy models, and on a real model."""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from beam_reference import log_softmax, toy_model
from helpers import full_logits
from toy import TOY, toy_engine, toy_params

from jaxpaged.tree.on_engine import EngineSteps
from jaxpaged.tree.search import (
    best_of_n,
    inclusion_probability,
    monte_carlo_tree_search,
    rollout,
    step_beam_search,
    stochastic_beam_search,
)
from jaxpaged.tree.toy import ToyLM
from jaxpaged.tree.tree import Tree

PROMPT = [1, 0]
END = 2


def small_toy(vocab_size=3, salt=b"search") -> ToyLM:
    logprobs = toy_model(vocab_size, salt, scale=1.0)
    return ToyLM(lambda prefix: logprobs([prefix])[0], vocab_size, eos_token_ids=[END])


@pytest.fixture
def tree():
    """A toy whose tree must be as it was when a search ends."""
    with small_toy().tree() as tree:
        tree.open(PROMPT)
        yield tree
        assert [node.tokens for node in tree.nodes] == [PROMPT]
        tree.check_invariants()


@pytest.fixture
def root(tree):
    return tree.nodes[0]


def all_continuations(toy: ToyLM, max_tokens: int) -> dict[tuple[int, ...], float]:
    """Log-probability of every continuation that ends with END or has max_tokens tokens."""
    found = {}
    for length in range(1, max_tokens + 1):
        for tokens in itertools.product(range(toy.vocab_size), repeat=length):
            is_leaf = tokens[-1] == END or length == max_tokens
            if is_leaf and END not in tokens[:-1]:
                found[tokens] = sum(
                    float(toy.logits_fn([*PROMPT, *tokens[:i]])[token]) for i, token in enumerate(tokens)
                )
    return found


# Stochastic beam search


def test_log_probabilities_of_stochastic_beams_are_right_and_enough_beams_find_everything(tree, root):
    truth = all_continuations(small_toy(), max_tokens=3)
    assert math.isclose(sum(math.exp(p) for p in truth.values()), 1, rel_tol=1e-5)
    beams = stochastic_beam_search(tree, root, k=len(truth) + 3, max_tokens=3, seed=0)
    assert {beam.tokens for beam in beams} == set(truth)
    for beam in beams:
        assert beam.logprob == pytest.approx(truth[beam.tokens], abs=1e-5)
    assert [beam.key for beam in beams] == sorted((beam.key for beam in beams), reverse=True)


def draws(tree, root, k, count):
    rng = np.random.default_rng(1)
    return [stochastic_beam_search(tree, root, k, max_tokens=2, seed=rng) for _ in range(count)]


def test_stochastic_beams_are_a_sample_without_replacement(tree, root):
    """How often each ordered pair comes, against drawing the first by its probability and the second from the rest."""
    count = 3000
    truth = {tokens: math.exp(p) for tokens, p in all_continuations(small_toy(), max_tokens=2).items()}
    seen = dict.fromkeys(itertools.permutations(truth, 2), 0)
    for first, second in draws(tree, root, 2, count):
        seen[first.tokens, second.tokens] += 1
    for (first, second), times in seen.items():
        expected = truth[first] * truth[second] / (1 - truth[first])
        deviation = math.sqrt(expected * (1 - expected) / count)
        assert abs(times / count - expected) < 4.5 * deviation, (first, second)


def test_inclusion_probabilities_give_unbiased_estimates(tree, root):
    """The mean length, from 2 of 3 beams, the last of which gives the threshold."""
    truth = all_continuations(small_toy(), max_tokens=2)
    estimates = []
    for *beams, last in draws(tree, root, 3, 2000):
        weights = [math.exp(beam.logprob) / inclusion_probability(beam, last.key) for beam in beams]
        estimates.append(sum(w * len(beam.tokens) for w, beam in zip(weights, beams, strict=True)))
    expected = sum(math.exp(p) * len(tokens) for tokens, p in truth.items())
    assert np.mean(estimates) == pytest.approx(expected, abs=4.5 * np.std(estimates) / math.sqrt(len(estimates)))


def test_impossible_tokens_are_never_drawn():
    toy = ToyLM(lambda prefix: [0.0, -np.inf, 0.0], 3, eos_token_ids=[END])
    with toy.tree() as tree:
        beams = stochastic_beam_search(tree, tree.open([0]), k=50, max_tokens=3, seed=0)
        assert {beam.tokens for beam in beams} == {(2,), (0, 2), (0, 0, 2), (0, 0, 0)}


def test_a_seed_repeats_a_stochastic_beam_search(tree, root):
    assert stochastic_beam_search(tree, root, 3, 4, seed=5) == stochastic_beam_search(tree, root, 3, 4, seed=5)
    assert stochastic_beam_search(tree, root, 3, 4, seed=5) != stochastic_beam_search(tree, root, 3, 4, seed=6)


def test_a_stochastic_beam_may_end_with_other_tokens_than_the_models(tree, root):
    beams = stochastic_beam_search(tree, root, k=20, max_tokens=3, seed=0, end_ids=[0, 1])
    assert {beam.tokens for beam in beams} == {(2,) * i + (end,) for i in range(3) for end in (0, 1)} | {(2, 2, 2)}


# Rollouts and best of n


def test_rollouts_stop_by_themselves_and_keep_what_was_appended(tree, root):
    nodes = tree.fork(root, 6)
    rollouts = rollout(tree, nodes, max_tokens=5, seed=0)
    lengths = [len(r.tokens) for r in rollouts]
    assert min(lengths) < max(lengths)
    for node, one in zip(nodes, rollouts, strict=True):
        assert node.tokens == [*PROMPT, *one.tokens]
        assert one.has_stopped == (one.tokens[-1] == END) and END not in one.tokens[:-1]
        assert one.has_stopped or len(one.tokens) == 5
        assert one.logprob == pytest.approx(tree.score(root, [one.tokens]).sums[0], abs=1e-5)
    tree.free(nodes)
    assert rollout(tree, [], 5, seed=0) == []


def test_best_of_n_counts_answers_and_breaks_ties_by_likelihood(tree, root):
    found = best_of_n(tree, root, n=20, max_tokens=4, seed=3, extract=len)
    assert found.answers == tuple(len(sample.tokens) for sample in found.samples)
    counts = {answer: found.answers.count(answer) for answer in set(found.answers)}
    assert dict(found.votes) == counts
    assert counts[found.majority] == max(counts.values())
    assert found.likeliest.logprob == max(sample.logprob for sample in found.samples)
    same = [sample for sample in found.samples if len(sample.tokens) == found.majority]
    assert found.best == max(same, key=lambda sample: sample.logprob)


def test_a_tie_goes_to_the_answer_with_the_likeliest_sample(tree, root):
    found = best_of_n(tree, root, n=2, max_tokens=4, seed=0)
    assert len(found.votes) == 2
    assert found.majority == found.likeliest.tokens


def test_samples_without_an_answer_do_not_vote(tree, root):
    found = best_of_n(tree, root, 40, 2, seed=0, extract=lambda tokens: tokens[0] if tokens[-1] == END else None)
    assert None in found.answers and None not in dict(found.votes)
    assert best_of_n(tree, root, 3, 2, seed=0, extract=lambda tokens: None).majority is None


@pytest.mark.parametrize("options", [dict(top=1), dict(temperature=1e-6), dict(top_p=1e-6)])
def test_options_of_sampling_narrow_what_is_drawn(tree, root, options):
    likeliest = rollout(tree, [node := tree.fork(root)], 4, seed=0, top=1)[0]
    tree.free(node)
    assert set(best_of_n(tree, root, n=5, max_tokens=4, seed=0, **options).samples) == {likeliest}
    beams = step_beam_search(
        tree, root, lambda rows: [0.0] * 4, lambda step: True, 4, 2, max_steps=4, max_step_tokens=1, seed=0, **options
    )
    assert {beam.tokens for beam in beams} == {likeliest.tokens}


def test_the_samples_share_their_prompt():
    with small_toy().tree() as tree:
        root = tree.open([0, 1] * 20)  # 10 pages of 4
        best_of_n(tree, root, n=16, max_tokens=4, seed=0)
        assert tree.stats().computed_tokens <= 40 + 16 * 4
        assert tree.stats().peak == 10 + 16


# Step-level beam search


def digit_toy() -> ToyLM:
    """Digits 0 to 6 alike, 7 ends a step, 8 (a little less likely) ends the text."""
    return ToyLM(lambda prefix: [0.0] * 8 + [-1.0], 9, eos_token_ids=[8])


def test_step_beams_keep_the_best_and_expand_them():
    calls = []

    def scorer(continuations):
        calls.append(continuations)
        return [sum(tokens) / len(tokens) for tokens in continuations]

    with digit_toy().tree() as tree:
        root = tree.open([0])
        beams = step_beam_search(
            tree, root, scorer, ends_step=lambda step: step[-1] == 7, n=6, expand=3, max_steps=4, max_step_tokens=5,
            seed=2,
        )  # fmt: skip
        assert [node.tokens for node in tree.nodes] == [[0]]
    assert len(calls) == 4 and all(len(call) == 6 for call in calls)
    for before, after in itertools.pairwise(calls):
        going = [tokens for tokens in before if tokens[-1] != 8]
        survivors = sorted(going, key=lambda tokens: -sum(tokens) / len(tokens))[:2]
        for i, tokens in enumerate(after):
            parent = survivors[i // 3]
            assert tokens[: len(parent)] == parent and 1 <= len(tokens) - len(parent) <= 5
    assert [beam.score for beam in beams] == sorted((beam.score for beam in beams), reverse=True)
    complete = [tokens for call in calls for tokens in call if tokens[-1] == 8]
    assert sorted(list(b.tokens) for b in beams if b.is_complete) == sorted(complete)
    for beam in beams:
        expected = -math.log(8 + math.exp(-1)) * len(beam.tokens) - beam.is_complete
        assert beam.logprob == pytest.approx(expected, rel=1e-5)


def test_a_scorer_that_likes_nines_finds_more_of_them_than_chance():
    def share(n, expand):
        with digit_toy().tree() as tree:
            beams = step_beam_search(
                tree, tree.open([0]), lambda rows: [row.count(6) for row in rows], lambda step: len(step) == 1,
                n, expand, max_steps=20, max_step_tokens=1, seed=0, end_ids=[],
            )  # fmt: skip
            return beams[0].score

    assert share(16, 4) > 12 > share(4, 1)  # 20 steps; a free choice finds 2.2 on average


def test_step_beams_refuse_what_cannot_be():
    with digit_toy().tree() as tree:
        root = tree.open([0])
        with pytest.raises(ValueError, match="n must be a multiple of expand, got n=5 and expand=2"):
            step_beam_search(tree, root, lambda rows: [0] * 5, lambda s: True, 5, 2, 1, 1, seed=0)
        with pytest.raises(ValueError, match="the scorer gave 1 scores for 4 continuations"):
            step_beam_search(tree, root, lambda rows: [0], lambda s: True, 4, 2, 1, 1, seed=0)
        assert len(tree.nodes) == 1


# Monte Carlo tree search


def test_visits_follow_puct():
    """One token deep, against the rule written out."""
    priors, values = np.array([0.5, 0.3, 0.2]), [0.2, 0.6, 0.9]
    visits, totals = np.zeros(3, int), np.zeros(3)
    for n in range(60):
        means = np.divide(totals, visits, out=np.zeros(3), where=visits > 0)
        chosen = int(np.argmax(means + 0.7 * math.sqrt(n + 1) * priors / (1 + visits)))
        visits[chosen] += 1
        totals[chosen] += values[chosen]
    with ToyLM(lambda prefix: np.log(priors), 3).tree() as tree:
        found = monte_carlo_tree_search(
            tree, tree.open([0]), lambda tokens: values[tokens[0]], 60, max_tokens=1, exploration=0.7
        )
    assert {token: count for token, count, _ in found.visits} == dict(enumerate(visits.tolist()))
    assert found.visits[0][0] == 2 and found.tokens == found.best == (2,)
    assert [mean for _, _, mean in found.visits] == pytest.approx([values[token] for token, _, _ in found.visits])


def test_paths_of_one_round_count_as_visits_of_no_worth_until_they_are_valued():
    """As above, four at a time."""
    priors, values = np.array([0.5, 0.3, 0.2]), [0.2, 0.6, 0.9]
    visits, totals = np.zeros(3, int), np.zeros(3)
    spreads = []
    for start in range(0, 30, 4):
        round_ = []
        for n in range(start, min(start + 4, 30)):
            means = np.divide(totals, visits, out=np.zeros(3), where=visits > 0)
            round_.append(int(np.argmax(means + 0.7 * math.sqrt(n + 1) * priors / (1 + visits))))
            visits[round_[-1]] += 1
        for chosen in round_:
            totals[chosen] += values[chosen]
        spreads.append(len(set(round_)))
    assert max(spreads) == 3
    with ToyLM(lambda prefix: np.log(priors), 3).tree() as tree:
        found = monte_carlo_tree_search(
            tree, tree.open([0]), lambda tokens: values[tokens[0]], 30, max_tokens=1, exploration=0.7, num_parallel=4
        )
    assert {token: count for token, count, _ in found.visits} == dict(enumerate(visits.tolist()))
    assert [mean for _, _, mean in found.visits] == pytest.approx([values[token] for token, _, _ in found.visits])


@pytest.mark.parametrize("num_parallel", [1, 8])
def test_the_search_finds_what_the_policy_does_not_expect_and_computes_no_token_twice(num_parallel, monkeypatch):
    hidden = (3, 1, 2, 2, 0, 3)
    seen = []

    def value(tokens):
        seen.append(tuple(tokens))
        right = next((i for i, (a, b) in enumerate(zip(tokens, hidden, strict=False)) if a != b), len(tokens))
        return right / len(hidden)

    with ToyLM(lambda prefix: [0.0, 0.5, 0.0, -0.5], 4, page_size=2).tree() as tree:
        root = tree.open([0, 1, 2])
        appended = []
        append = tree.append
        monkeypatch.setattr(tree, "append", lambda nodes, *rest: appended.append(len(nodes)) or append(nodes, *rest))
        found = monte_carlo_tree_search(
            tree, root, value, num_simulations=400, max_tokens=6, num_children=4, num_parallel=num_parallel
        )
        assert (found.best, found.best_value) == (hidden, 1.0)
        assert found.tokens == hidden
        assert sum(count for _, count, _ in found.visits) == 400
        assert len(set(seen)) == len(seen)
        assert (sum(appended), max(appended), len(appended)) == (len(seen), num_parallel, 400 // num_parallel)
        assert tree.stats().computed_tokens == 3 + len(seen)
        assert tree.nodes == [root]
        tree.check_invariants()


def test_noise_at_the_root_follows_the_seed(tree, root):
    def visits(**options):
        return monte_carlo_tree_search(tree, root, lambda tokens: 0.5, 30, 3, **options).visits

    assert visits(seed=1, root_noise=0.5) == visits(seed=1, root_noise=0.5) != visits(seed=2, root_noise=0.5)
    assert visits(seed=1) == visits(seed=2)


def test_a_tree_search_refuses_what_cannot_be(tree, root):
    for name in ("num_simulations", "max_tokens", "num_parallel"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            monte_carlo_tree_search(tree, root, lambda tokens: 0.5, **{"num_simulations": 1, "max_tokens": 1, name: 0})


def test_a_tree_search_that_is_broken_off_leaves_no_node_behind(tree, root):
    def value(tokens):
        raise RuntimeError("no value")

    with pytest.raises(RuntimeError, match="no value"):
        monte_carlo_tree_search(tree, root, value, 10, max_tokens=3, num_parallel=4)


# All of them on a network


@pytest.mark.slow
def test_searches_run_on_a_model_and_their_log_probabilities_are_its_own():
    engine = toy_engine(num_pages=64, page_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64)
    prompt = [5, 17, 3, 88, 41, 9]

    def logprob(tokens):
        rows = log_softmax(
            np.asarray(full_logits(toy_params(), TOY, jnp.asarray([*prompt, *tokens, *[0] * 58], jnp.int32)[:64]))
        )
        return sum(rows[len(prompt) - 1 + i, token] for i, token in enumerate(tokens))

    with Tree(EngineSteps(engine)) as tree:
        root = tree.open(prompt)
        beams = stochastic_beam_search(tree, root, k=6, max_tokens=4, seed=0)
        assert len({beam.tokens for beam in beams}) == 6
        samples = best_of_n(tree, root, n=5, max_tokens=6, seed=0, stop=lambda tokens: tokens[-1] < 20).samples
        steps = step_beam_search(
            tree, root, lambda rows: [sum(row) for row in rows], lambda step: step[-1] < 30, 4, 2, 3, 4, seed=0
        )
        found = monte_carlo_tree_search(tree, root, lambda tokens: tokens[-1] / 97, 20, max_tokens=3, num_parallel=3)
        assert tree.nodes == [root]
        tree.check_invariants()
        assert tree.score(root, [found.best]).sums[0] == pytest.approx(logprob(found.best), abs=1e-3)
    for one in (*beams, *samples, *steps):
        assert one.logprob == pytest.approx(logprob(one.tokens), abs=1e-3)
