"""Compiled programs: keyed by what they compute, so many kept, and those not used for longest given back.

Linux gives a process 65,530 memory maps, and XLA takes about a hundred of them for each program that runs on the CPU.
What jax has compiled it keeps as long as the function is there, so a process that asks for ever new programs (a logits
processor made in each call) would end in a crash. Here every program has a function of its own, and goes with it.

What a run in progress has used is not given back; what it needs and is gone is compiled again.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

from jaxpaged.api.request_params import LogitsProcessor
from jaxpaged.device.processors import what_they_compute
from jaxpaged.step_io import Layout

#: Programs kept at most. All that a run can need, with default limits, are some 85 on a CPU, and on a GPU, for a long
#: model, a few hundred.
MAX_PROGRAMS = 512
#: Of the memory maps that the process may have: all programs of some four kinds of requests on a CPU.
MAPS_SHARE = 0.5
#: Programs given back before maps are counted again, which takes milliseconds.
GIVEN_BACK_AT_ONCE = 8

#: Matrix products are cuBLAS's alone. XLA would time kernels of its own beside these, half a second for each product,
#: and take some where in a step they are the slower ones: measured on an H200 with the products of an 8B model, 132 us
#: a layer for 64 tokens in place of 115, and 182 in place of 172 for 256; for 8 tokens both take 112.
XLA_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    # XLA takes pages that are written in place for memory of their own, finds that a step exceeds the device, and looks
    # for what it could compute twice to save memory. What a step really takes is measured before the pool is made.
    "xla_gpu_memory_limit_slop_factor": 1000,
}

#: What jax reports, with the seconds, in the thread that has compiled something or read it from a file; and before
#: that, where it was read.
MADE, READ = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"

MAPS, MAPS_LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


@dataclasses.dataclass
class Kept:
    """A program, and when it was last used."""

    program: Any  # a jitted function
    run: int = 0
    use: int = 0


class Programs:
    """The programs of a process."""

    def __init__(self):
        self.max_programs = MAX_PROGRAMS
        self.max_maps = default_max_maps()
        self.num_made = 0  # ever, compiled or read from a file; what was given back counts
        self.num_read = 0  # of these
        self._kept: dict[Hashable, Kept] = {}
        self._run = 0
        self._use = 0
        #: Of logits processors in this run, which stand for their identity, by sizes.
        self._computations: dict[Hashable, tuple[tuple[LogitsProcessor, ...], Hashable]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def begin_run(self) -> None:
        """From here on programs that are used are kept, and processors are looked at again: they may have changed."""
        self._run += 1
        self._computations = {}

    def find(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                kept = self._kept[key] = Kept(make())
            self._use += 1
            kept.run, kept.use = self._run, self._use
        return kept.program

    def computation_of(self, processors: tuple[LogitsProcessor, ...], layout: Layout, vocab_size: int) -> Hashable:
        known, key = self._computations, (*map(id, processors), layout, vocab_size)
        if key not in known:
            known[key] = processors, what_they_compute(processors, layout, vocab_size)
        return known[key][1]

    def note_made(self, count: int, num_read: int) -> None:
        with self._lock:
            self.num_made += count
            self.num_read += num_read
            self._make_room()

    def _make_room(self) -> None:
        while len(self._kept) > self.max_programs or self._has_many_maps():
            old = [key for key, kept in self._kept.items() if kept.run != self._run]
            if not old:
                return
            for key in sorted(old, key=lambda key: self._kept[key].use)[:GIVEN_BACK_AT_ONCE]:
                self._kept.pop(key).program.clear_cache()

    def _has_many_maps(self) -> bool:
        return self.max_maps is not None and num_maps() > self.max_maps


def num_maps() -> int:
    """Memory maps of this process."""
    with MAPS.open("rb") as lines:
        return sum(1 for _ in lines)


def default_max_maps() -> int | None:
    """None where there is no such limit, or none that can be read."""
    if not (MAPS.exists() and MAPS_LIMIT.exists()):
        return None
    return int(int(MAPS_LIMIT.read_text()) * MAPS_SHARE)


PROGRAMS = Programs()


class MadeHere(threading.local):
    """What this thread has compiled or read: jax does it in the thread that calls."""

    count = 0
    num_read = 0


_made_here = MadeHere()


def _note_made(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == MADE:
        _made_here.count += 1


def _note_read(event: str, **kwargs: str | int) -> None:
    if event == READ:
        _made_here.num_read += 1


jax.monitoring.register_event_duration_secs_listener(_note_made)
jax.monitoring.register_event_listener(_note_read)


def made_here() -> tuple[int, int]:
    """Programs that this thread has compiled or read, ever, and those that it has read."""
    return _made_here.count, _made_here.num_read


class Step:
    """A function that runs on the device, as programs: one for each set of keyword arguments and each size of `cache`.

    Called, and lowered, as `jax.jit` of the function would be, with all keyword arguments static.
    """

    def __init__(self, function: Callable[..., Any], donates_cache: bool):
        self._function = function
        self._donated = "cache" if donates_cache else None
        self._cache_index = list(inspect.signature(function).parameters).index("cache")
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **static: Any) -> Any:
        program = self._program(args, static)
        count, num_read = made_here()
        results = program(*args)
        if made := _made_here.count - count:
            PROGRAMS.note_made(made, _made_here.num_read - num_read)
        return results

    def lower(self, *args: Any, **static: Any) -> jax.stages.Lowered:
        return self._program(args, static).lower(*args)

    def _program(self, args: tuple[Any, ...], static: dict[str, Any]) -> Any:
        values = dict(static)
        if processors := values.get("processors"):
            values["processors"] = PROGRAMS.computation_of(processors, static["layout"], static["config"].vocab_size)
        pool = jax.tree.leaves(args[self._cache_index])[:1]
        key = (self._function, tuple(sorted(values.items())), *((leaf.shape, leaf.dtype) for leaf in pool))
        return PROGRAMS.find(key, lambda: self._jitted(static))

    def _jitted(self, static: dict[str, Any]) -> Any:
        """A function of its own: jax keeps together what it compiled of one function, and this is to go alone."""
        function = functools.partial(self._function, **static)
        return jax.jit(function, donate_argnames=self._donated, compiler_options=XLA_OPTIONS)


def takes_cache(function: Callable[..., Any]) -> Step:
    """A step that takes its cache by donation."""
    return Step(function, donates_cache=True)


def reads_cache(function: Callable[..., Any]) -> Step:
    return Step(function, donates_cache=False)
