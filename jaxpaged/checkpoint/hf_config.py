"""Reads a Hugging Face config.json as a `ModelConfig`: one short function a family, a refusal for everything else.

Files of transformers 4 and 5 are read: `rope_theta` with `rope_scaling` or `rope_parameters`, `sliding_window_pattern`
or `layer_types`, `torch_dtype` or `dtype`. Defaults are those of the family's configuration class in transformers,
because files leave out what equals them. A key that changes the computation in a way that jaxpaged does not implement
is an error that names it; nothing is silently computed otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpaged.checkpoint.hf_rope import parse_rope
from jaxpaged.config import DTYPES, ModelConfig

Values = dict[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Family(NamedTuple):
    name: str
    parse: Callable[[Values], Values]  # config.json -> fields of ModelConfig
    bos_token_id: int | None = None  # where config.json does not say
    eos_token_id: int | None = None


def parse_config(values: Values, generation: Values | None = None) -> ModelConfig:
    """The contents of config.json, and of generation_config.json where there is one -> ModelConfig."""
    family = _find_family(values)
    values = {**values, **(values.get("text_config") or {})}  # multimodal files nest the language model
    if (quantization := values.get("quantization_config")) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"quantized weights ({method}) are not supported; use the original checkpoint")
    tokens = _token_ids(values, generation or {}, family)
    return ModelConfig(family=family.name, **family.parse(values), **tokens, dtype=_dtype(values))


def declared_dtype(values: Values) -> str | None:
    """What config.json says that the weights are stored as; files of transformers 4 say `torch_dtype`."""
    text = values.get("text_config") or {}
    return text.get("dtype") or text.get("torch_dtype") or values.get("dtype") or values.get("torch_dtype")


def _find_family(values: Values) -> Family:
    """By `architectures` (a classifier has the same model_type as a language model), else by `model_type`."""
    model_type = values.get("model_type")
    names = values.get("architectures") or [MODEL_TYPES.get(str(model_type), str(model_type))]
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ValueError(f"architecture {', '.join(names)} is not supported; supported are {', '.join(ARCHITECTURES)}")


def _llama(values: Values) -> Values:
    return {
        **_shape(values),
        "activation": _activation(values, "hidden_act", "silu"),
        "mlp_bias": bool(values.get("mlp_bias", False)),
        **_attention_bias(values),
        "rope": parse_rope(values),
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
    }


def _mistral(values: Values) -> Values:
    _accept(values, "layer_types", None)  # transformers' Mistral has one kind of layer, whatever the file says
    return {
        **_shape(values, num_key_value_heads=8),
        "activation": _activation(values, "hidden_act", "silu"),
        "sliding_window": values.get("sliding_window", 4096),
        "rope": parse_rope(values),
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
    }


def _qwen2(values: Values) -> Values:
    return {**_qwen(values), "qkv_bias": True}


def _qwen3(values: Values) -> Values:
    return {**_qwen(values, head_dim=128), "qk_norm": True, **_attention_bias(values)}


def _qwen(values: Values, **defaults: int) -> Values:
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window", False) else None
    first_sliding = values.get("max_window_layers", 28)
    sliding = [window is not None and layer >= first_sliding for layer in range(_integer(values, "num_hidden_layers"))]
    return {
        **_shape(values, num_key_value_heads=32, **defaults),
        "activation": _activation(values, "hidden_act", "silu"),
        **_windows(values, window, sliding),
        "rope": parse_rope(values),
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", False)),
    }


def _gemma2(values: Values) -> Values:
    sliding = [layer % 2 == 0 for layer in range(_integer(values, "num_hidden_layers"))]
    return {
        **_gemma(values, sliding),
        "attention_soft_cap": values.get("attn_logit_softcapping", 50.0),
        "final_soft_cap": values.get("final_logit_softcapping", 30.0),
        "rope": parse_rope(values),
    }


def _gemma3(values: Values) -> Values:
    _accept(values, "attn_logit_softcapping", None)
    # Files of the multimodal models leave out what equals these defaults.
    values = {"vocab_size": 262_208, "num_attention_heads": 8, "max_position_embeddings": 131_072, **values}
    pattern = values.get("sliding_window_pattern") or 6  # one layer in so many sees everything
    sliding = [(layer + 1) % pattern != 0 for layer in range(_integer(values, "num_hidden_layers"))]
    nested = values.get("rope_parameters") or {}
    local = {
        "rope_theta": values.get("rope_local_base_freq"),
        "rope_parameters": nested.get("sliding_attention"),
        "max_position_embeddings": values["max_position_embeddings"],
    }
    return {
        **_gemma(values, sliding),
        "qk_norm": True,
        "final_soft_cap": values.get("final_logit_softcapping"),
        "rope": parse_rope({**values, "rope_parameters": nested.get("full_attention")}, default_theta=1_000_000.0),
        "local_rope": parse_rope(local),
    }


def _gemma(values: Values, sliding: list[bool]) -> Values:
    _accept(values, "use_bidirectional_attention", None, False)
    return {
        **_shape(values, num_key_value_heads=4, head_dim=256),
        "activation": _activation(values, "hidden_activation", "gelu_pytorch_tanh"),
        **_windows(values, values.get("sliding_window", 4096), sliding),
        **_attention_bias(values),
        "attention_scale": values.get("query_pre_attn_scalar", 256) ** -0.5,
        "norm_offset": 1.0,
        "norm_placement": "sandwich",
        "embedding_scale": _integer(values, "hidden_size") ** 0.5,
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", True)),
    }


def _opt(values: Values) -> Values:
    _accept(values, "layer_norm_elementwise_affine", None, True)
    _accept(values, "_remove_final_layer_norm", None, False)
    hidden, heads = _integer(values, "hidden_size"), _integer(values, "num_attention_heads")
    embedded = values.get("word_embed_proj_dim")
    bias = bool(values.get("enable_bias", True))
    return {
        "vocab_size": _integer(values, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _integer(values, "ffn_dim"),
        "num_layers": _integer(values, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": _split_hidden(hidden, heads),
        "max_position_embeddings": _integer(values, "max_position_embeddings"),
        "norm": "layer",
        "norm_eps": 1e-5,
        "norm_placement": "pre" if values.get("do_layer_norm_before", True) else "post",
        "activation": _activation(values, "activation_function", "relu"),
        "gated_mlp": False,
        "mlp_bias": bias,
        "qkv_bias": bias,
        "attention_out_bias": bias,
        "rope": None,
        "learned_position_offset": 2,
        "embedding_size": None if embedded == hidden else embedded,
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", True)),
    }


ARCHITECTURES = {
    "LlamaForCausalLM": Family("llama", _llama, bos_token_id=1, eos_token_id=2),
    "MistralForCausalLM": Family("mistral", _mistral, bos_token_id=1, eos_token_id=2),
    "Qwen2ForCausalLM": Family("qwen2", _qwen2),
    "Qwen3ForCausalLM": Family("qwen3", _qwen3),
    "Gemma2ForCausalLM": Family("gemma2", _gemma2, bos_token_id=2, eos_token_id=1),
    "Gemma3ForCausalLM": Family("gemma3", _gemma3, bos_token_id=2, eos_token_id=1),
    "Gemma3ForConditionalGeneration": Family("gemma3", _gemma3, bos_token_id=2, eos_token_id=1),  # its text part
    "OPTForCausalLM": Family("opt", _opt, bos_token_id=2, eos_token_id=2),
}
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "opt": "OPTForCausalLM",
}


def _shape(values: Values, **defaults: int) -> Values:
    """Sizes that every family with RMS norm and rotary positions names alike; `defaults` are the family's, by key."""
    values = {**defaults, **values}
    hidden, heads = _integer(values, "hidden_size"), _integer(values, "num_attention_heads")
    kv_heads, head_dim = values.get("num_key_value_heads"), values.get("head_dim")
    return {
        "vocab_size": _integer(values, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _integer(values, "intermediate_size"),
        "num_layers": _integer(values, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": _split_hidden(hidden, heads) if head_dim is None else head_dim,
        "max_position_embeddings": _integer(values, "max_position_embeddings"),
        "norm_eps": values.get("rms_norm_eps", 1e-6),
    }


def _split_hidden(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    return hidden // heads


def _attention_bias(values: Values) -> Values:
    bias = bool(values.get("attention_bias", False))
    return {"qkv_bias": bias, "attention_out_bias": bias}


def _windows(values: Values, window: int | None, sliding: list[bool]) -> Values:
    """Which layers read only the last `window` positions: `layer_types` where given, else the family's pattern."""
    if (layer_types := values.get("layer_types")) is not None:
        if unknown := sorted(set(layer_types) - {"sliding_attention", "full_attention"}):
            raise ValueError(f"layer_types {', '.join(unknown)} are not supported")
        sliding = [layer_type == "sliding_attention" for layer_type in layer_types]
    if not any(sliding):
        return {}
    return {"sliding_window": window, "sliding_layers": tuple(sliding)}


def _activation(values: Values, key: str, default: str) -> str:
    name = values.get(key) or default
    if name not in ACTIVATIONS:
        raise ValueError(f"{key} {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _token_ids(values: Values, generation: Values, family: Family) -> Values:
    """generation_config.json knows best: chat models end a turn with tokens that config.json does not name."""
    bos, eos = generation.get("bos_token_id"), generation.get("eos_token_id")
    bos = values.get("bos_token_id", family.bos_token_id) if bos is None else bos
    eos = values.get("eos_token_id", family.eos_token_id) if eos is None else eos
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return {"bos_token_id": bos, "eos_token_ids": tuple(eos_ids)}


def _dtype(values: Values) -> str:
    name = str(declared_dtype(values) or "bfloat16").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; supported are {', '.join(DTYPES)}")
    return name


def _integer(values: Values, key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    return value


def _accept(values: Values, key: str, *accepted: object) -> None:
    """Refuse a key whose other values change the computation in a way that is not implemented."""
    if (value := values.get(key)) not in accepted:
        raise ValueError(f"{key}={value!r} is not supported")
