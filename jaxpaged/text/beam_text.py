"""The text of beams: when a stop string ends one, and what is left of its text then.

A beam's text is made anew for every question, since beams fork at every step; samples have a stream each instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.text.stream import decode_continuation, find_stop
from jaxpaged.text.tokenizer import Tokenizer


class BeamText:
    """Output token ids of one request's beams as text."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: BeamSearchParams):
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._params = params

    def find_stop(self, output_ids: Sequence[int]) -> tuple[int, str] | None:
        """Where in the text the first stop string begins, and which it is; as for samples, none before min_tokens."""
        params = self._params
        if len(output_ids) < params.min_tokens:
            return None
        too_early = len(self._decode(output_ids[: params.min_tokens - 1], False)) if params.min_tokens > 1 else 0
        return find_stop(self._decode(output_ids, False), params.stop_strings, too_early)

    def of_output(self, output_ids: Sequence[int], ended_by_token: bool) -> tuple[str, str | None]:
        """The text of a finished beam, cut where it ends, and the stop string that ended it."""
        includes_stop = self._params.include_stop_str_in_output
        if ended_by_token:
            return self._decode(output_ids if includes_stop else output_ids[:-1]), None
        found = self.find_stop(output_ids)
        if found is None:
            return self._decode(output_ids), None
        at, stop = found
        return self._decode(output_ids)[: at + len(stop) if includes_stop else at], stop

    def _decode(self, output_ids: Sequence[int], is_finished: bool = True) -> str:
        """With an incomplete character at the end only where no more tokens come."""
        skip = self._params.skip_special_tokens
        return decode_continuation(self._tokenizer, self._prompt_ids, output_ids, skip, is_finished)
