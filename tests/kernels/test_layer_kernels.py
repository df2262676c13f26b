"""What stands around attention in a layer: the kernels compute what XLA does, interpreted and on a GPU."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_but_slow

from pallas_kernels import layer_reference
from pallas_kernels.layer_reference import HeadNorms, Rotation

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")

PAGES, PAGE_SIZE = 5, 16
#: T, H, K, D, whether single heads are normed
HEADS = [(3, 8, 8, 64, False), (2, 64, 8, 128, True), (1, 32, 8, 80, False), (2, 16, 16, 256, True)]
NOT_FOR_THE_KERNEL = [(2, 14, 2, 64, False), (1, 240, 24, 64, True)]
COMPILED = [*HEADS, (256, 32, 8, 128, False), (77, 16, 8, 128, True), (4096, 32, 8, 64, False)]
WIDTHS = [(3, 512), (2, 896), (1, 8192)]
OTHER_WIDTHS = [(2, 576), (1, 16384)]


@contextlib.contextmanager
def interpreted():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def numbers(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def check_add_norm(tokens, width, dtype=jnp.bfloat16):
    from pallas_kernels.add_norm import add_norm

    x, h, weight = numbers(0, tokens, width, dtype=dtype), numbers(1, tokens, width, dtype=dtype), numbers(2, width)
    for offset in (0.0, 1.0):
        total, normed = jax.jit(lambda x, h, w, o=offset: add_norm(x, h, w, eps=1e-5, offset=o))(x, h, weight)
        expected = layer_reference.add_norm(x, h, weight, eps=1e-5, offset=offset)
        np.testing.assert_array_equal(np.asarray(total, np.float32), np.asarray(expected[0], np.float32))
        np.testing.assert_allclose(np.asarray(normed, np.float32), np.asarray(expected[1], np.float32), rtol=8e-3)


def check_write_heads(tokens, heads, kv_heads, head_dim, is_normed, dtype=jnp.bfloat16):
    """Slots are in random order; what is not written stays, NaN included."""
    from pallas_kernels.write_heads import write_heads

    pages = max(PAGES, tokens)
    projected = numbers(0, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    rotation = Rotation(*numbers(1, 2, tokens, head_dim // 2, dtype=jnp.float32))
    norms = HeadNorms(*numbers(2, 2, head_dim, dtype=dtype), 1e-5, 1.0) if is_normed else None
    slots = jnp.asarray(np.random.default_rng(3).permutation(pages * PAGE_SIZE)[:tokens], jnp.int32)
    pools = jnp.full((2, pages, PAGE_SIZE, kv_heads, head_dim), jnp.nan, dtype)
    written = jax.jit(lambda *arrays: write_heads(arrays[0], arrays[1], norms, *arrays[2:]))(
        projected, rotation, slots, *pools
    )
    expected = layer_reference.write_heads(projected, rotation, norms, slots, *pools)
    for got, want in zip(written, expected, strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        # A norm rounds before the rotation, and the two terms of that may cancel: an error is one of the largest.
        np.testing.assert_allclose(got, want, rtol=0, atol=np.nanmax(np.abs(want)) / 128)


@pytest.mark.parametrize("tokens, width", [*WIDTHS, *OTHER_WIDTHS])
def test_sum_and_norm(tokens, width):
    with interpreted():
        check_add_norm(tokens, width)


@pytest.mark.parametrize("case", [*all_but_slow(HEADS, *HEADS[:2]), *NOT_FOR_THE_KERNEL])
def test_heads_are_written(case):
    with interpreted():
        check_write_heads(*case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens, width", [*WIDTHS, *OTHER_WIDTHS, (256, 4096), (8192, 2048)])
def test_sum_and_norm_compiled(tokens, width, dtype):
    check_add_norm(tokens, width, jnp.dtype(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", [*COMPILED, *NOT_FOR_THE_KERNEL])
def test_heads_are_written_compiled(case, dtype):
    check_write_heads(*case, jnp.dtype(dtype))


def lowered_for_cuda(function, *shapes, **options):
    return jax.jit(function, **options).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_heads_are_written_in_place_by_one_launch():
    from pallas_kernels.write_heads import write_heads

    shape = jax.ShapeDtypeStruct
    rotation = Rotation(*[shape((8, 64), jnp.float32)] * 2)
    pool = shape((100, 16, 8, 128), jnp.bfloat16)
    text = lowered_for_cuda(
        lambda heads, rotation, slots, k, v: write_heads(heads, rotation, None, slots, k, v),
        shape((8, 48, 128), jnp.bfloat16), rotation, shape((8,), jnp.int32), pool, pool, donate_argnums=(3, 4),
    )  # fmt: skip
    assert text.count("custom_call @mosaic_gpu") == 1
    assert text.count("tf.aliasing_output") == 2
    assert "scatter" not in text


def test_sum_and_norm_are_one_launch():
    from pallas_kernels.add_norm import add_norm

    rows = jax.ShapeDtypeStruct((8, 2048), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((2048,), jnp.bfloat16)
    text = lowered_for_cuda(lambda x, h, w: add_norm(x, h, w, eps=1e-5, offset=0.0), rows, rows, weight)
    assert text.count("custom_call @mosaic_gpu") == 1
