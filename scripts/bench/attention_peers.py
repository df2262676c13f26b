"""Other implementations of attention, behind one interface: what the project's kernels are compared with.

A function that prepares one takes a case and its paged data, and returns candidates, of which the fastest counts. Where
an implementation is not installed or cannot run a case, it raises NotHere and says why.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from attention_cases import Cache, DecodeCase, PagedData, PrefillCase, dense
from device_timing import Program, chained

Array = jax.Array


class NotHere(Exception):
    """Why an implementation cannot run a case here."""


class Candidate(Protocol):
    """One way to run a case."""

    @property
    def setting(self) -> str: ...

    def output(self) -> Array:
        """Of one call over the first cache, in the shape of the queries."""
        ...

    def program(self, calls: int) -> Program: ...


class JaxCandidate(NamedTuple):
    """attend(q, *cache, *args) -> output in the shape of q."""

    attend: Callable[..., Array]
    q: Array
    caches: list[Cache]
    args: tuple[Any, ...]
    setting: str = ""

    def output(self) -> Array:
        return jax.jit(self.attend)(self.q, *self.caches[0], *self.args)

    def program(self, calls: int) -> Program:
        run = chained(self.attend, calls)
        return Program(lambda q: run(q, self.caches, *self.args), self.q, calls)


def decode_triton(case: DecodeCase, data: PagedData) -> Sequence[Candidate]:
    """The paged op that JAX ships (Pallas Triton, deprecated), at the best of a few settings."""
    _require_gpu()
    op = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention").paged_attention
    caches = [tuple(pages.transpose(2, 0, 1, 3) for pages in cache) for cache in data.caches]
    rows, width = data.block_tables.shape
    balanced = 2 ** max(0, round(math.log2(2048 / (rows * case.heads.num_kv_heads))))  # about 2048 programs
    candidates = []
    for splits in sorted({16, balanced}):
        pages = min(8, 2 ** int(math.log2(max(1, width / splits))))
        tables = jnp.pad(data.block_tables, ((0, 0), (0, -width % (splits * pages))))

        def attend(q, k, v, tables, lens, splits=splits, pages=pages):
            return op(q * case.heads.scale, k, v, tables, lens, k_splits=splits, pages_per_compute_block=pages)

        setting = f"{splits} splits, {pages} pages"
        candidates.append(JaxCandidate(attend, data.q, caches, (tables, data.context_lens), setting))
    return candidates


def decode_cudnn(case: DecodeCase, data: PagedData) -> Sequence[Candidate]:
    """cuDNN over a dense cache: what reading pages is compared with."""
    _require_gpu()

    def attend(q, k, v, lens):
        return jax.nn.dot_product_attention(
            q[:, None], k, v, scale=case.heads.scale, key_value_seq_lengths=lens, implementation="cudnn"
        )[:, 0]

    return [JaxCandidate(attend, data.q, dense(data), (data.context_lens,), "dense")]


def prefill_cudnn(case: PrefillCase, data: PagedData) -> Sequence[Candidate]:
    """cuDNN over dense keys and values."""
    _require_gpu()
    if case.cached:
        raise NotHere("JAX gives cuDNN's causal mask top-left aligned only: wrong behind cached tokens")

    def attend(q, k, v):
        rows = q.reshape(case.rows, case.new, *q.shape[1:])
        out = jax.nn.dot_product_attention(rows, k, v, scale=case.heads.scale, is_causal=True, implementation="cudnn")
        return out.reshape(q.shape)

    return [JaxCandidate(attend, data.q, dense(data), (), "dense")]


def decode_fa3(case: DecodeCase, data: PagedData) -> Sequence[Candidate]:
    return [_flash_attention_3(data, 1, max(case.context_lens), case.heads.scale)]


def prefill_fa3(case: PrefillCase, data: PagedData) -> Sequence[Candidate]:
    return [_flash_attention_3(data, case.new, case.new + case.cached, case.heads.scale)]


def _require_gpu() -> None:
    if jax.default_backend() != "gpu":
        raise NotHere(f"needs a GPU, this is {jax.devices()[0].device_kind}")


class TorchCandidate(NamedTuple):
    """attend(q, *cache) -> output in the shape of q, on torch tensors that share the memory of JAX's arrays."""

    torch: Any
    attend: Callable[..., Any]
    q: Any
    caches: list[tuple[Any, ...]]
    setting: str

    def output(self) -> Array:
        return jnp.from_dlpack(self.attend(self.q, *self.caches[0]).contiguous())

    def program(self, calls: int) -> Program:
        """The same chain of calls as a CUDA graph, so that torch's launches cost nothing."""
        cuda = self.torch.cuda

        def run() -> None:
            q = self.q
            for call in range(calls):
                q = q + self.attend(q, *self.caches[call % len(self.caches)]) * 2**-10

        with cuda.stream(cuda.Stream()):  # what a first call allocates must not become part of the graph
            run()
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            run()
        return Program(lambda _: graph.replay(), None, calls, wait=lambda _: cuda.synchronize())


def _flash_attention_3(data: PagedData, new: int, longest: int, scale: float) -> Candidate:
    """FlashAttention-3 over the same pages: `new` queries for each row, the last ones of its context."""
    _require_gpu()
    torch, name, library = _import_flash_attention_3()
    q, tables, lens = (torch.from_dlpack(array) for array in (data.q, data.block_tables, data.context_lens))
    caches = [tuple(torch.from_dlpack(pages) for pages in cache) for cache in data.caches]
    rows = tables.shape[0]
    starts = torch.arange(0, rows * new + 1, new, dtype=torch.int32, device=q.device)

    def with_kvcache(q, k, v):
        out = library.flash_attn_with_kvcache(
            q.reshape(rows, new, *q.shape[1:]), k, v,
            cache_seqlens=lens, page_table=tables, softmax_scale=scale, causal=True,
        )  # fmt: skip
        return out.reshape(q.shape)

    def varlen(q, k, v):
        return library.flash_attn_varlen_func(
            q, k, v, max_seqlen_q=new, cu_seqlens_q=starts, max_seqlen_k=longest, seqused_k=lens,
            softmax_scale=scale, causal=True, block_table=tables, fa_version=3,
        )  # fmt: skip

    attend = varlen if name.startswith("vllm") else with_kvcache  # vllm's own with_kvcache is of FlashAttention-2
    return TorchCandidate(torch, attend, q, caches, name)


def _import_flash_attention_3() -> tuple[Any, str, Any]:
    reasons = []
    for name in ("flash_attn_interface", "vllm.vllm_flash_attn"):
        try:
            return importlib.import_module("torch"), name, importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise NotHere("; ".join(reasons))
