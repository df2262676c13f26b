"""The options of an engine. Each stands here once: its default, its check, its choices and what it is for.

`LLM(model, **options)`, `LLM.rebuild`, the flags of the commands and the table of docs/guide.md follow from the fields
of `EngineOptions`, so one more option is one more field, and the code that acts on it.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

from jaxpaged.api.values import as_int, read_flag, read_int, read_number, read_seed, shortened
from jaxpaged.config.choices import (
    ATTENTIONS,
    DENSE_CACHES,
    DTYPES,
    KV_CACHE_DTYPES,
    KV_CACHES,
    LOAD_FORMATS,
    PREEMPTION_MODES,
    choices_in_words,
)

P = ParamSpec("P")
R = TypeVar("R")

#: Ids of pages and slots, and lengths, are 32 bits on the device.
COUNT_MAX = 2**31 - 1


class Option(NamedTuple):
    """One option, as its field and those who show it to people have it."""

    name: str
    default: Any
    kind: type  # of its values, None aside
    help: str  # a sentence, without choices and default
    read: Callable[[str, Any], Any]  # of name and value: a plain value, or ValueError
    choices: tuple[str, ...]
    unset: str  # what None, the default, stands for
    decides_result: bool  # what a request's result is; the others decide only how fast it comes
    is_fixed: bool  # for an LLM, whose `rebuild` cannot change it

    @property
    def sentence(self) -> str:
        return self.help + (f"; one of {', '.join(self.choices)}" if self.choices else "")

    @property
    def default_text(self) -> str:
        return self.unset or str(self.default)

    @property
    def help_text(self) -> str:
        return f"{self.sentence} (default{':' if self.unset else ''} {self.default_text})"


def option(
    default: Any,
    help: str,
    read: Callable[[str, Any], Any] | None = None,
    *,
    choices: tuple[str, ...] = (),
    unset: str = "",
    decides_result: bool = False,
    is_fixed: bool = False,
) -> Any:
    """The field of an option; see `Option`. One that can be None is a count, and `unset` says what None stands for."""
    kind = int if default is None else type(default)
    reads = read or (_one_of(choices) if choices else read_flag)
    made = Option("", default, kind, help, reads, choices, unset, decides_result, is_fixed)
    return dataclasses.field(default=default, metadata={"option": made})


def _one_of(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def read(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}={shortened(value)}; {choices_in_words(value, choices)}")
        return value

    return read


def _count(name: str, value: Any) -> int:
    number = as_int(value)
    if number is None or number < 1:
        raise ValueError(f"{name} must be a positive integer, got {shortened(value)}")
    return read_int(name, number, 1, COUNT_MAX)


def _count_or_none(name: str, value: Any) -> int | None:
    return None if value is None else _count(name, value)


def _share_above_0(name: str, value: Any) -> float:
    share = read_number(name, value, 0, 1, "in (0, 1]")
    if share == 0:
        raise ValueError(f"{name} must be in (0, 1], got 0")
    return share


def _share_below_1(name: str, value: Any) -> float:
    share = read_number(name, value, 0, 1, "in [0, 1)")
    if share == 1:
        raise ValueError(f"{name} must be in [0, 1), got 1")
    return share


def _gib(name: str, value: Any) -> float:
    gib = read_number(name, value, 0, float("inf"), "a number of at least 0")
    if gib > COUNT_MAX:
        raise ValueError(f"{name} must be at most {COUNT_MAX}, got {shortened(value)}")
    return gib


def _seed(_name: str, value: Any) -> int:
    return read_seed(value)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What shapes an engine; read into plain values when it is made, or refused with ValueError."""

    dtype: str = option(
        "auto", "of weights and activations; auto is the checkpoint's, on a CPU float32",
        choices=("auto", *DTYPES), decides_result=True, is_fixed=True,
    )  # fmt: skip
    load_format: str = option(
        "auto", "of the checkpoint; dummy makes random weights from config.json alone",
        choices=LOAD_FORMATS, decides_result=True, is_fixed=True,
    )  # fmt: skip
    seed: int = option(
        0, "of requests that have none of their own, and of dummy weights; below 2**64", _seed,
        decides_result=True, is_fixed=True,
    )  # fmt: skip
    max_model_len: int | None = option(
        None, "tokens of prompt and output at most", _count_or_none,
        unset="the model's positions, before scaling that depends on it", decides_result=True,
    )  # fmt: skip
    tensor_parallel_size: int = option(
        1, "devices among which the model is divided, by heads; their number must divide the model's heads", _count,
        is_fixed=True,
    )  # fmt: skip
    data_parallel_size: int = option(
        1, "engines with the whole model each, on tensor_parallel_size devices of their own, which share the requests "
        "of a run", _count, is_fixed=True,
    )  # fmt: skip
    page_size: int = option(16, "token positions in a page", _count)
    num_pages: int | None = option(
        None, "pages of the pool, page 0 included, which is never used", _count_or_none, unset="what fits the device"
    )
    memory_utilization: float = option(
        0.9,
        "share of the device's memory for weights, pool and temporaries; the rest is for programs and CUDA graphs",
        _share_above_0,
    )
    max_num_seqs: int = option(256, "sequences that run together at most", _count)
    max_num_batched_tokens: int = option(
        8192, "tokens in a step with prompts at most; longer prompts are computed in chunks", _count
    )
    attention: str = option(
        "auto", "pallas needs a Hopper GPU and 16-bit floats, reference (XLA) runs anywhere, auto is the better one "
        "that runs here",
        choices=ATTENTIONS,
    )  # fmt: skip
    cascade_attention: bool = option(
        False, "read pages that several sequences have in common once a step, where that saves enough (pallas only)"
    )
    batch_invariant: bool = option(
        False, "attention adds up each sequence in an order in which the rest of the batch has no part (pallas only)"
    )
    preemption: str = option(
        "auto", "how a request gives way when pages run out: swap keeps them in host memory, recompute computes them "
        "again, auto does what costs less",
        choices=PREEMPTION_MODES,
    )  # fmt: skip
    swap_space_gib: float = option(
        4.0, "host memory for the pages of requests that gave way by swapping; pinned on a GPU", _gib
    )
    kv_cache: str = option(
        "paged", "how KV memory is kept: in pages, or as a system that they are compared with",
        choices=KV_CACHES,
    )  # fmt: skip
    kv_cache_dtype: str = option(
        "auto", "of keys and values; auto is dtype, fp8 is float8_e4m3fn, in which twice as many tokens fit as in 16 "
        "bits",
        choices=KV_CACHE_DTYPES, decides_result=True,
    )  # fmt: skip
    async_scheduling: bool = option(
        True, "plan and launch the next step while one runs; the tokens are the same either way"
    )
    mixed_steps: bool = option(
        True, "let sequences decode in the steps that compute prompts (pages only, not on a CPU); vLLM says chunked "
        "prefill, SGLang mixed chunk"
    )  # fmt: skip
    prefix_caching: bool = option(
        True, "keep full pages of ended requests until others need the room, and share them with requests that begin "
        "with the same tokens (pages only)"
    )  # fmt: skip
    compilation_cache: bool = option(
        True, "keep compiled programs in files of the user's cache folder, for the processes after this one"
    )
    watermark: float = option(
        0.01, "share of a paged pool that admission leaves free, so that running sequences can grow", _share_below_1
    )

    def __post_init__(self):
        for each in engine_options():
            object.__setattr__(self, each.name, each.read(each.name, getattr(self, each.name)))
        if self.kv_cache != "paged" and self.preemption == "swap":
            raise ValueError(
                f"kv_cache={self.kv_cache!r} reserves all that a request needs beforehand, so none gives way: "
                "preemption='swap' needs kv_cache='paged'"
            )
        if self.has_fp8_pages and self.kv_cache in (*DENSE_CACHES, "none"):
            raise ValueError(
                f"kv_cache_dtype={self.kv_cache_dtype!r} is of pages, and kv_cache={self.kv_cache!r} has none: leave "
                "kv_cache_dtype='auto' there"
            )
        if self.has_fp8_pages and self.cascade_attention:
            raise ValueError(
                "cascade_attention=True reads pages of dtype alone, and those of "
                f"kv_cache_dtype={self.kv_cache_dtype!r} are not: choose one of them"
            )
        if self.kv_cache != "paged" and self.cascade_attention:
            raise ValueError(
                f"kv_cache={self.kv_cache!r} shares nothing: cascade_attention=True needs kv_cache='paged'"
            )
        if self.batch_invariant and self.cascade_attention:
            raise ValueError(
                "cascade_attention=True reads pages in an order that follows from the whole batch, which "
                "batch_invariant=True rules out: choose one of them"
            )
        if self.preemption == "swap" and self.swap_space_gib == 0:
            raise ValueError(
                "preemption='swap' needs host memory for the pages that it moves, but swap_space_gib=0: give it some "
                f"({EngineOptions.swap_space_gib:g} is the default), or choose preemption='recompute'"
            )

    @property
    def has_fp8_pages(self) -> bool:
        return self.kv_cache_dtype != "auto"


def engine_options() -> Iterator[Option]:
    """All options, in the order of the fields."""
    for field in dataclasses.fields(EngineOptions):
        yield field.metadata["option"]._replace(name=field.name)


OPTION_NAMES = tuple(each.name for each in engine_options())
#: Those that `rebuild` cannot change, and those that decide what a request's result is.
FIXED_OPTIONS = tuple(each.name for each in engine_options() if each.is_fixed)
RESULT_OPTIONS = tuple(each.name for each in engine_options() if each.decides_result)


def lists_options(method: Callable[P, R]) -> Callable[P, R]:
    """For `help` of a method that takes them as **options: each in its signature, and all at the end of its text."""
    signature = inspect.signature(method)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    types = {field.name: field.type for field in dataclasses.fields(EngineOptions)}
    for each in engine_options():
        kind = inspect.Parameter.KEYWORD_ONLY
        named.append(inspect.Parameter(each.name, kind, default=each.default, annotation=types[each.name]))
    method.__signature__ = signature.replace(parameters=named)  # pyright: ignore[reportFunctionMemberAccess]
    method.__doc__ = f"{inspect.getdoc(method)}\n\nOptions:\n{_list_options()}"
    return method


def _list_options() -> str:
    texts = (f"{each.name}: {each.help_text}" for each in engine_options())
    return "\n".join(
        textwrap.fill(text, 110, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
        for text in texts
    )
