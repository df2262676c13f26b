"""Times on a device without the cost of launching: what the benchmarks of kernels share."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

#: What the many calls of one measurement should take.
SECONDS_A_MEASUREMENT = 0.06
MOST_RUNS = 50


class Program(NamedTuple):
    """Something to time: state = step(state), again and again; each step makes `calls` calls of what is timed."""

    step: Callable[[Any], Any]
    state: Any
    calls: int = 1
    wait: Callable[[Any], Any] = jax.block_until_ready


def seconds_per_call(program: Program, repeats: int) -> float:
    """Median of `repeats` differences between the wall times of R and of 3R steps, so that constant costs cancel.

    Steps are dispatched without waiting in between; a device carries them out in order.
    """
    state = program.step(program.state)  # compiles
    program.wait(state)

    def run(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state = program.step(state)
        program.wait(state)
        return time.perf_counter() - start

    run(1)
    runs = int(min(MOST_RUNS, max(1, SECONDS_A_MEASUREMENT / 4 / run(1))))
    differences = [(-run(runs) + run(3 * runs)) / (2 * runs) for _ in range(repeats)]
    return statistics.median(differences) / program.calls


@functools.cache  # one program for all data of the same shapes
def chained(attend: Callable[..., jax.Array], calls: int) -> Callable[..., jax.Array]:
    """jit of f(q, caches, *args): `calls` calls of attend(q, *cache, *args), taking the caches in turn.

    Each output is the next query, so no call can be hoisted, merged or run beside another, and nothing else is timed.
    """
    attend = jax.jit(attend)  # traced and lowered once, not once a call

    @jax.jit
    def run(q: jax.Array, caches: list[tuple[jax.Array, ...]], *args: jax.Array) -> jax.Array:
        for call in range(calls):
            q = attend(q, *caches[call % len(caches)], *args)
        return q

    return run


class Card(NamedTuple):
    """What this device reaches at its simplest jobs: the ceilings that kernels are compared with."""

    device: str
    copy_gb_per_s: float  # bytes read and bytes written
    matmul_tflop_per_s: float


def measure_card(repeats: int) -> Card:
    device = jax.devices()[0]
    is_gpu = device.platform == "gpu"
    size = 2**30 if is_gpu else 2**22
    numbers = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    copied = 2 * size / seconds_per_call(Program(jax.jit(lambda x: x + jnp.uint32(1)), numbers), repeats)
    side = 8192 if is_gpu else 256
    # Random operands: on zeros the chip draws less power, and so clocks higher than on any real work.
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    multiplied = 2 * side**3 / seconds_per_call(Program(lambda _: product(a, b), None), repeats)
    return Card(device.device_kind, copied / 1e9, multiplied / 1e12)
