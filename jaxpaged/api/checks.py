"""How a field of the parameters is read, while a frozen object of them is made.

A field is read and written back as a plain value, a copy where it is a list: what was accepted is what runs, whatever
the caller does with the arguments later.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from jaxpaged.api.values import FLOAT32_MAX, read_flag, read_int, read_list, read_number, shortened


def settle(params: object, name: str, value: object) -> None:
    """Set a field of a frozen dataclass while it is made."""
    object.__setattr__(params, name, value)


def read_int_field(params: object, name: str, low: int) -> None:
    settle(params, name, read_int(name, getattr(params, name), low))


def read_optional_int(params: object, name: str, low: int) -> None:
    if getattr(params, name) is not None:
        read_int_field(params, name, low)


def read_number_field(params: object, name: str, low: float, high: float, wanted: str) -> None:
    settle(params, name, read_number(name, getattr(params, name), low, high, wanted))


def read_flags(params: object, *names: str) -> None:
    for name in names:
        settle(params, name, read_flag(name, getattr(params, name)))


def read_bias(given: object) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {shortened(given)}")
    wanted = "finite (allowed_token_ids and bad_words forbid tokens)"
    bias = {}
    for key, value in given.items():
        token_id = read_int("logit_bias token id", key, 0)
        if token_id in bias:
            raise ValueError(f"logit_bias has token id {token_id} twice")
        bias[token_id] = read_number(f"logit_bias[{token_id}]", value, -FLOAT32_MAX, FLOAT32_MAX, wanted)
    return bias


def read_processors(given: object) -> Sequence[object]:
    processors = read_list("logits_processors", given, "callables")
    for processor in processors:
        if not callable(processor):
            raise ValueError(f"logits_processors must be callables, got {shortened(processor)}")
        try:
            hash(processor)
        except TypeError:
            raise ValueError(
                f"logits_processors has {shortened(processor)}, which has no hash: programs are found again by it"
            ) from None
    return processors


def check_ids(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Raise ValueError where one of the ids is not of the vocabulary, or where there are more than it has."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"{name} has token id {shortened(token_id)}; the vocabulary has ids 0 to {vocab_size - 1}")
    if len(token_ids) > vocab_size:
        raise ValueError(f"{name} has {len(token_ids)} token ids, of a vocabulary of {vocab_size}")
