"""Who has the page pool: one run, tree or other call at a time. Who comes second is refused at once, and not queued.

A second run beside an open one would write to its pages, so owning is not a courtesy: every way into the engine takes
the pool first, and what is refused has changed nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Runs that stand still between two results, so that it is their caller who must go on.
ITERATORS = ("generate_iter", "agenerate", "watch_beams", "Engine.run")
TREE = "tree"


class Hold:
    """One claim, which counts by its identity."""

    __slots__ = ("who",)

    def __init__(self, who: str):
        self.who = who


class Ownership:
    """At most one `with ownership.held(who)` block is entered at a time, in whichever thread.

    `refusal` says to another why not, given who has it. With `after_fork`, it can be had in this process alone, and
    that is what a child is told.
    """

    def __init__(self, refusal: Callable[[str], str], after_fork: str | None = None):
        self._refusal = refusal
        self._after_fork = after_fork
        self._process = os.getpid()
        self._holds: dict[str, Hold] = {}  # none, or the one

    @contextmanager
    def held(self, who: str, hold: Hold | None = None) -> Iterator[Hold]:
        """Own it within the block; or, given the `hold` of a caller who owns it already, make sure of that.

        Being a generator, it ends with whoever forgets it: a run that is dropped leaves nothing behind, whatever
        thread drops it.
        """
        self.check_process()
        if hold is not None:
            self._check_held(hold)
            yield hold
            return
        hold = Hold(who)
        try:
            # One atomic call; between a lock's `acquire` and a note of who has it, Control-C could come.
            owner = self._holds.setdefault("owner", hold)
            if owner is not hold:
                raise RuntimeError(self._refusal(owner.who))
            yield hold
        finally:
            if self._holds.get("owner") is hold:
                del self._holds["owner"]

    def check_process(self) -> None:
        """RuntimeError in a child that was forked."""
        if self._after_fork is not None and os.getpid() != self._process:
            raise RuntimeError(self._after_fork)

    def _check_held(self, hold: Hold) -> None:
        owner = self._holds.get("owner")
        if owner is not hold:
            raise RuntimeError(f"{hold.who} has given this back" if owner is None else self._refusal(owner.who))


def pool_ownership() -> Ownership:
    return Ownership(
        _pool_refusal,
        "this process was forked from the one that made the LLM, and JAX does not work behind a fork: make the LLM in "
        "the child, or start it with multiprocessing's 'spawn'",
    )


def _pool_refusal(who: str) -> str:
    if who == TREE:
        return "a tree is open and owns the page pool: close it first"
    if who in ITERATORS:
        return (
            f"another run is in progress ({who}) and owns the page pool: take all its results, or close its "
            "iterator, first"
        )
    return f"another call is in progress ({who}) and owns the page pool: wait until it has returned"
