"""`close` and `with`: the device's memory is given back, whatever was open has ended, and later calls say why not."""

from __future__ import annotations

import threading

import jax
import pytest
from helpers import all_but_slow, small_llm
from toy import save_toy_checkpoint

from jaxpaged import LLM, BeamSearchParams, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_toy_checkpoint(tmp_path_factory.mktemp("closed") / "toy")


@pytest.fixture
def llm(toy):
    return small_llm(toy)


def arrays_of(llm):
    engine = llm.engine
    return [leaf for leaf in jax.tree.leaves((engine.runner.pool, engine.params)) if isinstance(leaf, jax.Array)]


def test_close_frees_the_weights_and_the_pool_and_ends_what_renders_templates(llm):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    llm.chat([{"role": "user", "content": "ab"}], PARAMS, chat_template=template)
    worker = llm._requests._chat_templates._process._process
    steps, arrays = llm.last_run.steps, arrays_of(llm)
    assert len(arrays) > 10 and not any(array.is_deleted() for array in arrays) and worker.poll() is None
    llm.close()
    assert all(array.is_deleted() for array in arrays)
    assert worker.poll() is not None
    llm.close()
    assert llm.last_run.steps == steps > 0


CALLS = {
    "engine": lambda llm: llm.engine,
    "generate": lambda llm: llm.generate("a"),
    "generate_iter": lambda llm: llm.generate_iter("a"),
    "agenerate": lambda llm: llm.agenerate("a"),
    "chat": lambda llm: llm.chat([{"role": "user", "content": "a"}]),
    "stream": lambda llm: llm.stream("a"),
    "beam_search": lambda llm: llm.beam_search("a", BeamSearchParams(beam_width=2)),
    "watch_beams": lambda llm: llm.watch_beams("a", BeamSearchParams(beam_width=2)),
    "tree": lambda llm: llm.tree(),
    "warm_up": lambda llm: llm.warm_up(),
    "rebuild": lambda llm: llm.rebuild(num_pages=10),
    "reset_prefix_cache": lambda llm: llm.reset_prefix_cache(),
    "check_request": lambda llm: llm.check_request("a", PARAMS),
    "record_trace": lambda llm: llm.record_trace(),
    "profile": lambda llm: llm.profile("x.json.gz"),
    "with": lambda llm: llm.__enter__(),
}


def test_every_call_of_a_closed_llm_says_that_it_was_closed(llm):
    begun_later = llm.generate_iter("a")
    llm.close()
    public = {name for name in dir(LLM) if not name.startswith("_")}
    assert public - set(CALLS) == {"close", "describe", "last_run", "tokenizer"}
    for call in (*CALLS.values(), lambda _: next(begun_later)):
        with pytest.raises(RuntimeError, match="this LLM was closed, and its weights and pages are freed"):
            call(llm)


def test_a_with_block_closes_whatever_ends_it(toy):
    with small_llm(toy) as llm:
        outputs = llm.generate("ab", PARAMS)
    assert len(outputs[0].outputs[0].token_ids) == 6
    with pytest.raises(RuntimeError, match="was closed"):
        llm.generate("ab")
    with pytest.raises(ZeroDivisionError), small_llm(toy) as llm:
        kept = llm.generate_iter(["ab", "cd"], PARAMS)
        next(kept)
        arrays = arrays_of(llm)
        raise ZeroDivisionError
    assert all(array.is_deleted() for array in arrays)
    assert next(kept, None) is None


@pytest.mark.parametrize(
    "kind", all_but_slow(["generate_iter", "stream", "watch_beams", "tree"], "generate_iter", "tree")
)
def test_close_ends_what_stands_between_two_results(llm, kind):
    opened = {
        "generate_iter": lambda: llm.generate_iter(["ab", "cd"], PARAMS),
        "stream": lambda: llm.stream("ab", PARAMS),
        "watch_beams": lambda: llm.watch_beams("ab", BeamSearchParams(beam_width=2, max_tokens=6)),
        "tree": llm.tree,
    }[kind]()
    if kind != "tree":
        next(opened)
    llm.close()
    if kind == "tree":
        with pytest.raises(RuntimeError, match="closed"):
            opened.open([1])
    else:
        assert next(opened, None) is None


def test_close_is_refused_while_another_thread_is_in_a_call(llm):
    came, go_on, results = threading.Event(), threading.Event(), []

    def wait(_token):
        came.set()
        assert go_on.wait(30)

    thread = threading.Thread(target=lambda: results.extend(llm.generate("ab", PARAMS, on_token=wait)))
    thread.start()
    assert came.wait(60)
    with pytest.raises(RuntimeError, match=r"another call is in progress \(generate\)"):
        llm.close()
    go_on.set()
    thread.join()
    assert len(results[0].outputs[0].token_ids) == 6
    llm.close()


def test_a_model_that_failed_to_rebuild_can_be_closed(llm):
    with pytest.raises(ValueError):
        llm.rebuild(num_pages=1)
    llm.close()
    with pytest.raises(RuntimeError, match="was closed"):
        llm.rebuild(num_pages=10)
