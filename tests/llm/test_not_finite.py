"""Numbers that are not finite end the request that they belong to, with an error: no token, no NaN, no other."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import greedy_tokens
from toy import TOY, char_tokenizer, make_group, toy_params

from jaxpaged import LLM, BeamSearchParams, SamplingParams
from jaxpaged.checkpoint import save_checkpoint
from jaxpaged.cli.main import main
from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.device.attention import REFERENCE
from jaxpaged.device.beam_candidates import beam_columns, group_candidates, group_columns
from jaxpaged.device.param_nodes import Linear
from jaxpaged.device.sampling import row_failures, sample_tokens, token_logprobs
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.runner import StepRunner
from jaxpaged.host.beams.beam_state import BeamState
from jaxpaged.requests.answer import make_output
from jaxpaged.step_io import BAD_LOGITS, BAD_PROCESSED, NO_TOKEN, SamplingInputs, Wanted, unpack_outputs

POISONED = 96  # "~", whose embedding is NaN: whoever reads it has NaN from there on, and in its pages
MODEL = dataclasses.replace(TOY, tie_word_embeddings=False)
PARAMS = dataclasses.replace(
    toy_params(),
    embedding=toy_params().embedding.at[POISONED].set(jnp.nan),
    lm_head=Linear(weight=toy_params().embedding.T),
)
GOOD, BAD = "fine", "a~b"


def ids(text):
    return char_tokenizer().encode(text).ids


def good_tokens(count, prompt=GOOD):
    return greedy_tokens(PARAMS, MODEL, ids(prompt), count, 32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "toy"
    save_checkpoint(directory, dataclasses.replace(MODEL, eos_token_ids=(1,), dtype="float32"), PARAMS)
    char_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def llm(directory):
    llm = LLM(directory, page_size=2, num_pages=60, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=32)
    llm.engine.runner.buckets = dataclasses.replace(llm.engine.runner.buckets, decode_rows=(16,))
    return llm


#: Lines of a file, all of them of features that one compiled step serves; those with BAD fail.
LINES = [
    {"prompt": GOOD, "max_tokens": 8, "temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
    {"prompt": BAD, "max_tokens": 8, "temperature": 0, "logprobs": 2},
    {"prompt": BAD, "max_tokens": 3, "n": 3, "seed": 1},
    {"prompt": BAD, "max_tokens": 3, "beam_width": 3, "logprobs": 1},
    {"prompt": BAD, "max_tokens": 3, "beam_width": 2, "do_sample": True},
    {"prompt": GOOD, "max_tokens": 4, "beam_width": 2, "logprobs": 1},
    {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": [GOOD, BAD], "max_tokens": 4}},
    {"prompt": "~" + GOOD, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 2},
]
FAILS = [1, 2, 3, 4, 6, 7]


def strict_rows(path):
    def refuse(name):
        raise AssertionError(f"{name} in {path}")

    lines = path.read_text().splitlines()
    return {row["index"]: row for row in (json.loads(line, parse_constant=refuse) for line in lines)}


@pytest.mark.slow
def test_a_file_has_error_rows_for_such_lines_and_a_resumed_run_does_them_again(llm, directory, tmp_path, capfd):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    command = ["generate", str(directory), "--input", str(source), "--output", str(output)]
    assert main(command, make_llm=lambda **_: llm) == 1
    assert "6 of 8 lines failed: 2, 3, 4, 5, 7, ..." in capfd.readouterr().err
    rows = strict_rows(output)
    assert [index for index, row in sorted(rows.items()) if row.get("error")] == FAILS
    for index in FAILS:
        assert "logits are not finite" in rows[index]["error"]["message"] and rows[index]["line"] == index + 1
    assert (
        rows[6]["error"]["code"] == "generation_failed"
        and "line 7: prompt 2: the model's" in (rows[6]["error"]["message"])
    )
    assert rows[0]["outputs"][0]["token_ids"] == good_tokens(8)
    served = []
    assert main(command, make_llm=lambda **_: Serving(llm, served)) == 1
    assert len(served) == 7 and strict_rows(output).keys() == rows.keys()  # the OpenAI line has two prompts
    assert "2 of 8 lines already" in capfd.readouterr().err


class Serving:
    """An LLM that takes down the requests that it is given."""

    def __init__(self, llm, served):
        self._llm, self._served = llm, served

    def __getattr__(self, name):
        return getattr(self._llm, name)

    def generate_iter(self, prompts, *arguments, **options):
        self._served += prompts
        return self._llm.generate_iter(prompts, *arguments, **options)


def test_rows_with_nan_of_an_earlier_version_are_no_results(llm, directory, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    command = ["generate", str(directory), "--input", str(source), "--output", str(output)]
    main(command, make_llm=lambda **_: llm)
    row = strict_rows(output)[0]
    row["outputs"][0]["cumulative_logprob"] = float("nan")
    output.write_text(json.dumps(row) + "\n")
    main(command, make_llm=lambda **_: llm)
    assert strict_rows(output)[0]["outputs"][0]["token_ids"] == good_tokens(8)


def test_outputs_say_why_and_keep_what_there_was(llm):
    names = ("beam_width", "do_sample", "logprobs", "max_tokens", "n", "prompt_logprobs", "seed", "temperature")
    lines = [line for line in LINES if "body" not in line]
    params = [
        (BeamSearchParams if "beam_width" in line else SamplingParams)(**{n: line[n] for n in names if n in line})
        for line in lines
    ]
    outputs = llm.generate([line["prompt"] for line in lines], params)
    for line, output in zip(lines, outputs, strict=True):
        if line["prompt"] == GOOD:
            assert output.error is None
            continue
        assert output.error is not None and "the model's logits are not finite" in output.error
        assert output.prompt_logprobs is None
        assert {(s.finish_reason, s.cumulative_logprob) for s in output.outputs} == {("error", 0.0)}
        assert len(output.outputs) == line.get("n", 1) and not any(s.token_ids for s in output.outputs)
    llm.engine.scheduler.check_invariants()
    assert llm.engine.scheduler.allocator.num_used == 0


def nan_after_two(token_ids, num_tokens, logits):
    return jnp.where(num_tokens >= len(GOOD) + 2, jnp.nan, logits)


def endless(token_ids, num_tokens, logits):
    return logits.at[7].set(jnp.where(num_tokens >= len(GOOD) + 1, jnp.inf, logits[7]))


@pytest.mark.slow
def test_a_logits_processor_spoils_its_own_requests_alone(llm):
    params = [
        SamplingParams(temperature=0, max_tokens=6),
        SamplingParams(temperature=0, max_tokens=6, logits_processors=[nan_after_two]),
        SamplingParams(logits_processors=[endless], n=2, seed=1, max_tokens=6),
        BeamSearchParams(beam_width=2, max_tokens=6, logits_processors=[nan_after_two]),
        BeamSearchParams(beam_width=2, max_tokens=1, logits_processors=[nan_after_two]),
    ]
    outputs = llm.generate([GOOD] * len(params), params)
    assert [output.error is None for output in outputs] == [True, False, False, False, True]
    assert all("logits are NaN or +inf after" in output.error for output in outputs[1:4])
    good, nan, _, beams, _ = (output.outputs for output in outputs)
    assert good[0].token_ids == good_tokens(6) and nan[0].token_ids == good_tokens(2)
    assert [(s.finish_reason, len(s.token_ids)) for s in beams] == [("error", 2)]
    assert np.isfinite(beams[0].cumulative_logprob) and beams[0].cumulative_logprob < 0


def test_a_sample_that_meets_nan_later_ends_its_request(llm):
    """Samples that drew the end before keep it; the poisoned token itself may be drawn, and is the last one."""
    params = SamplingParams(
        n=8, seed=3, max_tokens=9, temperature=50, allowed_token_ids=[POISONED, 5], stop_token_ids=[5]
    )
    (output,) = llm.generate([GOOD], params)
    assert {(s.finish_reason, *s.token_ids) for s in output.outputs} == {("stop", 5), ("error", POISONED)}


@pytest.mark.parametrize("kv_cache", ["paged", "contiguous-pow2", "dense", "dense-static", "none"])
def test_every_system_ends_such_a_request_and_serves_the_next_from_its_memory(kv_cache):
    limits = EngineConfig(32, 4, 128, kv_cache=kv_cache)
    cache = CacheConfig(4, 33, "float32")
    engine = Engine(StepRunner(PARAMS, MODEL, cache, limits, REFERENCE, jax.devices()[0]))
    engine.runner.buckets = dataclasses.replace(engine.runner.buckets, decode_rows=(4,), prefill_tokens=(128,))
    greedy = SamplingParams(temperature=0, max_tokens=6)
    samples = SamplingParams(n=2, seed=1, max_tokens=20)
    for _ in range(2):
        groups = [make_group(ids(BAD * 5), samples), make_group(ids(GOOD), greedy), make_group(ids(BAD), greedy)]
        done = {}
        for group in engine.run(groups):
            engine.scheduler.check_invariants()
            done[group] = make_output(group, None)
        bad, good, other = (done[group] for group in groups)
        assert [s.finish_reason for s in (*bad.outputs, *other.outputs)] == ["error"] * 3
        assert good.outputs[0].token_ids == good_tokens(6) and good.error is None


def test_a_tree_refuses_to_go_on_and_nothing_has_changed(llm):
    with llm.tree() as tree:
        node = tree.open(GOOD, 5)
        before = tree.stats().physical
        for call in (
            lambda: tree.append(node, [POISONED], 5),
            lambda: tree.open(BAD, 5),
            lambda: tree.score(node, [[5, POISONED, 6]]),
        ):
            with pytest.raises(ValueError, match="logits are not finite"):
                call()
        assert (node.length, tree.stats().physical) == (len(GOOD), before)
        assert tree.next_tokens(node, 5).top(1)[0][0, 0] == good_tokens(1)[0]
        tree.check_invariants()


def test_the_commands_say_it_on_standard_error_and_exit_1(llm, directory, tmp_path, capfd):
    def run(*arguments):
        code = main([str(a) for a in arguments], make_llm=lambda **_: llm)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    code, out, err = run("generate", directory, "--prompt", BAD, "--temperature", 0, "--max-tokens", 2)
    assert code == 1 and err.startswith("jaxpaged: prompt 1: the model's logits are not finite")
    assert json.loads(out)["error"]["message"].startswith("line 1: the model's logits")
    code, out, err = run("beams", directory, "--prompt", BAD, "--beam-width", 2, "--max-tokens", 2)
    assert code == 1 and err.startswith("jaxpaged: the model's logits are not finite")
    trace = tmp_path / "trace.json"
    code, _, err = run("trace", directory, "--prompt", BAD, "--json", trace, "--max-tokens", 2)
    assert code == 1 and "jaxpaged: prompt 1: the model's logits are not finite" in err
    events = [event for frame in json.loads(trace.read_text())["frames"] for event in frame.get("events", [])]
    assert ["finish", 0, "error"] in events


# The parts, on the device

INPUTS = SamplingInputs(np.zeros((5, 2), np.int32), np.zeros(5, np.int32), np.zeros(5, np.int32))
#: A row of NaN, one with +inf, one of -inf alone, one with a NaN behind its largest, a good one.
ROWS = np.array(
    [[np.nan] * 4, [0, np.inf, 1, 2], [-np.inf] * 4, [3, np.nan, -np.inf, 1], [-np.inf, 1, 5, 2]], np.float32
)


@pytest.mark.parametrize("temperatures", [None, np.ones(5, np.float32)])
def test_rows_that_can_choose_nothing_are_told_apart(temperatures):
    inputs = INPUTS._replace(temperatures=temperatures)
    good, rows = jnp.zeros((5, 4)), jnp.asarray(ROWS)
    assert row_failures(rows, rows).tolist() == [BAD_LOGITS] * 4 + [0]
    assert row_failures(good, rows).tolist() == [BAD_PROCESSED, BAD_PROCESSED, 0, BAD_PROCESSED, 0]
    assert row_failures(rows, good).tolist() == [BAD_LOGITS] * 4 + [0]
    tokens = sample_tokens(rows, inputs).tolist()
    assert tokens[2] == NO_TOKEN and tokens[4] in (1, 2, 3)
    logprobs = np.asarray(token_logprobs(rows, jnp.full(5, 2), 1))[:, 0].view(np.float32)
    assert np.isnan(logprobs[:4]).all() and np.isfinite(logprobs[4])


def test_a_temperature_however_small_takes_the_likeliest_of_logits_however_large():
    logits = np.array(
        [[3e38, 2e38, -3e38], [-2e38, -3e38, -np.inf], [1, 3, 2], [5, 5, 9], [-3e38, -1, -2e38]], np.float32
    )
    for temperature in (1e-38, 1e-6, 1e-3):
        inputs = INPUTS._replace(temperatures=np.full(5, temperature, np.float32))
        assert sample_tokens(jnp.asarray(logits), inputs).tolist() == [0, 0, 1, 2, 1]
        filtered = inputs._replace(
            top_ps=np.full(5, 0.9, np.float32), top_ks=np.full(5, 2, np.int32), min_ps=np.full(5, 0.1, np.float32)
        )
        assert sample_tokens(jnp.asarray(logits), filtered).tolist() == [0, 0, 1, 2, 1]


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("is_merged", [False, True])
def test_of_beams_the_group_with_the_row_fails_and_no_other(drawn, is_merged):
    logits = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32)
    logits[1, 7], logits[4] = np.nan, np.nan  # of the first group; of a place without a beam
    inputs = SamplingInputs(
        np.zeros((6, 2), np.int32), np.zeros(6, np.int32), np.zeros(6, np.int32),
        running_scores=np.array([0, -1, -2, -1, -np.inf, 0], np.float32),
        beam_temperatures=np.full(6, 0.7, np.float32) if drawn else None,
        beam_rows=np.array([[0, 1], [2, 3], [5, 4]], np.int32) if is_merged else None,
    )  # fmt: skip
    wanted = Wanted(False, num_candidates=4, draws_beams=drawn)
    of_model = jnp.asarray(logits)
    processed = jax.nn.log_softmax(of_model)
    if is_merged:
        merged = group_candidates(lambda rows, _: (of_model[rows], processed[rows]), inputs, 4, 50)
        columns = group_columns(merged, 6)
    else:
        columns = beam_columns(of_model, processed, inputs, wanted)
    candidates = unpack_outputs(np.asarray(columns), wanted, 3 if is_merged else 0).candidates
    assert candidates is not None
    codes = np.minimum(candidates.tokens, 0)
    failing = codes[0] if is_merged else codes[1]
    assert (failing == BAD_LOGITS).all() and codes.sum() == 4 * BAD_LOGITS
    assert np.isfinite(candidates.scores[2]).all()


def test_the_sum_of_a_search_that_is_over_is_that_of_its_last_beams():
    state = BeamState(2, 5)
    state.end()
    assert state.is_done and state.last_score == 0.0
