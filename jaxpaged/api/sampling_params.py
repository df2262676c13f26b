"""What a user may ask of samples: vLLM's names and meanings, checked when the object is made."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpaged.api.checks import read_int_field, read_number_field, read_optional_int
from jaxpaged.api.request_params import RequestParams


@dataclass(frozen=True, kw_only=True)
class SamplingParams(RequestParams):
    """How the tokens of one request are chosen and when it ends. All arguments go by name.

    Numbers and arrays of numpy count as what they hold. Lists are copied. A sample is a function of (seed, sample
    index, position) alone; with a temperature of 0 it is greedy.

    Attributes:
        n: samples returned. More than one needs temperature > 0.
        best_of: samples drawn, of which the `n` with the highest cumulative log-probability are returned (default `n`).
        top_p, top_k, min_p: keep the smallest set of tokens with probability `top_p` in sum; the `top_k` likeliest
            (0 or -1: all); those with at least `min_p` of the likeliest token's probability.
    """

    n: int = 1
    best_of: int | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self):
        read_int_field(self, "n", 1)
        read_optional_int(self, "best_of", 1)
        if self.best_of is not None and self.n > self.best_of:
            raise ValueError(f"n={self.n} samples cannot be returned of best_of={self.best_of} drawn: raise best_of")
        self._read_counts()
        read_int_field(self, "top_k", -1)
        self._read_distribution()
        self._read_penalties()
        self._read_lists("sample")
        self._read_text_flags()

    def _read_distribution(self):
        self._read_temperature("0 (greedy) or more")
        read_number_field(self, "top_p", 0.0, 1.0, "in (0, 1]")
        if self.top_p == 0:
            raise ValueError("top_p must be in (0, 1], got 0: for greedy decoding use temperature=0")
        read_number_field(self, "min_p", 0.0, 1.0, "in [0, 1]")
        if self.is_greedy and self.num_samples > 1:
            raise ValueError(
                f"temperature=0 gives the same tokens every time, but {self.num_samples} samples were asked for: "
                "set temperature above 0, or n=1 and best_of=1"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def num_samples(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def num_returned(self) -> int:
        return self.n
