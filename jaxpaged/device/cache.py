"""Where keys and values live: a pool of pages, or rows as long as a sequence.

Both are pytrees with one array a layer for K and one for V, replaced by every step (and donated to it, so updated in
place). A dense cache is a paged one whose page is as long as a sequence: the same fields, the same write; only the read
differs.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, Self

import jax
import jax.numpy as jnp

from jaxpaged.config import AttentionOptions, CacheConfig, ModelConfig
from jaxpaged.device.attention import AttentionKernels
from jaxpaged.step_io import DecodeInputs, PrefillInputs

Array = jax.Array


class KVCache(Protocol):
    """What a step needs of a cache."""

    def write(self, layer: int, k: Array, v: Array, slots: Array) -> Self:
        """Scatter new k, v [T, K, D] to slots i32[T]."""
        ...

    def attend(
        self,
        layer: int,
        q: Array,
        inputs: DecodeInputs | PrefillInputs,
        options: AttentionOptions,
        kernels: AttentionKernels,
    ) -> Array:
        """q [T, H, D] against what the rows of `inputs` may read -> [T, H, D]."""
        ...

    def copy_pages(self, src: Array, dst: Array, kernels: AttentionKernels) -> Self:
        """Copy whole pages src i32[C] to dst i32[C], in every layer."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """The page pool: k and v are tuples over layers of [N, S, K, D]."""

    k: tuple[Array, ...]
    v: tuple[Array, ...]

    def write(self, layer: int, k: Array, v: Array, slots: Array) -> Self:
        return dataclasses.replace(self, k=_written(self.k, layer, k, slots), v=_written(self.v, layer, v, slots))

    def attend(
        self,
        layer: int,
        q: Array,
        inputs: DecodeInputs | PrefillInputs,
        options: AttentionOptions,
        kernels: AttentionKernels,
    ) -> Array:
        with jax.named_scope("attention"):
            if isinstance(inputs, DecodeInputs):
                if inputs.prefix_groups is not None and options.sliding_window is None:
                    assert kernels.shared_prefix_decode is not None, f"{kernels.name} reads no shared prefixes"
                    return kernels.shared_prefix_decode(
                        q, self.k[layer], self.v[layer], inputs.block_tables, inputs.context_lens,
                        inputs.prefix_groups, scale=options.scale, soft_cap=options.soft_cap,
                    )  # fmt: skip
                return kernels.paged_decode(
                    q, self.k[layer], self.v[layer], inputs.block_tables, inputs.context_lens, **options._asdict()
                )
            return kernels.paged_prefill(
                q, self.k[layer], self.v[layer], inputs.block_tables, inputs.query_starts, inputs.query_lens,
                inputs.context_lens, **options._asdict(),
            )  # fmt: skip

    def copy_pages(self, src: Array, dst: Array, kernels: AttentionKernels) -> Self:
        pools, num_layers = kernels.copy_pages((*self.k, *self.v), src, dst), len(self.k)
        return dataclasses.replace(self, k=pools[:num_layers], v=pools[num_layers:])

    def gather_pages(self, page_ids: Array) -> Array:
        """Pages i32[C] of all layers, keys and then values: [2 * layers, C, S, K, D]."""
        return jnp.stack([pool.at[page_ids].get(mode="promise_in_bounds") for pool in (*self.k, *self.v)])

    def scatter_pages(self, page_ids: Array, pages: Array) -> Self:
        """The reverse of `gather_pages`; page_ids are unique."""
        leaves = [
            pool.at[page_ids].set(pages[i], unique_indices=True, mode="promise_in_bounds")
            for i, pool in enumerate((*self.k, *self.v))
        ]
        return dataclasses.replace(self, k=tuple(leaves[: len(self.k)]), v=tuple(leaves[len(self.k) :]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache(PagedCache):
    """One row a sequence: k and v are tuples over layers of [rows, max_len, K, D]. Decodes only.

    A row's "block table" has the one entry that names it.
    """

    def attend(
        self,
        layer: int,
        q: Array,
        inputs: DecodeInputs | PrefillInputs,
        options: AttentionOptions,
        kernels: AttentionKernels,
    ) -> Array:
        del kernels  # the read is XLA's own
        assert isinstance(inputs, DecodeInputs), "a dense cache decodes only"
        k, v = self.k[layer][inputs.block_tables[:, 0]], self.v[layer][inputs.block_tables[:, 0]]
        rows, length, kv_heads, head_dim = k.shape
        keys_at = jnp.arange(length)
        readable = keys_at < inputs.context_lens[:, None]
        v = jnp.where(readable[:, :, None, None], v, 0)
        if options.sliding_window is not None:
            readable &= keys_at >= inputs.context_lens[:, None] - options.sliding_window
        grouped = q.reshape(rows, kv_heads, -1, head_dim)
        scores = jnp.einsum("bkgd,bskd->bkgs", grouped, k, precision="highest", preferred_element_type=jnp.float32)
        scores = scores * options.scale
        if options.soft_cap is not None:
            scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
        weights = jax.nn.softmax(jnp.where(readable[:, None, None], scores, -1e30), axis=-1)
        out = jnp.einsum("bkgs,bskd->bkgd", weights, v.astype(jnp.float32), precision="highest")
        return out.reshape(q.shape).astype(q.dtype)


def _written(pools: tuple[Array, ...], layer: int, values: Array, slots: Array) -> tuple[Array, ...]:
    """Scatter into one layer's array; in place when the caller donated it.

    Slots are unique but for padding rows, which all hit NULL_PAGE: which of them wins does not matter, nothing reads
    it.
    """
    pool = pools[layer]
    page_size = pool.shape[1]
    written = pool.at[slots // page_size, slots % page_size].set(
        values.astype(pool.dtype), unique_indices=True, mode="promise_in_bounds"
    )
    return (*pools[:layer], written, *pools[layer + 1 :])


def make_paged_cache(model: ModelConfig, cache: CacheConfig, device: jax.Device | None = None) -> PagedCache:
    """An empty pool (zeros: what a page held before must never be a NaN) on the device."""
    shape = (cache.num_pages, cache.page_size, model.num_kv_heads, model.head_dim)

    def pools() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, cache.dtype, device=device) for _ in range(model.num_layers))

    return PagedCache(pools(), pools())


def make_dense_cache(model: ModelConfig, num_rows: int, max_len: int, dtype: str) -> DenseCache:
    """An empty dense cache of `num_rows` sequences."""
    shape = (num_rows, max_len, model.num_kv_heads, model.head_dim)
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(model.num_layers)) for _ in "kv")
    return DenseCache(k, v)
