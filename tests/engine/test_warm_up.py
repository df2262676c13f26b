"""Programs compiled ahead, in threads: all that runs need, each once, and found by the steps that need them."""

from __future__ import annotations

import threading

import jax
import pytest
from toy import make_group, run_tokens, toy_engine

from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.device.programs import MADE
from jaxpaged.engine.warm_up import compile_together
from jaxpaged.host.step.batching import StepShape, make_batch
from jaxpaged.host.step.features import SamplingFeatures
from jaxpaged.host.step.step_plan import StepPlan

PARAMS = [SamplingParams(temperature=0, max_tokens=9), SamplingParams(n=2, repetition_penalty=1.2, max_tokens=7)]


def groups():
    return [make_group([1, 2, 3, 4, 5 + i], one, str(i), seed=i) for i, one in enumerate(PARAMS)]


@pytest.fixture(scope="module")
def engine():
    return toy_engine(num_pages=60, page_size=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=32)


@pytest.fixture
def makers(monkeypatch):
    """The threads that have compiled or read something, in order."""
    found: list[str] = []

    def note(event, *args, **kwargs):
        if event == MADE:
            found.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


def test_steps_find_what_threads_have_compiled_ahead(engine, makers):
    """With histories too, those that come with a step and those that the device has."""
    seen = []
    done = engine.warm_up(groups(), lambda *counts: seen.append(counts))
    total = seen[-1][1]
    assert seen == [(ready, total) for ready in range(total + 1)]
    assert sum(name.startswith("compile") for name in makers) == total
    copies_and_swaps = len(engine.runner.buckets.copies) + 2 * len(engine.runner.buckets.swaps)
    assert done.compiled + done.read == total + copies_and_swaps
    run_tokens(engine, groups())
    assert engine.stats.programs_made == 0 and engine.stats.steps > 0


def test_a_second_warm_up_makes_nothing(engine):
    engine.warm_up(groups())
    assert engine.warm_up(groups())[:2] == (0, 0)


def test_what_fails_to_compile_ends_the_warm_up_with_its_error():
    class Broken:
        def compile_ahead(self):
            raise ValueError("no such instruction")

    with pytest.raises(ValueError, match="no such instruction"):
        compile_together([Broken()] * 9)


@pytest.mark.parametrize(
    ("params", "num_programs"), [(PARAMS[0], 2), pytest.param(PARAMS[1], 4, marks=pytest.mark.slow)]
)
def test_the_first_decode_step_is_compiled_beside_the_prompts(params, num_programs, makers):
    """In a thread, and once: the run finds it, and a second run has nothing to wait for. Four with samples and
    penalties: copies, and a step with the history that the device has."""
    engine = toy_engine(num_pages=61, page_size=4, max_num_seqs=4, max_model_len=32)
    for expected, in_threads in ((num_programs, 1), (0, 0)):
        del makers[:]
        run_tokens(engine, [make_group([1, 2, 3, 4, 5], params, max_model_len=8)])
        assert engine.stats.programs_made == expected
        assert sum(name.startswith("compile") for name in makers) == in_threads


def test_what_is_foreseen_waits_for_the_first_step_where_that_is_asked_for(makers):
    engine = toy_engine(num_pages=62, page_size=4, max_num_seqs=4, max_model_len=32)
    runner = engine.runner
    features = SamplingFeatures.of(groups()[:1], 97)
    later = StepShape(4, runner.buckets.table_widths[-1])
    runner.compile_ahead([later], features, behind_first=True)
    assert not in_threads(makers)
    nothing = make_batch(StepPlan(is_prefill=False), later._replace(num_rows=2), engine.cache_config, 97, features)
    runner.run(runner.prepare_batch(nothing, features))
    runner._ahead.pending[0].result()
    assert in_threads(makers)
    runner.stop_ahead()


def in_threads(makers) -> list[str]:
    return [name for name in makers if name.startswith("compile")]
