"""Values of wrong kind, sign or size in a checkpoint's configuration: one ValueError with file, key and value."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDENS

from jaxpaged.checkpoint import native, open_checkpoint
from jaxpaged.checkpoint.hf_config import parse_config
from jaxpaged.config import ModelConfig
from jaxpaged.engine.describe import describe_checkpoint

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "opt")
FILES = {name: json.loads((GOLDENS / name / "config.json").read_text()) for name in FAMILIES}
NAN, INFINITY = float("nan"), float("inf")

#: What tools add, what generation and training read, and what says "no" to another family's computation.
HARMLESS = {
    "_name_or_path": "org/model", "unsloth_version": "2024.9", "unsloth_fixed": True, "use_cache": False,
    "auto_map": {"AutoConfig": "configuration_x.XConfig"}, "task_specific_params": {"a": {"b": 1}}, "pretraining_tp": 4,
    "initializer_range": 0.01, "attention_dropout": 0.1, "transformers_version": "9.0", "torchscript": False,
    "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 100, "use_mrope": False, "cache_implementation": "hybrid",
    "pad_token_id": -1, "tokenizer_class": "X", "chat_template": "{{ x }}", "id2label": {"0": "A"},
    "_attn_implementation_autoset": True, "attn_implementation": "flash_attention_2", "use_flash_attention": True,
    "num_experts": 0, "num_local_experts": None, "attn_logit_softcapping": None, "logit_scale": 1.0,
    "residual_multiplier": 1, "qk_layernorm": False, "rope_interleaved": False, "quantization_config": None,
    "max_sequence_length": 16, "model_max_length": 8, "bias": None, "output_router_logits": False, "is_decoder": True,
    "router_aux_loss_coef": 0.001, "max_window_layers": 28, "embedding_initializer_range": 0.1,
    "classifier_dropout": 0.1, "warmup_steps": 100, "properties": {"a": 1}, "activation_checkpointing": True,
    "position_encoding": "rope", "is_causal": True, "local_attention": False, "parallel_block": False,
    "use_rope": True, "rotary_pct": 1.0, "lora_rank": 16, "conversation": "x", "gradient_checkpointing": True,
}  # fmt: skip
#: What acts in a model of transformers and in none of ours.
ACTING = {
    "clip_qkv": 8.0, "logit_scale": 0.0625, "residual_multiplier": 0.22, "embedding_multiplier": 12.0,
    "attention_multiplier": 0.01, "logits_scaling": 8.0, "qk_layernorm": True, "use_qk_norm": True, "num_experts": 8,
    "num_local_experts": 8, "partial_rotary_factor": 0.5, "rotary_pct": 0.25, "rope_interleaved": True,
    "no_rope_layers": [1, 0], "no_rope_layer_interval": 4, "attn_temperature_tuning": True, "scale_emb": 12,
    "scale_depth": 1.4, "alibi": True, "use_alibi": True, "position_embedding_type": "alibi", "use_logn_attn": True,
    "dual_chunk_attention_config": {"chunk_size": 8}, "attention_chunk_size": 8, "num_kv_shared_layers": 2,
    "use_parallel_residual": True, "moe_intermediate_size": 64, "attn_output_gate": True, "use_post_norm": True,
    "swiglu_limit": 7.0, "add_cross_attention": True, "pruned_heads": {"0": [1]}, "sliding_window_pattern": 2,
    "rope_theta_scaling": 2.0, "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "position_encoding": "alibi", "act_fn": "relu", "attention_window": 512, "is_causal": False, "parallel_block": True,
    "use_rope": False, "use_rotary_embedding": False, "rotary_percent": 0.0, "norm_affine": False,
    "quantization": {"bits": 4, "group_size": 64}, "compression_config": {"quant_method": "sparse"},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_change_nothing_are_ignored(family):
    expected = parse_config(FILES[family])
    for key, value in HARMLESS.items():
        if key not in FILES[family] or key in ("use_cache", "transformers_version"):
            assert parse_config(FILES[family] | {key: value}) == expected, key


def test_a_key_may_say_the_same_activation_in_another_word():
    same = {**FILES["llama"], "hidden_act": "silu", "activation": "swiglu"}
    assert parse_config(same) == parse_config(FILES["llama"])
    with pytest.raises(ValueError, match="activation='gelu' is not supported"):
        parse_config({**same, "activation": "gelu"})


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_ask_for_another_computation_are_refused(family):
    read = {"gemma3": ["sliding_window_pattern"]}.get(family, [])
    for key, value in ACTING.items():
        if key not in read:
            with pytest.raises(ValueError, match=f"{key}|quantized weights"):
                parse_config(FILES[family] | {key: value})


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "attn_logit_softcapping", 50.0), ("llama", "query_pre_attn_scalar", 144),
        ("llama", "sliding_window", 6), ("llama", "layer_types", ["full_attention", "sliding_attention"]),
        ("llama", "hidden_activation", "relu"), ("llama", "norm_eps", 0.1), ("mistral", "attention_bias", True),
        ("mistral", "final_logit_softcapping", 30.0), ("qwen2", "mlp_bias", True), ("qwen3", "mlp_bias", True),
        ("gemma2", "rope_local_base_freq", 50.0), ("opt", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("opt", "rope_theta", 500.0), ("opt", "head_dim", 16), ("opt", "hidden_act", "gelu"),
        ("opt", "sliding_window", 6), ("opt", "num_key_value_heads", 2),
    ],
)  # fmt: skip
def test_keys_of_another_family_are_refused(family, key, value):
    with pytest.raises(ValueError, match=f"^{key}="):
        parse_config(FILES[family] | {key: value})


def test_a_window_that_nothing_exceeds_or_that_is_off_is_no_window():
    expected = parse_config(FILES["llama"])
    assert parse_config(FILES["llama"] | {"sliding_window": 64}) == expected
    assert parse_config(FILES["llama"] | {"sliding_window": 6, "use_sliding_window": False}) == expected


def test_architecture_and_model_type_must_agree():
    with pytest.raises(ValueError, match="model_type 'qwen2' and architectures .*LlamaForCausalLM.* different models"):
        parse_config(FILES["llama"] | {"model_type": "qwen2"})
    # transformers picks the class by model_type, here one with the same tensors and other arithmetic
    with pytest.raises(ValueError, match="model_type 'granite' and architectures .*Llama.* different models"):
        parse_config(FILES["llama"] | {"model_type": "granite"})


@pytest.mark.parametrize("positions", ["64", None])
def test_a_window_beside_positions_that_are_no_number(positions):
    with pytest.raises(ValueError, match="max_position_embeddings must be a positive integer, got"):
        parse_config(FILES["llama"] | {"sliding_window": 6, "max_position_embeddings": positions})


def test_a_nested_language_model_is_read_in_its_place_alone():
    text = {key: value for key, value in FILES["gemma3"].items() if key not in ("architectures", "model_type")}
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    assert parse_config(nested) == parse_config(FILES["gemma3"])
    assert parse_config({**nested, "eos_token_id": [1, 7]}).eos_token_ids == (1, 7)
    with pytest.raises(ValueError, match="final_logit_softcapping is 9.0 at the top and None in text_config"):
        parse_config({**nested, "final_logit_softcapping": 9.0})
    with pytest.raises(ValueError, match="text_config=.* is not supported: llama models have their keys at the top"):
        parse_config(FILES["llama"] | {"text_config": {"rope_theta": 7.0}})


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("llama", "num_hidden_layers", 10**9, "num_hidden_layers must be at most 10000, got 1000000000"),
        ("gemma2", "num_hidden_layers", 10**9, "num_hidden_layers must be at most 10000, got 1000000000"),
        ("llama", "hidden_size", 0, "hidden_size must be a positive integer, got 0"),
        ("llama", "vocab_size", 10**30, "vocab_size must be at most 16777216, got 1" + "0" * 30),
        ("llama", "vocab_size", 10**4000, "vocab_size must be at most 16777216, got an integer of 13288 bits"),
        ("llama", "num_attention_heads", 4.0, "num_attention_heads must be a positive integer, got 4.0"),
        ("llama", "num_key_value_heads", "2", "num_key_value_heads must be a positive integer, got '2'"),
        ("llama", "num_key_value_heads", 3, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ("llama", "head_dim", True, "head_dim must be a positive integer, got True"),
        ("llama", "rms_norm_eps", -1, "rms_norm_eps must be above 0 and at most 1, got -1"),
        ("llama", "rms_norm_eps", NAN, "rms_norm_eps must be above 0 and at most 1, got nan"),
        ("llama", "rms_norm_eps", None, "rms_norm_eps must be a number, got None"),
        ("llama", "tie_word_embeddings", "yes", "tie_word_embeddings must be true or false, got 'yes'"),
        ("llama", "attention_bias", 1, "attention_bias must be true or false, got 1"),
        ("llama", "dtype", 16, "dtype must be a string, got 16"),
        ("llama", "hidden_act", ["silu"], r"hidden_act must be a string, got \['silu'\]"),
        ("llama", "architectures", "LlamaForCausalLM", "architectures must be a list of strings, got 'Llama"),
        ("llama", "architectures", [1], r"architectures must be a list of strings, got \[1\]"),
        ("llama", "model_type", {}, "model_type must be a string, got {}"),
        ("llama", "text_config", [], r"text_config must be an object, got \[\]"),
        ("llama", "eos_token_id", "2", "eos_token_id must be a token id, got '2'"),
        ("llama", "eos_token_id", [2, [3]], r"eos_token_id must be a token id, got \[3\]"),
        ("llama", "eos_token_id", 2.0, "eos_token_id must be a token id, got 2.0"),
        ("llama", "bos_token_id", [1, 2], "bos_token_id must be one token id"),
        ("llama", "bos_token_id", -1, "bos_token_id: token id -1 is outside the vocabulary of 128"),
        ("mistral", "sliding_window", -1, "sliding_window must be a positive integer, got -1"),
        ("mistral", "sliding_window", "6", "sliding_window must be a positive integer, got '6'"),
        ("qwen2", "layer_types", ["full_attention"], "layer_types names 1 layers, num_hidden_layers is 2"),
        ("qwen2", "layer_types", "full_attention", "layer_types must be a list of strings"),
        ("qwen2", "max_window_layers", "1", "max_window_layers must be a number, got '1'"),
        ("gemma2", "query_pre_attn_scalar", 0, "query_pre_attn_scalar must be above 0 and finite, got 0"),
        ("gemma2", "attn_logit_softcapping", INFINITY, "attn_logit_softcapping must be above 0 and finite, got inf"),
        ("gemma3", "sliding_window_pattern", 0, "sliding_window_pattern must be a positive integer, got 0"),
        ("opt", "word_embed_proj_dim", -4, "word_embed_proj_dim must be a positive integer, got -4"),
        ("opt", "do_layer_norm_before", "x", "do_layer_norm_before must be true or false, got 'x'"),
    ],
)
def test_a_value_of_wrong_kind_sign_or_size_is_named(family, key, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_config(FILES[family] | {key: value})


@pytest.fixture
def directory(tmp_path):
    return Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("logits*")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "config.json is not valid JSON: it is nested too deeply"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "config.json is not valid JSON: Exceeds the limit"),
        (b"\xff\xfe{}", "config.json is not valid JSON: 'utf-8' codec"),
        (b'{"architectures": ["LlamaForCausalLM"], "hidden_size": NaN}', "config.json: hidden_size must .* got nan"),
    ],
)
def test_a_file_that_json_cannot_read_is_named(directory, content, message):
    (directory / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(directory)
    shutil.copy(GOLDENS / "llama" / "config.json", directory)
    (directory / "generation_config.json").write_bytes(b"[" * 200_000)
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON: it is nested too deeply"):
        open_checkpoint(directory)


def test_a_byte_order_mark_is_skipped(directory):
    expected = open_checkpoint(directory).config
    file = directory / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert open_checkpoint(directory).config == expected


def test_info_refuses_a_layer_count_that_no_model_has(directory):
    values = FILES["llama"] | {"num_hidden_layers": 10**9}
    (directory / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="llama/config.json: num_hidden_layers must be at most 10000, got 1000000000"):
        describe_checkpoint(directory)


def test_generation_config_is_named_where_it_is_wrong(directory):
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, "3"]}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is \[2, '3'\]"):
        open_checkpoint(directory)


# The native format

NATIVE = {name: json.loads(json.dumps(parse_config(FILES[name]).to_dict())) for name in FAMILIES}


def native_config(values):
    return native.parse_config({"format": native.FORMAT, "format_version": native.FORMAT_VERSION, **values})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", 10**9, "num_layers must be at most 10000"),
        ("norm_eps", NAN, "norm_eps must be above 0 and at most 1, got nan"),
        ("qk_norm", "no", "qk_norm must be true or false, got 'no'"),
        ("rope", "linear", "rope must be an object, got 'linear'"),
        ("rope", {"theta": 100.0, "angle": 1}, r"rope has the unknown keys \['angle'\]"),
        ("rope", {"theta": 0}, "rope: rope theta must be at least 1 and finite, got 0"),
        ("rope", {"scaling": ["yarn"]}, r"rope: rope scaling is \['yarn'\]; choose one of none, linear"),
        ("rope", {"scaling": "longrope", "long_factors": 2}, "rope long_factors must be a list of numbers, got 2"),
        ("sliding_layers", "xx", "sliding_layers must be a list, got 'xx'"),
        ("sliding_layers", [1, 0], "sliding_layers must be true or false, got 1"),
        ("eos_token_ids", 2, "eos_token_ids must be a list, got 2"),
        ("eos_token_ids", [2.0], "eos_token_ids must be a token id, got 2.0"),
        ("family", None, "family must be a string, got None"),
        ("activation", ["silu"], r"activation is \['silu'\]; choose one of silu"),
        ("final_soft_cap", 0, "final_soft_cap must be above 0 and finite, got 0"),
    ],
)
def test_a_wrong_value_of_the_native_format_is_named(key, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        native_config(NATIVE["llama"] | {key: value})


# All of it at random

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.sampled_from([10**9, 2**31, -(2**63), 10**400, 10**4000]),
    st.floats(), st.sampled_from(["", "yes", "4", "silu", "full_attention", "float32", "rms"]), st.text(max_size=3),
    st.lists(st.one_of(st.integers(-2, 300), st.text(max_size=2), st.booleans(), st.none()), max_size=4),
    st.dictionaries(
        st.sampled_from(["rope_type", "factor", "full_attention", "theta", "scaling"]),
        st.one_of(st.integers(-1, 9), st.floats(), st.sampled_from(["yarn", "linear", "dynamic"])), max_size=3,
    ),
)  # fmt: skip


def check_hugging_face(family, key, value):
    values = FILES[family] | {key: value}
    try:
        config = parse_config(values)
    except ValueError as error:
        names = [key.removesuffix("s"), *(value if isinstance(value, dict) else ()), "vocabulary", "quantized"]
        assert any(name in str(error) for name in names)
    else:
        assert isinstance(config, ModelConfig) and hash(config) is not None
        if key in HARMLESS and key not in FILES[family]:
            assert config == parse_config(FILES[family])


def check_native(family, key, value):
    try:
        config = native_config(NATIVE[family] | {key: value})
    except ValueError as error:
        # a size may be refused by the name of the one that it does not go with
        assert key in str(error) or "layers" in str(error) or "vocabulary" in str(error)
    else:
        assert native_config(json.loads(json.dumps(config.to_dict()))) == config


KEYS = {name: sorted({*FILES[name], *HARMLESS, *ACTING, "rope_scaling", "rope_theta", "text_config"}) for name in FILES}
CHANGES = st.sampled_from(FAMILIES).flatmap(lambda f: st.tuples(st.just(f), st.sampled_from(KEYS[f]), VALUES))
NATIVE_CHANGES = st.sampled_from(FAMILIES).flatmap(
    lambda f: st.tuples(st.just(f), st.sampled_from(sorted(NATIVE[f])), VALUES)
)


@given(CHANGES, NATIVE_CHANGES)
@settings(max_examples=150, deadline=None)
def test_a_changed_value_is_read_or_refused_by_name(change, native_change):
    check_hugging_face(*change)
    check_native(*native_change)


@pytest.mark.slow
@given(CHANGES, NATIVE_CHANGES)
@settings(max_examples=10_000, deadline=None)
def test_so_are_ten_thousand(change, native_change):
    check_hugging_face(*change)
    check_native(*native_change)
