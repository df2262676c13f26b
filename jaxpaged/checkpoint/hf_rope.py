"""Reads the rotary position embedding of a Hugging Face config.json, in the spellings of transformers 4 and 5.

transformers 4 writes `rope_theta` and `rope_scaling`, with "type" in old files and "rope_type" in newer ones, and for
Gemma 3 `rope_local_base_freq`. transformers 5 writes all of it into `rope_parameters`, for Gemma 3 one such object for
each kind of layer. `original_max_position_embeddings` may also stand at the top. Both versions drop keys that they do
not know; here each must belong to its kind of scaling, and where two places disagree neither is taken, because the two
versions then read the file differently.
"""

from __future__ import annotations

import math
from typing import Any

from jaxpaged.checkpoint.hf_values import Values, read_object, read_size
from jaxpaged.config.checks import MAX_SIZE, check_flag, check_number, check_size, check_text, short
from jaxpaged.config.rope import RopeConfig

PLACES = ("rope_scaling", "rope_parameters")
ORIGINAL = "original_max_position_embeddings"
#: Keys of each kind: those of transformers' `_validate_..._rope_parameters`.
KINDS = {
    "default": (),
    "linear": ("factor", ORIGINAL),
    "dynamic": ("factor", ORIGINAL),
    "yarn": (
        "factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    ),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"),
}  # fmt: skip
TYPE_KEYS = ("rope_type", "type")
COMMON = (*TYPE_KEYS, "rope_theta", "partial_rotary_factor")
#: Keys of other kinds, or that tools add, with the value with which they do nothing. "finetuned" is a note.
WITHOUT_EFFECT = {"factor": 1, "attention_factor": 1, "attn_factor": 1, "extrapolation_factor": 1}
NOTES = ("finetuned",)
LAYER_TYPES = ("full_attention", "sliding_attention")


def parse_rope(values: Values, default_theta: float = 10_000.0) -> RopeConfig:
    """`values` is a whole config.json of a model in which all layers turn alike."""
    return _parse(_settings(values), values, default_theta)


def parse_layer_ropes(
    values: Values, default_theta: float, default_local_theta: float
) -> tuple[RopeConfig, RopeConfig]:
    """Of the layers that see everything and of those with a window (Gemma 3); one object without layers, as in files of
    transformers 4, is for the former alone."""
    settings = _settings(values)
    if values.get(ORIGINAL) is not None:
        raise ValueError(f"{ORIGINAL} must stand in the rope settings of the layers that it is for, not at the top")
    if not any(key in settings for key in LAYER_TYPES):
        if read_object(values, "rope_parameters"):
            raise ValueError(
                f"rope_parameters {short(settings)} must name the layers that it is for: {' and '.join(LAYER_TYPES)}"
            )
        settings = {"full_attention": settings}
    elif unknown := sorted(set(settings) - set(LAYER_TYPES)):
        raise ValueError(f"rope_parameters has the keys {', '.join(unknown)} beside {' and '.join(LAYER_TYPES)}")
    local = {key: value for key, value in values.items() if key != "rope_theta"}
    if (local_theta := values.get("rope_local_base_freq")) is not None:
        local["rope_theta"] = local_theta
    full = _parse(read_object(settings, "full_attention"), values, default_theta)
    sliding = _parse(read_object(settings, "sliding_attention"), local, default_local_theta)
    if not (full.truncate and sliding.truncate):
        raise ValueError(
            "truncate=False is not supported in settings of kinds of layers: transformers 5 ignores it there"
        )
    return full, sliding


def positions(rope: RopeConfig, max_position_embeddings: int) -> int:
    """How many the scaling makes of those that config.json names: `factor` times the original ones, as in vLLM.

    llama3 and longrope files name the scaled number themselves; some of the others do, too, and keep what they name.
    """
    if rope.scaling not in ("linear", "dynamic", "yarn"):
        return max_position_embeddings
    original = rope.original_max_position if rope.scaling == "yarn" else max_position_embeddings
    return min(MAX_SIZE, max(max_position_embeddings, int(original * rope.factor)))


def _settings(values: Values) -> Values:
    """`rope_scaling` and `rope_parameters` as one object; a key that both have must be the same in both."""
    scaling, parameters = (_without_nulls(read_object(values, place)) for place in PLACES)
    for key, value in parameters.items():
        if key in scaling and scaling[key] != value:
            raise ValueError(
                f"{key} is {short(scaling[key])} in {PLACES[0]} and {short(value)} in {PLACES[1]}: give one of the two"
            )
        if scaling and not _is_said_outside(key, scaling, values):
            raise ValueError(
                f"{key} is in {PLACES[1]} and not in {PLACES[0]}, which alone transformers reads where both are given: "
                "give one of the two"
            )
    return {**scaling, **parameters}


def _is_said_outside(key: str, scaling: Values, values: Values) -> bool:
    """Whether a key of `rope_parameters` says nothing that a reader of `rope_scaling` and of the top would not know."""
    is_type = key in TYPE_KEYS and any(name in scaling for name in TYPE_KEYS)  # they are compared by _kind
    return key in scaling or is_type or values.get(key) is not None


def _without_nulls(settings: Values) -> Values:
    """null is "not given", but for `truncate`, where transformers takes it for false: that is refused by `_yarn`."""
    return {key: value for key, value in settings.items() if value is not None or key == "truncate"}


def _parse(settings: Values, values: Values, default_theta: float) -> RopeConfig:
    settings = _without_nulls(settings)
    kind = _kind(settings)
    _check_keys(settings, values, kind)
    theta = _agreed(settings, values, "rope_theta", default_theta)
    check_number("rope_theta", theta, 0)
    if theta <= 1:
        raise ValueError(f"rope_theta must be above 1, got {theta}")
    if kind == "default":
        return RopeConfig(float(theta))
    trained = read_size(values, "max_position_embeddings")
    original = _agreed(settings, values, ORIGINAL, trained)
    check_size(ORIGINAL, original)
    if kind == "dynamic" and original != trained:
        raise ValueError(f"{ORIGINAL}={original} is not supported with rope_type 'dynamic', which scales {trained}")
    fields = PARSERS[kind](settings, original, trained)
    if kind != "linear":  # which scales all alike, whatever the original length was
        fields["original_max_position"] = original
    return RopeConfig(float(theta), kind, **fields)


def _kind(settings: Values) -> str:
    names = [settings[key] for key in TYPE_KEYS if key in settings]
    for name in names:
        check_text("rope_type", name)
    if len(set(names)) > 1:
        raise ValueError(f"rope_type is {names[0]!r} and type is {names[1]!r}: give one of the two")
    kind = names[0] if names else "default"
    if kind not in KINDS:
        raise ValueError(f"rope_type {kind!r} is not supported; supported are {', '.join(KINDS)}")
    return kind


def _check_keys(settings: Values, values: Values, kind: str) -> None:
    for holder in (settings, values):
        partial = holder.get("partial_rotary_factor")
        if partial is not None and (isinstance(partial, bool) or partial != 1):
            raise ValueError(f"partial_rotary_factor={short(partial)} is not supported; heads are rotated whole")
    for key, value in settings.items():
        if key in COMMON or key in KINDS[kind] or key in NOTES or value is None or value is False or value == []:
            continue
        if isinstance(value, bool) or key not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[key]:
            named = any(name in settings for name in TYPE_KEYS)
            remedy = (
                ": give attention_factor, what sines and cosines are multiplied by in all"
                if key == "attn_factor"
                else ""
            )
            raise ValueError(
                f"{key}={short(value)} is not read with rope_type {kind!r}{remedy}"
                + ("" if named else f", which is what {short(settings)} means: it has no rope_type")
            )


def _agreed(settings: Values, values: Values, key: str, default: Any) -> Any:
    """A key that may stand inside or at the top."""
    inside, top = settings.get(key), values.get(key)
    if inside is not None and top is not None and inside != top:
        raise ValueError(
            f"{key} is {short(top)} at the top and {short(inside)} in the rope settings: give one of the two"
        )
    found = top if inside is None else inside
    return default if found is None else found


def _number(settings: Values, kind: str, key: str, low: float = 0) -> float:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"rope_type {kind!r} needs a number for {key!r}, got {short(value)}")
    check_number(f"{key} of rope_type {kind!r}", value, low, MAX_SIZE)
    return float(value)


def _numbers(settings: Values, kind: str, key: str) -> tuple[float, ...]:
    value = settings.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"rope_type {kind!r} needs a list of numbers for {key!r}, got {short(value)}")
    for item in value:
        check_number(f"{key} of rope_type {kind!r}", item, 0)
    return tuple(float(item) for item in value)


def _linear(settings: Values, original: int, trained: int) -> Values:
    return {"factor": _number(settings, "linear", "factor", 1.0)}


def _dynamic(settings: Values, original: int, trained: int) -> Values:
    return {"factor": _number(settings, "dynamic", "factor", 1.0)}


def _llama3(settings: Values, original: int, trained: int) -> Values:
    return {
        "factor": _number(settings, "llama3", "factor", 1.0),
        "low_freq_factor": _number(settings, "llama3", "low_freq_factor"),
        "high_freq_factor": _number(settings, "llama3", "high_freq_factor"),
    }


def _yarn(settings: Values, original: int, trained: int) -> Values:
    has_ratio = "factor" not in settings and trained > original
    factor = trained / original if has_ratio else _number(settings, "yarn", "factor", 1.0)
    truncate = settings.get("truncate", True)
    check_flag("truncate of rope_type 'yarn'", truncate)
    # 0 is "not given" for these, as in transformers
    given = {
        key: _number(settings, "yarn", key)
        for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        if settings.get(key, 0) != 0
    }
    scales = (given.pop("mscale", None), given.pop("mscale_all_dim", None))
    return {
        "factor": factor,
        "attention_factor": _yarn_attention(settings, factor, *scales),
        "truncate": truncate,
        **given,
    }


def _yarn_attention(settings: Values, factor: float, scale: float | None, scale_all: float | None) -> float:
    """As the paper has it, or as DeepSeek does, with two scales; one of them alone changes nothing in transformers."""
    if "attention_factor" in settings:
        return _number(settings, "yarn", "attention_factor")
    growth = 0.1 * math.log(factor)
    if scale is None or scale_all is None:
        return growth + 1.0
    return (growth * scale + 1.0) / (growth * scale_all + 1.0)


def _longrope(settings: Values, original: int, trained: int) -> Values:
    factor = _number(settings, "longrope", "factor", 1.0) if "factor" in settings else max(1.0, trained / original)
    if "attention_factor" in settings:
        attention = _number(settings, "longrope", "attention_factor")
    elif factor > 1 and original < 2:
        raise ValueError(f"{ORIGINAL} must be at least 2 with rope_type 'longrope', got {original}")
    else:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "factor": factor,
        "attention_factor": attention,
        "short_factors": _numbers(settings, "longrope", "short_factor"),
        "long_factors": _numbers(settings, "longrope", "long_factor"),
    }


PARSERS = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
