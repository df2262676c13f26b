"""Attention over dense rows: what surrounds cuDNN's kernel, with XLA in its place, and who may run it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import TOY

from jaxpaged.config import AttentionOptions
from jaxpaged.device.attention import cudnn_obstacle, resolve_dense_attention
from jaxpaged.device.dense_attention import decode_rows, decode_xla, prefill_rows
from jaxpaged.step_io import PrefillInputs
from pallas_kernels import reference

OPTIONS = AttentionOptions(scale=0.3)
MAX_LEN = 24


def random(*shape, seed=0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_decoding_rows_in_the_order_of_the_cache_is_decoding_pages():
    q, k, v = random(4, 4, 8), random(6, MAX_LEN, 2, 8, seed=1), random(6, MAX_LEN, 2, 8, seed=2)
    rows, lens = np.array([5, 0, -1, 2], np.int32), np.array([24, 1, 0, 13], np.int32)
    pages = np.maximum(rows, 0)[:, None]
    expected = reference.paged_decode(q, k, v, pages, lens, scale=OPTIONS.scale)
    live = rows >= 0
    for decode in (decode_xla, lambda *args: decode_rows(*args, implementation="xla")):
        out = decode(q, k, v, jnp.asarray(rows), jnp.asarray(lens), OPTIONS)
        np.testing.assert_allclose(out[live], expected[live], atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 3, 11, 16])
def test_prefilling_rows_is_prefilling_pages_for_whole_prompts_and_later_chunks(num_rows):
    """More rows than one call takes, among them chunks that start late, and padding rows and tokens."""
    rng = np.random.default_rng(num_rows)
    lens = rng.integers(1, 9, num_rows).astype(np.int32)
    starts = np.cumsum(lens, dtype=np.int32) - lens
    contexts = lens + np.where(np.arange(num_rows) % 2, rng.integers(1, MAX_LEN - 8, num_rows), 0).astype(np.int32)
    rows = rng.permutation(num_rows).astype(np.int32)
    padding = np.zeros(5, np.int32)
    inputs = PrefillInputs(
        None, None, None, None, *(jnp.asarray(np.append(a, padding)) for a in (starts, lens, contexts)), None
    )
    tokens = int(lens.sum()) + 7
    q, k, v = random(tokens, 4, 8), random(num_rows, MAX_LEN, 2, 8, seed=1), random(num_rows, MAX_LEN, 2, 8, seed=2)
    tables = jnp.asarray(np.append(rows, padding))[:, None]
    expected = reference.paged_prefill(
        q, k, v, tables, inputs.query_starts, inputs.query_lens, inputs.context_lens, scale=OPTIONS.scale
    )
    all_rows = jnp.asarray(np.append(rows, padding - 1))
    out = prefill_rows(q, lambda some: (k[some], v[some]), MAX_LEN, all_rows, inputs, OPTIONS, "xla")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert not np.asarray(out)[lens.sum() :].any()


@dataclasses.dataclass
class FakeDevice:
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    compute_capability: str = "9.0"


@pytest.mark.parametrize(
    ("device", "change", "dtype", "why"),
    [
        (FakeDevice(), {}, "bfloat16", None),
        (FakeDevice(compute_capability="8.0"), dict(head_dim=128), "float16", None),
        (jax.devices("cpu")[0], {}, "bfloat16", "needs an NVIDIA GPU"),
        (FakeDevice(compute_capability="7.5"), {}, "bfloat16", "needs an NVIDIA GPU"),
        (FakeDevice(compute_capability="gfx942"), {}, "bfloat16", "needs an NVIDIA GPU"),
        (FakeDevice(), {}, "float32", "needs 16-bit floats, this is float32"),
        (FakeDevice(compute_capability="8.0"), dict(head_dim=256), "bfloat16", "head_dim of at most 128"),
        (FakeDevice(), dict(head_dim=12), "bfloat16", "multiple of 8"),
        (FakeDevice(), dict(attention_soft_cap=30.0), "bfloat16", "no soft cap"),
        (FakeDevice(), dict(sliding_window=64), "bfloat16", "no sliding window"),
    ],
)
def test_cudnn_is_chosen_where_it_runs_and_xla_elsewhere_aloud(device, change, dtype, why, caplog):
    model = dataclasses.replace(TOY, **change)
    with caplog.at_level("INFO", logger="jaxpaged"):
        kernels = resolve_dense_attention("auto", device, model, dtype)
    obstacle = cudnn_obstacle(device, model, dtype)
    assert kernels.dense == ("cudnn" if why is None else "xla")
    assert (why is None and obstacle is None) or why in obstacle
    assert ("cuDNN on" if why is None else why) in caplog.text
    assert hash(kernels) == hash(resolve_dense_attention("auto", device, model, dtype))
    assert resolve_dense_attention("reference", device, model, dtype).dense == "xla"


def test_kernels_over_pages_are_refused_for_dense_rows():
    with pytest.raises(ValueError, match="attention='pallas' reads pages"):
        resolve_dense_attention("pallas", FakeDevice(), TOY, "bfloat16")
    with pytest.raises(ValueError, match="attention='flash'; choose one of auto"):
        resolve_dense_attention("flash", FakeDevice(), TOY, "bfloat16")
