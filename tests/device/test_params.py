"""The parameters: typed nodes, the record of each tensor, and random weights that stay what they were."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import TOY

from jaxpaged.device.param_nodes import Layer, Linear, Norm, Params, by_name
from jaxpaged.device.params import Part, param_records, param_shapes, random_params

GEMMA = dataclasses.replace(TOY, family="gemma3", norm_placement="sandwich", norm_offset=1.0, qk_norm=True)
OPT = dataclasses.replace(
    TOY, family="opt", rope=None, norm="layer", gated_mlp=False, activation="relu", qkv_bias=True, mlp_bias=True,
    attention_out_bias=True, learned_position_offset=2, num_kv_heads=4, embedding_size=16, num_layers=1,
)  # fmt: skip
CPU = jax.devices("cpu")[0]
UNTIED = dataclasses.replace(TOY, tie_word_embeddings=False, num_layers=12)


def checksum(params: Params) -> str:
    crc = 0
    for leaf in jax.tree.leaves(params):
        crc = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), crc)
    return f"{crc:08x}"


@pytest.mark.parametrize(
    ("config", "expected"), [(TOY, "379bbb28"), (GEMMA, "8bdddcaa"), (OPT, "c02327a9"), (UNTIED, "020a8439")]
)
def test_random_weights_are_those_of_the_dictionaries_before(config, expected):
    """The checksums were taken on a CPU when the parameters were nested dictionaries."""
    assert checksum(random_params(config, "bfloat16", (1 << 40) + 3, CPU)) == expected


def test_a_random_leaf_is_numbered_by_its_name():
    """Names in order, those of layers by number: weights of a seed do not depend on how nodes are written."""
    params = random_params(UNTIED, "float32", seed=3)
    names = list(by_name(params))
    assert names[:4] == [
        "embedding", "final_norm.weight", "layers.0.attention_norm.weight", "layers.0.attention_out.weight",
    ]  # fmt: skip
    assert names[-2:] == ["layers.11.qkv.weight", "lm_head.weight"]
    key = jax.random.fold_in(jax.random.key(3, impl="unsafe_rbg"), names.index("layers.10.qkv.weight"))
    expected = jax.random.normal(key, (32, 64), "float32") * jnp.float32(0.02)
    np.testing.assert_allclose(params.layers[10].qkv.weight, expected, rtol=1e-5)


@pytest.mark.parametrize("node", [Norm, Linear, Layer, Params])
def test_fields_are_in_the_order_of_their_names(node):
    names = [field.name for field in dataclasses.fields(node)]
    assert names == sorted(names)


def test_what_a_model_does_not_have_is_none():
    plain, opt = param_shapes(TOY, "float32"), param_shapes(OPT, "float32")
    assert (plain.lm_head, plain.position_embedding, plain.embedding_in, plain.embedding_out) == (None,) * 4
    assert (plain.layers[0].qkv.bias, plain.layers[0].query_norm, plain.layers[0].post_mlp_norm) == (None,) * 3
    assert opt.position_embedding.shape == (258, 32)
    assert (opt.embedding_in.shape, opt.embedding_out.shape) == ((16, 32), (32, 16))
    assert opt.layers[0].qkv.bias.shape == (96,)
    assert len(jax.tree.leaves(plain)) == 2 + 2 * 6


def test_the_record_of_a_tensor_says_all_that_is_known_of_it():
    record = param_records(TOY).layers[1].qkv.weight
    assert (record.shape, record.axes, record.is_transposed) == ((32, 64), ("embed", "qkv"), True)
    assert record.parts == (
        Part("self_attn.q_proj", "heads", 32), Part("self_attn.k_proj", "kv_heads", 16),
        Part("self_attn.v_proj", "kv_heads", 16),
    )  # fmt: skip
    axes = {name: record.axes for name, record in by_name(param_records(OPT)).items()}
    assert axes["embedding"] == ("vocab", "embed")
    assert axes["position_embedding"] == ("position", "embed")
    assert axes["layers.0.attention_out.weight"] == ("heads", "embed")
    assert axes["layers.0.mlp_in.weight"] == ("embed", "mlp")
    assert axes["layers.0.mlp_out.bias"] == ("embed",)


@pytest.mark.parametrize("config", [TOY, GEMMA, OPT, UNTIED])
def test_parts_fill_the_last_axis_and_every_axis_has_a_name(config):
    for name, record in by_name(param_records(config)).items():
        assert sum(part.width for part in record.parts) == record.shape[-1], name
        assert len(record.axes) == len(record.shape), name


def test_a_norm_with_an_offset_begins_as_the_identity():
    params = random_params(GEMMA, "bfloat16", 0, CPU)
    assert not params.layers[0].post_mlp_norm.weight.any() and not params.layers[0].query_norm.weight.any()
    assert (random_params(OPT, "bfloat16", 0, CPU).final_norm.weight == 1).all()
