"""Reading shared pages once gives what reading them for every row gives, and the engine's tokens do not change."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_but_slow, logprobs_after
from toy import ALWAYS, TOY, cascade_engine, make_group, random_prompts, run_tokens, toy_engine

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.device import steps
from jaxpaged.host.step.cascade import pad_groups, plan_cascade, plan_groups
from jaxpaged.tree.on_engine import EngineSteps
from jaxpaged.tree.tree import Tree
from pallas_kernels import reference
from pallas_kernels.cascade_groups import CascadeGroups

needs_mosaic = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic GPU kernels need JAX 0.11")


class SharedCase:
    """Prompts with samples that own `own_lens` tokens each (in turn), in permuted pages; NaN wherever none may read.

    Of every prompt's samples, the first two also share `history` tokens behind the prompt, like beams.
    """

    def __init__(self, prompts, samples, prompt, own_lens, page_size=16, heads=8, kv_heads=2, head_dim=64, history=0):
        rng = np.random.default_rng(0)
        rows: list[tuple[list[int], int]] = []
        num_pages = 1

        def new_pages(count):
            nonlocal num_pages
            num_pages += count
            return list(range(num_pages - count, num_pages))

        for _ in range(prompts):
            shared = new_pages(prompt // page_size)
            common = new_pages(history // page_size)
            for sample in range(samples):
                start = shared + (common if sample < 2 else [])
                length = len(start) * page_size + own_lens[len(rows) % len(own_lens)]
                rows.append((start + new_pages(-(-length // page_size) - len(start)), length))
        permuted = np.concatenate([[0], 1 + rng.permutation(num_pages + 2)])
        self.lens = np.array([length for _, length in rows], np.int32)
        self.tables = np.zeros((len(rows), max(len(pages) for pages, _ in rows) + 1), np.int32)
        live = np.zeros((num_pages + 3, page_size), bool)
        for row, (pages, length) in enumerate(rows):
            self.tables[row, : len(pages)] = permuted[pages]
            at = np.arange(length)
            live[self.tables[row, at // page_size], at % page_size] = True
        shape = (*live.shape, kv_heads, head_dim)
        k, v = (np.where(live[:, :, None, None], rng.standard_normal(shape), np.nan) for _ in "kv")
        q = rng.standard_normal((len(rows), heads, head_dim))
        self.arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
        self.page_size = page_size

    def plan(self, max_members: int, padding: int = 0) -> CascadeGroups:
        groups = plan_groups(self.tables, self.lens, self.page_size, max_members, ALWAYS)
        assert groups is not None
        groups = pad_groups(groups, len(groups.num_pages) + padding)
        return CascadeGroups(*(jnp.asarray(array) for array in groups))

    def expected(self, **options):
        exact = (x.astype(jnp.float32) for x in self.arrays)
        return reference.paged_decode(*exact, self.tables, self.lens, scale=0.2, **options)

    def close_to_expected(self, out, **options):
        np.testing.assert_allclose(np.asarray(out, np.float32), self.expected(**options), atol=2e-2)


CASES = {
    "two prompts": (dict(prompts=2, samples=3, prompt=64, own_lens=[5, 20, 40]), {}),
    "beams with a common history": (dict(prompts=1, samples=4, prompt=48, own_lens=[1, 33], history=32), {}),
    "more samples than a group holds": (dict(prompts=1, samples=11, prompt=32, own_lens=[9], kv_heads=1), {}),
    "small pages, one query head": (dict(prompts=2, samples=2, prompt=40, own_lens=[30], page_size=8, kv_heads=8), {}),
    "soft cap, wide heads": (dict(prompts=1, samples=2, prompt=64, own_lens=[70], head_dim=128), dict(soft_cap=3.0)),
    "large pages": (dict(prompts=1, samples=3, prompt=256, own_lens=[20], page_size=128, head_dim=80), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reference_reads_groups_as_the_tables_say(name):
    shape, options = CASES[name]
    case = SharedCase(**shape)
    exact = [x.astype(jnp.float32) for x in case.arrays]
    out = reference.cascade_decode(*exact, case.tables, case.lens, case.plan(4, 1), scale=0.2, **options)
    np.testing.assert_allclose(out, case.expected(**options), atol=1e-5)


def test_the_reference_follows_the_plan():
    case = SharedCase(prompts=2, samples=2, prompt=32, own_lens=[3])
    groups = case.plan(4)
    wrong = groups._replace(members=groups.members[::-1])
    out = reference.cascade_decode(*case.arrays, case.tables, case.lens, wrong, scale=0.2)
    assert np.abs(np.asarray(out, np.float32) - case.expected()).max() > 0.1


def run_kernel(case, groups, **options):
    from pallas_kernels.cascade import cascade_decode

    tables, lens = jnp.asarray(case.tables), jnp.asarray(case.lens)
    return cascade_decode(*case.arrays, tables, lens, groups, scale=0.2, **options)


def interpreted(case, groups, detect_races=False, **options):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
        return run_kernel(case, groups, **options)


@needs_mosaic
@pytest.mark.parametrize("name", all_but_slow(CASES, "two prompts"))
def test_the_kernel_gives_what_plain_attention_gives(name):
    shape, options = CASES[name]
    case = SharedCase(**shape)
    case.close_to_expected(interpreted(case, case.plan(2, 1), num_programs=3, **options), **options)


@pytest.mark.slow
@needs_mosaic
def test_no_thread_races_another():
    case = SharedCase(prompts=1, samples=3, prompt=80, own_lens=[5, 70])
    groups = case.plan(4)
    case.close_to_expected(interpreted(case, groups, detect_races=True, num_programs=5))


@needs_mosaic
def test_rows_that_share_nothing_need_no_group():
    case = SharedCase(prompts=3, samples=1, prompt=32, own_lens=[1, 40])
    nothing = CascadeGroups(
        jnp.full((2, 4), -1, jnp.int32), *(jnp.zeros(2, jnp.int32),) * 2, jnp.zeros(3, jnp.int32),
        jnp.full((2, 3), -1, jnp.int32),
    )  # fmt: skip
    case.close_to_expected(interpreted(case, nothing, num_programs=4))


@needs_mosaic
def test_too_many_members_are_refused():
    case = SharedCase(prompts=1, samples=9, prompt=32, own_lens=[1], kv_heads=1)
    with pytest.raises(ValueError, match="groups of 9 rows .* at most 8 rows a group"):
        run_kernel(case, case.plan(9))


@needs_mosaic
@pytest.mark.slow
def test_it_lowers_for_cuda():
    case = SharedCase(prompts=1, samples=4, prompt=64, own_lens=[5], heads=32, kv_heads=8, head_dim=128)
    groups = case.plan(4)
    lowered = jax.jit(lambda: run_kernel(case, groups)).trace().lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 2


@needs_mosaic
@pytest.mark.gpu
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(32, 8, 128), (32, 8, 64), (16, 1, 128), (28, 4, 128), (8, 8, 256)]
)
def test_on_a_gpu_it_gives_what_plain_attention_gives(heads, kv_heads, head_dim):
    from pallas_kernels.decode_tile import max_members

    case = SharedCase(3, 11, 512, [1, 100, 700], heads=heads, kv_heads=kv_heads, head_dim=head_dim, history=128)
    groups = case.plan(max_members(heads, kv_heads, head_dim), 3)
    out = run_kernel(case, groups)
    case.close_to_expected(out)
    assert (np.asarray(out) == np.asarray(run_kernel(case, groups))).all()


def requests():
    params = [SamplingParams(n=5, max_tokens=20), SamplingParams(temperature=0, max_tokens=9)]
    return [make_group(prompt, params[i % 2], str(i), seed=i) for i, prompt in enumerate(random_prompts(6))]


def test_sharing_does_not_change_a_token():
    assert run_tokens(cascade_engine(), requests()) == run_tokens(toy_engine(), requests())


@pytest.mark.slow
def test_preemption_and_sharing_do_not_change_a_token():
    tight = cascade_engine(num_pages=40)
    assert run_tokens(tight, requests()) == run_tokens(toy_engine(), requests())
    assert tight.stats.preemptions > 0


@pytest.mark.slow
def test_warm_up_compiles_the_shared_steps_too():
    engine = cascade_engine(max_num_seqs=8, max_model_len=64)
    groups = [make_group(prompt[:20], SamplingParams(n=4, max_tokens=9), seed=1) for prompt in random_prompts(2)]
    engine.warm_up(groups)
    run_tokens(engine, groups)
    assert engine.stats.programs_made == 0


@pytest.mark.slow
def test_layers_with_a_window_read_every_row_alone():
    config = dataclasses.replace(TOY, sliding_window=8, sliding_layers=(True, False))
    engines = [cascade_engine(), toy_engine()]
    for engine in engines:
        engine.model = config
    assert run_tokens(engines[0], requests()) == run_tokens(engines[1], requests())


@pytest.fixture
def runs_read(monkeypatch):
    """Of every decode step of an engine that shares: the lengths, in pages, of the runs that it read once."""
    found = []

    def plan(batch, page_size, cascade, searches=()):
        shared = plan_cascade(batch, page_size, cascade, searches)
        groups = shared.inputs.cascade_groups
        if batch.inputs.context_lens.any():  # not of an empty batch, whose program is made ahead
            found.append([] if groups is None else [int(count) for count in groups.num_pages if count])
        return shared

    monkeypatch.setattr("jaxpaged.engine.runner.plan_cascade", plan)
    return found


def test_requests_read_the_pages_of_their_runs_prefix_once(runs_read):
    """22 tokens that all begin with, at page size 4: five full pages; a group holds at most four members."""
    prefix, suffixes = random_prompts(1, 22, 22)[0], random_prompts(6, 2, 9, seed=1)

    def groups(prefix_len):
        made = [make_group(prefix + own, SamplingParams(temperature=0, max_tokens=5), str(i)) for i, own in
                enumerate(suffixes)]  # fmt: skip
        for group in made:
            group.prefix_len = prefix_len
        return made

    assert run_tokens(cascade_engine(page_size=4), groups(22)) == run_tokens(toy_engine(), groups(0))
    assert runs_read == [[5, 5]] * 4


def test_the_nodes_of_a_tree_read_their_common_pages_once_and_give_what_recomputing_gives(runs_read):
    prompt = random_prompts(1, 22, 22)[0]  # at page size 4: five full pages, and two tokens on the next
    engine = cascade_engine(page_size=4)
    with Tree(EngineSteps(engine)) as tree:
        root = tree.open(prompt)
        kids = tree.fork(root, 7)
        for step in range(5):
            out = tree.append(kids, [(step * 7 + i) % TOY.vocab_size for i in range(7)])
        for row, kid in zip(out.logprobs, kids, strict=True):
            np.testing.assert_allclose(row, logprobs_after(tuple(kid.tokens)), atol=2e-4)
        assert runs_read == [[5, 5]] * 5  # two groups, since one holds at most four members

        tree.truncate(kids[0], 24)
        grandkids = tree.fork([kids[0]] * 4)  # six full pages with one another, and five of these with the kids
        nodes = [*grandkids, *kids[1:]]
        tree.next_tokens(nodes)
        out = tree.append(nodes, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
        for row, node in zip(out.logprobs, nodes, strict=True):
            np.testing.assert_allclose(row, logprobs_after(tuple(node.tokens)), atol=2e-4)
        assert runs_read[-1] == [5, 5, 5, 1]
        tree.check_invariants()


@pytest.mark.slow
def test_warming_a_tree_up_compiles_its_shared_steps_too(runs_read):
    engine = cascade_engine(page_size=4, max_num_seqs=8, max_model_len=64)
    with Tree(EngineSteps(engine)) as tree:
        tree.warm_up(top=5)
        compiled = steps.num_programs()
        nodes = tree.fork(tree.open(random_prompts(1, 20, 20)[0], top=5), 6)
        out = tree.next_tokens(nodes, top=5)
        for _ in range(3):
            out = tree.append(nodes, out.sample(seed=0)[0], top=5)
        assert steps.num_programs() == compiled
    assert runs_read == [[5, 5]] * 3
