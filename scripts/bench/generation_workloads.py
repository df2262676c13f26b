"""Workloads of the generation benchmark, by a name that says their lengths: what jaxpaged and each peer is given.

    256x128+512        256 prompts of 128 tokens, 512 new ones each
    48x512+192x8       8 samples of each prompt
    chat384            384 requests with lengths as in chats: log-normal, prompts of 200 tokens and answers of 280 on
                       average, up to 1,024 each

Where requests begin alike, which prefix caching can find:

    500x2048/128+64    500 questions of 128 tokens behind the same 2,048, in one call
    64x256+128t8       64 conversations of 8 turns: in each, 256 new tokens behind all that was said, 128 answered
    48x512+192x8c4     8 samples of each prompt in each of 4 calls

Prompts are random tokens, ends of sequence are ignored, so all who run a workload generate as many tokens. What a run
has left to be found is forgotten before the next: what counts is found within a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

DEFAULT = ("chat384", "256x128+512", "32x2048+128", "1x128+256", "48x512+192x8")
PREFIXES = ("500x2048/128+64", "64x256+128t8", "48x512+192x8c4")
#: Token ids below are left out: control tokens in most vocabularies.
FIRST_TOKEN = 10
CHAT_LIMIT = 1024
#: Requests, samples of each, and tokens that a name may ask for.
MOST = 1_000_000
NAME = (
    r"chat(?P<chats>[0-9]+)|(?P<count>[0-9]+)x(?P<prompt>[0-9]+)(?:/(?P<own>[0-9]+))?\+(?P<new>[0-9]+)"
    r"(?:x(?P<samples>[0-9]+))?(?:t(?P<turns>[0-9]+)|c(?P<calls>[0-9]+))?"
)


class GenerationWorkload(NamedTuple):
    name: str
    prompts: list[list[int]]
    output_lens: list[int]
    num_samples: int = 1
    num_calls: int = 1  # of the same prompts, if there are no `turns`
    turns: tuple[list[list[int]], ...] = ()  # what is said in each further call, behind a prompt and its answer

    @property
    def num_generated(self) -> int:
        return self.num_samples * sum(self.output_lens) * self.num_calls

    def run(self, generate: Callable[[list[list[int]], list[int]], list[list[int]]]) -> None:
        """Every call; `generate` takes prompts and lengths of answers, and gives the first answer to each prompt."""
        prompts = self.prompts
        for call in range(self.num_calls):
            answers = generate(prompts, self.output_lens)
            if call < len(self.turns):
                said = zip(prompts, answers, self.turns[call], strict=True)
                prompts = [[*prompt, *answer, *more] for prompt, answer, more in said]

    def lengths(self) -> Iterator[tuple[int, int]]:
        """Of each request of each call: tokens of its prompt, and of an answer."""
        for call in range(self.num_calls):
            for i, (prompt, new) in enumerate(zip(self.prompts, self.output_lens, strict=True)):
                yield len(prompt) + sum(new + len(turn[i]) for turn in self.turns[:call]), new


def make_workload(name: str, vocab_size: int, seed: int, longest: int) -> GenerationWorkload:
    """ValueError where the name says no lengths, or a request of more than `longest` tokens."""
    rng = np.random.default_rng(seed)
    lengths = re.fullmatch(NAME, name)
    if lengths is None:
        raise ValueError(
            f"{name}: no workload; write one as 256x128+512, 48x512+192x8 or chat384, or with common beginnings as "
            + ", ".join(PREFIXES)
        )
    asked = {part: int(number) for part, number in lengths.groupdict().items() if number is not None}
    if not 1 <= min(asked.values()) <= max(asked.values()) <= MOST:
        raise ValueError(f"{name}: counts and lengths are numbers from 1 to {MOST:,}")
    if "chats" in asked:
        most, count = min(CHAT_LIMIT, longest // 2), asked["chats"]
        prompt_lens, output_lens = _log_normal(rng, 200, 0.9, most, count), _log_normal(rng, 280, 0.7, most, count)
    else:
        prompt_lens, output_lens = [asked.get("own", asked["prompt"])] * asked["count"], [asked["new"]] * asked["count"]

    def random_tokens(length: int) -> list[int]:
        return rng.integers(FIRST_TOKEN, vocab_size, length).tolist()

    prefix = random_tokens(asked["prompt"]) if "own" in asked else []
    turns = tuple([random_tokens(length) for length in prompt_lens] for _ in range(asked.get("turns", 1) - 1))
    workload = GenerationWorkload(
        name, [prefix + random_tokens(length) for length in prompt_lens], output_lens, asked.get("samples", 1),
        asked.get("turns", asked.get("calls", 1)), turns,
    )  # fmt: skip
    most = max(map(sum, workload.lengths()))
    if most > longest:
        raise ValueError(f"{name}: a request of {most:,} tokens, but the model or --max-model-len has {longest:,}")
    return workload


def _log_normal(rng: np.random.Generator, mean: float, sigma: float, most: int, count: int) -> list[int]:
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(drawn.astype(int), 4, most).tolist()
