"""Norms, in float32 whatever the dtype of what is normed, as the families' reference implementations compute them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpaged.config import ModelConfig
from jaxpaged.device.param_nodes import Norm
from pallas_kernels.layer_reference import rms_norm

Array = jax.Array

#: `layer_reference.add_norm`, or a kernel that computes the same.
AddNorm = Callable[..., tuple[Array, Array]]


def norm(weights: Norm, config: ModelConfig, x: Array) -> Array:
    """[..., E] -> [..., E], by the model's norm."""
    if config.norm == "rms":
        return rms_norm(x, weights.weight, config.norm_eps, config.norm_offset)
    assert weights.bias is not None, "layer norm has a bias"
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + config.norm_eps)
    return (y * weights.weight.astype(jnp.float32) + weights.bias.astype(jnp.float32)).astype(x.dtype)


def add_and_norm(
    weights: Norm, config: ModelConfig, x: Array, h: Array | None, add_norm: AddNorm
) -> tuple[Array, Array]:
    """x and h [T, E] -> their sum, and the norm of it. `h` None adds nothing; `add_norm` does both where it can."""
    if h is None:
        return x, norm(weights, config, x)
    if config.norm == "rms":
        return add_norm(x, h, weights.weight, eps=config.norm_eps, offset=config.norm_offset)
    x = x + h
    return x, norm(weights, config, x)
