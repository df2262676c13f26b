"""Pages are copied in every pool, and nothing else changes: by XLA, and by the kernel, interpreted and on a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference

needs_mosaic = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
SHAPES = [(3, (9, 16, 2, 64), "bfloat16"), (9, (12, 8, 1, 64), "float16"), (2, (7, 32, 4, 96), "uint8")]


def make_pools(count, shape, dtype):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.integers(0, 256, shape), dtype) for _ in range(count))


def check_copies(copy_pages, pools):
    src, dst = [1, 2, 1, 0, 0], [4, 6, 5, 0, 0]  # one page to two places, and what pads a list
    copied = jax.jit(copy_pages)(pools, jnp.array(src, jnp.int32), jnp.array(dst, jnp.int32))
    for before, after in zip(pools, copied, strict=True):
        expected = np.array(before.astype(jnp.float32))
        expected[dst] = expected[src]
        np.testing.assert_array_equal(np.asarray(after.astype(jnp.float32)), expected)


@pytest.mark.parametrize("count, shape, dtype", SHAPES)
def test_the_reference_copies_pages_in_every_pool(count, shape, dtype):
    check_copies(reference.copy_pages, make_pools(count, shape, dtype))


@needs_mosaic
@pytest.mark.parametrize("count, shape, dtype", SHAPES)
def test_the_kernel_copies_pages_in_every_pool(count, shape, dtype):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.page_copy import copy_pages

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        check_copies(copy_pages, make_pools(count, shape, dtype))


@needs_mosaic
@pytest.mark.gpu
@pytest.mark.parametrize("count, shape, dtype", [*SHAPES, (64, (200, 16, 8, 128), "bfloat16")])
def test_the_compiled_kernel_copies_pages_in_every_pool(count, shape, dtype):
    from pallas_kernels.page_copy import copy_pages

    check_copies(copy_pages, make_pools(count, shape, dtype))


@needs_mosaic
def test_64_pools_are_copied_by_one_launch_in_place():
    from pallas_kernels.page_copy import copy_pages

    pools = [jax.ShapeDtypeStruct((100, 16, 8, 128), jnp.bfloat16)] * 64
    ids = jax.ShapeDtypeStruct((8,), jnp.int32)
    lowered = jax.jit(copy_pages, donate_argnums=0).trace(tuple(pools), ids, ids).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


@needs_mosaic
def test_pages_that_are_no_multiple_of_a_row_are_copied_too():
    from pallas_kernels.page_copy import copy_pages

    check_copies(copy_pages, make_pools(2, (9, 16, 1, 80), "bfloat16"))


@needs_mosaic
def test_refuses_pools_that_differ():
    from pallas_kernels.page_copy import copy_pages

    pools = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in [(9, 16, 2, 64), (9, 16, 2, 128)])
    ids = jax.ShapeDtypeStruct((2,), jnp.int32)
    message = r"pools differ: bfloat16\[9, 16, 2, 64\] and bfloat16\[9, 16, 2, 128\]"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(copy_pages, pools, ids, ids)
