"""Processes that trace and lower steps, since Python does one of these at a time and a step takes it seconds.

Most of that is what Mosaic computes for the Pallas kernels. A worker has no device: it gets shapes and static
arguments, and answers with the program's text (`jax.export`), which this process compiles. Whatever goes wrong there
is done here instead, so a worker can only save time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
from jax import export

from jaxpaged.device.attention import AttentionKernels

logger = logging.getLogger("jaxpaged")

#: Cores of a machine for each worker, and workers at most: the compiler's threads need cores, too.
CORES_EACH, MAX_WORKERS = 2, 8
#: Programs that are wanted from which on workers are worth their start, which takes some three seconds.
FROM_PROGRAMS = 3
#: Calls in a step's text that JAX cannot promise to keep for years: text and compiler are of one version here.
CALLS = tuple(map(export.DisabledSafetyCheck.custom_call, ("mosaic_gpu_v2", "mosaic_gpu", "annotate_device_placement")))
#: Settings of JAX that change no program, and where they are of this process alone, must not change its name.
NO_MATTER = ("cache", "log_", "logging", "traceback", "profiler", "distributed", "coordination", "coordinator", "dump")
SIZE_BYTES = 8

Jit = Callable[[Callable[..., Any]], Any]
Lowered = jax.stages.Lowered | None

WORKER = Path(__file__).with_name("lowering_worker.py")


class Task(NamedTuple):
    """A step to be lowered, as it is sent: all of it can be pickled, and nothing is on a device."""

    module: str
    function: str
    static: dict[str, Any]  # kernels by name
    args: tuple[Any, ...]  # shapes
    platform: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, function: Callable[..., Any], static: dict[str, Any], args: tuple[Any, ...]) -> Task:
        platform = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
        by_name = {name: KernelsByName.of(value) for name, value in static.items()}
        settings = settings_that_matter()
        return cls(function.__module__, function.__name__, by_name, shapes, platform, settings)


class KernelsByName(NamedTuple):
    """Kernels as another process finds them."""

    name: str
    is_batch_invariant: bool

    @classmethod
    def of(cls, value: Any) -> Any:
        return cls(value.name, value.is_batch_invariant) if isinstance(value, AttentionKernels) else value


class Answer(NamedTuple):
    """A program's text, a function of the arguments' leaves, and the shapes of its results."""

    text: bytes
    results: Any


class LoweringWorkers:
    """The workers of this process: none until `running`, and none behind it."""

    def __init__(self):
        self._crew: _Crew | None = None
        self._users = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def running(self, num_programs: int) -> Iterator[None]:
        """Have workers for so many programs in the block, if there are cores for them and a device that they know."""
        wanted = min(num_workers(), num_programs) if num_programs >= FROM_PROGRAMS and knows_device() else 0
        with self._lock:
            self._users += 1
            if self._crew is None and wanted > 0:
                self._crew = _Crew(wanted)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users or self._crew is None:
                return
            crew, self._crew = self._crew, None
        crew.end()

    def lower(self, function: Callable[..., Any], static: dict[str, Any], args: tuple[Any, ...], jit: Jit) -> Lowered:
        """By a worker; None where none is at work, or it could not. `jit` makes a jitted function of what it found."""
        crew, kernels = self._crew, static.get("kernels")
        if crew is None or kernels is None or kernels.name != "pallas":
            return None
        answer = crew.ask(Task.of(function, static, args))
        return None if answer is None else inlined(answer, jit).lower(*args)


def settings_that_matter() -> dict[str, Any]:
    """Settings of JAX by which a program is made, which a worker takes over."""
    return {
        name: value for name, value in jax.config.values.items() if not any(word in name for word in NO_MATTER)
    }  # fmt: skip


def num_workers() -> int:
    return min(MAX_WORKERS, (os.cpu_count() or 1) // CORES_EACH - 1)


def knows_device() -> bool:
    """What a process without a GPU lowers for is what Mosaic takes for granted: a Hopper, with as many multiprocessors
    as an H100 or H200 has."""
    device = jax.devices()[0]
    return device.platform == "gpu" and (device.compute_capability, device.core_count) == ("9.0", 132)


def inlined(answer: Answer, jit: Jit) -> Any:
    """A jitted function of a step's arguments that is the text."""
    exported, results = export.deserialize(bytearray(answer.text)), jax.tree.structure(answer.results)

    def step(*args: Any) -> Any:
        return jax.tree.unflatten(results, exported.call(*jax.tree.leaves(args)))

    return jit(step)


class _Crew:
    """Workers, and those of them that have nothing to do."""

    def __init__(self, count: int):
        self._workers = [_Worker() for _ in range(count)]
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def ask(self, task: Task) -> Answer | None:
        worker = self._idle.get()
        try:
            return None if worker is None else worker.ask(task)
        finally:
            self._idle.put(worker)  # None, too: whoever else waits is to learn that it is over

    def end(self) -> None:
        self._idle.put(None)
        for worker in self._workers:
            worker.end()


class _Worker:
    """A process, which ends when its input does: when this object ends it, or our process, however that ends."""

    def __init__(self):
        command = [sys.executable, "-P", str(WORKER)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._is_new = True

    def ask(self, task: Task) -> Answer | None:
        """None where it failed: the process that asks will see why, when it does the same itself."""
        try:
            if self._is_new:
                send(self._input, sys.path)
                self._is_new = False
            send(self._input, task)
            return receive(self._output)
        except (OSError, EOFError, pickle.PicklingError, TypeError, AttributeError, ValueError) as error:  # or closed
            logger.info("a process that lowers programs failed: %s", error or type(error).__name__)
            return None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()
        with contextlib.suppress(OSError):
            self._input.close()


def send(stream: IO[bytes], what: Any) -> None:
    content = pickle.dumps(what)
    stream.write(len(content).to_bytes(SIZE_BYTES, "little") + content)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """What `send` wrote at the other end; EOFError where that is gone."""
    size = stream.read(SIZE_BYTES)
    content = stream.read(int.from_bytes(size, "little"))
    if len(size) < SIZE_BYTES or not content:
        raise EOFError("it has ended")
    return pickle.loads(content)


LOWERING = LoweringWorkers()
