"""Which policy keeps the KV memory of each system in `config.KV_CACHES`."""

from __future__ import annotations

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.pages.window import PageWindow
from jaxpaged.host.systems.contiguous import ESTIMATES, Contiguous, estimate_max
from jaxpaged.host.systems.dense_rows import RowAllocator, StaticBatches
from jaxpaged.host.systems.no_cache import NoCache
from jaxpaged.host.systems.reservation import Paged
from jaxpaged.host.systems.roles import Policy


def make_policy(cache: CacheConfig, limits: EngineConfig, allocator: PageAllocator | None = None) -> Policy:
    """`allocator`: all pages of a pool, free, of which some are known; by default those of a new one.

    Raises ValueError, with the numbers, for a pool in which no sequence of a dense cache fits."""
    match limits.kv_cache:
        case "paged":
            allocator = allocator or PageAllocator(cache.num_pages, cache.page_size, limits.prefix_caching)
            window = None
            if cache.window is not None and cache.window < limits.max_model_len:
                window = PageWindow(cache.window, limits.max_num_batched_tokens, allocator)
            return Paged(cache, allocator, window)
        case "none":
            return NoCache(cache, limits)
        case "dense":
            rows = RowAllocator(cache, limits.max_model_len)
            return Contiguous(cache, limits.max_model_len, estimate_max, rows)
        case "dense-static" | "dense-static-global":
            return StaticBatches(cache, limits, to_longest_of_all=limits.kv_cache == "dense-static-global")
        case _:
            return Contiguous(cache, limits.max_model_len, ESTIMATES[limits.kv_cache])
