"""The XLA attention against the definition in float64: lengths, windows, soft caps, permuted pages, NaN all around."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference

OPTIONS = [
    dict(scale=0.3),
    dict(scale=0.3, soft_cap=2.0),
    dict(scale=0.3, sliding_window=5),
    dict(scale=0.3, soft_cap=2.0, sliding_window=40),
]


def naive(q, k, v, first_position, scale, soft_cap=None, sliding_window=None):
    """q [Q, H, D] at first_position, ...; k, v [context, K, D]: softmax written out, in float64."""
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        last = first_position + i
        start = 0 if sliding_window is None else max(0, last - sliding_window + 1)
        for h in range(q.shape[1]):
            keys, values = k[start : last + 1, h // group], v[start : last + 1, h // group]
            scores = keys.astype(np.float64) @ q[i, h].astype(np.float64) * scale
            if soft_cap:
                scores = soft_cap * np.tanh(scores / soft_cap)
            weights = np.exp(scores - scores.max())
            out[i, h] = weights / weights.sum() @ values
    return out


class Case:
    """Rows with the given context lengths over a pool of permuted pages; everything that may not be read is NaN."""

    def __init__(self, lens, page_size, heads=4, kv_heads=2, head_dim=16, seed=0, spare_pages=3):
        rng = np.random.default_rng(seed)
        pages = [-(-length // page_size) for length in lens]
        num_pages = 1 + sum(pages) + spare_pages
        ids = 1 + rng.permutation(num_pages - 1)[: sum(pages)]
        self.tables = np.zeros((len(lens), max(pages, default=0) + 2), np.int32)  # wider than needed
        self.k_pages = np.full((num_pages, page_size, kv_heads, head_dim), np.nan, np.float32)
        self.v_pages = self.k_pages.copy()
        self.k = [rng.standard_normal((length, kv_heads, head_dim)).astype(np.float32) for length in lens]
        self.v = [rng.standard_normal((length, kv_heads, head_dim)).astype(np.float32) for length in lens]
        for row, count in enumerate(pages):
            self.tables[row, :count], ids = ids[:count], ids[count:]
            for position in range(lens[row]):
                page, offset = self.tables[row, position // page_size], position % page_size
                self.k_pages[page, offset], self.v_pages[page, offset] = self.k[row][position], self.v[row][position]
        self.k_pages, self.v_pages = jnp.asarray(self.k_pages), jnp.asarray(self.v_pages)
        self.lens = np.array(lens, np.int32)
        self.rng, self.shape = rng, (heads, head_dim)

    def take_unread_pages(self, first_positions, window):
        """Pages that no query from these positions on reads are nobody's: the tables name page 0 in their places."""
        for table, first in zip(self.tables, first_positions, strict=True):
            table[: max(0, int(first) - window + 1) // self.k_pages.shape[1]] = 0

    def queries(self, count):
        return self.rng.standard_normal((count, *self.shape)).astype(np.float32)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("options", OPTIONS)
def test_decode_equals_the_definition(page_size, options):
    case = Case([0, 1, page_size, page_size + 1, 3 * page_size - 1 or 1, 150, 0], page_size)
    if "sliding_window" in options:
        case.take_unread_pages(case.lens - 1, options["sliding_window"])
    q = case.queries(len(case.lens))
    out = jax.jit(functools.partial(reference.paged_decode, **options))(
        q, case.k_pages, case.v_pages, case.tables, case.lens
    )
    for row, length in enumerate(case.lens):
        expected = naive(q[row][None], case.k[row], case.v[row], length - 1, **options)[0] if length else 0.0
        np.testing.assert_allclose(out[row], expected, atol=2e-6, err_msg=f"row {row} of {length} tokens")


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("options", OPTIONS)
def test_prefill_equals_the_definition(page_size, options):
    lens, counts = [7, 0, 50, 33, 150, 1], [7, 0, 1, 33, 70, 1]  # whole prompts, a chunk, a single token, padding
    case = Case(lens, page_size)
    if "sliding_window" in options:
        case.take_unread_pages(case.lens - counts, options["sliding_window"])
    starts = np.cumsum(counts) - counts
    q = case.queries(sum(counts) + 9)  # and tokens that no row owns
    out = jax.jit(functools.partial(reference.paged_prefill, **options))(
        q, case.k_pages, case.v_pages, case.tables, starts.astype(np.int32), np.array(counts, np.int32), case.lens
    )
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count:
            expected = naive(q[start : start + count], case.k[row], case.v[row], lens[row] - count, **options)
            np.testing.assert_allclose(out[start : start + count], expected, atol=2e-6, err_msg=f"row {row}")
    np.testing.assert_array_equal(out[sum(counts) :], 0)


def test_prefill_multiplies_fp8_pages_by_their_scales_as_decode_does():
    case = Case([40, 7], 16)
    pages = [pool.astype(jnp.float8_e4m3fn) for pool in (case.k_pages, case.v_pages)]
    scales = np.random.default_rng(1).uniform(0.5, 2, (2, pages[0].shape[0], 2)).astype(np.float32)
    by_page = dict(k_scales=jnp.asarray(scales[0]), v_scales=jnp.asarray(scales[1]))
    q, tables, lens = (jnp.asarray(x) for x in (case.queries(2), case.tables, case.lens))
    rows = jnp.arange(2, dtype=jnp.int32), jnp.ones(2, jnp.int32), lens
    decoded = reference.paged_decode(q, *pages, tables, lens, scale=0.3, **by_page)
    prefilled = reference.paged_prefill(q, *pages, tables, *rows, scale=0.3, **by_page)
    np.testing.assert_allclose(prefilled, decoded, atol=2e-6)
    without = reference.paged_decode(q, *pages, tables, lens, scale=0.3)
    assert np.abs(decoded - without).max() > 0.1


@pytest.mark.parametrize("groups", [(4, 4), (4, 1), (6, 3)])
def test_any_group_size(groups):
    heads, kv_heads = groups
    case = Case([9, 30], 4, heads=heads, kv_heads=kv_heads)
    q = case.queries(2)
    out = reference.paged_decode(q, case.k_pages, case.v_pages, case.tables, case.lens, scale=0.3)
    for row, length in enumerate(case.lens):
        np.testing.assert_allclose(
            out[row], naive(q[row][None], case.k[row], case.v[row], length - 1, 0.3)[0], atol=2e-6
        )


def test_a_row_does_not_depend_on_its_neighbours_to_the_bit():
    case = Case([9, 200, 31, 1], 4)
    q = case.queries(4)
    decode = jax.jit(functools.partial(reference.paged_decode, scale=0.3))
    together = decode(q, case.k_pages, case.v_pages, case.tables, case.lens)
    others_gone = np.where(np.arange(4) == 0, case.lens, 0).astype(np.int32)
    alone = decode(q, case.k_pages, case.v_pages, case.tables, others_gone)
    np.testing.assert_array_equal(together[0], alone[0])
    np.testing.assert_array_equal(together, decode(q, case.k_pages, case.v_pages, case.tables, case.lens))


def test_16_bit_inputs_accumulate_in_float32():
    case = Case([64], 16)
    q = case.queries(1)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, case.k_pages, case.v_pages)]
    out = reference.paged_decode(*half, case.tables, case.lens, scale=0.3)
    exact = [x.astype(jnp.float32) for x in half]
    expected = reference.paged_decode(*exact, case.tables, case.lens, scale=0.3)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=8e-3)
