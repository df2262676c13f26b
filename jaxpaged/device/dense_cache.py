"""The caches that paging is compared with: rows as long as a sequence may become, and none beyond a step.

A dense cache is a paged one whose page is as long as a sequence: the same fields, slot for slot the same bytes; only
the read differs. The host counts its memory in pages all the same: a row is a run of pages, so copies and block tables
are those of any cache (dense_rows.py), and a row is found by the first page of its table. NULL_PAGE has no row: what
padding writes is dropped.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from jaxpaged.config import DENSE_CACHES, AttentionOptions, CacheConfig, EngineConfig, ModelConfig, num_dense_rows
from jaxpaged.device import dense_attention
from jaxpaged.device.attention import AttentionKernels
from jaxpaged.device.cache import LayerArrays, PagedCache, make_paged_cache, write_split
from jaxpaged.device.heads import Heads
from jaxpaged.step_io import DecodeInputs, StepInputs

Array = jax.Array


@struct.dataclass
class DenseCache(LayerArrays):
    """One row a sequence.

    Attributes:
        k: keys, a tuple over layers of [rows, max_len, K, D].
        v: values, likewise.
        page_size: positions that the host counts as a page; max_len is a multiple of it. Static.
    """

    page_size: int = struct.field(pytree_node=False)

    def write(self, layer: int, k: Array, v: Array, slots: Array) -> Self:
        rows, max_len = self.k[layer].shape[:2]
        at = slots - self.page_size  # slot 0 of the pool is in NULL_PAGE, of the rows behind it
        index = jnp.where(at < 0, rows, at // max_len), at % max_len

        def written(pools: tuple[Array, ...], values: Array) -> tuple[Array, ...]:
            pool = pools[layer].at[index].set(values.astype(pools[layer].dtype), unique_indices=True, mode="drop")
            return (*pools[:layer], pool, *pools[layer + 1 :])

        return dataclasses.replace(self, k=written(self.k, k), v=written(self.v, v))

    def write_heads(self, layer: int, heads: Heads, slots: Array, kernels: AttentionKernels) -> tuple[Array, Self]:
        del kernels  # of pages
        return write_split(self, layer, heads, slots)

    def attend(
        self, layer: int, q: Array, inputs: StepInputs, options: AttentionOptions, kernels: AttentionKernels
    ) -> Array:
        k, v = self.k[layer], self.v[layer]
        rows = (inputs.block_tables[:, 0] - 1) // (k.shape[1] // self.page_size)  # -1 for padding
        with jax.named_scope("attention"):
            if isinstance(inputs, DecodeInputs):
                decode = dense_attention.decode_rows if kernels.dense == "cudnn" else dense_attention.decode_xla
                return decode(q, k, v, rows, inputs.context_lens, options)
            if kernels.dense == "cudnn":
                return dense_attention.prefill_rows(
                    q, lambda some: (k[some], v[some]), k.shape[1], rows, inputs, options
                )
            # Tiles of the queries that there are against tiles of what they may read, as over pages.
            return kernels.paged_prefill(
                q, self._as_pages(k), self._as_pages(v), jnp.maximum(inputs.block_tables - 1, 0), inputs.query_starts,
                inputs.query_lens, inputs.context_lens, **options._asdict(),
            )  # fmt: skip

    def copy_pages(self, src: Array, dst: Array, kernels: AttentionKernels) -> Self:
        del kernels  # the copy is XLA's own

        def copied(pool: Array) -> Array:
            pages = self._as_pages(pool)
            target = jnp.where(dst > 0, dst - 1, pages.shape[0])
            return pages.at[target].set(pages[jnp.maximum(src - 1, 0)], mode="drop").reshape(pool.shape)

        return jax.tree.map(copied, self)

    def _as_pages(self, pool: Array) -> Array:
        """[rows, max_len, K, D] -> [pages, S, K, D], the same bytes."""
        return pool.reshape(-1, self.page_size, *pool.shape[2:])


@struct.dataclass
class OneStepCache(LayerArrays):
    """Keys and values of one layer in one step: of the next layer they are others, and between steps there are none.

    Attributes:
        k: keys of the layer that attends, a tuple of one [T, K, D]; between layers and steps an empty one.
        v: values, likewise.
        max_len: tokens of a sequence at most. Static.
    """

    max_len: int = struct.field(pytree_node=False)

    def write(self, layer: int, k: Array, v: Array, slots: Array) -> Self:
        return dataclasses.replace(self, k=(k,), v=(v,))

    def write_heads(self, layer: int, heads: Heads, slots: Array, kernels: AttentionKernels) -> tuple[Array, Self]:
        del kernels  # of pages
        return write_split(self, layer, heads, slots)

    def kept(self) -> Self:
        return dataclasses.replace(self, k=(), v=())

    def attend(
        self, layer: int, q: Array, inputs: StepInputs, options: AttentionOptions, kernels: AttentionKernels
    ) -> Array:
        (k,), (v,) = self.k, self.v
        if isinstance(inputs, DecodeInputs):  # prompts of one token: each sees itself alone
            return jnp.repeat(v, q.shape[1] // v.shape[1], axis=1)
        starts, num_tokens = inputs.query_starts, len(q)
        with jax.named_scope("attention"):
            at = jnp.minimum(starts[:, None] + jnp.arange(self.max_len), num_tokens - 1)  # [B, max_len]
            if kernels.dense == "cudnn":
                rows = jnp.arange(len(starts))
                return dense_attention.prefill_rows(
                    q, lambda some: (k[at[some]], v[at[some]]), self.max_len, rows, inputs, options
                )
            # The step's own tokens are pages of one token, and the table of a sequence counts them.
            return kernels.paged_prefill(
                q, k[:, None], v[:, None], at.astype(jnp.int32), starts, inputs.query_lens, inputs.context_lens,
                **options._asdict(),
            )  # fmt: skip


def make_dense_cache(
    model: ModelConfig,
    cache: CacheConfig,
    max_model_len: int,
    device: jax.Device | jax.sharding.Sharding | None = None,
) -> DenseCache:
    """An empty dense cache (zeros) of as many rows as the usable pages of `cache` hold, rounded down."""
    max_len = -(-max_model_len // cache.page_size) * cache.page_size
    kv_heads = model.num_kv_heads * model.num_shards
    shape = (num_dense_rows(cache, max_model_len), max_len, kv_heads, model.head_dim)
    k, v = (tuple(jnp.zeros(shape, cache.dtype, device=device) for _ in range(model.num_layers)) for _ in "kv")
    return DenseCache(k, v, cache.page_size)


def make_cache(
    model: ModelConfig,
    cache: CacheConfig,
    limits: EngineConfig,
    device: jax.Device | jax.sharding.Sharding | None = None,
) -> PagedCache | DenseCache | OneStepCache:
    """The cache of the system that `limits.kv_cache` names, of a model or, on several devices, of all its shards."""
    if limits.kv_cache == "none":
        return OneStepCache((), (), limits.max_model_len)
    if limits.kv_cache in DENSE_CACHES:
        return make_dense_cache(model, cache, limits.max_model_len, device)
    return make_paged_cache(model, cache, device)
