"""The page pool has one owner at a time: what would disturb an open run is refused, and nothing is left locked."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import textwrap
import threading

import pytest
from helpers import all_but_slow
from paths import ROOT
from toy import make_group, save_toy_checkpoint

from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.tree.toy import ToyLM

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
BEAMS = BeamSearchParams(beam_width=2, max_tokens=3)
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [5, 6, 7], [40]]
PARAMS = [
    SamplingParams(max_tokens=6, seed=1, ignore_eos=True), GREEDY,
    SamplingParams(n=2, max_tokens=5, seed=2, ignore_eos=True), SamplingParams(max_tokens=3, seed=3, ignore_eos=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")


def make_llm(directory):
    return LLM(directory, page_size=4, num_pages=30, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32)


@pytest.fixture(scope="module")
def llm(directory):
    return make_llm(directory)


def tokens(output):
    return [sample.token_ids for sample in output.outputs]


@pytest.fixture(scope="module")
def alone(llm):
    """The tokens of each request without any other."""
    return [tokens(llm.generate(prompt, params)[0]) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


def begin(llm, late=0.05):
    """A run that stands still between arrivals, when no request is queued; its first output; and all its others."""
    run = llm.generate_iter(PROMPTS, PARAMS, arrival_times=[0, late, late, late])
    return run, [next(run)]


def check(outputs, alone):
    assert {int(output.request_id): tokens(output) for output in outputs} == dict(enumerate(alone))


def calls_of(llm):
    """Everything that would write to pages, or change what a run reads."""
    engine = llm.engine
    shape = engine.runner.buckets.shapes()[0]
    groups = [make_group([5], GREEDY, max_model_len=32)]
    return {
        "generate": lambda: llm.generate(PROMPTS, SamplingParams(max_tokens=2)),
        "generate nothing": lambda: llm.generate([]),
        "generate_iter": lambda: next(llm.generate_iter(PROMPTS, SamplingParams(max_tokens=2))),
        "beam_search": lambda: llm.beam_search(PROMPTS, BEAMS),
        "watch_beams": lambda: next(llm.watch_beams(PROMPTS[0], BEAMS)),
        "tree": llm.tree,
        "warm_up": lambda: llm.warm_up(GREEDY),
        "rebuild": lambda: llm.rebuild(num_pages=20),
        "record_trace": llm.record_trace,
        "Engine.run": lambda: next(engine.run(groups)),
        "Engine.run_steps": lambda: next(engine.run_steps(groups)),
        "Engine.step_by_hand": lambda: engine.step_by_hand(SamplingFeatures()).__enter__(),
        "Engine.lend_pool": lambda: engine.lend_pool().__enter__(),
        "Engine.programs": lambda: engine.programs(shape, SamplingFeatures()),
        "Engine.warm_up": lambda: engine.warm_up(groups),
    }


def test_what_would_disturb_an_open_run_is_refused_and_the_run_goes_on(llm, alone):
    run, outputs = begin(llm)
    engine = llm.engine
    before = engine.record, engine.stats, engine.recorder, engine.runner.pool, engine.scheduler
    for call in calls_of(llm).values():
        with pytest.raises(RuntimeError, match=r"another run is in progress \(generate_iter\) and owns the page pool"):
            call()
    llm.check_request([5, 6], GREEDY)
    assert llm.engine is engine and llm.last_run is before[1]
    assert (engine.record, engine.stats, engine.recorder, engine.runner.pool, engine.scheduler) == before
    check(outputs + list(run), alone)


def test_an_open_tree_refuses_them_too(llm, alone):
    with llm.tree() as tree:
        node = tree.open(PROMPTS[0])
        for call in calls_of(llm).values():
            with pytest.raises(RuntimeError, match="a tree is open and owns the page pool: close it first"):
                call()
        assert tree.next_tokens(node, top=1).token_ids is not None
    check(llm.generate(PROMPTS, PARAMS), alone)


def test_a_refused_call_and_a_run_that_never_begins_change_no_seed_of_later_ones(directory):
    plain, disturbed = make_llm(directory), make_llm(directory)
    drawn = SamplingParams(max_tokens=6, ignore_eos=True)
    expected = [[tokens(output) for output in plain.generate(PROMPTS, drawn)] for _ in range(2)]
    disturbed.generate_iter(PROMPTS, drawn)
    run = disturbed.generate_iter(PROMPTS, drawn)
    first = next(run)
    for call in calls_of(disturbed).values():
        with pytest.raises(RuntimeError):
            call()
    outputs = sorted([first, *run], key=lambda output: int(output.request_id))
    assert [tokens(output) for output in outputs] == expected[0]
    assert [tokens(output) for output in disturbed.generate(PROMPTS, drawn)] == expected[1]


def closed(run):
    run.close()


def dropped(run):
    del run


def dropped_in_a_cycle(run):
    cycle = [run]
    cycle.append(cycle)


def closed_in_another_thread(run):
    thread = threading.Thread(target=run.close)
    thread.start()
    thread.join()


def left_by_an_error(run):
    with pytest.raises(ZeroDivisionError):
        for _ in run:
            1 / 0  # noqa: B018


@pytest.mark.parametrize("leave", [closed, dropped, dropped_in_a_cycle, closed_in_another_thread, left_by_an_error])
def test_however_a_run_is_left_the_pool_is_free_again(llm, alone, leave):
    leave(begin(llm)[0])
    leave(llm.generate_iter(PROMPTS, PARAMS))  # which had not begun
    leave(llm.watch_beams(PROMPTS[0], BEAMS))
    if leave is dropped_in_a_cycle:
        gc.collect()
    check(llm.generate(PROMPTS, PARAMS), alone)


def test_a_tree_that_is_dropped_gives_the_pool_back_at_once_though_its_nodes_are_kept(llm, alone):
    node = llm.tree().open(PROMPTS[0])
    check(llm.generate(PROMPTS, PARAMS), alone)
    assert node.tokens == PROMPTS[0]


def test_a_warm_up_that_is_interrupted_leaves_the_llm_usable(llm, alone, monkeypatch):
    def take_the_pool_and_stop(*_):
        for array in (*llm.engine.runner.pool.k, *llm.engine.runner.pool.v):
            array.delete()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", take_the_pool_and_stop)
        with pytest.raises(KeyboardInterrupt):
            llm.warm_up(GREEDY)
    check(llm.generate(PROMPTS, PARAMS), alone)


def test_an_interrupt_while_the_pool_is_cleared_leaves_the_llm_usable(llm, alone, monkeypatch):
    run, _ = begin(llm)

    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "_reset", stop)
        with pytest.raises(KeyboardInterrupt):
            run.close()
    check(llm.generate(PROMPTS, PARAMS), alone)


# Threads


def test_closing_a_run_that_computes_in_another_thread_harms_nothing(llm, alone):
    run, outputs = begin(llm, late=0.3)
    thread = threading.Thread(target=lambda: outputs.append(next(run)))
    thread.start()  # and sleeps until the next arrival
    while not run.gi_running:
        pass
    with pytest.raises(ValueError, match="generator already executing"):
        run.close()
    with pytest.raises(RuntimeError, match="another run is in progress"):
        llm.generate(PROMPTS, PARAMS)
    thread.join()
    check(outputs + list(run), alone)


def test_of_threads_that_generate_at_once_each_is_right_or_refused(llm, alone):
    results, refusals = [], []

    def work():
        for _ in range(5):
            try:
                results.append(llm.generate(PROMPTS, PARAMS, progress=False))
            except RuntimeError as error:
                refusals.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results and len(results) + len(refusals) == 20
    for outputs in results:
        check(outputs, alone)
    assert set(refusals) <= {
        "another run is in progress (generate) and owns the page pool: wait until it has returned",
        "another call is in progress (generate) and owns the page pool: wait until it has returned",
    }


def test_a_tree_takes_one_call_at_a_time():
    begun, may_end = threading.Event(), threading.Event()

    def logits(prefix):
        begun.set()
        assert may_end.wait(60)
        return [0.0, 1.0]

    with ToyLM(logits, vocab_size=2).tree() as tree:
        nodes = []
        thread = threading.Thread(target=lambda: nodes.append(tree.open([0])))
        thread.start()
        assert begun.wait(60)
        for call in (lambda: tree.open([1]), tree.close):
            with pytest.raises(RuntimeError, match=r"another call of this tree has not returned \(open\)"):
                call()
        may_end.set()
        thread.join()
        assert tree.nodes == nodes and tree.fork(nodes[0]).tokens == [0]


# Engines that are made anew


def test_after_a_rebuild_that_failed_everything_says_so_and_another_mends_it(directory, alone):
    llm = make_llm(directory)
    calls = calls_of(llm)
    never_begun = llm.generate_iter(PROMPTS, PARAMS)
    with pytest.raises(ValueError, match="num_pages must be a positive integer"):
        llm.rebuild(num_pages=0)
    check(llm.generate(PROMPTS, PARAMS), alone)  # that could be refused beforehand
    with pytest.raises(ValueError, match="num_pages=1000000000 pages take"):
        llm.rebuild(num_pages=10**9)
    for name in ("generate", "generate nothing", "generate_iter", "watch_beams", "tree", "warm_up", "record_trace"):
        with pytest.raises(RuntimeError, match="no engine, since its last rebuild failed: call rebuild again"):
            calls[name]()
    with pytest.raises(RuntimeError, match="no engine"):
        llm.check_request([5], GREEDY)
    llm.rebuild()
    assert llm.engine.cache_config.num_pages == 30
    check(llm.generate(PROMPTS, PARAMS), alone)
    with pytest.raises(RuntimeError, match="the engine was rebuilt since generate_iter checked these requests"):
        next(never_begun)
    check(llm.generate(PROMPTS, PARAMS), alone)


# Processes


def run_script(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)], cwd=ROOT, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip


def test_a_forked_process_is_told_that_jax_cannot_work_there(directory):
    done = run_script(
        """
        import os, signal, sys, warnings
        from jaxpaged import LLM, SamplingParams
        warnings.simplefilter("ignore")  # jax's, about the fork
        llm = LLM(sys.argv[1], page_size=4, num_pages=30, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=32)
        tree = llm.tree()
        node = tree.open([5, 6])
        if (child := os.fork()) == 0:
            signal.alarm(60)
            for call in (lambda: llm.generate([5]), llm.tree, llm.warm_up, lambda: llm.rebuild(num_pages=20),
                         lambda: tree.append(node, 7), lambda: next(llm.engine.run([]))):
                try:
                    call()
                except RuntimeError as error:
                    print(str(error)[:29], flush=True)
            os._exit(7)
        print(os.waitpid(child, 0)[1] >> 8, tree.append(node, 7) is not None)
        tree.close()
        run = llm.generate_iter([[5], [6]], SamplingParams(temperature=0, max_tokens=2))
        next(run)  # and is open when Python ends
        """,
        directory,
    )
    assert done.stdout.splitlines() == ["this process was forked from "] * 6 + ["7 True"], done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("at", all_but_slow((1, 2, 5, 40, 400), 2, 400))
def test_an_interrupt_during_imports_is_one_line_and_exit_code_130(at):
    """Before the n-th module that the command imports."""
    done = run_script(
        """
        import os, signal, sys
        from jaxpaged.__main__ import main
        left = int(sys.argv[1])
        def count(event, _):
            global left
            if event == "import":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGINT)
        sys.addaudithook(count)
        sys.argv = ["jaxpaged", "info", "checkpoints/tiny-python"]
        sys.exit(main())
        """,
        at,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "jaxpaged: interrupted\n")


def test_the_package_imports_its_names_when_they_are_asked_for():
    done = run_script(
        """
        import sys, jaxpaged
        assert "numpy" not in sys.modules and {"LLM", "SamplingParams", "__version__"} <= set(dir(jaxpaged))
        from jaxpaged import *
        assert all(value is getattr(jaxpaged, name) for name, value in [("LLM", LLM), ("ToyLM", ToyLM)])
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


# Any order of calls


class Program:
    """Random calls on one LLM; who owns its pool is known, so each must work, and be right, or be refused."""

    def __init__(self, llm, alone, seed):
        self.llm, self.alone, self.random = llm, alone, random.Random(seed)
        self.runs, self.owner = [], None  # runs that were made: [iterator, the requests it has]

    def attempt(self, call, who):
        """What the call returns, in whichever thread; None if it was refused, as it must be if another is the owner."""
        results, refusals = [], []

        def work():
            try:
                results.append(call())
            except RuntimeError as error:
                refusals.append(str(error))  # the error itself would keep the frames, and what is to be dropped

        thread = threading.Thread(target=work)
        thread.start() if self.random.random() < 0.3 else work()
        if thread.ident is not None:
            thread.join()
        assert bool(refusals) == (self.owner not in (None, who)), (refusals, self.owner)
        return None if refusals else results[0]

    def make_run(self):
        chosen = self.random.sample(range(4), self.random.randint(1, 4))
        times = [self.random.choice([0, 0.01]) for _ in chosen]
        prompts, params = [PROMPTS[i] for i in chosen], [PARAMS[i] for i in chosen]
        run = self.llm.generate_iter(prompts, params, [str(i) for i in chosen], times)
        self.runs.append((run, set(chosen)))

    def go_on(self):
        if not self.runs:
            return
        run, left = self.runs.pop(self.random.randrange(len(self.runs)))
        output = self.attempt(lambda: next(run), run)
        if output is None:
            return  # refused: a generator that raised has ended
        assert tokens(output) == self.alone[int(output.request_id)]
        left.remove(int(output.request_id))
        self.owner = run
        if left:
            self.runs.append((run, left))
        else:
            assert list(run) == []
            self.owner = None

    def drop(self):
        if self.runs:
            run, _ = self.runs.pop(self.random.randrange(len(self.runs)))
            if self.random.random() < 0.5:
                run.close()
            self.owner = None if self.owner is run else self.owner

    def generate(self):
        outputs = self.attempt(lambda: self.llm.generate(PROMPTS, PARAMS), "generate")
        if outputs is not None:
            check(outputs, self.alone)

    def use_tree(self):
        tree = self.attempt(self.llm.tree, "tree")
        if tree is not None:
            self.owner = tree
            node = tree.open(PROMPTS[0])
            self.generate()
            self.go_on()
            tree.append(node, 5)
            if self.random.random() < 0.5:
                tree.close()
            self.owner = None

    def warm_up(self):
        self.attempt(lambda: self.llm.warm_up(GREEDY) or True, "warm_up")

    def rebuild(self):
        if self.attempt(lambda: self.llm.rebuild() or True, "rebuild"):
            self.runs.clear()  # of the engine before; none has begun

    def run(self, num_calls):
        calls = [self.make_run, self.go_on, self.go_on, self.drop, self.generate, self.use_tree, self.warm_up]
        for _ in range(num_calls):
            self.random.choice([*calls, *calls, self.rebuild])()


@pytest.mark.parametrize("seed", all_but_slow(range(40), 0, 1))
def test_in_any_order_of_calls_each_is_right_or_refused(llm, alone, seed):
    Program(llm, alone, seed).run(num_calls=30)
    gc.collect()
    check(llm.generate(PROMPTS, PARAMS), alone)


def test_what_was_lent_is_of_no_use_once_it_was_given_back(llm):
    with llm.engine.lend_pool() as loan:
        loan.compile_copies()
    with pytest.raises(RuntimeError, match="tree has given this back"):
        loan.compile_copies()
