"""The rotary position embedding of a model, hashable as all configuration: base frequency, and how it is scaled."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from jaxpaged.config.checks import MAX_SIZE, check_choice, check_flag, check_number, check_size

SCALINGS = ("none", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and, for contexts longer than trained, how frequencies are scaled.

    * "linear" divides every frequency by `factor`.
    * "llama3" does so only for wavelengths longer than `original_max_position / low_freq_factor`, blends up to
      `original_max_position / high_freq_factor`, and leaves shorter wavelengths alone (Llama 3.1 model card).
    * "yarn" blends too, between the rotations that turn `beta_fast` and `beta_slow` times over the original length.
    * "dynamic" raises the base with the length of the context; "longrope" divides each frequency by a number of its
      own, of `long_factors` if the context is longer than the original length, else of `short_factors`.

    What dynamic and longrope compute depends on a length. In transformers it is that of the batch at hand, so the keys
    of one sequence may be those of several bases, and its tokens depend on what runs beside it. Here it is
    `context_len`, one for all that an engine runs: `for_length` settles it, as the longest sequence that may come. An
    engine that takes nothing beyond the original length computes what transformers does there.
    """

    theta: float = 10_000.0
    scaling: str = "none"  # one of SCALINGS
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float = 1.0  # cosines and sines are multiplied by it (yarn, longrope)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn blends between whole rotations
    short_factors: tuple[float, ...] = ()  # one for each rotation, head_dim / 2
    long_factors: tuple[float, ...] = ()
    context_len: int | None = None  # None: not beyond original_max_position

    def __post_init__(self):
        check_choice("rope scaling", self.scaling, SCALINGS)
        check_number("rope theta", self.theta, 1.0)
        if self.theta == 1:
            raise ValueError("rope theta must be above 1, got 1: every rotation would turn alike")
        check_number("rope factor", self.factor, 1.0, MAX_SIZE)
        for name in ("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"):
            check_number(f"rope {name}", getattr(self, name), 0)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}"
            )
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"rope beta_fast={self.beta_fast} must not be below beta_slow={self.beta_slow}")
        check_size("rope original_max_position", self.original_max_position)
        check_flag("rope truncate", self.truncate)
        for name in ("short_factors", "long_factors"):
            for factor in getattr(self, name):
                check_number(f"rope {name}", factor, 0)
        if self.context_len is not None:
            check_size("rope context_len", self.context_len)

    @property
    def depends_on_length(self) -> bool:
        return self.scaling in ("dynamic", "longrope")

    def for_length(self, length: int) -> RopeConfig:
        """The same for an engine whose sequences have at most `length` tokens."""
        return dataclasses.replace(self, context_len=length) if self.depends_on_length else self

    def check_head_dim(self, head_dim: int) -> None:
        if head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, got {head_dim}")
        if self.scaling == "dynamic" and head_dim < 4:
            raise ValueError(f"dynamic rope scaling needs a head_dim of at least 4, got {head_dim}")
        if self.scaling == "longrope":
            for name in ("short_factors", "long_factors"):
                if len(getattr(self, name)) != head_dim // 2:
                    raise ValueError(
                        f"rope {name} has {len(getattr(self, name))} numbers, head_dim={head_dim} needs {head_dim // 2}"
                    )

    @classmethod
    def from_dict(cls, name: str, values: Any) -> RopeConfig:
        """Reads back what `dataclasses.asdict` gave; `name` is for the message."""
        if not isinstance(values, dict):
            raise ValueError(f"{name} must be an object, got {values!r}")
        if unknown := sorted(set(values) - {f.name for f in dataclasses.fields(cls)}):
            raise ValueError(f"{name} has the unknown keys {unknown}")
        values = dict(values)
        for key in ("short_factors", "long_factors"):
            if not isinstance(values.get(key, []), list | tuple):
                raise ValueError(f"{name} {key} must be a list of numbers, got {values[key]!r}")
            values[key] = tuple(values.get(key, ()))
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
