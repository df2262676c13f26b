"""What a user may ask of one beam search: checked when the object is made, with the words of `SamplingParams`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxpaged.api.checks import read_flags, read_int_field, read_number_field, read_optional_int, settle
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.values import read_int, read_list, shortened

#: A generated length raised to a power beyond this could leave the range of float32.
LENGTH_PENALTY_LIMIT = 5.0
#: Sums of log-probabilities must stay far above -1e9, which stands for "no beam".
MIN_DRAWN_TEMPERATURE = 0.01
MAX_DIVERSITY_PENALTY = 100.0


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams(RequestParams):
    """How one request is searched and when the search ends; the semantics are those of transformers 5. All arguments go
    by name.

    The search keeps the `beam_width` continuations with the highest sum of log-probabilities, and a pool of the
    `beam_width` best finished ones by score: that sum / generated length ** `length_penalty`. A beam finishes at the
    model's end-of-sequence ids, `stop_token_ids` and `stop` strings, if it is then among the best `beam_width`
    candidates, and at `max_tokens`. The token that ends it counts in its length.

    Penalties, biases and `logits_processors` act on log-probabilities, which are not normalised again: the changes are
    part of the sums. `logprobs` are those of each token of a beam under the model alone, with its rank; their sum is
    `cumulative_logprob` where nothing changes them. `temperature` divides log-probabilities where `do_sample`;
    otherwise it is 1, or 0, which is vLLM's word for the same.

    Attributes:
        beam_width: beams that run at a time, and hypotheses that are kept. A list has a number for each step: so many
            beams go on behind the first token, the second, ...; the last number holds for all further steps, and is
            that of the hypotheses.
        n: hypotheses returned, best first (default `beam_width`, of a list the last).
        length_penalty: above 0 favours long hypotheses, below 0 short ones; in [-5, 5].
        early_stopping: True ends the search when `beam_width` hypotheses have finished; False when no running beam of
            its present length can better the worst of them; "never" when none of any length up to `max_tokens` can
            (with a positive `length_penalty`; otherwise the same as False).
        num_beam_groups, diversity_penalty: so many groups of beams search apart, one after the other in each step; a
            token that earlier groups chose c times in this step loses c * `diversity_penalty`.
        do_sample: draw candidates without replacement, from the softmax of their sums, instead of taking the best.
    """

    beam_width: int | Sequence[int]
    n: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    do_sample: bool = False

    def __post_init__(self):
        self._read_widths()
        read_optional_int(self, "n", 1)
        if self.n is not None and self.n > self.widths[-1]:
            raise ValueError(
                f"n={self.n} hypotheses cannot be returned of the beam_width={self.widths[-1]} that are kept: "
                "raise beam_width"
            )
        self._read_counts()
        self._read_ending()
        self._read_drawing()
        self._read_groups()
        self._read_penalties()
        self._read_lists("beam")
        self._read_text_flags()

    def _read_widths(self):
        if isinstance(self.beam_width, (Sequence, np.ndarray)) and not isinstance(self.beam_width, (str, bytes)):
            widths = read_list("beam_width", self.beam_width, "numbers of beams, one a step")
            if not len(widths):
                raise ValueError("beam_width=[] has no number of beams: give one a step, or one number for all")
            settle(self, "beam_width", [read_int(f"beam_width[{i}]", width, 1) for i, width in enumerate(widths)])
        else:
            read_int_field(self, "beam_width", 1)

    def _read_ending(self):
        limit = LENGTH_PENALTY_LIMIT
        read_number_field(self, "length_penalty", -limit, limit, f"in [{-limit:g}, {limit:g}]")
        if not (isinstance(self.early_stopping, str) and self.early_stopping == "never"):
            try:
                read_flags(self, "early_stopping")
            except ValueError:
                raise ValueError(
                    f"early_stopping must be False, True or 'never', got {shortened(self.early_stopping)}"
                ) from None

    def _read_drawing(self):
        read_flags(self, "do_sample")
        self._read_temperature("0 or more")
        if self.do_sample and self.temperature == 0:
            raise ValueError("temperature=0 leaves nothing to draw: set temperature above 0, or do_sample=False")
        if self.do_sample and self.temperature < MIN_DRAWN_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature} is too low for beams that are drawn: set {MIN_DRAWN_TEMPERATURE} or "
                "more, or do_sample=False, to which it comes"
            )
        if not self.do_sample and self.temperature not in (0, 1):
            raise ValueError(f"temperature={self.temperature} would not be used: set do_sample=True, or temperature=1")

    def _read_groups(self):
        read_int_field(self, "num_beam_groups", 1)
        most = MAX_DIVERSITY_PENALTY
        read_number_field(self, "diversity_penalty", 0.0, most, f"0 or more, and at most {most:g}")
        if self.num_beam_groups > 1 and not isinstance(self.beam_width, int):
            raise ValueError(
                f"num_beam_groups={self.num_beam_groups} share one beam_width: give a number instead of a list"
            )
        if isinstance(self.beam_width, int) and self.beam_width % self.num_beam_groups:
            raise ValueError(
                f"beam_width={self.beam_width} cannot be split into num_beam_groups={self.num_beam_groups} groups of "
                "the same width: make it a multiple"
            )
        if self.num_beam_groups == 1 and self.diversity_penalty:
            raise ValueError(
                f"diversity_penalty={self.diversity_penalty} acts between groups of beams: raise num_beam_groups"
            )
        if self.num_beam_groups > 1 and not self.diversity_penalty:
            raise ValueError(
                f"num_beam_groups={self.num_beam_groups} without a diversity_penalty finds the same beams in every "
                "group: set it above 0"
            )
        if self.num_beam_groups > 1 and self.do_sample:
            raise ValueError(
                f"do_sample=True draws beams that differ, num_beam_groups={self.num_beam_groups} searches for them: "
                "use one of the two"
            )

    @property
    def num_returned(self) -> int:
        return self.widths[-1] if self.n is None else self.n

    @property
    def widths(self) -> tuple[int, ...]:
        """Beams behind each step; the last number holds for all further ones."""
        return (self.beam_width,) if isinstance(self.beam_width, int) else tuple(self.beam_width)

    @property
    def num_samples(self) -> int:
        """The most beams that run at a time."""
        return max(self.widths)

    @property
    def group_width(self) -> int:
        """The most beams of one of the `num_beam_groups`."""
        return self.num_samples // self.num_beam_groups

    @property
    def group_widths(self) -> tuple[int, ...]:
        """`widths` of one of them."""
        return tuple(width // self.num_beam_groups for width in self.widths)
