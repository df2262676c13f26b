"""Workloads of the generation benchmark, by a name that says their lengths: what jaxpaged and each peer is given.

    256x128+512        256 prompts of 128 tokens, 512 new ones each
    48x512+192x8       8 samples of each prompt
    chat384            384 requests with lengths as in chats: log-normal, prompts of 200 tokens and answers of 280 on
                       average, up to 1,024 each

Prompts are random tokens, ends of sequence are ignored, so all who run a workload generate as many tokens.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

DEFAULT = ("chat384", "256x128+512", "32x2048+128", "1x128+256", "48x512+192x8")
#: Token ids below are left out: control tokens in most vocabularies.
FIRST_TOKEN = 10
CHAT_LIMIT = 1024
#: Requests, samples of each, and tokens that a name may ask for.
MOST = 1_000_000


class GenerationWorkload(NamedTuple):
    name: str
    prompts: list[list[int]]
    output_lens: list[int]
    num_samples: int = 1

    @property
    def num_generated(self) -> int:
        return self.num_samples * sum(self.output_lens)


def make_workload(name: str, vocab_size: int, seed: int, longest: int) -> GenerationWorkload:
    """ValueError where the name says no lengths, or a request of more than `longest` tokens."""
    rng = np.random.default_rng(seed)
    lengths = re.fullmatch(r"chat([0-9]+)|([0-9]+)x([0-9]+)\+([0-9]+)(?:x([0-9]+))?", name)
    if lengths is None:
        raise ValueError(f"{name}: no workload; write one as 256x128+512, 48x512+192x8 or chat384")
    numbers = [int(one) for one in lengths.groups() if one is not None]
    if not 1 <= min(numbers) <= max(numbers) <= MOST:
        raise ValueError(f"{name}: counts and lengths are numbers from 1 to {MOST:,}")
    count, num_samples = numbers[0], int(lengths[5] or 1)
    if lengths[1]:
        most = min(CHAT_LIMIT, longest // 2)
        prompt_lens, output_lens = _log_normal(rng, 200, 0.9, most, count), _log_normal(rng, 280, 0.7, most, count)
    else:
        prompt_lens, output_lens = [numbers[1]] * count, [numbers[2]] * count
    asked = max(map(sum, zip(prompt_lens, output_lens, strict=True)))
    if asked > longest:
        raise ValueError(f"{name}: a request of {asked:,} tokens, but the model or --max-model-len has {longest:,}")
    prompts = [rng.integers(FIRST_TOKEN, vocab_size, length).tolist() for length in prompt_lens]
    return GenerationWorkload(name, prompts, output_lens, num_samples)


def _log_normal(rng: np.random.Generator, mean: float, sigma: float, most: int, count: int) -> list[int]:
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(drawn.astype(int), 4, most).tolist()
