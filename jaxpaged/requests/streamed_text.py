"""The text of one sample while it is generated, of which only what will stay is given."""

from __future__ import annotations

from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.api.values import shortened
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.text.stream import TextStream
from jaxpaged.text.tokenizer import Tokenizer


def check_streamable(params: RequestParams) -> None:
    """ValueError where there is more than one text, or none."""
    if not isinstance(params, SamplingParams):
        raise ValueError(f"stream takes one SamplingParams, got {shortened(params)}")
    if params.num_samples != 1 or not params.detokenize:
        wrong = "has detokenize=False" if params.num_samples == 1 else f"asks for {params.num_samples} samples"
        raise ValueError(f"stream gives the text of one sample, and the request {wrong}: use generate_iter")


class StreamedText:
    """Pieces of a sample, by default of a group's first: `grow` after each step, or `push` with each token, and
    `finish` with the text of the finished one."""

    def __init__(self, group: SequenceGroup, tokenizer: Tokenizer, sequence: Sequence | None = None):
        self._sequence = sequence or group.sequences[0]
        prompt_ids = self._sequence.token_ids[: group.prompt_len]
        self._stream = TextStream(tokenizer.decode, prompt_ids, group.params.skip_special_tokens)
        self._stops = group.params.stop_strings
        self._num_pushed = 0
        self._text = ""
        self._num_given = 0

    def grow(self) -> str:
        """What is new, of a sample that goes on; of one that has ended the last token may not be part of the text."""
        if self._sequence.finish_reason is not None:
            return ""
        new = self._sequence.output_ids[self._num_pushed :]
        self._num_pushed += len(new)
        return "".join([self.push(token_id) for token_id in new])

    def push(self, token_id: int) -> str:
        """What stays of the text with one more token, of a sample that goes on."""
        self._text += self._stream.push(token_id)
        return self._give(self._text[: len(self._text) - begun_stop(self._text, self._stops)])

    def finish(self, text: str) -> str:
        """What is left of the whole text."""
        return self._give(text)

    def _give(self, text: str) -> str:
        piece = text[self._num_given :]
        self._num_given += len(piece)
        return piece


def begun_stop(text: str, stops: tuple[str, ...]) -> int:
    """Characters at the end of a text that begin one of the stop strings: the most that do."""
    lengths = (n for stop in stops for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)
