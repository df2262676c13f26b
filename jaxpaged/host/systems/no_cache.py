"""Without a cache: keys and values live for one step, and the next one computes those of all tokens again.

What a request needs instead of memory is room in the step, which takes `max_num_batched_tokens`: a step has all running
sequences, whole, so each has its full length reserved there when its request is admitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxpaged.config import CacheConfig, EngineConfig
from jaxpaged.host.pages.block_table import BlockTable, PageCopy
from jaxpaged.host.pages.page_allocator import PageAllocator
from jaxpaged.host.pages.token_tree import SequencePlacement
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.host.systems.roles import LeavesAtOnce


class NoCache(LeavesAtOnce):
    """Tables stay empty, and the pool stays free."""

    shares_pages = False
    requested_slots = 0
    hindsight = None
    window = None

    def __init__(self, cache: CacheConfig, limits: EngineConfig):
        self.page_size = cache.page_size
        self.allocator = PageAllocator(cache.num_pages, cache.page_size)
        self.max_step_tokens = limits.max_num_batched_tokens
        self._step_tokens: dict[SequenceGroup, int] = {}  # that each group may come to need

    def check(self, prompt_len: int, num_samples: int, max_len: int, prefix_len: int = 0) -> None:
        needed = num_samples * _tokens_at_most(prompt_len, max_len)
        if needed > self.max_step_tokens:
            raise ValueError(
                f"prompt of {prompt_len} tokens with {num_samples} sample(s) of up to {max_len - prompt_len} tokens: "
                f"without a cache one step computes all of them, up to {needed} tokens, but "
                f"max_num_batched_tokens={self.max_step_tokens}: raise it, or lower max_tokens or n"
            )

    def try_place(self, group: SequenceGroup, placements: list[SequencePlacement], headroom: Callable[[], int]) -> bool:
        needed = group.num_rows * _tokens_at_most(group.prompt_len, group.max_len)
        if sum(self._step_tokens.values()) + needed > self.max_step_tokens:
            return False
        self._step_tokens[group] = needed
        return True

    def fork(self, table: BlockTable) -> BlockTable:
        return BlockTable()

    def refork(self, table: BlockTable, parent: BlockTable) -> tuple[int, int]:
        return 0, 0

    def append(self, tables: list[BlockTable], counts: list[int]) -> list[PageCopy]:
        raise AssertionError("nothing is appended where nothing is kept")

    def release(self, table: BlockTable) -> int:
        return 0

    def settle(self, group: SequenceGroup) -> None:
        if group.num_rows:
            self._step_tokens[group] = group.num_rows * _tokens_at_most(group.prompt_len, group.max_len)
        else:
            self._step_tokens.pop(group, None)

    def take_copies(self) -> list[PageCopy]:
        return []

    def check_invariants(self, tables: Iterable[BlockTable]) -> None:
        """No page is held."""
        assert not self.allocator.num_used and not any(table.pages for table in tables)


def _tokens_at_most(prompt_len: int, max_len: int) -> int:
    """Tokens of a sequence that a step computes: all but the last, whose successor nobody asks for."""
    return max(prompt_len, max_len - 1)
