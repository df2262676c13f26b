"""config.json files as published, with the parameter counts that their authors publish."""

import math

import jax
import pytest

from jaxpaged.checkpoint.hf_config import parse_config
from jaxpaged.config import ModelConfig, RopeConfig
from jaxpaged.device.params import param_shapes

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA_3_2_1B = {
    **LLAMA_3_1_8B, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "rope_scaling": {**LLAMA_3_1_8B["rope_scaling"], "factor": 32.0}, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
MISTRAL_7B_V0_1 = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
MISTRAL_7B_V0_3 = {**MISTRAL_7B_V0_1, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
QWEN_2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 152064,
}  # fmt: skip
QWEN_3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
GEMMA_2_9B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
    "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
    "torch_dtype": "float32", "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
}  # fmt: skip
OPT_125M = {
    "_name_or_path": "facebook/opt-125m", "activation_dropout": 0.0, "activation_function": "relu",
    "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True,
    "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02, "layerdrop": 0.0,
    "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16", "transformers_version": "4.21.0.dev0",
    "use_cache": True, "vocab_size": 50272, "word_embed_proj_dim": 768,
}  # fmt: skip
OPT_350M = {
    **OPT_125M, "do_layer_norm_before": False, "ffn_dim": 4096, "hidden_size": 1024, "num_attention_heads": 16,
    "num_hidden_layers": 24, "word_embed_proj_dim": 512,
}  # fmt: skip
OPT_13B = {
    **OPT_125M, "ffn_dim": 20480, "hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40,
    "word_embed_proj_dim": 5120,
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "family", "num_params", "kv_bytes_per_token"),
    [
        pytest.param(LLAMA_3_1_8B, "llama", 8_030_261_248, 131_072, id="Llama-3.1-8B"),
        pytest.param(LLAMA_3_2_1B, "llama", 1_235_814_400, 32_768, id="Llama-3.2-1B"),
        pytest.param(LLAMA_2_7B, "llama", 6_738_415_616, 524_288, id="Llama-2-7b"),
        pytest.param(MISTRAL_7B_V0_1, "mistral", 7_241_732_096, 131_072, id="Mistral-7B-v0.1"),
        pytest.param(MISTRAL_7B_V0_3, "mistral", 7_248_023_552, 131_072, id="Mistral-7B-v0.3"),
        pytest.param(QWEN_2_5_7B, "qwen2", 7_615_616_512, 57_344, id="Qwen2.5-7B"),
        pytest.param(QWEN_3_8B, "qwen3", 8_190_735_360, 147_456, id="Qwen3-8B"),
        pytest.param(GEMMA_2_9B, "gemma2", 9_241_705_984, 344_064, id="gemma-2-9b"),
        pytest.param(GEMMA_3_1B, "gemma3", 999_885_952, 26_624, id="gemma-3-1b"),
        pytest.param(GEMMA_3_4B, "gemma3", 3_880_263_168, 139_264, id="gemma-3-4b, text part"),
        pytest.param(OPT_125M, "opt", 125_239_296, 36_864, id="opt-125m"),
        pytest.param(OPT_350M, "opt", 331_196_416, 98_304, id="opt-350m"),
        pytest.param(OPT_13B, "opt", 12_853_473_280, 819_200, id="opt-13b"),
    ],
)
def test_published_models_have_their_published_size(values, family, num_params, kv_bytes_per_token):
    config = parse_config(values)
    assert config.family == family
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config, "bfloat16"))) == num_params
    assert config.kv_bytes_per_token(2) == kv_bytes_per_token


def test_llama_3_1():
    assert parse_config(LLAMA_3_1_8B) == ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        norm_eps=1e-5,
        rope=RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192),
        bos_token_id=128000,
        eos_token_ids=(128001,),
        dtype="bfloat16",
    )


def test_old_llama_files_name_neither_kv_heads_nor_theta():
    values = {key: LLAMA_2_7B[key] for key in LLAMA_2_7B if key not in ("num_key_value_heads", "rope_scaling")}
    config = parse_config(values)
    assert (config.num_kv_heads, config.head_dim, config.rope) == (32, 128, RopeConfig(10_000.0))
    assert config.dtype == "float16"


def test_transformers_5_spells_rope_and_dtype_differently():
    new = {key: LLAMA_3_1_8B[key] for key in LLAMA_3_1_8B if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert parse_config(new) == parse_config(LLAMA_3_1_8B)


def test_linear_scaling_in_its_oldest_spelling():
    config = parse_config({**LLAMA_2_7B, "rope_scaling": {"type": "linear", "factor": 4}})
    assert config.rope == RopeConfig(10_000.0, "linear", 4.0)


def test_a_null_head_dim_is_derived():
    assert parse_config({**MISTRAL_7B_V0_3, "head_dim": None}).head_dim == 128


def test_mistral_windows():
    assert parse_config(MISTRAL_7B_V0_1).sliding_window == 4096
    assert parse_config(MISTRAL_7B_V0_3).sliding_window is None


def test_qwen_uses_its_window_only_when_told_to_and_only_above_max_window_layers():
    assert parse_config(QWEN_2_5_7B).sliding_window is None
    config = parse_config({**QWEN_2_5_7B, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 26})
    assert config.sliding_window == 4096
    assert config.sliding_layers == (False,) * 26 + (True,) * 2
    config = parse_config({**QWEN_2_5_7B, "use_sliding_window": True, "max_window_layers": 28})
    assert config.sliding_window is None


def test_qwen_biases_and_norms():
    qwen2, qwen3 = parse_config(QWEN_2_5_7B), parse_config(QWEN_3_8B)
    assert (qwen2.qkv_bias, qwen2.attention_out_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.attention_out_bias, qwen3.qk_norm) == (False, False, True)


def test_gemma_2():
    config = parse_config({**GEMMA_2_9B, "query_pre_attn_scalar": 144})
    assert (config.attention_scale, config.attention_soft_cap, config.final_soft_cap) == (144**-0.5, 50.0, 30.0)
    assert config.sliding_layers == (True, False) * 21
    assert config.tie_word_embeddings and config.embedding_scale == 3584**0.5
    assert (config.activation, config.norm_offset, config.norm_placement) == ("gelu_tanh", 1.0, "sandwich")


def test_gemma_3_has_two_rotations():
    config = parse_config(GEMMA_3_1B)
    assert (config.rope, config.local_rope) == (RopeConfig(1_000_000.0), RopeConfig(10_000.0))
    assert config.sliding_layers[:7] == (True, True, True, True, True, False, True)
    assert config.eos_token_ids == (1, 106)


def test_gemma_3_text_part_of_a_multimodal_file():
    config = parse_config(GEMMA_3_4B)
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262_208, 8, 4, 256)
    assert config.rope == RopeConfig(1_000_000.0, "linear", 8.0)
    assert config.local_rope == RopeConfig(10_000.0)
    assert (config.dtype, config.eos_token_ids, config.bos_token_id) == ("bfloat16", (1, 106), 2)


def test_gemma_3_of_transformers_5():
    values = {key: GEMMA_3_1B[key] for key in GEMMA_3_1B if "rope" not in key and key != "sliding_window_pattern"}
    values["layer_types"] = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(26)]
    values["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000},
    }
    assert parse_config(values) == parse_config(GEMMA_3_1B)


def test_opt():
    small, medium = parse_config(OPT_125M), parse_config(OPT_350M)
    assert (small.norm_placement, small.embedding_size, small.learned_position_offset) == ("pre", None, 2)
    assert (medium.norm_placement, medium.embedding_size, medium.has_final_norm) == ("post", 512, False)
    assert (small.rope, small.norm, small.norm_eps, small.activation) == (None, "layer", 1e-5, "relu")
    assert small.tie_word_embeddings and small.qkv_bias and small.mlp_bias and not small.gated_mlp


def test_generation_config_outranks_config():
    config = parse_config(LLAMA_3_1_8B, {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]})
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert parse_config(LLAMA_3_1_8B, {"eos_token_id": None}).eos_token_ids == (128001,)
    assert parse_config(LLAMA_3_1_8B, {"eos_token_id": 128009}).eos_token_ids == (128009,)


def test_token_ids_that_equal_the_family_default_may_be_left_out():
    values = {key: LLAMA_2_7B[key] for key in LLAMA_2_7B if not key.endswith("token_id")}
    assert (parse_config(values).bos_token_id, parse_config(values).eos_token_ids) == (1, (2,))
    assert parse_config({**values, "eos_token_id": None}).eos_token_ids == ()


def test_model_type_suffices_without_architectures():
    values = {key: OPT_125M[key] for key in OPT_125M if key != "architectures"}
    assert parse_config(values) == parse_config(OPT_125M)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are LlamaForCausalLM"),
        ({**LLAMA_2_7B, "architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not"),
        ({"model_type": "mamba"}, "mamba is not supported"),
        ({}, "None is not supported"),
        (
            {**LLAMA_2_7B, "rope_scaling": {"type": "mrope"}},
            "supported are default, linear, dynamic, yarn, llama3, long",
        ),
        ({**LLAMA_2_7B, "rope_scaling": {"type": "linear"}}, "needs a number for 'factor', got None"),
        ({**LLAMA_2_7B, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({**LLAMA_2_7B, "hidden_act": "tanh"}, "hidden_act 'tanh' is not supported; supported are silu"),
        ({**OPT_125M, "activation_function": "gelu_fast"}, "activation_function 'gelu_fast'"),
        ({**OPT_125M, "layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
        ({**OPT_125M, "_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
        ({**GEMMA_3_1B, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({**GEMMA_3_1B, "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({**QWEN_3_8B, "layer_types": ["chunked_attention"] * 36}, "layer_types chunked_attention are not supported"),
        ({**QWEN_3_8B, "layer_types": ["sliding_attention"] * 36}, "sliding_window is not"),
        ({**MISTRAL_7B_V0_1, "layer_types": ["full_attention"] * 32}, "layer_types"),
        ({**LLAMA_2_7B, "quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized weights \(gptq\)"),
        ({**LLAMA_2_7B, "torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({**LLAMA_2_7B, "hidden_size": None}, "hidden_size must be a positive integer, got None"),
        ({**LLAMA_2_7B, "num_hidden_layers": "32"}, "num_hidden_layers must be a positive integer, got '32'"),
        ({**LLAMA_2_7B, "num_attention_heads": 33}, "hidden_size=4096 is not a multiple of num_attention_heads=33"),
        ({**LLAMA_2_7B, "eos_token_id": 32000}, "token id 32000 is outside the vocabulary of 32000"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        parse_config(values)
