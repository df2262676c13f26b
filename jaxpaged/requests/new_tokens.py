"""Tells a caller of every token when it has come, with the text that it adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxpaged.api.outputs import NewToken
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.api.values import shortened
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.requests.answer import text_of
from jaxpaged.requests.streamed_text import StreamedText
from jaxpaged.text.tokenizer import Tokenizer

OnToken = Callable[[NewToken], object]


class TokenTeller:
    """Calls `on_token` with what each step has brought."""

    def __init__(self, on_token: OnToken, groups: Iterable[SequenceGroup], tokenizer: Tokenizer | None):
        if not callable(on_token):
            raise ValueError(f"on_token must be a function of one argument, got {shortened(on_token)}")
        for i, group in enumerate(groups):
            if not isinstance(group.params, SamplingParams):
                raise ValueError(
                    f"on_token is told of tokens that stand, and those of a beam search (prompt {i}) do so at its end "
                    "alone: use watch_beams, or leave it out"
                )
        self._on_token = on_token
        self._tokenizer = tokenizer
        self._told: dict[SequenceGroup, dict[int, _Sample]] = {}

    def tell(self, running: Iterable[SequenceGroup], finished: Iterable[SequenceGroup]) -> None:
        """After a step: of the groups that go on, and of those that have ended with it."""
        for group in running:
            self._tell(group)
        for group in finished:
            self._tell(group)
            self._told.pop(group, None)

    def _tell(self, group: SequenceGroup) -> None:
        samples = self._told.setdefault(group, {})
        for sequence in group.sequences:
            sample = samples.get(sequence.sample_index)
            if sample is None:
                sample = samples[sequence.sample_index] = _Sample(group, sequence, self._tokenizer)
            for token in sample.new_tokens():
                self._on_token(token)


class _Sample:
    """One sample, and how many of its tokens were told."""

    def __init__(self, group: SequenceGroup, sequence: Sequence, tokenizer: Tokenizer | None):
        self._group = group
        self._sequence = sequence
        self._tokenizer = tokenizer
        has_text = tokenizer is not None and group.params.detokenize
        self._text = StreamedText(group, tokenizer, sequence) if tokenizer is not None and has_text else None
        self._num_told = 0

    def new_tokens(self) -> Iterable[NewToken]:
        sequence = self._sequence
        known = len(sequence.token_ids) - sequence.prompt_len
        while self._num_told < known:
            token_id = sequence.token_ids[sequence.prompt_len + self._num_told]
            self._num_told += 1
            reason = sequence.finish_reason if self._num_told == known else None
            yield NewToken(
                self._group.request_id, sequence.sample_index, token_id, self._piece(token_id, reason), reason
            )

    def _piece(self, token_id: int, finish_reason: str | None) -> str:
        if self._text is None:
            return ""
        if finish_reason is None:
            return self._text.push(token_id)
        return self._text.finish(text_of(self._group, self._sequence, self._tokenizer))
