"""Rotary scaling computes what transformers computes (tests/goldens/rope.json of scripts/make/goldens.py)."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_but_slow, full_logits
from paths import GOLDENS

from jaxpaged import LLM, SamplingParams
from jaxpaged.checkpoint import convert_checkpoint, load_params, open_checkpoint
from jaxpaged.checkpoint.hf_config import parse_config
from jaxpaged.config.rope import RopeConfig
from jaxpaged.device.rope import rope_frequencies

CASES = {case["name"]: case for case in json.loads((GOLDENS / "rope.json").read_text())}


def case_values(case):
    values = {**json.loads((GOLDENS / case["source"] / "config.json").read_text()), **case["changes"]}
    return {key: value for key, value in values.items() if value is not None}


def write_case(directory, name, **changes):
    case = CASES[name]
    directory.mkdir()
    for file in (GOLDENS / case["source"]).glob("*.safetensors*"):
        shutil.copy(file, directory)
    (directory / "config.json").write_text(json.dumps({**case_values(case), **changes}))
    return directory


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_attention_factor_are_those_of_transformers(name):
    config = parse_config(case_values(CASES[name]))
    for result in CASES[name]["results"]:
        rope = config.for_length(len(result["prompt"])).rope
        np.testing.assert_allclose(rope_frequencies(rope, config.head_dim), result["frequencies"], rtol=3e-7)
        assert rope.attention_factor == pytest.approx(result["attention_factor"], rel=1e-12)


@pytest.mark.parametrize("name", all_but_slow(CASES, "longrope", "yarn, attention factor"))
def test_logits_agree_to_2e_4(name):
    case = CASES[name]
    config = parse_config(case_values(case))
    params = load_params(open_checkpoint(GOLDENS / case["source"]), dtype="float32", device=jax.devices("cpu")[0])
    for result in case["results"]:
        tokens = jnp.asarray(result["prompt"], jnp.int32)
        with jax.disable_jit():
            logits = full_logits(params, config.for_length(len(tokens)), tokens)[-1]
        np.testing.assert_allclose(logits, result["logits"], rtol=0, atol=2e-4)


def logprob_of_llm(llm, prompt):
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, logprobs=0), progress=False)
    (token_id,) = output.outputs[0].token_ids
    return token_id, output.outputs[0].logprobs[0][token_id].logprob


@pytest.mark.parametrize(("which", "max_model_len"), [(0, None), (1, 64)])
def test_an_engine_picks_its_factors_by_the_longest_sequence_it_takes(tmp_path, which, max_model_len):
    directory = write_case(tmp_path / "model", "longrope, as 4 writes")
    result = CASES["longrope, as 4 writes"]["results"][which]
    llm = LLM(directory, num_pages=8, max_model_len=max_model_len)
    expected = jax.nn.log_softmax(jnp.asarray(result["logits"]))
    token_id, logprob = logprob_of_llm(llm, result["prompt"])
    assert token_id == expected.argmax()
    assert logprob == pytest.approx(float(expected.max()), abs=2e-4)
    if max_model_len is None:
        with pytest.raises(ValueError, match="max_model_len is 16"):
            llm.generate([CASES["longrope"]["results"][1]["prompt"]], SamplingParams(), progress=False)


def test_positions_are_counted_by_the_factor_where_the_file_names_those_before_scaling():
    llama = json.loads((GOLDENS / "llama" / "config.json").read_text()) | {"max_position_embeddings": 64}

    def lengths(**rope):
        config = parse_config(llama | {"rope_parameters": {"rope_theta": 100.0, **rope}})
        return config.default_model_len, config.max_position_embeddings

    assert lengths(rope_type="default") == (64, 64)
    assert lengths(rope_type="linear", factor=4.0) == (256, 256)
    assert lengths(rope_type="yarn", factor=4.0) == (256, 256)
    assert lengths(rope_type="yarn", factor=4.0, original_max_position_embeddings=32) == (128, 128)
    assert lengths(rope_type="yarn", factor=4.0, original_max_position_embeddings=16) == (64, 64)
    assert lengths(rope_type="yarn", factor=2.0, original_max_position_embeddings=16) == (64, 64)
    assert lengths(rope_type="dynamic", factor=4.0) == (64, 256)
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    assert lengths(rope_type="longrope", original_max_position_embeddings=16, **factors) == (16, 64)


def test_gemma_3_names_positions_after_scaling():
    gemma = json.loads((GOLDENS / "gemma3" / "config.json").read_text())
    assert parse_config(gemma).max_position_embeddings == 64
    assert parse_config(gemma).rope.factor == 4.0


def test_only_dynamic_and_longrope_depend_on_the_length():
    for scaling in ("none", "linear", "yarn", "llama3"):
        assert RopeConfig(scaling=scaling, factor=2.0).for_length(100) == RopeConfig(scaling=scaling, factor=2.0)
    rope = RopeConfig(scaling="dynamic", factor=2.0, original_max_position=50)
    np.testing.assert_array_equal(rope_frequencies(rope.for_length(50), 8), rope_frequencies(RopeConfig(), 8))
    assert (rope_frequencies(rope.for_length(51), 8)[1:] < rope_frequencies(RopeConfig(), 8)[1:]).all()


def test_the_native_format_keeps_the_scaling_and_reads_files_that_know_fewer_fields(tmp_path):
    write_case(tmp_path / "source", "longrope")
    convert_checkpoint(tmp_path / "source", tmp_path / "native")
    config = open_checkpoint(tmp_path / "source").config
    assert open_checkpoint(tmp_path / "native").config == config
    assert config.rope.long_factors == (1.1, 1.7, 2.9, 3.8)
    file = tmp_path / "native" / "config.json"
    values = json.loads(file.read_text())
    old = ("theta", "scaling", "factor", "low_freq_factor", "high_freq_factor", "original_max_position")
    values["rope"] = {key: values["rope"][key] for key in old} | {"scaling": "linear"}
    file.write_text(json.dumps(values))
    assert open_checkpoint(tmp_path / "native").config.rope == RopeConfig(100.0, "linear", 4.0, 1.0, 4.0, 16)
