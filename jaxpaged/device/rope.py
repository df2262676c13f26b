"""Rotary position embedding: the frequencies of every scaling, on the host, and the rotations of tokens, on the device.

Each scaling is that of transformers' function of the same name, in float64 and rounded once.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.config.rope import RopeConfig
from pallas_kernels.layer_reference import Rotation

Array = jax.Array


def rotation_at(positions: Array, rope: RopeConfig, head_dim: int) -> Rotation:
    """i32[T] -> the rotation of heads of D elements."""
    angles = positions.astype(jnp.float32)[:, None] * rope_frequencies(rope, head_dim)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.attention_factor != 1.0:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    return Rotation(cos, sin)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angle per position of each of the head_dim / 2 rotations, f32[D / 2]."""
    plain = _powers(rope.theta, head_dim)
    match rope.scaling:
        case "linear":
            scaled = plain / rope.factor
        case "dynamic":
            scaled = _powers(_dynamic_theta(rope, head_dim), head_dim)
        case "yarn":
            scaled = _blend(plain, rope.factor, _yarn_share(rope, head_dim))
        case "llama3":
            scaled = _blend(plain, rope.factor, _llama3_share(rope, plain))
        case "longrope":
            is_long = _context_len(rope) > rope.original_max_position
            scaled = plain / np.asarray(rope.long_factors if is_long else rope.short_factors)
        case _:
            scaled = plain
    return scaled.astype(np.float32)


def _powers(theta: float, head_dim: int) -> np.ndarray:
    return theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _blend(plain: np.ndarray, factor: float, share: np.ndarray) -> np.ndarray:
    """`share` of every frequency stays as it is, the rest is divided by `factor`."""
    return share * plain + (1 - share) * plain / factor


def _context_len(rope: RopeConfig) -> int:
    return rope.context_len or rope.original_max_position


def _dynamic_theta(rope: RopeConfig, head_dim: int) -> float:
    stretch = max(_context_len(rope), rope.original_max_position) / rope.original_max_position
    return rope.theta * (rope.factor * stretch - (rope.factor - 1)) ** (head_dim / (head_dim - 2))


def _llama3_share(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    turns = rope.original_max_position * plain / (2 * np.pi)  # rotations over the trained context
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return np.clip(share, 0.0, 1.0)


def _yarn_share(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """1 up to the rotation that turns beta_fast times over the trained context, 0 from that of beta_slow times on."""

    def rotation(turns: float) -> float:
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = rotation(rope.beta_fast), rotation(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    return 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
