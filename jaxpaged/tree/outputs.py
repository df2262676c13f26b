"""What the calls of a tree return: log-probabilities as numpy arrays, one row a node."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from jaxpaged.api.values import FLOAT32_MAX, as_int, read_number, shortened
from jaxpaged.tree.batching import likeliest
from jaxpaged.tree.input import read_ids

INT32_MAX = 2**31 - 1
#: Below this the likeliest token is taken: dividing by it could overflow.
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class NextTokens:
    """Log-probabilities of the token that comes next, float32, row i for node i; read-only, so copy before changing.

    Attributes:
        logprobs: f32[n, V], column v for token v; or, with `top=k`, f32[n, k], the likeliest first.
        token_ids: i32[n, k], which tokens these are; None where `logprobs` has the whole vocabulary.
    """

    logprobs: np.ndarray
    token_ids: np.ndarray | None

    def __len__(self) -> int:
        return len(self.logprobs)

    def rows(self, indices: SequenceOf[int]) -> NextTokens:
        """The rows of some of the nodes, in this order."""
        listed = read_ids("rows", indices)
        if listed and not -len(self) <= min(listed) <= max(listed) < len(self):
            raise ValueError(f"rows {shortened(listed)}: there are rows 0 to {len(self) - 1}")
        chosen = np.array(listed, np.int64)
        return NextTokens(self.logprobs[chosen], None if self.token_ids is None else self.token_ids[chosen])

    def top(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k likeliest: ids i32[n, k] and log-probabilities f32[n, k], best first."""
        width = self.logprobs.shape[1]
        if not 1 <= (as_int(k) or 0) <= width:
            raise ValueError(f"top({shortened(k)}): there are log-probabilities of 1 to {width} tokens a row")
        if self.token_ids is not None:
            return self.token_ids[:, :k], self.logprobs[:, :k]
        values, ids = likeliest(self.logprobs, k)
        return ids, values

    def of(self, tokens: SequenceOf[int]) -> np.ndarray:
        """f32[n]: row i's log-probability of tokens[i]. ValueError for a token of which nothing is known."""
        tokens = read_ids("of", tokens)
        if len(tokens) != len(self):
            raise ValueError(f"{len(tokens)} tokens for {len(self)} rows")
        if self.token_ids is None:
            if tokens and not 0 <= min(tokens) <= max(tokens) < self.logprobs.shape[1]:
                raise ValueError(
                    f"a token of {shortened(tokens)} is outside the vocabulary of {self.logprobs.shape[1]}"
                )
            return np.take_along_axis(self.logprobs, np.array(tokens, np.int64)[:, None], axis=1)[:, 0]
        # Nothing known is as large as INT32_MAX, which any id of no token may as well be.
        chosen = np.array([token if abs(token) < INT32_MAX else INT32_MAX for token in tokens], np.int64)[:, None]
        found = self.token_ids == chosen
        if not found.any(axis=1).all():
            row = int(np.flatnonzero(~found.any(axis=1))[0])
            raise ValueError(
                f"token {shortened(tokens[row])} is not among the {self.logprobs.shape[1]} likeliest of row {row}: "
                "ask for a larger top, or for top=None, the whole vocabulary"
            )
        return self.logprobs[found]

    def sample(
        self, seed: int | np.random.Generator, temperature: float = 1.0, top_p: float = 1.0
    ) -> tuple[list[int], np.ndarray]:
        """Draw one token a row: ids, to be appended as they are, and the model's log-probabilities f32[n] of them.

        Drawn from what is there: with `top=k`, from the k likeliest. `temperature=0` takes the likeliest; `top_p` keeps
        the fewest likeliest tokens that together have at least this share.
        """
        temperature = read_number("temperature", temperature, 0, FLOAT32_MAX, "at least 0, and finite in float32")
        top_p = read_number("top_p", top_p, 0, 1, "in (0, 1]")
        if top_p == 0:
            raise ValueError("top_p must be in (0, 1], got 0: for the likeliest token use temperature=0")
        if not isinstance(seed, np.random.Generator) and (as_int(seed) is None or seed < 0):
            raise ValueError(f"seed must be an integer of at least 0 or a numpy Generator, got {shortened(seed)}")
        if temperature < MIN_TEMPERATURE:
            columns = self.logprobs.argmax(axis=1)
        else:
            # One uniform number a row finds its token in the cumulated weights.
            weights = np.exp(_nucleus((self.logprobs - self.logprobs.max(axis=1, keepdims=True)) / temperature, top_p))
            cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
            points = np.random.default_rng(seed).random(len(self)) * cumulative[:, -1]
            points = np.minimum(points, np.nextafter(cumulative[:, -1], 0))  # rounding must not reach past the last
            pairs = zip(cumulative, points, strict=True)
            columns = np.array([np.searchsorted(row, point, side="right") for row, point in pairs], np.int64)
        chosen = np.take_along_axis(self.logprobs, columns[:, None], axis=1)[:, 0]
        ids = columns if self.token_ids is None else self.token_ids[np.arange(len(self)), columns]
        return ids.tolist(), chosen


def _nucleus(logits: np.ndarray, top_p: float) -> np.ndarray:
    """[n, V], the highest of each row 0, with -inf for what top_p excludes."""
    if top_p == 1 or not logits.size:
        return logits
    order = np.argsort(-logits, axis=1, kind="stable")
    weights = np.exp(np.take_along_axis(logits, order, 1))
    before = np.cumsum(weights, axis=1) - weights
    is_within = before < top_p * weights.sum(axis=1, keepdims=True)
    is_within[:, 0] = True  # the likeliest, though so small a share may round to nothing
    kept = np.empty(logits.shape, bool)
    np.put_along_axis(kept, order, is_within, axis=1)
    return np.where(kept, logits, -np.inf)


@dataclass(frozen=True)
class Appended(NextTokens):
    """What `append` returns: the next tokens, and how likely those were that were appended.

    Attributes:
        token_logprobs: for each node f32[k], of the k tokens appended to it.
        token_ranks: for each node i32[k]; 1 says that greedy decoding would have chosen this token.
    """

    token_logprobs: list[np.ndarray]
    token_ranks: list[np.ndarray]

    @property
    def sums(self) -> np.ndarray:
        """f64[n]: the log-probability of all that was appended to each node."""
        return _sums(self.token_logprobs)


@dataclass(frozen=True)
class Scores:
    """How likely given continuations are, in the order in which they were given.

    Attributes:
        token_logprobs: for each continuation f32[its length].
        token_ranks: for each i32[its length]; 1 is the likeliest token.
    """

    token_logprobs: list[np.ndarray]
    token_ranks: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.token_logprobs)

    @property
    def sums(self) -> np.ndarray:
        """f64[n]: the log-probability of each whole continuation."""
        return _sums(self.token_logprobs)


def _sums(rows: list[np.ndarray]) -> np.ndarray:
    return np.array([row.sum(dtype=np.float64) for row in rows], np.float64)
