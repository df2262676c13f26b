"""What the nnx module computes is what our model computes with the parameters that are made of it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import TOY

from jaxpaged.config import ModelConfig, RopeConfig
from jaxpaged.device.model import compute_logits, forward
from jaxpaged.device.param_nodes import by_name
from jaxpaged.device.params import param_shapes

QWEN3 = dataclasses.replace(TOY, family="qwen3", qk_norm=True, num_kv_heads=1, norm_eps=1e-3)
BIASED = dataclasses.replace(
    TOY, num_layers=11, qkv_bias=True, mlp_bias=True, attention_out_bias=True, tie_word_embeddings=False,
    rope=RopeConfig(100.0, "llama3", 2.0),
)  # fmt: skip


@pytest.fixture(autouse=True)
def standard_promotion():
    """flax mixes dtypes, which conftest.py forbids our own code."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def nnx_llama():
    pytest.importorskip("optax")
    import nnx_llama

    return nnx_llama


def random_module(nnx_llama, config: ModelConfig):
    """With norms and biases that differ, too, and weights that are large enough to matter."""
    model = nnx_llama.Llama(config, rngs=nnx_llama.nnx.Rngs(0))
    state, rng = nnx_llama.nnx.state(model), np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: np.float32(5 * np.asarray(x) + rng.normal(0, 0.1, x.shape)), state)
    nnx_llama.nnx.update(model, noisy)
    return model


@pytest.mark.parametrize("config", [TOY, QWEN3, BIASED], ids=["llama", "qwen3", "biased"])
def test_logits_are_those_of_the_converted_parameters(nnx_llama, config):
    model = random_module(nnx_llama, config)
    params = nnx_llama.to_params(model, config)
    shapes = {name: leaf.shape for name, leaf in by_name(params).items()}
    assert shapes == {name: leaf.shape for name, leaf in by_name(param_shapes(config, "float32")).items()}
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 7))

    def attend(cache, layer, heads):
        q, k, v = (x.reshape(2, 7, *x.shape[1:]) for x in heads.split())
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(14, *q.shape[2:]), cache

    @jax.jit
    def compute(params, tokens):
        hidden, _ = forward(params, config, tokens.reshape(-1), jnp.tile(jnp.arange(7), 2), None, attend)
        return compute_logits(params, config, hidden).reshape(2, 7, -1)

    expected = compute(params, tokens)
    logits = nnx_llama.nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(norm_placement="post"), "does not compute norm_placement='post'"),
        (dict(gated_mlp=False, activation="relu"), "does not compute activation='relu', gated_mlp=False"),
        (dict(rope=None), "is a Llama, and does not compute rope=None"),
    ],
)
def test_what_the_module_cannot_compute_is_refused(nnx_llama, changes, message):
    with pytest.raises(ValueError, match=message):
        nnx_llama.Llama(dataclasses.replace(TOY, **changes), rngs=nnx_llama.nnx.Rngs(0))
