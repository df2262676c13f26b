"""A process of its own that lowers steps for `lowering_workers`: tasks come in on stdin, answers go out on stdout."""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any


def main() -> None:
    """The first that comes is where modules are found, since a user's program may have added to it."""
    tasks, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints
    sys.path[:] = _first(tasks)

    from jaxpaged.device.lowering_workers import receive, send

    while True:
        try:
            task = receive(tasks)
        except EOFError:
            return
        send(answers, lowered(task))


def _first(stream: Any) -> list[str]:
    return pickle.loads(stream.read(int.from_bytes(stream.read(8), "little")))


def lowered(task: Any) -> Any:
    """The task's `Answer`. What fails ends this process: whoever asked does it himself then, and sees why."""
    import functools
    import importlib

    import jax
    from jax import export

    from jaxpaged.device.attention import named_kernels
    from jaxpaged.device.lowering_workers import CALLS, Answer, KernelsByName

    for name, value in task.settings.items():
        if name != "jax_platforms" and jax.config.values.get(name) != value:
            jax.config.update(name, value)
    static = {
        name: named_kernels(*value) if isinstance(value, KernelsByName) else value
        for name, value in task.static.items()
    }
    step = getattr(importlib.import_module(task.module), task.function)
    function = functools.partial(step.function, **static)
    leaves, tree = jax.tree.flatten(task.args)
    results: list[Any] = []

    def flat(*leaves: Any) -> list[Any]:
        results.append(function(*jax.tree.unflatten(tree, leaves)))
        return jax.tree.leaves(results[-1])

    text = export.export(jax.jit(flat), platforms=[task.platform], disabled_checks=CALLS)(*leaves).serialize()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), results[-1])
    return Answer(bytes(text), shapes)


if __name__ == "__main__":
    main()
