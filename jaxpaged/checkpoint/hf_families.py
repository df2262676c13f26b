"""What each family of Hugging Face checkpoints says in its config.json: one short function a family.

Defaults are those of the family's configuration class in transformers, because files leave out what equals them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxpaged.checkpoint.hf_rope import parse_layer_ropes, parse_rope, positions
from jaxpaged.checkpoint.hf_values import (
    Values,
    read_flag,
    read_number,
    read_optional_number,
    read_optional_size,
    read_size,
    read_text,
)
from jaxpaged.config.checks import MAX_COUNT, short

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


#: Keys that every family with rotary positions reads; families add theirs. Only those matter that hf_keys would refuse.
ROTARY_KEYS = frozenset((
    "head_dim", "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "partial_rotary_factor",
))  # fmt: skip
WINDOW_KEYS = frozenset(("sliding_window", "layer_types"))
GEMMA_KEYS = frozenset((
    *ROTARY_KEYS, *WINDOW_KEYS, "hidden_activation", "attention_bias", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention",
))  # fmt: skip


class Family(NamedTuple):
    name: str
    parse: Callable[[Values], Values]  # config.json -> fields of ModelConfig
    keys: frozenset[str]  # what `parse` reads
    bos_token_id: int | None = None  # where config.json does not say
    eos_token_id: int | None = None


def _llama(values: Values) -> Values:
    return {
        **_shape(values),
        **_rotation(values),
        "activation": _activation(values, "hidden_act", "silu"),
        "mlp_bias": read_flag(values, "mlp_bias", False),
        **_attention_bias(values),
        "tie_word_embeddings": read_flag(values, "tie_word_embeddings", False),
    }


def _mistral(values: Values) -> Values:
    """transformers' Mistral has one kind of layer, whatever `layer_types` says: it may say no other."""
    window = read_optional_size(values, "sliding_window", MAX_COUNT, default=4096)
    kind = "full_attention" if window is None else "sliding_attention"
    _accept(values, "layer_types", None, [kind] * read_size(values, "num_hidden_layers"))
    return {
        **_shape(values, num_key_value_heads=8),
        **_rotation(values),
        "activation": _activation(values, "hidden_act", "silu"),
        "sliding_window": window,
        "tie_word_embeddings": read_flag(values, "tie_word_embeddings", False),
    }


def _qwen2(values: Values) -> Values:
    return {**_qwen(values), "qkv_bias": True}


def _qwen3(values: Values) -> Values:
    return {**_qwen(values, head_dim=128), "qk_norm": True, **_attention_bias(values)}


def _qwen(values: Values, **defaults: int) -> Values:
    window = read_optional_size(values, "sliding_window", MAX_COUNT, default=4096)
    window = window if read_flag(values, "use_sliding_window", False) else None
    first_sliding = read_number(values, "max_window_layers", 28, low=-1)
    num_layers = read_size(values, "num_hidden_layers")
    sliding = [window is not None and layer >= first_sliding for layer in range(num_layers)]
    return {
        **_shape(values, num_key_value_heads=32, **defaults),
        **_rotation(values),
        "activation": _activation(values, "hidden_act", "silu"),
        **_windows(values, window, sliding),
        "tie_word_embeddings": read_flag(values, "tie_word_embeddings", False),
    }


def _gemma2(values: Values) -> Values:
    sliding = [layer % 2 == 0 for layer in range(read_size(values, "num_hidden_layers"))]
    return {
        **_gemma(values, sliding),
        **_rotation(values),
        "attention_soft_cap": read_optional_number(values, "attn_logit_softcapping", 50.0),
        "final_soft_cap": read_optional_number(values, "final_logit_softcapping", 30.0),
    }


def _gemma3(values: Values) -> Values:
    """Its files name positions as they are after scaling, so they are not counted up."""
    _accept(values, "attn_logit_softcapping", None)
    # Files of the multimodal models leave out what equals these defaults.
    values = {"vocab_size": 262_208, "num_attention_heads": 8, "max_position_embeddings": 131_072, **values}
    pattern = read_optional_size(values, "sliding_window_pattern") or 6  # one layer in so many sees everything
    sliding = [(layer + 1) % pattern != 0 for layer in range(read_size(values, "num_hidden_layers"))]
    rope, local_rope = parse_layer_ropes(values, default_theta=1_000_000.0, default_local_theta=10_000.0)
    return {
        **_gemma(values, sliding),
        "qk_norm": True,
        "final_soft_cap": read_optional_number(values, "final_logit_softcapping"),
        "rope": rope,
        "local_rope": local_rope,
    }


def _gemma(values: Values, sliding: list[bool]) -> Values:
    _accept(values, "use_bidirectional_attention", None, False)
    window = read_optional_size(values, "sliding_window", MAX_COUNT, default=4096)
    return {
        **_shape(values, num_key_value_heads=4, head_dim=256),
        "activation": _activation(values, "hidden_activation", "gelu_pytorch_tanh"),
        **_windows(values, window, sliding),
        **_attention_bias(values),
        "attention_scale": read_number(values, "query_pre_attn_scalar", 256) ** -0.5,
        "norm_offset": 1.0,
        "norm_placement": "sandwich",
        "embedding_scale": read_size(values, "hidden_size") ** 0.5,
        "tie_word_embeddings": read_flag(values, "tie_word_embeddings", True),
    }


def _opt(values: Values) -> Values:
    _accept(values, "layer_norm_elementwise_affine", None, True)
    _accept(values, "_remove_final_layer_norm", None, False)
    hidden, heads = read_size(values, "hidden_size"), read_size(values, "num_attention_heads")
    embedded = read_optional_size(values, "word_embed_proj_dim")
    bias = read_flag(values, "enable_bias", True)
    return {
        "vocab_size": read_size(values, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": read_size(values, "ffn_dim"),
        "num_layers": read_size(values, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": _split_hidden(hidden, heads),
        "max_position_embeddings": read_size(values, "max_position_embeddings"),
        "norm": "layer",
        "norm_eps": 1e-5,
        "norm_placement": "pre" if read_flag(values, "do_layer_norm_before", True) else "post",
        "activation": _activation(values, "activation_function", "relu"),
        "gated_mlp": False,
        "mlp_bias": bias,
        "qkv_bias": bias,
        "attention_out_bias": bias,
        "rope": None,
        "learned_position_offset": 2,
        "embedding_size": None if embedded == hidden else embedded,
        "tie_word_embeddings": read_flag(values, "tie_word_embeddings", True),
    }


LLAMA_KEYS = ROTARY_KEYS | {"attention_bias", "mlp_bias"}
QWEN2_KEYS = ROTARY_KEYS | WINDOW_KEYS | {"attention_bias"}  # it has one on q, k and v, whatever files say of it
QWEN3_KEYS = ROTARY_KEYS | WINDOW_KEYS | {"attention_bias"}
GEMMA2_KEYS = GEMMA_KEYS | {"sliding_window_size"}  # a second name of the window, in its first files
GEMMA3_KEYS = GEMMA_KEYS | {"sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"}
OPT_KEYS = frozenset((
    "activation_function", "enable_bias", "do_layer_norm_before", "layer_norm_elementwise_affine",
    "_remove_final_layer_norm",
))  # fmt: skip
ARCHITECTURES = {
    "LlamaForCausalLM": Family("llama", _llama, LLAMA_KEYS, bos_token_id=1, eos_token_id=2),
    "MistralForCausalLM": Family("mistral", _mistral, ROTARY_KEYS | WINDOW_KEYS, bos_token_id=1, eos_token_id=2),
    "Qwen2ForCausalLM": Family("qwen2", _qwen2, QWEN2_KEYS),
    "Qwen3ForCausalLM": Family("qwen3", _qwen3, QWEN3_KEYS),
    "Gemma2ForCausalLM": Family("gemma2", _gemma2, GEMMA2_KEYS, bos_token_id=2, eos_token_id=1),
    "Gemma3ForCausalLM": Family("gemma3", _gemma3, GEMMA3_KEYS, bos_token_id=2, eos_token_id=1),
    # Its text part
    "Gemma3ForConditionalGeneration": Family("gemma3", _gemma3, GEMMA3_KEYS, bos_token_id=2, eos_token_id=1),
    "OPTForCausalLM": Family("opt", _opt, OPT_KEYS, bos_token_id=2, eos_token_id=2),
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
    hidden, heads = read_size(values, "hidden_size"), read_size(values, "num_attention_heads")
    kv_heads, head_dim = read_optional_size(values, "num_key_value_heads"), read_optional_size(values, "head_dim")
    head_dim = _split_hidden(hidden, heads) if head_dim is None else head_dim
    if kv_heads is not None and heads % kv_heads:
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    return {
        "vocab_size": read_size(values, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": read_size(values, "intermediate_size"),
        "num_layers": read_size(values, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": read_size(values, "max_position_embeddings"),
        "norm_eps": read_number(values, "rms_norm_eps", 1e-6, high=1.0),
    }


def _rotation(values: Values) -> Values:
    rope = parse_rope(values)
    return {"rope": rope, "max_position_embeddings": positions(rope, read_size(values, "max_position_embeddings"))}


def _split_hidden(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    return hidden // heads


def _attention_bias(values: Values) -> Values:
    bias = read_flag(values, "attention_bias", False)
    return {"qkv_bias": bias, "attention_out_bias": bias}


def _windows(values: Values, window: int | None, sliding: list[bool]) -> Values:
    """Which layers read only the last `window` positions: `layer_types` where given, else the family's pattern."""
    if (layer_types := values.get("layer_types")) is not None:
        sliding = _sliding(layer_types, len(sliding))
    if not any(sliding):
        return {}
    if window is None:
        raise ValueError(
            "layer_types names layers with sliding_attention, but sliding_window is not set, "
            "or use_sliding_window is not true"
        )
    return {"sliding_window": window, "sliding_layers": tuple(sliding)}


def _sliding(layer_types: object, num_layers: int) -> list[bool]:
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
        raise ValueError(f"layer_types must be a list of strings, got {short(layer_types)}")
    if unknown := sorted(set(layer_types) - set(kinds)):
        raise ValueError(f"layer_types {', '.join(unknown):.200} are not supported; supported are {', '.join(kinds)}")
    if len(layer_types) != num_layers:
        raise ValueError(f"layer_types names {len(layer_types)} layers, num_hidden_layers is {num_layers}")
    return [kind == "sliding_attention" for kind in layer_types]


def _activation(values: Values, key: str, default: str) -> str:
    name = read_text(values, key) or default
    if name not in ACTIVATIONS:
        raise ValueError(f"{key} {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _accept(values: Values, key: str, *accepted: object) -> None:
    """Refuse a key whose other values change the computation in a way that is not implemented."""
    if (value := values.get(key)) not in accepted:
        raise ValueError(f"{key}={short(value)} is not supported")
