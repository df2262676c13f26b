"""Shapes of attention and random data of these shapes, for benchmarks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.host.step.cascade import NUM_LEVELS, CascadeRule, pad_groups, plan_groups
from pallas_kernels.cascade_groups import CascadeGroups

Array = jax.Array
Cache = tuple[Array, ...]

#: KV that one measurement goes through before it comes back to the same pool; a GPU's L2 holds some 50 MB.
MIN_KV_BYTES = {"gpu": 512 * 2**20}
#: What a call of about this many seconds is repeated to in one program: the launch of a program takes 50 to 100 us.
SECONDS_A_PROGRAM = 1e-3


@dataclass(frozen=True)
class Heads:
    """The shape of queries and pages."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"  # of the pages; queries are bfloat16 where pages are in 8 bits

    @property
    def query_dtype(self) -> str:
        return "bfloat16" if jnp.dtype(self.dtype).itemsize == 1 else self.dtype

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"heads {self.num_heads}/{self.num_kv_heads}, D={self.head_dim}, page {self.page_size}, {self.dtype}"

    def changes(self, common: Heads) -> str:
        """What a case changes of that which the others have in common."""
        both = zip(str(self).split(", "), str(common).split(", "), strict=True)
        return "".join(f", {part}" for part, other in both if part != other)


@dataclass(frozen=True)
class DecodeCase:
    """One query token for each row of these lengths."""

    name: str
    context_lens: tuple[int, ...]
    heads: Heads

    @property
    def kv_bytes(self) -> int:
        return sum(self.context_lens) * self.heads.token_bytes

    @property
    def seconds(self) -> float:
        """About what a call takes on a GPU; decides only how many calls a program makes."""
        return 5e-6 + self.kv_bytes / 3e12


@dataclass(frozen=True)
class PrefillCase:
    """`rows` chunks of `new` tokens, each behind `cached` ones; causal."""

    rows: int
    new: int
    cached: int
    heads: Heads

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.new}" + (f" + {self.cached}" if self.cached else "")

    @property
    def context_lens(self) -> tuple[int, ...]:
        return (self.new + self.cached,) * self.rows

    @property
    def pairs(self) -> int:
        """Query and key positions that meet."""
        return self.rows * (self.new * self.cached + self.new * (self.new + 1) // 2)

    @property
    def flops(self) -> int:
        return 4 * self.heads.num_heads * self.heads.head_dim * self.pairs

    @property
    def seconds(self) -> float:
        return 2e-5 + self.flops / 4e14


def decode_cases(heads: Heads, quick: bool) -> list[DecodeCase]:
    """The named cases, in the page size and dtype of `heads`."""
    ragged = np.random.default_rng(0).integers(128, 3968, 64, endpoint=True)
    multi_head = dataclasses.replace(heads, num_heads=32, num_kv_heads=32)
    many_heads = dataclasses.replace(heads, num_heads=64, num_kv_heads=8)
    cases = [
        uniform_decode(64, 2048, heads),
        uniform_decode(1, 32768, heads),
        DecodeCase("64 x 128..3968", tuple(ragged.tolist()), heads),
        uniform_decode(256, 1024, heads),
        uniform_decode(8, 8192, heads),
        uniform_decode(128, 2048, dataclasses.replace(heads, head_dim=64)),
        uniform_decode(64, 1024, multi_head),
        uniform_decode(64, 4096, many_heads),
    ]
    return cases[:3] if quick else cases


def uniform_decode(rows: int, context: int, heads: Heads) -> DecodeCase:
    return DecodeCase(f"{rows} x {context}", (context,) * rows, heads)


def prefill_cases(heads: Heads, quick: bool) -> list[PrefillCase]:
    shapes = [(4, 2048, 0), (1, 8192, 0), (1, 512, 8192), (1, 4096, 0), (1, 16384, 0), (1, 512, 16384), (16, 512, 0)]
    return [PrefillCase(rows, new, cached, heads) for rows, new, cached in (shapes[:3] if quick else shapes)]


class PagedData(NamedTuple):
    """Random data of a case. Several pools, as of several layers, so that none is found in a cache of the device."""

    q: Array  # [B or T, H, D]
    caches: list[Cache]  # k_pages and v_pages [N, S, K, D] of each layer
    block_tables: Array  # i32[B, P]
    context_lens: Array  # i32[B]


def calls_a_program(seconds: float) -> int:
    if jax.default_backend() != "gpu":
        return 2
    return int(min(32, max(4, SECONDS_A_PROGRAM / seconds)))


def num_pools(kv_bytes: int, calls: int) -> int:
    """At least two, and enough that all of them hold MIN_KV_BYTES, as far as the calls of one program go."""
    return min(calls, max(2, -(-MIN_KV_BYTES.get(jax.default_backend(), 0) // kv_bytes)))


def random_pools(num_layers: int, num_pages: int, heads: Heads) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """K and V of each layer [N, S, K, D], with `num_pages` pages or as many more as MIN_KV_BYTES takes."""
    page_bytes = num_layers * heads.page_size * heads.token_bytes
    num_pages = max(num_pages, -(-MIN_KV_BYTES.get(jax.default_backend(), 0) // page_bytes))
    shape = (num_pages, heads.page_size, heads.num_kv_heads, heads.head_dim)
    pools = [random_normal(jax.random.key(i), shape, heads.dtype) for i in range(2 * num_layers)]
    return tuple(pools[:num_layers]), tuple(pools[num_layers:])


def make_paged_data(
    block_tables: np.ndarray, context_lens: np.ndarray, num_queries: int, pools: int, heads: Heads
) -> PagedData:
    """Random queries and pools that hold the pages of the tables."""
    shape = (int(block_tables.max()) + 1, heads.page_size, heads.num_kv_heads, heads.head_dim)
    keys = jax.random.split(jax.random.key(0), 2 * pools + 1)
    caches = [tuple(random_normal(keys[2 * i + j], shape, heads.dtype) for j in range(2)) for i in range(pools)]
    q = random_normal(keys[-1], (num_queries, heads.num_heads, heads.head_dim), heads.query_dtype)
    return PagedData(q, caches, jnp.asarray(block_tables, jnp.int32), jnp.asarray(context_lens, jnp.int32))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_normal(key: Array, shape: tuple[int, ...], dtype: str) -> Array:
    return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)


def permuted_tables(context_lens: tuple[int, ...], page_size: int) -> np.ndarray:
    """i32[B, P] tables that share nothing, with pages from all over the pool; page 0 pads them."""
    counts = [-(-length // page_size) for length in context_lens]
    tables = np.zeros((len(counts), max(counts)), np.int32)
    pages = np.random.default_rng(0).permutation(np.arange(1, sum(counts) + 1))
    for row, ids in zip(tables, np.split(pages, np.cumsum(counts)[:-1]), strict=True):
        row[: len(ids)] = ids
    return tables


def decode_data(case: DecodeCase) -> PagedData:
    pools = num_pools(case.kv_bytes, calls_a_program(case.seconds))
    tables = permuted_tables(case.context_lens, case.heads.page_size)
    return make_paged_data(tables, np.array(case.context_lens), len(case.context_lens), pools, case.heads)


def prefill_data(case: PrefillCase) -> PagedData:
    """Two pools: prefill computes far longer than it reads, so where its KV comes from matters little."""
    tables = permuted_tables(case.context_lens, case.heads.page_size)
    return make_paged_data(tables, np.array(case.context_lens), case.rows * case.new, 2, case.heads)


@dataclass(frozen=True)
class CascadeCase:
    """One step of `samples` samples of each of `prompts` prompts, which have made `own` tokens each."""

    prompts: int
    samples: int
    prompt: int
    own: int
    heads: Heads

    @property
    def name(self) -> str:
        return f"{self.prompts} x {self.samples} @ {self.prompt} + {self.own}"

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    @property
    def context_lens(self) -> tuple[int, ...]:
        return (self.prompt + self.own,) * self.rows

    def tables(self, width: int) -> np.ndarray:
        """i32[B, width] where the samples of a prompt name the same pages, as far as the prompt fills them."""
        size = self.heads.page_size
        used, full = -(-(self.prompt + self.own) // size), self.prompt // size
        num_pages = self.prompts * full + self.rows * (used - full)
        pages = np.random.default_rng(0).permutation(np.arange(1, num_pages + 1))
        prompts, own = pages[: self.prompts * full], pages[self.prompts * full :]
        tables = np.zeros((self.rows, width), np.int32)
        tables[:, :full] = prompts.reshape(self.prompts, full).repeat(self.samples, axis=0)
        tables[:, full:used] = own.reshape(self.rows, used - full)
        return tables


class CascadeData(NamedTuple):
    """Of one case. All of a run have the same shapes, so that an implementation compiles once."""

    case: CascadeCase
    paged: PagedData
    groups: CascadeGroups  # of device arrays
    read_alone_bytes: int  # of KV, if every row reads its whole context
    read_shared_bytes: int
    calls: int


def cascade_cases(heads: Heads, quick: bool) -> list[CascadeCase]:
    """Two ways to share a prompt, at many lengths of the rest, and a batch that shares nothing."""
    own = (128,) if quick else (32, 128, 256)
    cases = [CascadeCase(*shape, 1024, n, heads) for shape in ((4, 16), (1, 64)) for n in own]
    return [*cases, CascadeCase(64, 1, 1024, own[-1], heads)]


def cascade_data(cases: list[CascadeCase], max_members: int) -> Iterator[CascadeData]:
    heads = cases[0].heads
    width = max(-(-max(case.context_lens) // heads.page_size) for case in cases)
    tables = [case.tables(width) for case in cases]
    share_all = CascadeRule(min_saved_tokens=0, min_run_pages=1)
    groups = [_groups(case, table, max_members, share_all) for case, table in zip(cases, tables, strict=True)]
    num_groups = 2 ** (max(1, *(len(plan.num_pages) for plan in groups)) - 1).bit_length()
    read = [_tokens_read(case, plan) for case, plan in zip(cases, groups, strict=True)]
    calls = calls_a_program(5e-6 + max(sum(case.context_lens) for case in cases) * heads.token_bytes / 3e12)
    pools = num_pools(min(read) * heads.token_bytes, calls)
    base = make_paged_data(max(tables, key=np.max), np.zeros(1), max(case.rows for case in cases), pools, heads)
    for case, table, plan, tokens in zip(cases, tables, groups, read, strict=True):
        lens = jnp.asarray(case.context_lens, jnp.int32)
        yield CascadeData(
            case=case,
            paged=base._replace(q=base.q[: case.rows], block_tables=jnp.asarray(table), context_lens=lens),
            groups=CascadeGroups(*(jnp.asarray(array) for array in pad_groups(plan, num_groups))),
            read_alone_bytes=sum(case.context_lens) * heads.token_bytes,
            read_shared_bytes=tokens * heads.token_bytes,
            calls=calls,
        )


def _groups(case: CascadeCase, tables: np.ndarray, max_members: int, rule: CascadeRule) -> CascadeGroups:
    """The plan, or one without groups: what running the kernel costs where nothing is shared."""
    groups = plan_groups(tables, np.array(case.context_lens), case.heads.page_size, max_members, rule)
    if groups is not None:
        return groups
    none, nothing = np.zeros(0, np.int32), np.full((NUM_LEVELS, case.rows), -1, np.int32)
    members = np.full((0, max_members), -1, np.int32)
    return CascadeGroups(members, none, none, np.zeros(case.rows, np.int32), nothing)


def _tokens_read(case: CascadeCase, groups: CascadeGroups) -> int:
    alone = np.array(case.context_lens) - groups.own_starts
    return int(alone.sum() + groups.num_pages.sum() * case.heads.page_size)


def dense(data: PagedData) -> list[Cache]:
    """The same KV as rows [B, T, K, D], padded to the longest."""
    length = int(data.context_lens.max())
    rows = data.block_tables.shape[0]
    return [
        tuple(pages[data.block_tables].reshape(rows, -1, *pages.shape[2:])[:, :length] for pages in cache)
        for cache in data.caches
    ]
