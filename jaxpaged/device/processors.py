"""What a logits processor computes, whoever made it: two functions of equal computations need only one program.

A function does not say what it computes: its code is one thing, what it closes over and reads of its module another,
and both may change. So it is traced, which takes milliseconds where compiling takes seconds, and the text of what comes
out is compared. Arrays that it holds are in that text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

import jax
import jax.numpy as jnp

from jaxpaged.api.request_params import LogitsProcessor
from jaxpaged.step_io import Layout, SamplingInputs


def what_they_compute(processors: tuple[LogitsProcessor, ...], layout: Layout, vocab_size: int) -> Hashable:
    """Equal for processors that compute the same in a step whose inputs have this layout."""
    length = _history_len(layout)
    return tuple(_computation_of(processor, length, vocab_size) for processor in processors)


def _computation_of(processor: LogitsProcessor, history_len: int, vocab_size: int) -> Hashable:
    """A digest of it, or the processor itself where its text does not say all: calls of other code stand there as
    numbers."""

    def traced_anew(token_ids: jax.Array, num_tokens: jax.Array, logits: jax.Array) -> jax.Array:
        return processor(token_ids, num_tokens, logits)  # jax has not seen this function, so it looks

    shapes = ((history_len,), jnp.int32), ((), jnp.int32), ((vocab_size,), jnp.float32)
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    text = jax.jit(traced_anew, keep_unused=True).lower(*inputs).as_text()
    return processor if "custom_call" in text else hashlib.sha256(text.encode()).digest()


def _history_len(layout: Layout) -> int:
    kind, fields = layout
    sampling = fields[kind._fields.index("sampling")]  # pyright: ignore[reportAttributeAccessIssue]
    _dtype, shape = sampling[1][SamplingInputs._fields.index("history")]
    return shape[1]
