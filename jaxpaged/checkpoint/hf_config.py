"""Reads a Hugging Face config.json as a `ModelConfig`, and refuses what is not one of the families (`hf_families`).

Files of transformers 4 and 5 are read: `rope_theta` with `rope_scaling` or `rope_parameters`, `sliding_window_pattern`
or `layer_types`, `torch_dtype` or `dtype`. Defaults are those of the family's configuration class in transformers,
because files leave out what equals them. A key that changes the computation in a way that jaxpaged does not implement
is an error that names it (`hf_keys`, for keys that no function here reads); nothing is silently computed otherwise.
"""

from __future__ import annotations

from jaxpaged.checkpoint.hf_families import ARCHITECTURES, MODEL_TYPES, Family
from jaxpaged.checkpoint.hf_keys import check_unread_keys
from jaxpaged.checkpoint.hf_values import Values, read_object, read_text
from jaxpaged.config import DTYPES, ModelConfig
from jaxpaged.config.checks import check_token_id, short


def parse_config(values: Values, generation: Values | None = None) -> ModelConfig:
    """The contents of config.json, and of generation_config.json where there is one -> ModelConfig."""
    family = _find_family(values)
    text, whole = read_object(values, "text_config"), values
    _check_nesting(text, whole, family)
    values = {**whole, **text}  # multimodal files nest the language model
    check_unread_keys(values, family.keys, family.name)
    fields = family.parse(values)
    # The whole model knows better than its part, in which transformers 5 writes all defaults.
    named = {**text, **_given(whole)} if text else whole
    tokens = _token_ids(named, generation or {}, family, fields["vocab_size"])
    return ModelConfig(family=family.name, **fields, **tokens, dtype=_dtype(values))


def declared_dtype(values: Values) -> str | None:
    """What config.json says that the weights are stored as; files of transformers 4 say `torch_dtype`."""
    for holder in (read_object(values, "text_config"), values):
        for key in ("dtype", "torch_dtype"):
            if name := read_text(holder, key):
                return name
    return None


def _find_family(values: Values) -> Family:
    """By `architectures` (a classifier has the same model_type as a language model), else by `model_type`."""
    model_type = read_text(values, "model_type")
    names = values.get("architectures") or [MODEL_TYPES.get(str(model_type), str(model_type))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"architectures must be a list of strings, got {short(names)}")
    found = next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
    if found is None:
        raise ValueError(
            f"architecture {', '.join(names):.200} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    if model_type and (model_type not in MODEL_TYPES or ARCHITECTURES[MODEL_TYPES[model_type]].name != found.name):
        raise ValueError(f"model_type {model_type!r} and architectures {short(names)} name different models")
    return found


def _check_nesting(text: Values, whole: Values, family: Family) -> None:
    """transformers reads the language model of a multimodal file in `text_config` alone, and of others at the top."""
    if text and family.name != "gemma3":
        raise ValueError(f"text_config={short(text)} is not supported: {family.name} models have their keys at the top")
    for key in sorted(family.keys) if text else ():
        if (value := whole.get(key)) is not None and value != text.get(key):
            raise ValueError(
                f"{key} is {short(value)} at the top and {short(text.get(key))} in text_config, which alone is read: "
                "give it there"
            )


def _given(values: Values) -> Values:
    return {key: value for key, value in values.items() if value is not None}


def _token_ids(values: Values, generation: Values, family: Family, vocab_size: int) -> Values:
    """generation_config.json knows best: chat models end a turn with tokens that config.json does not name."""
    defaults = {"bos_token_id": family.bos_token_id, "eos_token_id": family.eos_token_id}
    found = {}
    for key, default in defaults.items():
        named, value = f"{key} of generation_config.json", generation.get(key)
        if value is None:
            named, value = key, values.get(key, default)
        found[key] = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in found[key]:
            check_token_id(named, token_id, vocab_size)
    if len(found["bos_token_id"]) > 1:
        raise ValueError(f"bos_token_id must be one token id, got {short(found['bos_token_id'])}")
    return {"bos_token_id": next(iter(found["bos_token_id"]), None), "eos_token_ids": tuple(found["eos_token_id"])}


def _dtype(values: Values) -> str:
    name = (declared_dtype(values) or "bfloat16").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; supported are {', '.join(DTYPES)}")
    return name
