"""Pages that are known by their tokens, so that a later sequence which begins with the same ones need not compute them.

A full page is known by a hash of its tokens and of the hash of the page before it, so by all tokens up to its end: keys
and values depend on nothing else within one pool and one set of weights. (Where the weights change, all is forgotten.)
The first hash of a chain stands on a number that is drawn for each pool, so nobody can prepare two texts of one hash.

A page stays known when no table holds it any more. It rests then: its contents stand until it is given up for others
to write to, the page that has rested longest first. A table gives its last pages back first, so of a chain the end is
given up before the beginning, without which the end could not be found.

What is here are books alone. Whose tokens are known, and when they may be found, is `known_pages.py`'s business.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b

from jaxpaged.step_io import NULL_PAGE

#: Bytes of a hash: among 2**40 pages, two of one hash are less likely than 1 in 2**48.
HASH_BYTES = 16


class PrefixCache:
    """Which page holds what, of the pages that are known; and which of them rest."""

    def __init__(self, page_size: int, is_on: bool):
        """`is_on`: else no page is ever known."""
        self.page_size = page_size
        self.is_on = is_on
        self.hashes: dict[int, bytes] = {}  # of each known page
        self.resting: dict[int, None] = {}  # known pages that nobody holds, in the order in which they are given up
        self._pages: dict[bytes, int] = {}
        self._root = os.urandom(HASH_BYTES)

    def find(self, token_ids: array, chain: list[bytes], most: int) -> list[int]:
        """The pages of the first full pages of these int32 tokens, as far as all are known, `most` at most.

        `chain` has the hashes of these pages, as far as somebody asked, and is added to.
        """
        found: list[int] = []
        if not self.is_on:
            return found
        self._extend(chain, token_ids, most)
        for one in chain[:most]:
            page_id = self._pages.get(one)
            if page_id is None:
                break
            found.append(page_id)
        return found

    def find_last(self, token_ids: array, chain: list[bytes], most: int, num_unread: Callable[[int], int]) -> list[int]:
        """As `find`, for a sequence that reads its last pages alone: NULL_PAGE for those that it does not read.

        As many pages as can be gone on behind: `num_unread(position)` first ones are not read from a position on, and
        whether these are known does not matter.
        """
        if not self.is_on:
            return []
        self._extend(chain, token_ids, most)
        pages = [self._pages.get(one, NULL_PAGE) for one in chain[:most]]
        best = run = 0  # pages; and of these the last ones that are known
        for count, page_id in enumerate(pages, 1):
            run = run + 1 if page_id != NULL_PAGE else 0
            if run >= count - num_unread(count * self.page_size):
                best = count
        unread = num_unread(best * self.page_size)
        return [NULL_PAGE] * unread + pages[unread:best]

    def add(self, page_ids: Sequence[int], token_ids: array, chain: list[bytes], start: int, stop: int) -> None:
        """Pages `start` to `stop` of a table that holds these tokens are full: from now on they can be found.

        What is known already by another page stays with that one. NULL_PAGE stands for pages that are gone.
        """
        if not self.is_on:
            return
        self._extend(chain, token_ids, stop)
        for i in range(start, stop):
            page_id, one = page_ids[i], chain[i]
            if page_id != NULL_PAGE and page_id not in self.hashes and one not in self._pages:
                self.hashes[page_id] = one  # first: wherever an interrupt comes, what can be found is in both
                self._pages[one] = page_id

    def forget(self, page_id: int) -> None:
        """The page will hold other tokens."""
        one = self.hashes.get(page_id)
        if one is not None:
            self._pages.pop(one, None)
            del self.hashes[page_id]

    def forget_all(self) -> list[int]:
        """Returns the pages that rested, in the order in which they would have been given up."""
        rested = list(self.resting)
        for books in (self.hashes, self.resting, self._pages):
            books.clear()
        return rested

    def give_up(self) -> int:
        """Forget the page that has rested longest; there must be one."""
        page_id = next(iter(self.resting))
        del self.resting[page_id]
        self.forget(page_id)
        return page_id

    def check_invariants(self) -> None:
        assert {page_id: one for one, page_id in self._pages.items()} == self.hashes, "a page is known by two hashes"
        assert self.resting.keys() <= self.hashes.keys(), "a page rests that is not known"

    def _extend(self, chain: list[bytes], token_ids: array, count: int) -> None:
        if len(chain) >= count:
            return
        size = self.page_size
        raw, step = token_ids.tobytes(), size * token_ids.itemsize
        before = chain[-1] if chain else self._root
        for at in range(len(chain) * step, count * step, step):
            before = blake2b(before + raw[at : at + step], digest_size=HASH_BYTES).digest()
            chain.append(before)
