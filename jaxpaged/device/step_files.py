"""Compiled steps in files by what was asked for, so that a later process does not even trace them.

JAX's own key of a program is of its text, and to have the text one must trace and lower it: of a step with Pallas
kernels that takes seconds of Python, which is more than reading what the compiler has made of it. The name here is of
all that the text is made from: our source, JAX's version and settings, the device, the step's static arguments, and the
shapes of the others. What cannot be named so (a function of a user's, kernels that are not ours) has no file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable, Hashable
from enum import Enum
from typing import Any, NamedTuple

import jax
import jaxlib.version
import numpy as np
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from jaxpaged.device import program_files
from jaxpaged.device.attention import AttentionKernels, named_kernels
from jaxpaged.device.lowering_workers import LOWERING, Jit, settings_that_matter
from jaxpaged.device.mesh import Placement

logger = logging.getLogger("jaxpaged")


#: Our modules of which a step's text is made, and packages whose functions stand in them.
TRACED = "jaxpaged.device.", "pallas_kernels."
KNOWN = "jaxpaged", "pallas_kernels", "jax", "jaxlib", "numpy", "ml_dtypes"

#: Held by the thread that traces: Python does one of them at a time, and several at once would all be late.
TRACING = threading.Lock()

Compiled = jax.stages.Compiled


class StepName(NamedTuple):
    """What a step is, apart from the shapes of its arguments."""

    function: Callable[..., Any]
    static: dict[str, Any]
    described: str
    is_divided: bool = False  # among devices of a mesh


class Unnamed(Exception):
    """A value without a name that another process would give it, too."""


def step_name(function: Callable[..., Any], static: dict[str, Any], is_divided: bool = False) -> StepName | None:
    """None for a step that no other process would know."""
    if _is_patched():
        return None
    try:
        return StepName(function, static, _described((function, static)), is_divided)
    except Unnamed:
        return None


def made_or_read(name: StepName | None, jit: Jit, jitted: Any, args: tuple[Any, ...]) -> tuple[Compiled, bool]:
    """The program of a step for arguments like these; whether it was read from a file. `jitted` is the step, `jit` what
    makes such a function of one that computes the same."""
    files = program_files.program_files()
    if name is None or files is None:
        return _compiled(name, jit, jitted, args), False
    key = _key(name, args)
    content = files.read(key)
    if content is not None and (found := _loaded(content, args)) is not None:
        return found, True
    with files.set_aside():  # the program is kept once, under this name
        compiled = _compiled(name, jit, jitted, args)
    files.write(key, pickle.dumps(serialize(compiled)))
    return compiled, False


def _compiled(name: StepName | None, jit: Jit, jitted: Any, args: tuple[Any, ...]) -> Compiled:
    """One at a time where it is of several devices: XLA has crashed where two threads were at such programs."""
    if len(_devices_of(args)) == 1:
        return _lowered(name, jit, jitted, args).compile()
    with TRACING:
        return jitted.lower(*args).compile()


def _lowered(name: StepName | None, jit: Jit, jitted: Any, args: tuple[Any, ...]) -> jax.stages.Lowered:
    """By another process, where some are at work; else here, and so is a step of a mesh: they have none."""
    by_worker = None if name is None or name.is_divided else LOWERING.lower(name.function, name.static, args, jit)
    if by_worker is not None:
        return by_worker
    with TRACING:
        return jitted.lower(*args)


def _loaded(content: bytes, args: tuple[Any, ...]) -> Compiled | None:
    """None, and a line of the log, for what these devices cannot load."""
    try:
        return deserialize_and_load(*pickle.loads(content), execution_devices=_devices_of(args))
    except (jax.errors.JaxRuntimeError, ValueError, pickle.UnpicklingError) as error:
        logger.warning("a program in a file cannot be loaded (%s), and is compiled anew", error)
        return None


def _devices_of(args: tuple[Any, ...]) -> list[jax.Device]:
    """Those on which the arguments lie, and so the program is to run: not all that there are."""
    layouts = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args)]
    layout = next((layout for layout in layouts if layout is not None), None)
    if layout is None:
        return jax.devices()[:1]
    return list(Placement.of(layout).devices)


def _key(name: StepName, args: tuple[Any, ...]) -> str:
    leaves, tree = jax.tree.flatten(args)
    shapes = [(leaf.shape, str(leaf.dtype), _placed(leaf)) for leaf in leaves]
    return f"step-{_digest(repr((name.described, str(tree), shapes, made_by())))}"


def _placed(leaf: Any) -> str | None:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return None
    devices = sorted(device.id for device in sharding.device_set)
    kind = "one" if isinstance(sharding, jax.sharding.SingleDeviceSharding) else repr(sharding)
    return f"{kind} {devices} {sharding.memory_kind}"


def made_by() -> Hashable:
    """All that makes a program of a step: code, compiler, settings, device."""
    settings = sorted((setting, repr(value)) for setting, value in settings_that_matter().items())
    device = jax.devices()[0]
    return _versions(), device.device_kind, device.client.platform_version, len(jax.devices()), settings


@functools.cache
def _versions() -> Hashable:
    return jax.__version__, jaxlib.version.__version__, os.environ.get("XLA_FLAGS"), program_files.code_digest()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=program_files.DIGEST_BYTES).hexdigest()


def _is_patched() -> bool:
    """Whether somebody has put a function of his own among ours, which the source does not show."""
    ours = [module for name, module in list(sys.modules.items()) if f"{name}.".startswith(TRACED)]
    values = itertools.chain.from_iterable(list(vars(module).values()) for module in ours)
    modules = {str(getattr(value, "__module__", None) or "jax").split(".")[0] for value in values if callable(value)}
    return not modules <= {*KNOWN, *sys.stdlib_module_names}


def _described(value: Any) -> str:
    """Of a static argument, in words that are the same in every process."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes) or isinstance(value, np.dtype):
        return repr(value)
    if isinstance(value, AttentionKernels):
        if value != named_kernels(value.name, value.is_batch_invariant):
            raise Unnamed
        return f"kernels {value.name} {value.is_batch_invariant}"
    if kind in (tuple, list):
        return f"{kind.__qualname__}({', '.join(map(_described, value))})"
    if kind is dict:
        return f"{{{', '.join(f'{key}: {_described(each)}' for key, each in sorted(value.items()))}}}"
    if kind.__module__.startswith("jaxpaged."):  # a user's class may compute, and its fields do not say what
        if isinstance(value, Enum):
            return repr(value)
        if isinstance(value, tuple):
            return f"{kind.__qualname__}({', '.join(map(_described, value))})"
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return f"{kind.__qualname__}{_described(fields)}"
    return _name_of(value)


def _name_of(value: Any) -> str:
    """Of a function or class that is found by it: not what was made in another function, nor who only says so (a
    function that `functools.wraps` has given a name of JAX's)."""
    module, name = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    is_found = value in (found, getattr(found, "function", None))  # of a `Step`
    if not is_found or not f"{module}.".startswith(("jaxpaged.", "jax.", "numpy.")):
        raise Unnamed
    return f"{module}.{name}"
