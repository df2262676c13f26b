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
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring
from jax._src.config import trace_context  # the settings by which JAX itself tells programs apart; no public name

from jaxpaged.api.request_params import LogitsProcessor
from jaxpaged.device.lowering_workers import Jit
from jaxpaged.device.mesh import POOL, WHOLE, mesh_of, specs_of
from jaxpaged.device.processors import what_they_compute
from jaxpaged.device.step_files import StepName, made_or_read, step_name
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
    # XLA hands a kernel a part of an array in its place, if it begins at a multiple of 128 bytes; Mosaic's ask for 256.
    "xla_gpu_enable_dynamic_slice_fusion": False,
}

#: What jax reports, with the seconds, in the thread that has compiled something or read it from a file; and before
#: that, where it was read.
MADE, READ = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"

MAPS, MAPS_LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


@dataclasses.dataclass
class Kept:
    """A program, and when it was last used."""

    program: Program
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

    def find(self, key: Hashable, make: Callable[[], Program]) -> Program:
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                kept = self._kept[key] = Kept(make())
            self._use += 1
            kept.run, kept.use = self._run, self._use
        return kept.program

    def give_back_all(self) -> None:
        """Whatever is needed again is compiled again. `jax.clear_caches` knows nothing of these."""
        with self._lock:
            for kept in self._kept.values():
                kept.program.clear_cache()
            self._kept.clear()

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


class Program:
    """A step for one set of static arguments, one model and one size of the cache: compiled once for each form of its
    other arguments, by whichever thread comes first; who comes second waits."""

    def __init__(self, function: Callable[..., Any], jit: Jit, name: StepName | None, cache_index: int):
        self._jit = jit
        self._jitted = jit(function)
        self._name = name
        self._settings = trace_context()
        self._others = cache_index + 1
        self._forms: dict[Hashable, jax.stages.Compiled] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        compiled = self._forms.get(self._form(args))
        return (compiled or self.compile(args))(*args)

    def compile(self, args: tuple[Any, ...]) -> jax.stages.Compiled:
        """For arguments like these, of which shapes will do; nothing runs."""
        form = self._form(args)
        with self._lock:
            compiled = self._forms.get(form)
            if compiled is None:
                compiled = self._forms[form] = self._made(args)
        return compiled

    @property
    def is_for_here(self) -> bool:
        """Whether this thread has the settings by which it is to be made."""
        return trace_context() == self._settings

    def has(self, args: tuple[Any, ...]) -> bool:
        return self._form(args) in self._forms

    def lower(self, args: tuple[Any, ...]) -> jax.stages.Lowered:
        return self._jitted.lower(*args)

    def clear_cache(self) -> None:
        self._forms.clear()
        self._jitted.clear_cache()

    def _made(self, args: tuple[Any, ...]) -> jax.stages.Compiled:
        count, num_read = made_here()
        compiled, is_read = made_or_read(self._name, self._jit, self._jitted, args)
        PROGRAMS.note_made(made_here()[0] - count + is_read, made_here()[1] - num_read + is_read)
        return compiled

    def _form(self, args: tuple[Any, ...]) -> Hashable:
        """The parameters and the cache are the program's own; a step's other arguments are few."""
        return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args[self._others :]))


class ProgramToMake(NamedTuple):
    """A program of a step that may be needed, and what its arguments are like. Holds no array."""

    program: Program
    args: tuple[Any, ...]

    @property
    def is_there(self) -> bool:
        return self.program.has(self.args)

    def compile(self) -> jax.stages.Compiled:
        """Compile it, or read it, in this thread: whoever runs such a step finds it."""
        return self.program.compile(self.args)

    def compile_ahead(self) -> None:
        """The same in a thread of its own; nothing, if it has not the settings of who asked, where these are of one
        thread alone (`with jax.default_matmul_precision(...)`)."""
        if self.program.is_for_here:
            self.compile()

    def lower(self) -> jax.stages.Lowered:
        return self.program.lower(self.args)


class Step:
    """A function that runs on the device, as programs: one for each set of keyword arguments and each size of `cache`.

    Called, and lowered, as `jax.jit` of the function would be, with all keyword arguments static. Where its arrays lie
    on a mesh, each device runs it on its own part of them; `divided` says how the results lie there.
    """

    def __init__(self, function: Callable[..., Any], divided: Any, donates_cache: bool):
        self.function = function
        self._divided = divided
        self._cache_index = list(inspect.signature(function).parameters).index("cache")
        donated = self._cache_index if donates_cache else ()
        self._jit = functools.partial(jax.jit, donate_argnums=donated, compiler_options=XLA_OPTIONS)
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **static: Any) -> Any:
        return self._program(args, static)(*args)

    def lower(self, *args: Any, **static: Any) -> jax.stages.Lowered:
        return self._program(args, static).lower(args)

    def to_make(self, *args: Any, **static: Any) -> ProgramToMake:
        """The program for such arguments, to be compiled in whichever thread."""
        return ProgramToMake(self._program(args, static), jax.tree.map(_like, args))

    def _program(self, args: tuple[Any, ...], static: dict[str, Any]) -> Program:
        values = dict(static)
        if processors := values.get("processors"):
            values["processors"] = PROGRAMS.computation_of(processors, static["layout"], static["config"].vocab_size)
        pool = jax.tree.leaves(args[self._cache_index])[:1]
        mesh = mesh_of((pool or jax.tree.leaves(args[0]))[0])
        params = tuple(shapes_of(each) for each in args[: self._cache_index])
        lies = (getattr(leaf, "sharding", None) for leaf in pool)  # a program is for these devices alone
        settings = trace_context()
        key = (
            self.function,
            params,
            tuple(sorted(values.items())),
            settings,
            *((x.shape, x.dtype) for x in pool),
            *lies,
        )
        return PROGRAMS.find(key, lambda: self._made(args, static, mesh))

    def _made(self, args: tuple[Any, ...], static: dict[str, Any], mesh: jax.sharding.Mesh | None) -> Program:
        """With a function of its own: jax keeps together what it compiled of one function, and this is to go alone."""
        function = functools.partial(self.function, **static)
        name = step_name(self.function, static, is_divided=mesh is not None)
        if mesh is not None:
            # Not checked: kernels do not say which of their results are the same on all devices.
            function = jax.shard_map(
                function, mesh=mesh, in_specs=tuple(map(specs_of, args)), out_specs=self._divided, check_vma=False
            )
        return Program(function, self._jit, name, self._cache_index)


def _like(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)  # numpy's have none
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


class Shapes:
    """What programs must know of parameters, by the object, which is asked in every step and has hundreds of leaves."""

    def __init__(self):
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._lock = threading.Lock()

    def __call__(self, params: Any) -> int:
        """A number: the same one for parameters of the same shapes in the same places."""
        found = self._known.get(id(params))
        if found is not None:
            return found[1]
        leaves, tree = jax.tree.flatten(params)
        shapes = tree, *((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)
        with self._lock:  # engines in several threads
            number = self._numbers.setdefault(shapes, len(self._numbers))
        self._known[id(params)] = weakref.ref(params, functools.partial(self._forget, id(params))), number
        return number

    def _forget(self, known: int, _reference: weakref.ref[Any]) -> None:
        self._known.pop(known, None)


shapes_of = Shapes()


def takes_cache(function: Callable[..., Any], divided: Any = (WHOLE, POOL)) -> Step:
    """A step that takes its cache by donation; by default one that gives results, and the new cache."""
    return Step(function, divided, donates_cache=True)


def reads_cache(function: Callable[..., Any], divided: Any = WHOLE) -> Step:
    return Step(function, divided, donates_cache=False)
