"""Reads the rotary position embedding of a Hugging Face config.json, in the spellings of transformers 4 and 5."""

from __future__ import annotations

from typing import Any

from jaxpaged.config import RopeConfig

SUPPORTED = ("default", "linear", "llama3")


def parse_rope(values: dict[str, Any], default_theta: float = 10_000.0) -> RopeConfig:
    """`values` is a whole config.json; its `rope_scaling` (4) or `rope_parameters` (5) outrank its `rope_theta`."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta") or values.get("rope_theta") or default_theta)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in SUPPORTED:
        raise ValueError(f"rope_type {kind!r} is not supported; supported are {', '.join(SUPPORTED)}")
    partial = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor={partial} is not supported; heads are rotated whole")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", _number(rope, kind, "factor"))
    original = values.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return RopeConfig(
        theta,
        "llama3",
        factor=_number(rope, kind, "factor"),
        low_freq_factor=_number(rope, kind, "low_freq_factor"),
        high_freq_factor=_number(rope, kind, "high_freq_factor"),
        original_max_position=original or values["max_position_embeddings"],
    )


def _number(rope: dict[str, Any], kind: str, key: str) -> float:
    value = rope.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"rope_type {kind!r} needs a number for {key!r}, got {value!r}")
    return float(value)
