"""A stand-in for `LLM` in the tests of the command: outputs are a function of (prompt, seed, sample) alone, as the real
one's are, and requests finish in another order than they came.

    python tests/fake_llm.py generate MODEL ...     the command with the fake; FAKE_DELAY seconds before each result
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from types import SimpleNamespace

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.outputs import CompletionOutput, KVUsage, Logprob, RequestMetrics, RequestOutput
from jaxpaged.config import CacheConfig
from jaxpaged.host.account.accounting import RunStats

MAX_MODEL_LEN = 200
CHARACTERS = 'abcdefghij klmnopqrstuvwxyzäß€\n"\\ '


class FakeTokenizer:
    """One token a Unicode character."""

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(chr(i) for i in token_ids)


def _text(prompt):
    """Of a prompt without special tokens, of which this tokenizer has none: its first character is written ~. Of a
    conversation its messages, which a template of "none" has not."""
    if isinstance(prompt, dict) and "messages" in prompt:
        if prompt.get("chat_template") == "none":
            raise ValueError("the chat template says: none")
        return "".join(f"{message['role']}: {message['content']}\n" for message in prompt["messages"])
    return "~" + prompt["prompt"][1:] if isinstance(prompt, dict) else prompt


class FakeLLM:
    def __init__(self, model, seed=0, num_pages=None, **options):
        self.tokenizer = FakeTokenizer()
        self.max_len = MAX_MODEL_LEN if num_pages is None else num_pages
        self.delay = float(os.environ.get("FAKE_DELAY", "0"))
        self.last_run = RunStats.for_cache(CacheConfig(16, 11))
        self.served = []  # request ids, in the order of their results

    def check_request(self, prompt, params, shared_prefix=None):
        num_tokens = len(_text(prompt)) + len(_text(shared_prefix or ""))
        if not 1 <= num_tokens < self.max_len:
            raise ValueError(f"prompt of {num_tokens} tokens; 1 to {self.max_len - 1} are possible")

    def warm_up(self, sampling_params):
        FakeLLM.warmed_up = sampling_params
        return SimpleNamespace(compiled=7, read=2, seconds=1.5, folder="folder", folder_bytes=3_000_000)

    def generate_iter(self, prompts, sampling_params, request_ids=None, shared_prefix=None):
        prompts = [_text(shared_prefix) + _text(prompt) if shared_prefix else _text(prompt) for prompt in prompts]
        requests = list(zip(request_ids, prompts, sampling_params, strict=True))
        for request_id, prompt, params in sorted(requests, key=lambda r: hashlib.md5(r[0].encode()).digest()):
            self._wait()
            self.served.append(request_id)
            yield self._output(request_id, prompt, params)

    def _wait(self):
        if self.delay:
            try:
                time.sleep(self.delay)
            except KeyboardInterrupt:
                pass  # as in a callback of jax: Control-C must end the command all the same

    def _output(self, request_id, prompt, params):
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        is_search = isinstance(params, BeamSearchParams)
        samples = [self._sample(ids, params, i) for i in range(params.num_returned if is_search else params.n)]
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(self._logprobs(i) for i in ids[1:])]
        return RequestOutput(
            request_id, prompt if isinstance(prompt, str) else None, ids, prompt_logprobs, samples, True,
            RequestMetrics(0.0, 0.0, 0.0, time.time()), KVUsage(1, 1, 0, 0, 0, 0, 0),
        )  # fmt: skip

    def _sample(self, ids, params, index):
        count = min(params.max_tokens, MAX_MODEL_LEN)
        is_search = isinstance(params, BeamSearchParams)
        seed = 0 if is_search or params.is_greedy else params.seed
        digest = hashlib.shake_128(repr((ids, seed, index)).encode()).digest(count)
        token_ids = [ord(CHARACTERS[b % len(CHARACTERS)]) for b in digest]
        logprobs = None if params.logprobs is None else [self._logprobs(i) for i in token_ids]
        return CompletionOutput(index, self.tokenizer.decode(token_ids), token_ids, -0.5, logprobs, "length", None,
                                -0.25 - index if is_search else None)  # fmt: skip

    def _logprobs(self, token_id):
        return {token_id: Logprob(-0.25, 2, chr(token_id)), 33: Logprob(-0.1, 1, "!")}


if __name__ == "__main__":
    from jaxpaged.cli.main import main

    sys.exit(main(make_llm=FakeLLM))
