"""Values that no one should pass and somebody will: strategies of the fuzz tests, and how many cases these run."""

from __future__ import annotations

import decimal
import fractions

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def cases(quick: int, slow: int = 10_000):
    """Run a test with so many examples, always the same ones; and with many more, each time others, in test-slow."""
    return pytest.mark.parametrize("num_cases", [quick, pytest.param(slow, marks=pytest.mark.slow)])


#: From more cases on, they are others each time.
MOST_QUICK = 300


def run_cases(num_cases: int, check, *strategies, **named) -> None:
    options = settings(
        max_examples=num_cases, deadline=None, derandomize=num_cases <= MOST_QUICK, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    options(given(*strategies, **named)(check))()


edge_ints = st.sampled_from(
    [
        0,
        1,
        -1,
        2**31 - 1,
        2**31,
        2**32,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        10**12,
        10**30,
        -(10**30),
        10**400,
        10**4000,
    ]
)
edge_floats = st.sampled_from(
    [0.0, -0.0, 5e-324, 1e-45, 1e-38, 1e-30, 1e-5, 1.0, 1e38, 1e39, 1e300, float("inf"), float("-inf"), float("nan")]
)
numbers = st.one_of(
    st.integers(-3, 100), edge_ints, edge_floats, st.floats(),
    st.sampled_from([
        np.int64(3), np.int32(-1), np.uint8(7), np.float32(0.5), np.float64("nan"), np.float16("inf"), np.bool_(True),
        decimal.Decimal("0.5"), fractions.Fraction(1, 3), 1j, True, False,
    ]),
)  # fmt: skip
texts = st.one_of(
    st.text(max_size=5),
    st.sampled_from(["", "a", "\ud83d", "a\udcff", "\0", "\n", "nan", "x" * 1000, "never", "auto", "\ufeff", "😀"]),
)
scalars = st.one_of(st.none(), numbers, texts, st.binary(max_size=3))
arrays = st.sampled_from(
    [
        np.array(3), np.array([1, 2]), np.array([[1, 2], [3, 4]]), np.array([1.5, 2.0]), np.array([]), np.array(["a"]),
        np.array([b"a"]), np.array([True]), np.array([None, 1], object), np.array([2**63], np.uint64),
    ]
)  # fmt: skip


def nested(depth: int) -> list:
    values: list = []
    for _ in range(depth):
        values = [values]
    return values


objects = st.one_of(
    arrays,
    st.builds(object),
    st.sampled_from([int, np.ndarray, len, ..., range(3), bytearray(b"ab"), memoryview(b"ab"), nested(500)]),
    st.builds(lambda values: (value for value in values), st.lists(st.integers(0, 9), max_size=3)),  # a generator
    st.builds(lambda values: dict.fromkeys(values).keys(), st.lists(st.integers(0, 9), max_size=3)),
    st.sets(st.integers(0, 9), max_size=3),
    st.frozensets(texts, max_size=2),
)
#: Anything.
anything = st.recursive(
    scalars | objects,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.integers(-1, 99), edge_ints, texts, st.floats()), inner, max_size=2),
    ),
    max_leaves=4,
)
token_ids = st.integers(0, 96)
id_lists = st.one_of(
    st.lists(token_ids, max_size=4), st.lists(st.integers(-1, 200), max_size=3), st.lists(numbers, max_size=3), arrays
)
text_lists = st.one_of(texts, st.lists(texts, max_size=3), st.lists(scalars, max_size=2))
flags = st.booleans()

constraints = st.one_of(
    st.dictionaries(st.sampled_from(["regex", "grammar", "trie", "json_schema", "odd"]), texts, max_size=2),
    st.sampled_from(["[ab]+", "(", "a{1000}{1000}", "^a$", "/", "\\", "(?<n>a)"]).map(lambda one: {"regex": one}),
    st.dictionaries(st.sampled_from(["type", "$ref", "enum"]), scalars, max_size=2).map(lambda s: {"json_schema": s}),
    anything,
)  # fmt: skip
#: What fields of parameters may be, more often than not in the right form.
SAMPLING_FIELDS = {
    "n": st.integers(1, 4), "best_of": st.none() | st.integers(1, 4), "temperature": st.floats(0, 2) | edge_floats,
    "top_p": st.floats(0, 1, exclude_min=True), "top_k": st.integers(-1, 200) | edge_ints, "min_p": st.floats(0, 1),
    "seed": st.none() | edge_ints, "max_tokens": st.none() | st.integers(1, 40) | edge_ints,
    "min_tokens": st.integers(0, 5) | edge_ints, "stop": text_lists, "stop_token_ids": id_lists,
    "include_stop_str_in_output": flags, "ignore_eos": flags, "repetition_penalty": st.floats(0, 3) | edge_floats,
    "presence_penalty": st.floats(-3, 3), "frequency_penalty": st.floats(-3, 3),
    "logit_bias": st.dictionaries(st.integers(-1, 99) | st.sampled_from([np.int64(5), "5"]), numbers, max_size=3),
    "allowed_token_ids": id_lists, "bad_words": text_lists,
    "constraint": st.none() | constraints,
    "logits_processors": st.sampled_from([None, [len], [3], (len, len), iter([len]), len, [[]]]),
    "logprobs": st.none() | st.integers(-2, 99) | edge_ints, "prompt_logprobs": st.none() | st.integers(-2, 99),
    "detokenize": flags, "skip_special_tokens": flags,
}  # fmt: skip
_SHARED = {
    name: SAMPLING_FIELDS[name] for name in SAMPLING_FIELDS if name not in ("best_of", "top_p", "top_k", "min_p")
}
BEAM_FIELDS = {
    **_SHARED, "beam_width": st.integers(1, 8) | edge_ints, "length_penalty": st.floats(-6, 6),
    "early_stopping": st.sampled_from([True, False, "never", "always", 1]), "do_sample": flags,
    "num_beam_groups": st.integers(1, 4) | edge_ints, "diversity_penalty": st.floats(0, 3) | edge_floats,
}  # fmt: skip


@st.composite
def fields(draw, known: dict, required=(), values=anything):
    """Some of the fields, mostly as they may be and now and then with anything."""
    names = draw(st.lists(st.sampled_from(sorted(known)), max_size=4, unique=True))
    is_odd = draw(st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names)))
    chosen = {name: draw(values if odd == 0 else known[name]) for name, odd in zip(names, is_odd, strict=True)}
    return {**{name: draw(known[name]) for name in required}, **chosen}


prompts = st.one_of(
    st.text("abc xyz", min_size=1, max_size=20), texts, id_lists, anything,
    st.builds(lambda p: {"prompt": p}, texts | anything),
    st.builds(lambda p, adds: {"prompt": p, "add_special_tokens": adds}, texts, flags | anything),
    st.builds(lambda p: {"prompt_token_ids": p}, id_lists | anything),
)  # fmt: skip
