"""The decode kernel against the XLA reference: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_tile import DecodeTile, choose_tile, heads_per_pack
from pallas_kernels.paged_decode import paged_decode

BF16, F16, FP8 = jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn
SMALL, LARGE = DecodeTile(64, 2, 1), DecodeTile(128, 2, 1)
INVARIANT = dict(batch_invariant=True)


class Case(NamedTuple):
    """The arrays of one call."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    block_tables: jax.Array
    context_lens: jax.Array

    def rows(self, rows) -> Case:
        """Of these rows alone, over the same pool."""
        q, tables, lens = (x[jnp.array(rows)] for x in (self.q, self.block_tables, self.context_lens))
        return self._replace(q=q, block_tables=tables, context_lens=lens)


def without_unread_pages(case: Case, window: int | None) -> Case:
    """Pages that no window reaches are nobody's: the tables name page 0, which is NaN, in their places."""
    if window is None:
        return case
    unread = np.maximum(np.asarray(case.context_lens) - window, 0) // case.k_pages.shape[1]
    is_unread = np.arange(case.block_tables.shape[1]) < unread[:, None]
    return case._replace(block_tables=jnp.where(is_unread, 0, case.block_tables))


def make_case(
    lens, *, page_size=16, heads=4, kv_heads=1, head_dim=64, dtype=BF16, num_pages=None, spare_columns=2, seed=0
) -> Case:
    """Rows over permuted pages. All that may not be read is NaN: pages of nobody, which the tables name behind a row's
    length, page 0, the tail of a row's last page, and queries of rows of length 0."""
    rng = np.random.default_rng(seed)
    lens = np.array(lens, np.int32)
    counts = -(-lens // page_size)
    num_pages = num_pages or counts.sum() + 4
    ids = 1 + rng.permutation(num_pages - 1)
    *owned, spare = np.split(ids, np.cumsum(counts))
    tables = rng.choice([0, *spare], (len(lens), counts.max(initial=0) + spare_columns))
    live = np.zeros((num_pages, page_size), bool)
    for table, length, own in zip(tables, lens, owned, strict=True):
        table[: len(own)] = own
        live[own] = np.arange(own.size * page_size).reshape(-1, page_size) < length

    def values(shape, exists):
        drawn = rng.standard_normal(min(np.prod(shape), 1_000_003)).astype(dtype)  # repeats itself in a large pool
        array = np.resize(drawn, shape)
        array[~exists] = np.nan
        return jnp.asarray(array)

    pool = (num_pages, page_size, kv_heads, head_dim)
    return Case(
        values((len(lens), heads, head_dim), lens > 0), values(pool, live), values(pool, live),
        jnp.asarray(tables, jnp.int32), jnp.asarray(lens),
    )  # fmt: skip


@contextlib.contextmanager
def interpreter(**params):
    """The calls of `paged_decode` inside run in Pallas' interpreter, on the CPU."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**params)):
        with jax.default_device(jax.devices("cpu")[0]):
            yield


def attend(case, *, interpret=True, detect_races=False, **options):
    """Small tiles and three programs when interpreted, so that the rows are cut."""
    scale = 2 * case.q.shape[2] ** -0.5
    if not interpret:
        return paged_decode(*case, scale=scale, **options)
    with interpreter(detect_races=detect_races):
        return paged_decode(*case, **(dict(scale=scale, tile=SMALL, num_programs=3) | options))


def exact(case, *, sliding_window=None, soft_cap=None, k_scales=None, v_scales=None, **_):
    """The reference in float32 from the same values."""
    attend = functools.partial(reference.paged_decode, sliding_window=sliding_window, soft_cap=soft_cap)
    scale = 2 * case.q.shape[2] ** -0.5
    q, k_pages, v_pages = (x.astype(jnp.float32) for x in case[:3])
    rows = case.block_tables, case.context_lens
    return jax.jit(functools.partial(attend, scale=scale))(
        q, k_pages, v_pages, *rows, k_scales=k_scales, v_scales=v_scales
    )


def assert_close(out, expected, lens, tolerance):
    """Within a part of each row's largest output: what a tile more or less changes does not depend on its length."""
    out, expected = np.asarray(out, np.float32), np.asarray(expected, np.float32)
    padding = np.asarray(lens) == 0
    np.testing.assert_array_equal(out[padding], 0)
    error = np.abs(out - expected).max((1, 2))[~padding] / np.abs(expected).max((1, 2))[~padding]
    np.testing.assert_array_less(error, tolerance)  # not so for NaN


def check(case, **options):
    case = without_unread_pages(case, options.get("sliding_window"))
    out = attend(case, **options)
    assert out.dtype == case.q.dtype and out.shape == case.q.shape
    assert_close(out, exact(case, **options), case.context_lens, 2e-3 if out.dtype == F16 else 1e-2)
    return out


def assert_same_bits(a, b):
    np.testing.assert_array_equal(a.view(jnp.uint16), b.view(jnp.uint16))


# Shapes, and options of the call. Together: every head_dim, page size, group size, tile, dtype, and kind of cut.
QUICK = [
    pytest.param(dict(lens=[0, 1, 15, 16, 17, 96], spare_columns=0), {}, id="ragged"),
    pytest.param(dict(lens=[65, 0, 200], heads=8, kv_heads=4), dict(num_programs=1, soft_cap=3.0), id="pack-of-4-cap"),
    pytest.param(
        dict(lens=[257, 9], heads=14, kv_heads=2, head_dim=96, page_size=256, dtype=F16), {}, id="page-256-f16"
    ),
    pytest.param(dict(lens=[70, 130], heads=3, head_dim=80), dict(sliding_window=50), id="group-3-head-80-window"),
    pytest.param(dict(lens=[300, 90], heads=8, head_dim=128), dict(tile=LARGE, sliding_window=140), id="large-tile"),
]
SLOW = [
    pytest.param(dict(lens=[7, 9, 70], page_size=8, heads=8, kv_heads=8), INVARIANT, id="page-8-group-1-invariant"),
    pytest.param(
        dict(lens=[7, 8, 9, 130], page_size=8, heads=6, kv_heads=2, head_dim=128),
        dict(tile=LARGE, num_programs=5, soft_cap=2.0), id="page-8-group-3-cap",
    ),
    pytest.param(
        dict(lens=[15, 0, 33, 200], heads=8, kv_heads=4, head_dim=80, dtype=F16), dict(tile=LARGE, **INVARIANT),
        id="page-16-group-2-head-80-invariant-f16",
    ),
    pytest.param(
        dict(lens=[31, 33, 200], page_size=32, heads=3, kv_heads=3, head_dim=96, dtype=F16),
        dict(sliding_window=90, soft_cap=2.0), id="page-32-group-1-head-96-window-cap-f16",
    ),
    pytest.param(
        dict(lens=[63, 65, 200], page_size=64, heads=16, head_dim=256), dict(num_programs=5),
        id="page-64-group-16-head-256",
    ),
    pytest.param(
        dict(lens=[127, 129, 256], page_size=128, heads=7, dtype=F16), dict(sliding_window=100, **INVARIANT),
        id="page-128-group-7-window-invariant-f16",
    ),
    pytest.param(
        dict(lens=[255, 300], page_size=256, heads=16, kv_heads=2), dict(tile=LARGE, sliding_window=70),
        id="page-256-group-8-window",
    ),
    pytest.param(dict(lens=[129, 0, 40], heads=24, kv_heads=8), {}, id="pack-of-8-group-3"),
    pytest.param(dict(lens=[1, 100, 65]), dict(sliding_window=1, num_programs=12), id="window-of-1-and-idle-programs"),
    pytest.param(dict(lens=[64, 63, 128]), dict(sliding_window=64), id="window-of-a-tile"),
    pytest.param(dict(lens=[900]), dict(sliding_window=1000, num_programs=14), id="large-window-14-pieces"),
    pytest.param(dict(lens=[1300, 20]), dict(sliding_window=1100, **INVARIANT), id="window-of-two-chunks"),
    pytest.param(dict(lens=[1100, 70], page_size=64), INVARIANT, id="two-chunks"),
]  # fmt: skip


@pytest.mark.parametrize("shapes, options", QUICK)
def test_equals_the_reference_interpreted(shapes, options):
    check(make_case(**shapes), **options)


@pytest.mark.slow
@pytest.mark.parametrize("shapes, options", SLOW)
def test_more_shapes_equal_the_reference_interpreted(shapes, options):
    check(make_case(**shapes), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("shapes, options", QUICK + SLOW)
def test_equals_the_reference_compiled(shapes, options):
    check(make_case(**shapes), interpret=False, **options)


def three_rows(lens, seed=0):
    """Cases of the same shapes: they compile once."""
    return make_case(lens, num_pages=40, spare_columns=24 - -(-max(lens) // 16), seed=seed)


LAYOUTS = [[320, 0, 1], [63, 64, 65], [0, 0, 300], [128, 129, 10], [0, 0, 0], [1, 257, 1]]


@pytest.mark.parametrize("num_programs", [pytest.param(count, marks=pytest.mark.slow) for count in (1, 3, 5)])
def test_rows_cut_anywhere_equal_the_reference(num_programs):
    for seed, lens in enumerate(LAYOUTS):
        check(three_rows(lens, seed), num_programs=num_programs)


def permuted(case, seed=1):
    """The same pages under other ids."""
    new_ids = np.random.default_rng(seed).permutation(case.k_pages.shape[0])
    old_ids = jnp.argsort(jnp.asarray(new_ids))
    tables = jnp.asarray(new_ids, jnp.int32)[case.block_tables]
    return case._replace(k_pages=case.k_pages[old_ids], v_pages=case.v_pages[old_ids], block_tables=tables)


def test_reruns_and_permuted_pages_are_equal_to_the_bit():
    case = three_rows([300, 70, 20])
    out = attend(case)
    for again in (case, permuted(case)):
        assert_same_bits(attend(again), out)


def check_invariance(case, row, **options):
    """The row's bits with all others, alone, and in another order in a batch that is padded to other shapes."""
    together = check(case, **options)[row]
    assert_same_bits(attend(case.rows([row]), **options)[0], together)
    others = case.rows([3, row, 1])
    padded = Case(
        jnp.pad(others.q, ((0, 17), (0, 0), (0, 0))), case.k_pages, case.v_pages,
        jnp.pad(others.block_tables, ((0, 17), (0, 40))), jnp.pad(others.context_lens, (0, 17)),
    )  # fmt: skip
    assert_same_bits(attend(padded, **options)[1], together)


@pytest.mark.slow
def test_a_batch_invariant_row_does_not_depend_on_its_neighbours_to_the_bit():
    check_invariance(make_case([1100, 200, 0, 30]), 0, tile=None, **INVARIANT)


def test_without_batch_invariance_a_row_does_depend_on_its_neighbours():
    case = three_rows([200, 300, 1])
    alone = attend(case._replace(context_lens=jnp.array([0, 300, 0], jnp.int32)))
    assert (attend(case)[1] != alone[1]).any()


def quantise(case, by_page, by_head) -> tuple[Case, dict[str, jax.Array]]:
    """fp8 pages, and scales that fill most of its range; 1 for pages without keys."""
    axes = (1, 3) + (() if by_page else (0,)) + (() if by_head else (2,))
    stored, scales = [], []
    for pages in (case.k_pages, case.v_pages):
        pages = pages.astype(jnp.float32)
        largest = jnp.max(jnp.nan_to_num(jnp.abs(pages)), axes, keepdims=True)
        scale = jnp.where(largest > 0, largest / 300, 1.0)
        stored.append((pages / scale).astype(FP8))
        scales.append(scale[:, 0, :, 0])
    return case._replace(k_pages=stored[0], v_pages=stored[1]), dict(k_scales=scales[0], v_scales=scales[1])


def check_fp8(case, by_page, by_head, **options):
    case = without_unread_pages(case, options.get("sliding_window"))
    stored, scales = quantise(case, by_page, by_head)
    out = attend(stored, **scales, **options)
    assert out.dtype == case.q.dtype
    assert_close(out, exact(stored, **scales, **options), case.context_lens, 2e-2)
    # What 8 bits lose, a row as a whole: single outputs of long rows, nearly 0 by averaging, may be off by more.
    live = np.asarray(case.context_lens) > 0
    wanted, got = (np.asarray(x, np.float32)[live].reshape(live.sum(), -1) for x in (exact(case, **options), out))
    np.testing.assert_array_less(np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1), 0.15)


FP8_QUICK = [
    pytest.param(
        dict(lens=[100, 0, 30], heads=8, kv_heads=2, head_dim=128),
        (True, True),
        {},
        id="by-page-and-head",
        marks=pytest.mark.slow,
    ),
]
FP8_SLOW = [
    pytest.param(dict(lens=[200, 33], kv_heads=4), (False, True), dict(sliding_window=90, soft_cap=3.0), id="by-head"),
    pytest.param(dict(lens=[1100, 9], page_size=256, heads=3), (True, False), INVARIANT, id="by-page-chunks"),
    pytest.param(dict(lens=[150, 9], page_size=8, head_dim=96), (True, True), dict(tile=LARGE), id="head-96"),
    pytest.param(dict(lens=[140, 7], page_size=64, head_dim=256, dtype=F16), (False, False), {}, id="head-256-f16"),
]


@pytest.mark.parametrize("shapes, scales, options", FP8_QUICK)
def test_fp8_pages_equal_the_reference_interpreted(shapes, scales, options):
    check_fp8(make_case(**shapes), *scales, **options)


@pytest.mark.slow
@pytest.mark.parametrize("shapes, scales, options", FP8_SLOW)
def test_more_fp8_pages_equal_the_reference_interpreted(shapes, scales, options):
    check_fp8(make_case(**shapes), *scales, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("shapes, scales, options", FP8_QUICK + FP8_SLOW)
def test_fp8_pages_equal_the_reference_compiled(shapes, scales, options):
    check_fp8(make_case(**shapes), *scales, interpret=False, **options)


@pytest.mark.slow
def test_fp8_pages_without_scales_have_scale_1():
    case = make_case([70, 3])
    case = case._replace(k_pages=case.k_pages.astype(FP8), v_pages=case.v_pages.astype(FP8))
    out = check(case)
    assert_same_bits(attend(case, k_scales=jnp.ones((1, 1)), v_scales=jnp.ones((1, 1))), out)


@pytest.mark.parametrize("poison", [pytest.param(np.nan, marks=pytest.mark.slow), 1e30])
def test_scales_of_pages_without_keys_reach_no_output(poison):
    case, scales = quantise(make_case([100, 20]), True, True)
    live = np.zeros((case.k_pages.shape[0], 1), bool)
    live[case.block_tables[0, :7]] = live[case.block_tables[1, :2]] = True
    poisoned = {name: jnp.where(live, scale, poison) for name, scale in scales.items()}
    assert_same_bits(attend(case, **poisoned), attend(case, **scales))


def test_values_of_scale_0_are_0():
    case, scales = quantise(make_case([100, 20]), True, True)
    out = attend(case, **scales | dict(v_scales=jnp.zeros_like(scales["v_scales"])))
    np.testing.assert_array_equal(np.asarray(out, np.float32), 0)


@pytest.mark.parametrize(
    "shapes, options",
    [
        pytest.param(
            dict(lens=[300, 20], heads=8, kv_heads=2), dict(num_programs=5), id="cut-row", marks=pytest.mark.slow
        ),
        pytest.param(
            dict(lens=[70, 0, 140, 3, 90] * 2),
            dict(num_programs=1, sliding_window=80),
            id="many-rows",
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(lens=[1100, 3]), INVARIANT, id="chunks", marks=pytest.mark.slow),
        pytest.param(dict(lens=[200, 3], dtype=FP8), {}, id="fp8", marks=pytest.mark.slow),
    ],
)
def test_no_data_race(shapes, options, capfd):
    case = make_case(**shapes)
    case = case._replace(q=case.q.astype(BF16))
    check(case, detect_races=True, **options)
    output = capfd.readouterr()
    assert "RACE DETECTED" not in output.out + output.err


def test_the_race_detector_sees_a_race(capfd):
    def kernel(out_ref, tile):
        number = jnp.full((128,), jax.lax.axis_index("warpgroup"), jnp.int32)
        tile[...] = plgpu.layout_cast(number, plgpu.Layout.WG_STRIDED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out_ref)
        plgpu.wait_smem_to_gmem(0)

    with interpreter(detect_races=True):
        plgpu.kernel(
            kernel, out_type=array(128), scratch_types=[plgpu.SMEM((128,), jnp.int32)], num_threads=2,
            thread_name="warpgroup",
        )()  # fmt: skip
    output = capfd.readouterr()
    assert "RACE DETECTED" in output.out + output.err


def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def shapes(*, rows=4, heads=8, kv_heads=2, head_dim=128, page_size=16, num_pages=40, columns=9, dtype=BF16, pages=None,
           **others):  # fmt: skip
    pool = array(num_pages, page_size, kv_heads, head_dim, dtype=pages or dtype)
    arrays = dict(
        q=array(rows, heads, head_dim, dtype=dtype), k_pages=pool, v_pages=pool,
        block_tables=array(rows, columns), context_lens=array(rows),
    )  # fmt: skip
    return arrays | others


def lowered(arrays, **options) -> str:
    """What the kernel becomes for a GPU, without one."""
    attend = functools.partial(paged_decode, scale=0.1, **options)
    return jax.jit(attend).trace(**arrays).lower(lowering_platforms=("cuda",)).as_text()


LLAMA_8B = dict(rows=64, heads=32, kv_heads=8, num_pages=9000, columns=256)


@pytest.mark.parametrize(
    "arrays, options",
    [
        pytest.param(LLAMA_8B, {}, id="8B"),
        pytest.param(LLAMA_8B, INVARIANT, id="8B-invariant", marks=pytest.mark.slow),
        pytest.param(LLAMA_8B | dict(rows=1, pages=FP8), {}, id="8B-fp8-one-row", marks=pytest.mark.slow),
        pytest.param(dict(head_dim=80, page_size=8), dict(sliding_window=100), id="head-80", marks=pytest.mark.slow),
        pytest.param(dict(head_dim=256, page_size=256, rows=20), dict(soft_cap=50.0), id="head-256"),
        pytest.param(dict(head_dim=64, heads=7, kv_heads=1, dtype=F16), {}, id="group-7-f16", marks=pytest.mark.slow),
        pytest.param(
            dict(head_dim=96, heads=8, kv_heads=8, pages=FP8), INVARIANT, id="pack-fp8", marks=pytest.mark.slow
        ),
    ],
)
def test_lowers_for_cuda_without_a_gpu(arrays, options):
    assert "mosaic_gpu" in lowered(shapes(**arrays), **options)


def test_layers_share_one_kernel():
    def model(q, **arrays):
        for _ in range(3):
            q = paged_decode(q, **arrays, scale=0.1)
        return q

    text = jax.jit(model).trace(**shapes()).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2  # attention, and what merges its pieces


SCALES = dict(pages=FP8, k_scales=array(1, 1, dtype=jnp.float32))


@pytest.mark.parametrize(
    "arrays, options, message",
    [
        (dict(head_dim=72), {}, r"head_dim 72; these kernels run 64, 80, 96, 128, 256"),
        (dict(page_size=4), {}, r"page_size 4; these kernels run 8, 16, 32, 64, 128, 256"),
        (dict(head_dim=80, pages=FP8), {}, r"head_dim 80 with float8_e4m3fn pages; it must be a multiple of 32"),
        (dict(heads=7), {}, r"7 query heads are not a multiple of 2 KV heads"),
        (dict(dtype=jnp.float32), {}, r"q is float32; these kernels run bfloat16, float16"),
        (dict(pages=F16), {}, r"pages are float16 and q is bfloat16"),
        (dict(v_pages=array(40, 16, 2, 64, dtype=BF16)), {}, r"v_pages bfloat16\[40, 16, 2, 64\] differ"),
        (dict(v_pages=array(40, 16, 2, 128, dtype=F16)), {}, r"v_pages float16\[40, 16, 2, 128\] differ"),
        (dict(q=array(4, 8, 64, dtype=BF16)), {}, r"q has head_dim 64, the pages have 128"),
        (dict(q=array(4, 1, 8, 128, dtype=BF16)), {}, r"expected q \[rows, heads, head_dim\]"),
        (dict(block_tables=array(36)), {}, r"expected q .* block_tables \[rows, pages\]"),
        (dict(block_tables=array(3, 9)), {}, r"block_tables is int32\[3, 9\], expected int32\[4, 9\]"),
        (dict(block_tables=array(4, 9, dtype=jnp.int16)), {}, r"block_tables is int16\[4, 9\]"),
        (dict(context_lens=array(5)), {}, r"context_lens is int32\[5\], expected int32\[4\]"),
        (dict(context_lens=array(4, dtype=jnp.uint32)), {}, r"context_lens is uint32\[4\]"),
        ({}, dict(sliding_window=0), r"sliding_window=0; a window holds at least the query's own position"),
        ({}, dict(soft_cap=0.0), r"soft_cap=0.0; a soft cap is positive"),
        ({}, dict(soft_cap=-1.0), r"soft_cap=-1.0; a soft cap is positive"),
        (dict(k_scales=array(1, 1, dtype=jnp.float32)), {}, r"k_scales and v_scales belong to pages of float8_e4m3fn"),
        (
            SCALES | dict(v_scales=array(3, 1, dtype=jnp.float32)),
            {},
            r"v_scales is float32\[3, 1\], .*\[40 or 1, 2 or 1\]",
        ),
        (SCALES | dict(v_scales=array(1, 2, dtype=BF16)), {}, r"v_scales is bfloat16\[1, 2\], expected float32"),
        (SCALES | dict(v_scales=array(2, dtype=jnp.float32)), {}, r"v_scales is float32\[2\]"),
    ],
)
def test_refuses_what_it_cannot_run(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(paged_decode, scale=0.1, **options), **shapes(**arrays))


@pytest.mark.parametrize("fields", [dict(keys=0), dict(keys=96), dict(keys=-64), dict(stages=1), dict(programs=0)])
def test_a_tile_checks_itself(fields):
    with pytest.raises(ValueError, match="keys=|at least 2 stages"):
        DecodeTile(**fields)


PACKS = {(32, 32): 8, (8, 4): 4, (8, 2): 2, (24, 8): 8, (32, 4): 1, (16, 1): 1, (14, 2): 1, (3, 3): 1, (56, 8): 1}


@pytest.mark.parametrize("heads", PACKS)
def test_kv_heads_are_packed_where_their_query_heads_fill_eights(heads):
    assert heads_per_pack(*heads) == PACKS[heads]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("columns", [8, 24, 32])
def test_the_tile_fits_shared_memory(head_dim, itemsize, columns):
    tile = choose_tile(columns, head_dim, itemsize)
    ring = 2 * tile.stages * tile.keys * head_dim * itemsize
    others = 2 * (3 * columns * head_dim + columns * tile.keys) + (itemsize == 1) * 4 * tile.keys * head_dim
    assert tile.programs * (ring + others + 1024) <= 228 * 1024
    assert tile.programs == (2 if (head_dim, itemsize, columns) == (64, 2, 8) else 1)  # as many as the registers hold
    assert tile.keys == (128 if head_dim < 256 else 64)


def test_a_tile_that_does_not_fit_is_refused_with_the_stages_that_would():
    with pytest.raises(ValueError, match="head_dim 256 and 2 byte.* holds 1 stages"):
        check(make_case([70], heads=16, head_dim=256), tile=LARGE)


def test_says_when_no_tile_fits():
    with pytest.raises(ValueError, match="no tile of 512 query columns and head_dim 256 fits"):
        choose_tile(512, 256, 2)


# On a GPU: thousands of tokens, with the tile and the number of programs that follow from shape and device.
@functools.lru_cache(maxsize=1)
def large_case(**changes):
    """A batch like those of a server."""
    lens = np.random.default_rng(0).integers(0, 4000, 64)
    lens[:8] = [0, 1, 15, 16, 17, 4096, 2049, 2048]
    return make_case(**(dict(lens=lens, heads=32, kv_heads=8, head_dim=128) | changes))


SERVED = [
    pytest.param({}, {}, id="8B"),
    pytest.param({}, INVARIANT, id="8B-invariant"),
    pytest.param({}, dict(sliding_window=1000), id="window"),
    pytest.param({}, dict(sliding_window=1000, soft_cap=5.0, **INVARIANT), id="window-cap-invariant"),
    pytest.param({}, dict(soft_cap=5.0), id="cap"),
    pytest.param(dict(lens=(30_000,)), {}, id="one-long-row"),
    pytest.param(dict(lens=(30_000, 7, 300)), INVARIANT, id="one-long-row-invariant"),
    pytest.param(dict(head_dim=64, kv_heads=4), {}, id="head-64-group-8"),
    pytest.param(dict(head_dim=80, heads=16, kv_heads=16, page_size=32), {}, id="head-80-group-1"),
    pytest.param(dict(head_dim=96, heads=16, kv_heads=8, page_size=8), {}, id="head-96-group-2"),
    pytest.param(dict(head_dim=256, heads=16, kv_heads=4, page_size=64), dict(soft_cap=50.0), id="head-256"),
    pytest.param(dict(heads=28, kv_heads=4, dtype=F16), {}, id="group-7-f16"),
    pytest.param(dict(heads=64, kv_heads=4, page_size=128), {}, id="group-16"),
    pytest.param(dict(page_size=256), dict(tile=LARGE), id="page-256"),
]
SERVED_FP8 = [
    pytest.param({}, (True, True), {}, id="by-page-and-head"),
    pytest.param(dict(page_size=64, dtype=F16), (False, True), dict(sliding_window=1000), id="by-head-f16"),
    pytest.param(dict(lens=(20_000, 3)), (False, False), INVARIANT, id="few-rows-one-scale"),
    pytest.param(dict(head_dim=64, heads=16, kv_heads=16), (True, False), {}, id="head-64-group-1"),
    pytest.param(dict(head_dim=96), (True, True), {}, id="head-96"),
    pytest.param(dict(head_dim=256, kv_heads=4, page_size=256), (True, True), dict(soft_cap=5.0), id="head-256"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("changes, options", SERVED)
def test_large_shapes_equal_the_reference_and_reruns_equal_to_the_bit(changes, options):
    case = large_case(**changes)
    out = check(case, interpret=False, **options)
    for again in (case, case, case, permuted(case)):
        assert_same_bits(attend(again, interpret=False, **options), out)


@pytest.mark.gpu
@pytest.mark.parametrize("changes, scales, options", SERVED_FP8)
def test_large_fp8_pages_equal_the_reference(changes, scales, options):
    check_fp8(large_case(**changes), *scales, interpret=False, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("row", [5, 6, 40])
@pytest.mark.parametrize("options", [{}, dict(sliding_window=1000), dict(tile=LARGE)])
def test_a_large_batch_invariant_row_does_not_depend_on_its_neighbours_to_the_bit(row, options):
    check_invariance(large_case(), row, interpret=False, **INVARIANT, **options)
