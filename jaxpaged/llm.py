"""The user's door: prompts in, `RequestOutput`s out, with vLLM's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from jaxpaged.beam_params import BeamSearchParams
from jaxpaged.beam_snapshot import BeamSnapshot
from jaxpaged.beam_text import BeamText
from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.host.accounting import RunStats
from jaxpaged.host.arrivals import set_arrivals
from jaxpaged.host.beam_logprobs import logprobs_of
from jaxpaged.host.beam_state import BeamState, Hypothesis, best_hypotheses
from jaxpaged.host.beam_watch import take_snapshot
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.trace import TraceRecorder
from jaxpaged.loading import EngineOptions, build_engine
from jaxpaged.outputs import CompletionOutput, KVUsage, Logprob, RequestMetrics, RequestOutput
from jaxpaged.progress import ProgressBar
from jaxpaged.prompts import Prompt, prompt_token_ids, read_prompt, read_prompts
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.tokenizer import StopStringStream, Tokenizer, decode_continuation, find_tokenizer, need_tokenizer
from jaxpaged.tree import Tree
from jaxpaged.tree_steps import EngineSteps

Params = SamplingParams | BeamSearchParams
Prompts = Any  # text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, or a list of these


class LLM:
    """A model, its tokenizer and its page pool, ready to generate.

    Attributes:
        tokenizer: None where the checkpoint has none; prompts are then token ids and outputs have no text.
        last_run: what the latest run did: steps, seconds, the pool's use over time (host/accounting.py, `RunStats`).
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | Tokenizer | None = None,
        dtype: str = "auto",
        load_format: str = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
        memory_utilization: float = 0.9,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        attention: str = "auto",
        shared_prefixes: bool = False,
        preemption: str = "auto",
        swap_space_gib: float = 4.0,
        kv_cache: str = "paged",
        watermark: float = 0.01,
    ):
        """Open a checkpoint directory (native or Hugging Face), load its weights and allocate the page pool.

        Args:
            model: the directory.
            tokenizer: a file, a directory or an object with `encode` and `decode`; by default the checkpoint's own.
            dtype: of weights, activations and KV: "float32", "bfloat16", "float16"; "auto" is the checkpoint's, but
                float32 on a CPU.
            load_format: "auto", "native", "safetensors", or "dummy": random weights, from config.json alone.
            seed: of requests that have none of their own (and of dummy weights).
            max_model_len: tokens of prompt and output at most; by default the model's positions.
            page_size: token positions in a page.
            num_pages: of the pool, page 0 included, which is never used; by default what fits the device.
            memory_utilization: share of the device's memory for weights, pool and temporaries.
            max_num_seqs: sequences that run together at most.
            max_num_batched_tokens: prompt tokens in one step at most; longer prompts are computed in chunks.
            attention: "pallas" (a Hopper GPU, 16-bit floats), "reference" (XLA, anywhere), or "auto", the best of the
                two that runs here.
            shared_prefixes: read the pages that the samples of a prompt share once for all of them in each step, where
                that saves enough; with the "pallas" kernels only.
            preemption: how a request gives way when pages run out: "swap" (its pages are kept in host memory),
                "recompute" (they are computed again), or "auto", for each request what costs less.
            swap_space_gib: host memory for swapped pages; on a GPU it is pinned, when the engine starts. A request for
                which there is no room is computed again.
            kv_cache: "paged", or a baseline with the same model, sampler and scheduler and the same tokens. They take
                what a request needs when it is admitted. Consecutive pages, read by the same kernels:
                "contiguous-max" (`max_model_len`), "contiguous-pow2" (prompt and `max_tokens` rounded up to a power of
                two), "contiguous-oracle" (prompt and `max_tokens`). Dense rows of `max_model_len`, as many as
                `num_pages` pages hold, read by cuDNN or XLA: "dense-slots" (continuous batching), "dense-static"
                (batches that run until their longest ends), "dense-static-global" (until the longest of all would).
                "none": all tokens are computed again for every token. With dense rows and "none", `attention` is
                "auto" (cuDNN where it runs) or "reference" (XLA).
            watermark: share of the pool that admission leaves free for running sequences to grow, besides what their
                next step takes; 0 leaves only that. Of paging alone.

        Raises:
            FileNotFoundError, ValueError: with what was given, what is possible and what to change.
        """
        options = EngineOptions(
            dtype, load_format, seed, max_model_len, page_size, num_pages, memory_utilization, max_num_seqs,
            max_num_batched_tokens, attention, shared_prefixes, preemption,
            swap_space_gib, kv_cache, watermark,
        )  # fmt: skip
        self._options = options
        self._checkpoint = checkpoint = open_checkpoint(model)
        self.tokenizer = find_tokenizer(tokenizer, checkpoint.tokenizer_file)
        self.engine = build_engine(checkpoint, options)
        self._weights = self.engine.params
        self._missing = f"{checkpoint.directory} has no tokenizer.json or tokenizer.model"
        self._seed = seed
        self._num_requests = 0

    @property
    def last_run(self) -> RunStats:
        return self.engine.stats

    def record_trace(self) -> TraceRecorder:
        """Have the next run taken down, step by step; the recorder's `trace` then has what the page pool did."""
        self.engine.recorder = TraceRecorder(self.engine.cache_config)
        return self.engine.recorder

    def generate(
        self,
        prompts: Prompts,
        sampling_params: Params | SequenceOf[Params] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; results in input order. `progress` shows a bar where stderr is a terminal.

        Raises ValueError for a request that cannot run, before any request runs.
        """
        groups = self._make_groups(prompts, sampling_params, None)
        order = {group: i for i, group in enumerate(groups)}
        outputs: list[RequestOutput | None] = [None] * len(groups)
        with ProgressBar(len(groups), lambda: self.last_run, enabled=progress) as bar:
            for done, (group, output) in enumerate(self._run(groups), start=1):
                outputs[order[group]] = output
                bar.update(done)
        return [output for output in outputs if output is not None]

    def generate_iter(
        self,
        prompts: Prompts,
        sampling_params: Params | SequenceOf[Params] | None = None,
        request_ids: SequenceOf[str] | None = None,
        arrival_times: SequenceOf[float] | None = None,
    ) -> Iterator[RequestOutput]:
        """As `generate`, but yields each result as it finishes; `request_id` tells which it is (by default its index).

        `arrival_times`: seconds after the first result is asked for at which each request comes, as from users of a
        service; by default all are there. Requests are checked when this is called, not at the first result. Leaving
        the loop early drops the others.
        """
        groups = self._make_groups(prompts, sampling_params, request_ids)
        set_arrivals(groups, arrival_times)
        return (output for _, output in self._run(groups))

    def beam_search(
        self, prompts: Prompts, params: BeamSearchParams | SequenceOf[BeamSearchParams], progress: bool = True
    ) -> list[RequestOutput]:
        """The best continuations of every prompt, best first, with their `score`; the semantics of transformers 5.

        The same as `generate`, which takes beams, samples and greedy requests in one batch.
        """
        given = params if isinstance(params, SequenceOf) else [params]
        if any(not isinstance(one, BeamSearchParams) for one in given):
            raise ValueError(f"beam_search takes a BeamSearchParams or a list of them, got {params!r}")
        return self.generate(prompts, params, progress)

    def watch_beams(self, prompt: Any, params: BeamSearchParams) -> Iterator[BeamSnapshot]:
        """Search for one prompt and yield where the search stands after every step; the last one has the `output`.

        The request is checked when this is called. Leaving the loop early ends the search.
        """
        if not isinstance(params, BeamSearchParams):
            raise ValueError(f"watch_beams takes a BeamSearchParams, got {params!r}")
        groups = self._make_groups(prompt, params, None)
        if len(groups) != 1:
            raise ValueError(f"watch_beams takes one prompt, got {len(groups)}")
        return self._watch(groups[0])

    def _watch(self, group: SequenceGroup) -> Iterator[BeamSnapshot]:
        step = 0
        with closing(self.engine.run_steps([group])) as steps:
            for finished in steps:
                if max(state.num_generated for state in group.beams) > step:
                    step += 1
                    yield take_snapshot(group, step, self._request_output(group) if finished else None)

    def tree(self) -> Tree:
        """Sequences that you fork, append to and free yourself (tree.py): for searches that `generate` does not have.

        It owns the page pool until it is closed, so it is to be used as `with llm.tree() as tree`. RuntimeError while
        another is open or a run is in progress.
        """
        return Tree(EngineSteps(self.engine), self.tokenizer)

    def warm_up(self, sampling_params: Params | SequenceOf[Params] | None = None) -> None:
        """Compile everything that requests with such parameters can need; no later run of them compiles anything.

        Otherwise programs are compiled when they are first needed. Runs whose parameters together ask for another set
        of features (sampling, filters, penalties, log-probabilities, ...) need programs of their own.
        """
        params = (
            [sampling_params or SamplingParams()] if not isinstance(sampling_params, SequenceOf) else sampling_params
        )
        self.engine.warm_up([self._make_group(Prompt(None, [0]), one, "", seed=0) for one in params])

    def rebuild(self, **options: Any) -> None:
        """Make the engine anew with other options, the weights kept: `llm.rebuild(kv_cache="contiguous-max")`.

        Takes the constructor's arguments, except those that choose the weights. The old pool is freed before the new
        one is made. Raises ValueError as the constructor does; after one, the LLM can only be rebuilt.
        """
        if fixed := sorted({"model", "tokenizer", "dtype", "load_format", "seed"} & set(options)):
            raise ValueError(
                f"{', '.join(fixed)} cannot change without another LLM; rebuild takes the engine's options"
            )
        self._options = dataclasses.replace(self._options, **options)
        self.__dict__.pop("engine", None)  # and with it the pool
        self.engine = build_engine(self._checkpoint, self._options, self._weights)

    def check_request(self, prompt: Any, params: Params) -> None:
        """Raise ValueError where this one request could not run: the errors of `generate`, without running anything."""
        self._make_group(read_prompt(prompt), params, "", seed=0)

    def _make_groups(
        self,
        prompts: Prompts,
        params: Params | SequenceOf[Params] | None,
        request_ids: SequenceOf[str] | None,
    ) -> list[SequenceGroup]:
        """Every request, checked; nothing has run yet."""
        read = read_prompts(prompts)
        all_params = _one_for_each(params, len(read))
        ids = [str(i) for i in range(len(read))] if request_ids is None else list(request_ids)
        if len(ids) != len(read):
            raise ValueError(f"{len(ids)} request_ids for {len(read)} prompts")
        groups = []
        for i, (prompt, one_params, request_id) in enumerate(zip(read, all_params, ids, strict=True)):
            try:
                groups.append(self._make_group(prompt, one_params, request_id, self._request_seed(one_params, i)))
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}" if len(read) > 1 else str(error)) from None
        self._num_requests += len(groups)
        return groups

    def _request_seed(self, params: Params, index: int) -> int:
        """The request's own seed, or one that follows from the LLM's and the number of requests before it."""
        if params.seed is not None:
            return params.seed
        return int(np.random.SeedSequence([self._seed, self._num_requests + index]).generate_state(1, np.uint64)[0])

    def _make_group(self, prompt: Prompt, params: Params, request_id: str, seed: int) -> SequenceGroup:
        model, limits = self.engine.model, self.engine.limits
        params.check_token_ids(model.vocab_size)
        token_ids = self._token_ids(prompt, params)
        for token_id in token_ids:
            if not 0 <= token_id < model.vocab_size:
                raise ValueError(
                    f"token id {token_id} is outside the vocabulary, which has ids 0 to {model.vocab_size - 1}"
                )
        budget = limits.max_model_len if params.max_tokens is None else len(token_ids) + params.max_tokens
        group = SequenceGroup(
            request_id, prompt.text, params, seed,
            sequences=[Sequence(0, token_ids, len(token_ids))],
            max_len=min(budget, limits.max_model_len),
            eos_ids=frozenset() if params.ignore_eos else frozenset(model.eos_token_ids),
            stop_ids=frozenset(params.stop_token_ids or ()),
            make_stream=None if isinstance(params, BeamSearchParams) else self._stream_maker(params, token_ids),
            banned_words=self._banned_words(params),
        )  # fmt: skip
        if group.make_stream:
            group.sequences[0].stream = group.make_stream()
        if isinstance(params, BeamSearchParams):
            self._prepare_search(group, params)
        self.engine.scheduler.check(group.prompt_len, params.num_samples, group.max_len)
        return group

    def _prepare_search(self, group: SequenceGroup, params: BeamSearchParams) -> None:
        group.beams = BeamState.of(params, group.eos_ids | group.stop_ids, group.max_len - group.prompt_len)
        if params.stop_strings and self.tokenizer is not None:
            text = BeamText(self.tokenizer, group.sequences[0].token_ids[:], params)
            group.ends_text = lambda output_ids: text.find_stop(output_ids) is not None

    def _token_ids(self, prompt: Prompt, params: Params) -> list[int]:
        token_ids = prompt_token_ids(prompt, self.tokenizer, self._missing)
        if params.stop_strings or params.bad_words:
            need_tokenizer(self.tokenizer, "stop strings and bad_words need", self._missing)
        return token_ids

    def _stream_maker(self, params: SamplingParams, prompt_ids: list[int]):
        if not params.stop_strings or self.tokenizer is None:
            return None
        tokenizer, stop = self.tokenizer, params.stop_strings
        include, skip = params.include_stop_str_in_output, params.skip_special_tokens
        return lambda: StopStringStream(tokenizer, prompt_ids, stop, include, skip)

    def _banned_words(self, params: Params) -> tuple[tuple[int, ...], ...]:
        """Token ids of `bad_words`, each as it is written at the start of a text and behind a space."""
        if not params.bad_words or self.tokenizer is None:
            return ()
        words = {}
        for word in params.bad_words:
            for text in (word, " " + word.lstrip()):
                words[tuple(self.tokenizer.encode(text, add_special_tokens=False))] = None
        return tuple(word for word in words if word)

    def _run(self, groups: list[SequenceGroup]) -> Iterator[tuple[SequenceGroup, RequestOutput]]:
        for group in self.engine.run(groups):
            yield group, self._request_output(group)

    def _request_output(self, group: SequenceGroup) -> RequestOutput:
        params = group.params
        pages = group.pages
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=group.sequences[0].token_ids[: group.prompt_len],
            prompt_logprobs=None
            if params.prompt_logprobs is None
            else [None, *map(self._logprobs, group.prompt_logprobs)],
            outputs=self._completions(group),
            finished=True,
            metrics=RequestMetrics(
                group.arrival_time, group.first_scheduled_time, group.first_token_time, group.finished_time
            ),
            kv=KVUsage(
                pages.physical_at_peak, pages.logical_at_peak, pages.most_shared, pages.copied,
                group.num_preemptions, group.recomputed_tokens, group.num_swaps,
            ),
        )  # fmt: skip

    def _completions(self, group: SequenceGroup) -> list[CompletionOutput]:
        params = group.params
        if isinstance(params, BeamSearchParams):
            best = best_hypotheses(group.beams, params.num_returned)
            return [self._beam(group, params, hypothesis, i) for i, hypothesis in enumerate(best)]
        chosen = group.sequences
        if params.num_samples > params.n:
            chosen = sorted(chosen, key=lambda sequence: -sequence.cumulative_logprob)[: params.n]
        return [self._completion(group, sequence, i) for i, sequence in enumerate(chosen)]

    def _beam(self, group: SequenceGroup, params: BeamSearchParams, found: Hypothesis, index: int) -> CompletionOutput:
        last = found.token_ids[-1]
        ended_by_token = last in group.eos_ids | group.stop_ids
        text, stop = "", None
        if self.tokenizer is not None and params.detokenize:
            beam_text = BeamText(self.tokenizer, group.sequences[0].token_ids[: group.prompt_len], params)
            text, stop = beam_text.of_output(found.token_ids, ended_by_token)
        if last in group.stop_ids - group.eos_ids:
            stop = last
        logprobs = None
        if params.logprobs is not None:
            entries = logprobs_of(found, group.beams[found.search].logprobs, params.logprobs)
            logprobs = [self._logprobs(entry) for entry in entries]
        return CompletionOutput(
            index, text, found.token_ids, found.cumulative_logprob, logprobs,
            "length" if stop is None and not ended_by_token else "stop", stop, found.score,
        )  # fmt: skip

    def _completion(self, group: SequenceGroup, sequence: Sequence, index: int) -> CompletionOutput:
        assert sequence.finish_reason is not None
        wants_logprobs = group.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=self._text(group, sequence),
            token_ids=sequence.output_ids,
            cumulative_logprob=sequence.cumulative_logprob,
            logprobs=[self._logprobs(entry) for entry in sequence.logprobs] if wants_logprobs else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def _text(self, group: SequenceGroup, sequence: Sequence) -> str:
        params = group.params
        if self.tokenizer is None or not params.detokenize:
            return ""
        if isinstance(sequence.stop_reason, str) and isinstance(sequence.stream, StopStringStream):
            return sequence.stream.text
        output = sequence.output_ids
        if sequence.finish_reason == "stop" and not params.include_stop_str_in_output:
            output = output[:-1]  # the token that ended it
        prompt = sequence.token_ids[: sequence.prompt_len]
        return decode_continuation(self.tokenizer, prompt, output, params.skip_special_tokens)

    def _logprobs(self, entry: dict[int, tuple[float, int]]) -> dict[int, Logprob]:
        return {
            token_id: Logprob(logprob, rank, self.tokenizer.decode([token_id], False) if self.tokenizer else None)
            for token_id, (logprob, rank) in entry.items()
        }


def _one_for_each(params: Params | SequenceOf[Params] | None, count: int) -> list[Params]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, Params):
        return [params] * count
    if isinstance(params, str) or not isinstance(params, SequenceOf) or any(not isinstance(p, Params) for p in params):
        raise ValueError(
            f"sampling_params must be a SamplingParams or BeamSearchParams or a list of them, got {params!r}"
        )
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts: give one, or one for each prompt")
    return list(params)
