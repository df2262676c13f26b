"""What a logits processor computes, whoever made it: two functions of equal computations need only one program.

A function does not say what it computes: its code is one thing, what it closes over and reads of its module another,
and both may change. So it is traced, which takes milliseconds where compiling takes seconds, and the text of what comes
out is compared. Arrays that it holds are in that text. Functions of Python that it calls back are not, so they are
compared themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxpaged.api.request_params import LogitsProcessor
from jaxpaged.api.values import shortened
from jaxpaged.step_io import Layout, SamplingInputs


def what_they_compute(processors: tuple[LogitsProcessor, ...], layout: Layout, vocab_size: int) -> Hashable:
    """Equal for processors that compute the same in a step whose inputs have this layout."""
    length = _history_len(layout)
    return tuple(_computation_of(processor, length, vocab_size) for processor in processors)


def _computation_of(processor: LogitsProcessor, history_len: int, vocab_size: int) -> Hashable:
    """A digest of its text, and what the text does not say where it calls other code: there that stands as numbers."""

    def traced_anew(token_ids: jax.Array, num_tokens: jax.Array, logits: jax.Array) -> Any:
        return processor(token_ids, num_tokens, logits)  # jax has not seen this function, so it looks

    shapes = ((history_len,), jnp.int32), ((), jnp.int32), ((vocab_size,), jnp.float32)
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    traced = jax.jit(traced_anew, keep_unused=True).trace(*inputs)
    _check_result(processor, traced.out_info, vocab_size)
    text = traced.lower().as_text()
    if "custom_call" not in text:
        return _digest(text)
    return _digest(text + str(traced.jaxpr)), *_called_back(traced.jaxpr.jaxpr)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _check_result(processor: LogitsProcessor, result: Any, vocab_size: int) -> None:
    """What is no row of logits would be spread over the row, or be read as other numbers."""
    is_array = hasattr(result, "shape") and hasattr(result, "dtype")
    if is_array and result.shape == (vocab_size,) and result.dtype.kind not in "bc":
        return
    given = f"{result.dtype}{list(result.shape)}" if is_array else shortened(result)
    raise ValueError(
        f"logits_processors: {shortened(processor)} returns {given} where it must return the logits, "
        f"float32[{vocab_size}]"
    )


def _called_back(jaxpr: Jaxpr) -> Iterator[Hashable]:
    """Functions of Python that a computation calls, in its order; they are equal only if they are the same."""
    for equation in jaxpr.eqns:
        for name, value in equation.params.items():
            if name == "callback":
                yield value
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                if isinstance(inner, Jaxpr):
                    yield from _called_back(inner)


def _history_len(layout: Layout) -> int:
    kind, fields = layout
    sampling = fields[kind._fields.index("sampling")]  # pyright: ignore[reportAttributeAccessIssue]
    _dtype, shape = sampling[1][SamplingInputs._fields.index("history")]
    return shape[1]
