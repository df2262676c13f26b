"""The prefill kernel against the XLA reference: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_reference_attention import Case

from pallas_kernels import reference
from pallas_kernels.query_tiles import QUERIES, order_tiles, segment_of

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_prefill import paged_prefill
from pallas_kernels.prefill_tile import PrefillTile, choose_tile

INTERPRETED = plgpu.InterpretGPUParams()
WITH_RACE_DETECTOR = plgpu.InterpretGPUParams(detect_races=True)
WINDOW, CAP = dict(sliding_window=70), dict(soft_cap=3.0)


def run(lens, counts, *, page_size=16, heads=2, kv_heads=1, head_dim=64, starts=None, tokens=None, dtype=jnp.bfloat16,
        pages_dtype=None, scales=None, interpret=INTERPRETED, num_programs=3, reruns=0, **options):  # fmt: skip
    """Rows of `lens` positions whose last `counts` are queries: checks them, zeros elsewhere, and reruns to the bit.

    `scales` are of fp8 pages, of keys and of values, by head or one for all.
    """
    case = Case(lens, page_size, heads, kv_heads, head_dim)
    counts = np.array(counts, np.int32)
    starts = np.cumsum(counts) - counts if starts is None else starts
    tokens = int((starts + counts).max()) if tokens is None else tokens
    if "sliding_window" in options:
        case.take_unread_pages(case.lens - counts, options["sliding_window"])
    args = [jnp.asarray(case.queries(tokens), dtype)]
    args += [jnp.asarray(x, pages_dtype or dtype) for x in (case.k_pages, case.v_pages)]
    rows = [jnp.asarray(x, jnp.int32) for x in (case.tables, starts, counts, case.lens)]
    if scales is not None:
        options["k_scales"], options["v_scales"] = (jnp.asarray([scale], jnp.float32) for scale in scales)
    options = dict(scale=1.2 * head_dim**-0.5, **options)
    attend = functools.partial(paged_prefill, num_programs=num_programs, interpret=interpret, **options)
    out = attend(*args, *rows)
    assert out.dtype == dtype and out.shape == args[0].shape
    expected = jax.jit(functools.partial(reference.paged_prefill, **options))(
        *(x.astype(jnp.float32) for x in args), *rows
    )
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=2e-2)
    owned = np.zeros(tokens, bool)
    for start, count in zip(starts, counts, strict=True):
        owned[start : start + count] = True
    np.testing.assert_array_equal(np.asarray(out, np.float32)[~owned], 0)
    for _ in range(reruns):
        np.testing.assert_array_equal(attend(*args, *rows).view(jnp.uint16), out.view(jnp.uint16))


# Rows share query tiles and start anywhere; some have a context that is already cached, some rows are padding.
SLOW = pytest.mark.slow
RAGGED = dict(lens=[130, 0, 40, 300, 7], counts=[60, 0, 40, 45, 1])
APART = dict(lens=[330, 0, 40], counts=[160, 0, 7], starts=np.array([3, 0, 166]), tokens=200)
SMALL = [
    pytest.param(dict(RAGGED, heads=4, kv_heads=2), id="ragged"),
    pytest.param(APART, id="unowned-tokens", marks=SLOW),
    pytest.param(dict(lens=[128, 128], counts=[128, 128], tokens=256), id="aligned", marks=SLOW),
    pytest.param(
        dict(lens=[0, 5], counts=[0, 5], starts=np.array([0, 130]), tokens=300),
        id="empty-tiles",
        marks=SLOW,
    ),
    pytest.param(dict(APART, **WINDOW), id="window"),
    pytest.param(dict(RAGGED, **WINDOW, soft_cap=2.0, kv_heads=2), id="window-and-cap", marks=SLOW),
    pytest.param(dict(lens=[200], counts=[150], head_dim=128, page_size=8, **CAP), id="page-8-cap", marks=SLOW),
    pytest.param(dict(RAGGED, page_size=32, head_dim=80, heads=3), id="page-32-head-80", marks=SLOW),
    pytest.param(dict(lens=[300, 20], counts=[30, 20], page_size=256, head_dim=96), id="page-256-head-96", marks=SLOW),
    pytest.param(dict(lens=[150, 20], counts=[100, 20], head_dim=256, heads=1), id="head-256", marks=SLOW),
    pytest.param(dict(lens=[140, 9], counts=[31, 9], heads=8, dtype=jnp.float16), id="float16-group-8", marks=SLOW),
]
FP8 = dict(pages_dtype=jnp.float8_e4m3fn)
FP8_SMALL = [
    pytest.param(
        dict(lens=[130, 0, 40, 7], counts=[60, 0, 40, 1], kv_heads=2, scales=([0.7, 1.5], [2.0, 0.1])),
        id="scales-by-head",
    ),
    pytest.param(dict(RAGGED, heads=4, kv_heads=2), id="ragged", marks=SLOW),
    pytest.param(dict(APART, **WINDOW, page_size=32, head_dim=96), id="window-head-96", marks=SLOW),
    pytest.param(
        dict(lens=[300, 20], counts=[140, 20], head_dim=128, page_size=8, **CAP), id="head-128-cap", marks=SLOW
    ),
    pytest.param(
        dict(lens=[150, 20], counts=[100, 20], head_dim=256, heads=1, page_size=64), id="head-256", marks=SLOW
    ),
    pytest.param(dict(lens=[140, 9], counts=[31, 9], dtype=jnp.float16, scales=([0.5], [3.0])), id="f16", marks=SLOW),
]
LARGE = [
    pytest.param(dict(lens=[4000, 2500, 0, 700, 33], counts=[4000, 1100, 0, 700, 1]), id="ragged"),
    pytest.param(dict(lens=[3000, 2500], counts=[2900, 300], starts=np.array([77, 2990]), tokens=3700), id="apart"),
    pytest.param(dict(lens=[5000, 1000], counts=[2200, 1000], sliding_window=1000), id="window"),
    pytest.param(dict(lens=[2000, 1000], counts=[2000, 100], **CAP), id="cap"),
    pytest.param(dict(lens=[2100, 900], counts=[1500, 900], page_size=8), id="page-8"),
    pytest.param(dict(lens=[2100, 900], counts=[1500, 900], page_size=256), id="page-256"),
    pytest.param(dict(lens=[2100, 900], counts=[1500, 900], head_dim=64, heads=16), id="head-64"),
    pytest.param(dict(lens=[2100, 900], counts=[1500, 900], head_dim=80), id="head-80"),
    pytest.param(dict(lens=[2100, 900], counts=[1500, 900], head_dim=96, page_size=64), id="head-96"),
    pytest.param(dict(lens=[2100, 900], counts=[1500, 900], head_dim=256, heads=4, sliding_window=300), id="head-256"),
    pytest.param(dict(lens=[2100, 900], counts=[1500, 900], dtype=jnp.float16, heads=6), id="float16-group-3"),
]
FP8_LARGE = [case for case in LARGE if case.id != "head-80"]


@pytest.mark.parametrize("case", SMALL)
def test_equals_the_reference_interpreted(case):
    run(**case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL)
def test_equals_the_reference_compiled(case):
    run(**case, interpret=None)


@pytest.mark.parametrize("case", FP8_SMALL)
def test_fp8_pages_equal_the_reference_interpreted(case):
    run(**case, **FP8)


@pytest.mark.gpu
@pytest.mark.parametrize("case", FP8_SMALL)
def test_fp8_pages_equal_the_reference_compiled(case):
    run(**case, **FP8, interpret=None, reruns=3)


@pytest.mark.gpu
@pytest.mark.parametrize("case", FP8_LARGE)
def test_large_shapes_of_fp8_pages_equal_the_reference_and_reruns_equal_to_the_bit(case):
    run(**dict(heads=8, kv_heads=2, head_dim=128, interpret=None, num_programs=None, reruns=3) | case, **FP8)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE)
def test_large_shapes_equal_the_reference_and_reruns_equal_to_the_bit(case):
    run(**dict(heads=8, kv_heads=2, head_dim=128, interpret=None, num_programs=None, reruns=3) | case)


@pytest.mark.slow
@pytest.mark.parametrize("pages", [{}, pytest.param(FP8, id="fp8")])
def test_no_data_race(pages, capfd):
    run(lens=[300, 260], counts=[100, 30], **WINDOW, **pages, interpret=WITH_RACE_DETECTOR, num_programs=1)
    output = capfd.readouterr()
    assert "RACE DETECTED" not in output.out + output.err


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours():
    """Up to rounding: the interpreter's matrix products, a CPU's, round by the row's place in a tile."""
    together, again, alone = attend_together_and_alone(INTERPRETED)
    np.testing.assert_array_equal(together, again)
    np.testing.assert_allclose(together.astype(jnp.float32), alone.astype(jnp.float32), rtol=0.02, atol=1e-3)


@pytest.mark.gpu
def test_a_row_does_not_depend_on_its_neighbours_to_the_bit():
    together, again, alone = (out.view(jnp.uint16) for out in attend_together_and_alone(None))
    np.testing.assert_array_equal(together, again)
    np.testing.assert_array_equal(together, alone)


def attend_together_and_alone(interpret):
    """A row behind another one, at an odd place of two query tiles; again; and alone, at the start of the tokens."""
    case = Case([180, 333], 16, 2, 1, 64)
    pages = [jnp.asarray(x, jnp.bfloat16) for x in (case.k_pages, case.v_pages)]
    queries = jnp.asarray(case.queries(200), jnp.bfloat16)
    place, count = 41, 159

    def attend(queries, tables, *rows):
        rows = [jnp.asarray(x, jnp.int32) for x in (tables, *rows)]
        return paged_prefill(queries, *pages, *rows, scale=0.2, num_programs=2, interpret=interpret)

    together, again = (attend(queries, case.tables, [0, place], [place, count], [180, 333])[place:] for _ in range(2))
    return together, again, attend(queries[place:], case.tables[1:], [0], [count], [333])


@pytest.mark.parametrize("sliding_window", [None, 1, 64, 200])
def test_a_segment_has_the_key_tiles_that_hold_readable_keys(sliding_window):
    rng, keys = np.random.default_rng(0), 64
    arguments = []
    for _ in range(200):
        length = int(rng.integers(0, 400))
        arguments.append([rng.integers(0, 3), rng.integers(0, 200), length, length + rng.integers(0, 300)])
    options = dict(at_least=jnp.int32(0), keys=keys, sliding_window=sliding_window)
    columns = np.array(arguments, np.int32).T
    segments = jax.vmap(functools.partial(segment_of, **options))(*columns)
    for (tile, start, length, context), *segment in zip(arguments, *map(np.asarray, segments), strict=True):
        first, last, shift, _, begin, inner_begin, inner_end, end = segment
        tokens = np.arange(tile * QUERIES, (tile + 1) * QUERIES)[:, None]
        key = np.arange(0, -(-(context + 1) // keys) * keys)
        position = tokens - start + context - length
        readable = (tokens >= start) & (tokens < start + length) & (key <= position)
        if sliding_window is not None:
            readable &= key > position - sliding_window
        by_tile = readable.reshape(QUERIES, -1, keys)
        np.testing.assert_array_equal(np.flatnonzero(by_tile.any((0, 2))), np.arange(begin, end))
        assert begin <= inner_begin <= inner_end <= end
        np.testing.assert_array_equal(np.flatnonzero(by_tile.all((0, 2))), np.arange(inner_begin, inner_end))
        if begin < end:
            assert first + shift == position[first - tile * QUERIES, 0] and first < last


def test_tiles_with_the_longest_contexts_come_first():
    starts, lens, contexts = (
        jnp.asarray(x, jnp.int32) for x in ([0, 100, 0, 300], [100, 180, 0, 20], [100, 180, 0, 4000])
    )
    order = order_tiles(starts, lens, contexts, num_tiles=4, keys=128, sliding_window=None)
    np.testing.assert_array_equal(order, [[2, 1, 3], [0, 0, 1], [1, 1, 1], [3, 0, 0]])


def shapes(*, tokens=300, heads=8, kv_heads=2, head_dim=128, page_size=16, rows=3, dtype=jnp.bfloat16, **others):
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
    pages = jax.ShapeDtypeStruct((40, page_size, kv_heads, head_dim), dtype)
    arrays = dict(
        q=jax.ShapeDtypeStruct((tokens, heads, head_dim), dtype), k_pages=pages, v_pages=pages,
        block_tables=jax.ShapeDtypeStruct((rows, 21), jnp.int32), query_starts=ids, query_lens=ids, context_lens=ids,
    )  # fmt: skip
    return arrays | others


@pytest.mark.parametrize("head_dim", [128, *(pytest.param(size, marks=SLOW) for size in (64, 80, 96, 256))])
@pytest.mark.parametrize("options", [{}, WINDOW | CAP])
def test_lowers_for_cuda_without_a_gpu(head_dim, options):
    lower(shapes(head_dim=head_dim), **options)


@pytest.mark.parametrize("head_dim", [256, *(pytest.param(size, marks=SLOW) for size in (64, 96, 128))])
def test_lowers_for_cuda_without_a_gpu_for_fp8_pages(head_dim):
    lower(shapes(head_dim=head_dim, **fp8_pages(head_dim)), **WINDOW)


def lower(arrays, **options):
    attend = functools.partial(paged_prefill, scale=0.1, **options)
    jax.jit(attend).trace(**arrays).lower(lowering_platforms=("cuda",))


def fp8_pages(head_dim=128):
    return dict.fromkeys(("k_pages", "v_pages"), jax.ShapeDtypeStruct((40, 16, 2, head_dim), jnp.float8_e4m3fn))


def test_layers_share_one_kernel():
    def model(q, **arrays):
        for _ in range(3):
            q = paged_prefill(q, **arrays, scale=0.1)
        return q

    text = jax.jit(model).trace(**shapes()).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


TILES = {64: (128, 2, 4, 4), 80: (128, 2, 4, 4), 96: (128, 2, 3, 4), 128: (128, 2, 2, 3), 256: (64, 1, 2, 3)}


FP8_TILES = {64: (128, 2, 2, 2, 4), 96: (128, 2, 2, 2, 3), 128: (128, 1, 2, 2, 2), 256: (64, 1, 2, 2, 1)}


@pytest.mark.parametrize("itemsize, tiles", [(2, TILES), (1, FP8_TILES)])
def test_the_tile_fits_shared_memory(itemsize, tiles):
    for head_dim, fields in tiles.items():
        tile = choose_tile(head_dim, itemsize)
        assert tile == PrefillTile(*fields)
        tokens = 128 * tile.query_places + tile.keys * (tile.key_places + tile.value_places)
        assert (2 * tokens + 2 * tile.keys * tile.page_places) * head_dim <= 227 * 1024


ERRORS = [
    pytest.param(dict(query_starts=jax.ShapeDtypeStruct((4,), jnp.int32)), {}, "query_starts is int32.4.", id="rows"),
    pytest.param(dict(query_lens=jax.ShapeDtypeStruct((3,), jnp.int16)), {}, "query_lens is int16", id="ids"),
    pytest.param(dict(page_size=4), {}, "page_size 4; these kernels run 8, 16", id="page-size"),
    pytest.param(dict(head_dim=72), {}, "head_dim 72", id="head-dim"),
    pytest.param(
        dict(fp8_pages(), v_scales=jax.ShapeDtypeStruct((40, 2), jnp.float32)), {},
        r"v_scales is float32\[40, 2\], a scale for each page; this kernel runs scales of heads, float32\[1, 2\]",
        id="scales-by-page",
    ),
    pytest.param(
        dict(k_scales=jax.ShapeDtypeStruct((1, 2), jnp.float32)), {}, "k_scales and v_scales belong to pages of float8",
        id="scales-without-fp8",
    ),
    pytest.param(fp8_pages(), dict(tile=PrefillTile()), "page_places are at least 1 for 8 bits", id="fp8-tile"),
    pytest.param(
        {}, dict(tile=PrefillTile(page_places=2)), "page_places=2.* with pages of 16 bits", id="16-bit-tile"
    ),
    pytest.param({}, dict(scale=-1.0), "scale=-1.0", id="scale"),
    pytest.param({}, dict(sliding_window=0), "sliding_window=0", id="window"),
]  # fmt: skip


@pytest.mark.parametrize("arrays, options, message", ERRORS)
def test_refuses_what_it_cannot_run(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(paged_prefill, **(dict(scale=0.1) | options)), **shapes(**arrays))


@pytest.mark.parametrize(
    "fields", [dict(keys=96), dict(keys=512), dict(value_places=1), dict(query_places=0), dict(page_places=-1)]
)
def test_a_tile_checks_itself(fields):
    with pytest.raises(ValueError):
        PrefillTile(**fields)
