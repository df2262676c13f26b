"""Refuses a config.json whose keys ask for a computation that the family does not have.

A config.json holds the keys of one class of transformers, and whatever tools have added: notes of their own, options
for generation, leftovers of training. A list of all that is harmless would refuse tomorrow's notes, and a list of all
that acts would miss tomorrow's models. So a key that the family's function does not read is judged by its name: it is
refused if a word in it speaks of the computation (`WORDS`, gathered from the configuration classes of all language
models of transformers), its value is not one with which it does nothing, and it is not known to act in training or on
speed alone (`HARMLESS`). That is stricter than transformers, which drops a `sliding_window` of a Llama without a word,
while other programs obey it: of two readings of a file, neither is safe.
"""

from __future__ import annotations

from typing import Any

from jaxpaged.checkpoint.hf_values import read_size
from jaxpaged.config.checks import short

WORDS = (
    # positions
    "rope", "rotary", "yarn", "ntk", "logn", "alibi", "nope", "interpol", "position_bias",
    "position_embedding_type", "position_encoding",
    # attention
    "attention_bias", "attention_out_bias", "attn_bias", "qkv_bias", "qk_", "clip_qkv", "query_pre_attn",
    "bidirectional", "window_size", "window_pattern", "window_layers", "chunk_attention", "attention_chunk",
    "attention_type", "attn_type", "attn_temperature", "attention_temperature", "cross_attention", "kv_shared",
    "attention_k_eq_v", "q_lora", "kv_lora", "o_lora", "head_dim", "key_value_heads", "kv_heads", "multi_query", "sink",
    "layer_types", "attention_window", "local_attention", "is_causal",
    # feed-forward
    "mlp_bias", "use_bias", "enable_bias", "hidden_act", "activation", "act_fn", "expert", "moe", "swiglu",
    # norms and residuals
    "norm_eps", "norm_epsilon", "norm_type", "norm_bias", "norm_before", "norm_affine", "post_norm", "pre_norm",
    "sandwich", "zero_center", "parallel_residual", "parallel_attn", "residual_", "gate", "gating", "altup",
    "laurel", "hidden_size_per_layer", "pruned", "parallel_block", "skip_layers", "normalize_embedding",
    # scales and caps
    "multiplier", "scale", "scaling", "softcap", "soft_cap", "logit_cap", "mup", "is_encoder_decoder",
    "prefix_lm",
    # other mixers
    "mamba", "ssm", "conv_", "recurrent", "linear_attn", "linear_attention",
)  # fmt: skip
HARMLESS = (
    "dropout", "pdrop", "init", "loss", "warmup", "checkpointing", "finetun", "implementation", "flash", "cache",
    "max_window_layers", "lm_head_", "_fp32", "propert",
)  # fmt: skip
#: Words of which 1 is the value that changes nothing.
FACTORS = ("multiplier", "scale", "scaling", "factor", "pct", "mup")
#: Keys that every one of our models with such a part has switched on, so that "off" is what acts.
ALWAYS_ON = (
    "use_rope", "use_rotary", "use_rotary_embedding", "use_rotary_embeddings", "use_rotary_position_embeddings",
    "rotary_pct", "rotary_percent", "rope_pct", "norm_affine", "use_gated_mlp",
    "is_causal",
)  # fmt: skip
#: One function in several words: a gated feed-forward with SiLU.
SILU = ("silu", "swish", "swiglu")
DENSE = ("full_attention", "dense")  # what a list of the layers' kinds may say of each
QUANTIZED = ("quantization_config", "compression_config", "quantization")


def check_unread_keys(values: dict[str, Any], read: frozenset[str], family: str) -> None:
    """`read`: the keys that the function of this family reads, among those that a word would give away."""
    for key in QUANTIZED:
        if (found := values.get(key)) is not None:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise ValueError(
                f"quantized weights ({str(method or key):.80}) are not supported; use the original checkpoint"
            )
    for key, value in values.items():
        if key not in read and _speaks_of_the_computation(key) and not _does_nothing(key, value, values):
            raise ValueError(
                f"{key}={short(value)} is not supported: {family} models are not computed with it; "
                "remove the key if the model was not trained with it"
            )
    _check_window(values, read, family)


def _speaks_of_the_computation(key: str) -> bool:
    name = key.lower()
    return any(word in name for word in WORDS) and not any(word in name for word in HARMLESS)


def _does_nothing(key: str, value: object, values: dict[str, Any]) -> bool:
    if key.lower() in ALWAYS_ON:
        return value is None or value == 1
    if value is None or value is False or value in ("", "default", "none"):
        return True
    if isinstance(value, str):  # the same again, in another key's words
        says_rotary = "position" in key.lower() and value.lower() in ("rope", "rotary")
        return says_rotary or (value in SILU and values.get("hidden_act") in SILU)
    if isinstance(value, list):
        return all(isinstance(item, str) and item in DENSE for item in value)
    if isinstance(value, dict):
        return not value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or (value == 1 and any(word in key.lower() for word in FACTORS))


def _check_window(values: dict[str, Any], read: frozenset[str], family: str) -> None:
    """A window that no sequence can exceed, or that is switched off, does nothing."""
    window = values.get("sliding_window")
    if "sliding_window" in read or window is None or values.get("use_sliding_window", True) in (None, False):
        return
    if not isinstance(window, int) or window < read_size(values, "max_position_embeddings"):
        raise ValueError(
            f"sliding_window={short(window)} is not supported: {family} models read all of the text; "
            "remove the key if the model was not trained with it"
        )
