"""Every spelling of rotary scaling is the standard one's, or is refused by name: never read as no scaling."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDENS

from jaxpaged.checkpoint.hf_config import parse_config
from jaxpaged.config.rope import RopeConfig

ORIGINAL = "original_max_position_embeddings"
KINDS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, ORIGINAL: 16, "beta_fast": 4, "attention_factor": 1.5},
    "llama3": {"factor": 4.0, ORIGINAL: 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"factor": 4.0, ORIGINAL: 16, "short_factor": [1, 1, 1, 2], "long_factor": [2, 2, 3, 4]},
}
UNIFORM = ("llama", "mistral", "qwen2", "gemma2")


def config_values(family, **changes):
    values = json.loads((GOLDENS / family / "config.json").read_text())
    del values["rope_parameters"]
    if family == "gemma2":
        values["head_dim"] = 8
    return values | changes


def spellings(kind, given):
    """What transformers 4 and 5 write, and what people make of it; all with a rope_theta of 100."""
    inside = {"rope_type": kind, **given, "rope_theta": 100.0}
    yield {"rope_parameters": inside}
    yield {"rope_parameters": {**inside, "type": kind, "partial_rotary_factor": 1.0}}
    yield {"rope_parameters": {"rope_type": kind, **given}, "rope_theta": 100.0}
    yield {"rope_scaling": {"rope_type": kind, **given}, "rope_theta": 100.0}
    yield {"rope_scaling": {"type": kind, **given}, "rope_theta": 100, "rope_parameters": None}
    yield {"rope_scaling": {"type": kind, "rope_type": kind, **given}, "rope_theta": 100.0, "rope_parameters": {}}
    yield {"rope_scaling": {"type": kind, **given, "finetuned": True}, "rope_parameters": inside, "rope_theta": 100.0}
    if ORIGINAL in given:
        rest = {key: value for key, value in given.items() if key != ORIGINAL}
        yield {"rope_scaling": {"type": kind, **rest}, "rope_theta": 100.0, ORIGINAL: given[ORIGINAL]}


@pytest.mark.parametrize("family", UNIFORM)
@pytest.mark.parametrize("kind", KINDS)
def test_all_spellings_of_a_kind_are_one(family, kind):
    ropes = {parse_config(config_values(family, **s)).rope for s in spellings(kind, KINDS[kind])}
    assert len(ropes) == 1
    (rope,) = ropes
    assert (rope.theta, rope.scaling, rope.factor) == (100.0, kind, 4.0)


def gemma3_spellings(kind, given):
    scaling = {"rope_type": kind, **given}
    full, local = {**scaling, "rope_theta": 100.0}, {"rope_type": "default", "rope_theta": 50.0}
    tops = {"rope_theta": 100.0, "rope_local_base_freq": 50.0}
    yield {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    yield {"rope_scaling": {"full_attention": full, "sliding_attention": local}}
    yield {"rope_scaling": {"full_attention": full, "sliding_attention": local}, "rope_parameters": None}
    yield {"rope_scaling": scaling, **tops}
    yield {"rope_scaling": {"type": kind, **given}, "rope_parameters": {}, **tops}
    yield {"rope_parameters": {"full_attention": scaling, "sliding_attention": None}, **tops}
    yield {"rope_scaling": {"full_attention": scaling}, **tops}


@pytest.mark.parametrize("kind", KINDS)
def test_all_spellings_of_gemma_3_are_one(kind):
    configs = [parse_config(config_values("gemma3", **s)) for s in gemma3_spellings(kind, KINDS[kind])]
    assert len({config.rope for config in configs}) == 1
    assert (configs[0].rope.theta, configs[0].rope.scaling, configs[0].rope.factor) == (100.0, kind, 4.0)
    assert {config.local_rope for config in configs} == {RopeConfig(50.0)}


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rope_local_base_freq": 50.0},
        {"rope_parameters": {"full_attention": {"factor": 4.0}}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}, "factor": 2.0}},
        {"rope_parameters": {"full_attention": {}, "chunked_attention": {"rope_type": "default"}}},
        {"rope_parameters": {"full_attention": [4.0]}},
        {"rope_parameters": {"full_attention": {}}, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, ORIGINAL: 32},
        {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "factor": 4.0}}, ORIGINAL: 32},
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}},
    ],
)
def test_gemma_3_refuses_what_does_not_say_which_layers_it_is_for(values):
    with pytest.raises(ValueError, match="rope_parameters|full_attention|rope_type|settings .*of.* layers"):
        parse_config(config_values("gemma3", **values))


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"rope_type": "longrope", **KINDS["longrope"]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"factor": 4}}, "factor=4 is not read with rope_type 'default', .*it has no rope_type"),
        ({"rope_scaling": {"type": None, "factor": 4}}, "factor=4"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4}}, "factor=4 is not read with rope_type 'default'$"),
        ({"rope_parameters": {"short_factor": [1, 1], "long_factor": [2, 2]}}, "short_factor"),
        ({"rope_scaling": {**LINEAR, "type": "yarn"}}, "rope_type is 'linear' and type is 'yarn': give one"),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}},
            "rope_type is 'linear' in rope_scaling",
        ),
        (
            {"rope_parameters": {**LINEAR, "rope_theta": 10.0}, "rope_theta": 20.0},
            "rope_theta is 20.0 at the top and 10.0",
        ),
        ({"rope_parameters": {**YARN, ORIGINAL: 16}, ORIGINAL: 32}, "is 32 at the top and 16"),
        ({"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LINEAR}}, "full_attention=.* is not read"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        ({"rope_scaling": [LINEAR]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"rope_type must be a string, got \['yarn'\]"),
        ({"rope_scaling": {"type": "su"}}, "rope_type 'su' is not supported; supported are default, linear, dynamic"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "rope_type 'mrope' is not supported"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section="),
        ({"rope_parameters": {"rope_type": "proportional"}}, "'proportional' is not supported"),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {**YARN, "attn_factor": 2.0}}, "attn_factor=2.0 is not read with rope_type 'yarn'"),
        ({"rope_parameters": {**LINEAR, "beta_fast": 32}}, "beta_fast=32 is not read with rope_type 'linear'"),
        ({"rope_parameters": {**LINEAR, "rope_type": "dynamic", "alpha": 1000.0}}, "alpha=1000.0"),
        ({"rope_parameters": {**LINEAR, "rope_type": "dynamic", ORIGINAL: 16}}, f"{ORIGINAL}=16 .*'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs a number for 'factor', got None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "needs a number for 'factor', got None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "needs a number for 'factor', got '4'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            "factor of rope_type 'linear' must be at least 1",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": float("nan")}}, "factor .*got nan"),
        ({"rope_parameters": {**YARN, "truncate": "no"}}, "truncate .* must be true or false, got 'no'"),
        ({"rope_scaling": {**YARN, "truncate": None}}, "truncate .* must be true or false, got None"),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 50.0}}, "rope_theta is in rope_parameters and not"),
        ({"rope_scaling": {"factor": 4.0}, "rope_parameters": LINEAR}, "rope_type is in rope_parameters and not"),
        ({"rope_parameters": {**YARN, "attention_factor": 0}}, "attention_factor .* must be above 0"),
        ({"rope_parameters": {**YARN, "attention_factor": True}}, "a number for 'attention_factor', got True"),
        ({"rope_parameters": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast=1.0 must not be below beta_slow"),
        ({"rope_parameters": {**YARN, ORIGINAL: 0}}, f"{ORIGINAL} must be a positive integer, got 0"),
        ({"rope_parameters": {**YARN, ORIGINAL: "16"}}, f"{ORIGINAL} must be a positive integer, got '16'"),
        ({"rope_parameters": {"rope_type": "llama3", **KINDS["llama3"], "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": {**LONG, "long_factor": [1, 2]}}, "long_factors has 2 numbers, head_dim=8 needs 4"),
        ({"rope_parameters": {**LONG, "short_factor": 2}}, "needs a list of numbers for 'short_factor', got 2"),
        ({"rope_parameters": {**LONG, "long_factor": [1, 2, 3, "4"]}}, "long_factor .* got '4'"),
        ({"rope_theta": 0}, "rope_theta must be above 0 and finite, got 0"),
        ({"rope_theta": 1}, "rope_theta must be above 1, got 1"),
        ({"rope_theta": float("nan")}, "rope_theta must be above 0 and finite, got nan"),
        ({"rope_theta": "10000"}, "rope_theta must be a number, got '10000'"),
    ],
)
def test_what_is_unclear_or_unknown_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        parse_config(config_values("llama", **values))


def test_without_settings_nothing_is_scaled():
    for values in ({}, {"rope_scaling": None}, {"rope_parameters": {}}, {"rope_parameters": {"rope_type": "default"}}):
        assert parse_config(config_values("llama", **values)).rope == RopeConfig(10_000.0)
    assert parse_config(config_values("llama", rope_scaling={"type": "default", "factor": 1.0})).rope == RopeConfig()


def test_a_null_factor_of_yarn_is_the_ratio_of_the_lengths():
    rope = parse_config(config_values("llama", rope_parameters={**YARN, "factor": None, ORIGINAL: 16})).rope
    assert rope == parse_config(config_values("llama", rope_parameters={**YARN, ORIGINAL: 16})).rope


NAMES = ("factor", ORIGINAL, "attention_factor", "beta_fast", "mscale", "low_freq_factor", "short_factor", "rope_theta")
SETTINGS = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([None, 1, 4.0, 16, [2.0] * 4, "4"])).flatmap(
    lambda given: st.sampled_from([None, "default", *KINDS]).map(lambda kind: {**given, "rope_type": kind})
)


@given(SETTINGS, st.sampled_from(["rope_scaling", "rope_parameters"]), st.sampled_from([*UNIFORM, "gemma3"]))
@settings(max_examples=150, deadline=None)
def test_settings_that_ask_for_scaling_are_never_read_as_none(given_settings, place, family):
    try:
        rope = parse_config(config_values(family, **{place: given_settings})).rope
    except ValueError:
        return
    kind = given_settings["rope_type"] or "default"
    assert rope.scaling == ("none" if kind == "default" else kind)
    if kind == "default":
        asked = {key: value for key, value in given_settings.items() if key not in ("rope_type", "rope_theta")}
        assert all(value in (None, 1) for value in asked.values())
