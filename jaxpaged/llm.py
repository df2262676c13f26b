"""The user's door: prompts in, `RequestOutput`s out, with vLLM's names."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Generator, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.beam_snapshot import BeamSnapshot
from jaxpaged.api.messages import is_conversation
from jaxpaged.api.names import OTHER_OPTIONS, VLLM_CHAT, VLLM_REQUESTS, check_names, explains_names
from jaxpaged.api.outputs import RequestOutput
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.api.values import is_list, read_flag, read_path, shortened
from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.config.options import FIXED_OPTIONS, OPTION_NAMES, EngineOptions, lists_options
from jaxpaged.engine.describe import describe_checkpoint
from jaxpaged.engine.engine import Engine, Groups
from jaxpaged.engine.loading import build_engines
from jaxpaged.engine.profile import trace_to
from jaxpaged.engine.replicas import run_together
from jaxpaged.engine.warm_up import WarmUp
from jaxpaged.host.account.accounting import RunStats
from jaxpaged.host.account.trace import TraceRecorder
from jaxpaged.host.arrivals import StreamedGroups, set_arrivals
from jaxpaged.host.beams.beam_watch import take_snapshot
from jaxpaged.host.ownership import Hold, pool_ownership
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.hub import download_remedy, find_model
from jaxpaged.requests.answer import make_output
from jaxpaged.requests.async_outputs import AsyncOutputs, AsyncRuns
from jaxpaged.requests.new_tokens import OnToken, TokenTeller
from jaxpaged.requests.progress import CompilingLine, ProgressBar
from jaxpaged.requests.prompts import Prompt
from jaxpaged.requests.read import RequestReader
from jaxpaged.requests.streamed_text import StreamedText, check_streamable
from jaxpaged.text.chat_template import find_chat_templates
from jaxpaged.text.tokenizer import Tokenizer, find_tokenizer
from jaxpaged.tree.on_engine import EngineSteps
from jaxpaged.tree.tree import Tree

T = TypeVar("T")
Prompts = Any  # text, token ids, {"prompt": text}, {"prompt_token_ids": ids}, {"messages": ...}; many of these; a table

#: What an LLM says when it was closed.
CLOSED = "this LLM was closed, and its weights and pages are freed: make another one"
#: What says which model it is.
FOUND_BY = ("model", "tokenizer", "revision", "download")
#: What is asked for in other places than in a call.
ELSEWHERE = {
    **{name: f"it is an option of the engine: LLM(model, {name}=...)" for name in OPTION_NAMES},
    **{each.name: f"it goes into BeamSearchParams({each.name}=...)" for each in dataclasses.fields(BeamSearchParams)},
    **{each.name: f"it goes into SamplingParams({each.name}=...)" for each in dataclasses.fields(SamplingParams)},
    **VLLM_REQUESTS,
}


def _find(model: str | Path, revision: str | None, download: bool, needs_weights: bool) -> Path:
    """The directory of the model."""
    read_path("model", model)
    return Path(find_model(model, revision, read_flag("download", download), needs_weights)).expanduser()


class LLM:
    """A model, its tokenizer and its page pool, ready to generate.

    One run, tree or other call at a time has the pool, in whichever thread: a second is refused with a RuntimeError
    that names the first, and has then changed nothing. What iterates has it from its first result to its last, or until
    it is closed or dropped. In a process that was forked off, everything is refused.

    Attributes:
        tokenizer: None where the checkpoint has none; prompts are then token ids and outputs have no text.
        last_run: what the latest run did: steps, seconds, the pool's use over time (account/accounting.py, `RunStats`).
    """

    @lists_options
    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | Tokenizer | None = None,
        *,
        revision: str | None = None,
        download: bool = False,
        mesh: Any = None,
        **options: Any,
    ):
        """Open a checkpoint directory (native or Hugging Face), load its weights and allocate the page pool.

        Args:
            model: the directory, or the name of a model on the Hugging Face Hub, such as "Qwen/Qwen3-0.6B", whose files
                are in the Hub's cache.
            tokenizer: a file, a directory or an object with `encode` and `decode`; by default the checkpoint's own.
            revision: of a model of the Hub: a branch, a tag or a commit; by default "main".
            download: fetch what the Hub's cache lacks of the model; otherwise nothing is ever downloaded.
            mesh: a `jax.sharding.Mesh` of one axis, among whose devices the model is divided; by default the first
                `tensor_parallel_size` devices.
            **options: of the engine, by name, as below; docs/guide.md says more about them.

        Raises:
            FileNotFoundError, ValueError: with what was given, what is possible and what to change.
            TypeError: for an option that there is not, with the name that was probably meant, or that vLLM's has here.
        """
        check_names(
            "LLM", options, ("model", "tokenizer", *OPTION_NAMES, "revision", "download", "mesh"), OTHER_OPTIONS
        )
        self._mesh = mesh
        self._options = settled = EngineOptions(**options)
        self._checkpoint = checkpoint = open_checkpoint(
            _find(model, revision, download, needs_weights=settled.load_format != "dummy")
        )
        found = find_tokenizer(tokenizer, checkpoint.tokenizer_file)
        templates = find_chat_templates(tokenizer, checkpoint.directory)
        remedy = download_remedy(checkpoint.directory, download)
        self._requests = RequestReader(found, checkpoint.directory, settled.seed, templates, remedy)
        self._owner = pool_ownership()
        self._async_runs = AsyncRuns()
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()  # iterators and trees that `close` may have to end
        self._closed: RunStats | None = None  # what is left of an LLM that was closed: its last run
        #: One, or with `data_parallel_size` several, which run what generates together; of trees, streams and watched
        #: beams the first has all. Empty where there is none.
        self._engines = build_engines(checkpoint, settled, owner=self._owner, mesh=mesh)
        self._weights: Any = [engine.params for engine in self._engines]

    @staticmethod
    def describe(model: str | Path, *, revision: str | None = None, download: bool = False, **options: Any) -> str:
        """What `LLM(model, **options)` would be, in lines of text, from the model's configuration alone: its shape, and
        how many tokens fit the pool that it would get. `jaxpaged info` prints it."""
        check_names("describe", options, ("model", "revision", "download", *OPTION_NAMES), OTHER_OPTIONS)
        settled = EngineOptions(**options)
        return describe_checkpoint(_find(model, revision, download, needs_weights=False), settled)

    @property
    def _engine(self) -> Engine | None:
        """The first of all."""
        return next(iter(self._engines), None)

    @property
    def engine(self) -> Engine:
        """What runs the requests; RuntimeError where there is none: while it is rebuilt, after a rebuild that failed,
        after `close`, and in a process that was forked off."""
        self._check_usable()
        engine = self._engine
        if engine is None:
            with self._owner.held("LLM.engine"):
                raise RuntimeError(
                    "this LLM has no engine, since its last rebuild failed: call rebuild again, with options that work"
                )
        return engine

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._requests.tokenizer

    @property
    def last_run(self) -> RunStats:
        return self._stats() if self._closed is None else self._closed

    def _stats(self) -> RunStats:
        first, others = self.engine.stats, [engine.stats for engine in self._engines[1:]]
        return first.with_others(others) if others else first

    def close(self) -> None:
        """Free the weights and the pool on the device and end what works for this LLM; once more does nothing.

        Iterators and trees that are open have ended then, and an `async for` that waits gets a RuntimeError, as all do
        that call this LLM from now on; `last_run` and `tokenizer` stay. RuntimeError, with all as before, while a call
        is in progress in another thread. `with LLM(...) as llm:` closes it at the end of the block.
        """
        self._owner.check_process()
        if self._closed is not None:
            return
        self._async_runs.stop_all(RuntimeError(CLOSED))
        for iterator in list(self._open):
            if not isinstance(iterator, Generator) or inspect.getgeneratorstate(iterator) == inspect.GEN_SUSPENDED:
                iterator.close()
        with self._owner.held("close"):
            closed = self._stats() if self._engines else RunStats(0, 0)
            engines, self._engines, self._weights, self._closed = self._engines, [], None, closed
            for engine in engines:
                engine.runner.free()
        self._requests.close()

    def _check_usable(self) -> None:
        """RuntimeError in a process that was forked off, and for an LLM that was closed; when this returns, nothing is
        left of runs that were dropped."""
        self._owner.check_process()
        if self._closed is not None:
            raise RuntimeError(CLOSED)
        self._async_runs.settle()

    def __enter__(self) -> LLM:
        self._check_usable()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record_trace(self) -> TraceRecorder:
        """Have the next run taken down, step by step; the recorder's `trace` then has what the page pool did."""
        engine = self.engine
        if len(self._engines) > 1:
            raise ValueError(
                f"a trace is of one engine, and data_parallel_size={len(self._engines)} makes so many: leave it out"
            )
        with self._owner.held("record_trace"):
            engine.recorder = recorder = TraceRecorder(engine.cache_config)
        return recorder

    def profile(self, path: str | Path) -> AbstractContextManager[None]:
        """`with llm.profile("trace.json.gz"): ...` writes what host and device do in the block, for Perfetto
        (https://ui.perfetto.dev): of the host, the phases of each step. Taking it down costs time itself."""
        self._check_usable()
        return trace_to(Path(read_path("path", path)))

    @explains_names(ELSEWHERE)
    def generate(
        self,
        prompts: Prompts,
        sampling_params: RequestParams | SequenceOf[RequestParams] | None = None,
        progress: bool = True,
        shared_prefix: Any = None,
        add_special_tokens: bool = True,
        *,
        on_token: OnToken | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; results in input order. `progress` shows a bar where stderr is a terminal.

        `shared_prefix`, text or token ids, comes before every prompt: an instruction, examples. The results are those
        of the whole prompts; but with pages its keys and values are computed once in this call and stored once, for
        all requests. (Other `kv_cache`s compute the whole prompts.) Text is tokenised in parts, the prefix and each
        prompt, special tokens (a beginning-of-sequence token) only with the prefix; so the token ids are those of the
        parts, and may differ from those of the joined text where they meet. Not with `prompt_logprobs`.

        `add_special_tokens=False`: texts that spell their special tokens themselves, as chat templates do, get no other
        from the tokenizer. A prompt {"prompt": text, "add_special_tokens": ...} says it for itself.

        Prompts may also be any iterable, whose prompts are all read first, or a table with a column prompt,
        prompt_token_ids, messages or text: a Hugging Face dataset, a DataFrame, or `jaxpaged.Rows`, which names another
        column. What else a row has is its result's `carried`.

        `on_token` is called with a `NewToken` for every token, when the step that chose it has ended: those of one
        sample in their order, the samples and requests that run together in turn. What it raises is raised here, and
        ends the run. Not with beams, whose tokens are settled at the end.

        Raises ValueError for a request that cannot run, before any request runs. One that cannot go on in the run, as
        no token is left to choose or numbers are not finite, comes back with its `error`; the others are not touched.
        """
        engine = self.engine
        groups = self._requests.read_all(prompts, sampling_params, None, engine, shared_prefix, add_special_tokens)
        teller = None if on_token is None else TokenTeller(on_token, groups, self.tokenizer)
        order = {group: i for i, group in enumerate(groups)}
        outputs: list[RequestOutput | None] = [None] * len(groups)
        run, done = self._run_steps("generate", groups, weakref.ref(engine)), 0
        with closing(run), ProgressBar(len(groups), lambda: self.last_run, enabled=progress) as bar:
            for finished in run:
                if teller is not None:
                    running = [group for one in self._engines for group in one.scheduler.running]
                    teller.tell(running, [group for group, _ in finished])
                for group, output in finished:
                    outputs[order[group]] = output
                bar.update(done := done + len(finished))
        return [output for output in outputs if output is not None]

    @explains_names(ELSEWHERE)
    def generate_iter(
        self,
        prompts: Prompts,
        sampling_params: RequestParams | SequenceOf[RequestParams] | None = None,
        request_ids: Iterable[str] | None = None,
        arrival_times: SequenceOf[float] | None = None,
        shared_prefix: Any = None,
        add_special_tokens: bool = True,
    ) -> Iterator[RequestOutput]:
        """As `generate`, but yields each result as it finishes; `request_id` tells which it is (by default its index).

        `arrival_times`: seconds after the first result is asked for at which each request comes, as from users of a
        service; by default all are there. Requests are checked when this is called, not at the first result; the pool
        is theirs from the first result that is asked for, which is where RuntimeError comes if another has it. Leaving
        the loop early drops the others.

        Prompts of a generator, another iterable that is no list, or a Hugging Face dataset are read while others run,
        at most twice `max_num_seqs` ahead of the results; a prompt that cannot run is a ValueError behind the results
        of those before it. `request_ids` may then be an iterable, too; `arrival_times` need a list.
        """
        engine = self.engine
        groups = self._requests.open(prompts, sampling_params, request_ids, engine, shared_prefix, add_special_tokens)
        set_arrivals(groups, arrival_times)
        return self._opened(self._iterate(groups, weakref.ref(engine)))

    @explains_names(ELSEWHERE)
    def agenerate(
        self,
        prompts: Prompts,
        sampling_params: RequestParams | SequenceOf[RequestParams] | None = None,
        request_ids: Iterable[str] | None = None,
        shared_prefix: Any = None,
        add_special_tokens: bool = True,
    ) -> AsyncOutputs[RequestOutput]:
        """As `generate_iter`, for `async for` in an asyncio loop, which goes on with other things while steps run.

        Requests are read and run in a thread, from the first result that is asked for; what is wrong with them is
        raised there, too. Where several are open, they run one after the other, in the order in which they began, and
        those that wait are not refused: results wait for their reader, and no run for another's. (Requests that are to
        run together go into one call.) Any other call is refused while one has the pool.

        A run ends where its iterator is dropped (`break`, an exception), closed (`aclose`), or cancelled while it is
        waited for: after the step that runs then all pages are free, and the next call, of any kind, waits for that.
        """
        _ = self.engine  # there is one

        def steps() -> Generator[list[RequestOutput], None, None]:
            engine = self.engine
            groups = self._requests.open(
                prompts, sampling_params, request_ids, engine, shared_prefix, add_special_tokens
            )
            with closing(self._run_steps("agenerate", groups, weakref.ref(engine))) as run:
                for finished in run:
                    yield [output for _, output in finished]

        return AsyncOutputs(self._async_runs, steps)

    def _iterate(self, groups: Groups, checked_for: weakref.ref[Engine]) -> Iterator[RequestOutput]:
        with closing(self._run_steps("generate_iter", groups, checked_for)) as run:
            for finished in run:
                for _, output in finished:
                    yield output

    @explains_names({**ELSEWHERE, **VLLM_CHAT})
    def chat(
        self,
        messages: Any,
        sampling_params: RequestParams | SequenceOf[RequestParams] | None = None,
        progress: bool = True,
        *,
        on_token: OnToken | None = None,
        tools: SequenceOf[dict[str, Any]] | None = None,
        documents: SequenceOf[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them; results in input order.

        A conversation is a list of messages: {"role": "user", "content": text}. The model's chat template makes text of
        it, `prompt` of the result, exactly as transformers does; it writes all special tokens itself.

        Args:
            messages: a conversation or a list of them; a content is text, or a list of {"type": "text", "text": ...}.
            sampling_params: as for `generate`.
            progress: a bar where stderr is a terminal.
            on_token: as for `generate`.
            tools: JSON schemas of functions, for templates that read them.
            documents: objects with title and text, as well.
            chat_template: a template in place of the model's, or the name of one of several that the model has.
            add_generation_prompt: end with the beginning of an answer; the default, unless `continue_final_message`.
            continue_final_message: leave the last message open, so that the model goes on with it.
            chat_template_kwargs: more variables of the template, such as {"enable_thinking": False}.

        Raises ValueError, before any request runs, for messages that are wrong (which, and which key) and for a
        template that is missing, raises, or does not end.
        """
        options = {
            "tools": tools, "documents": documents, "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message,
            "chat_template_kwargs": chat_template_kwargs,
        }  # fmt: skip
        if is_conversation(messages):
            return self.generate({"messages": messages, **options}, sampling_params, progress, on_token=on_token)
        prompts = [{"messages": one, **options} for one in messages]
        return self.generate(prompts, sampling_params, progress, on_token=on_token)

    @explains_names(ELSEWHERE)
    def stream(
        self, prompt: Any, sampling_params: SamplingParams | None = None, add_special_tokens: bool = True
    ) -> Generator[str, None, RequestOutput]:
        """The text of one sample in pieces, as its tokens come: what may become a stop string waits until it is none.

        The pieces join to the sample's text, and the generator returns the `RequestOutput`. The request is checked when
        this is called; the pool is taken with the first piece. Leaving the loop early ends the request.
        """
        engine = self.engine
        params = SamplingParams() if sampling_params is None else sampling_params
        check_streamable(params)
        groups = self._requests.read_all(prompt, params, None, engine, add_special_tokens=add_special_tokens)
        if len(groups) != 1:
            raise ValueError(f"stream takes one prompt, got {len(groups)}")
        if self.tokenizer is None:
            raise ValueError("stream gives text, and there is no tokenizer: use generate_iter, or name a tokenizer")
        return self._opened(self._stream(groups[0], self.tokenizer, weakref.ref(engine)))

    def _stream(
        self, group: SequenceGroup, tokenizer: Tokenizer, checked_for: weakref.ref[Engine]
    ) -> Generator[str, None, RequestOutput]:
        text = StreamedText(group, tokenizer)
        with (
            self._begin("stream", [group], checked_for) as hold,
            closing(self.engine.run_steps([group], hold)) as steps,
        ):
            for finished in steps:
                if not finished and (piece := text.grow()):
                    yield piece
        output = make_output(group, tokenizer)
        if piece := text.finish(output.outputs[0].text):
            yield piece
        return output

    @explains_names(ELSEWHERE)
    def beam_search(
        self,
        prompts: Prompts,
        params: BeamSearchParams | SequenceOf[BeamSearchParams],
        progress: bool = True,
        shared_prefix: Any = None,
        add_special_tokens: bool = True,
    ) -> list[RequestOutput]:
        """The best continuations of every prompt, best first, with their `score`; the semantics of transformers 5.

        The same as `generate`, which takes beams, samples and greedy requests in one batch.
        """
        given = params if is_list(params) else [params]
        if any(not isinstance(one, BeamSearchParams) for one in given):
            raise ValueError(f"beam_search takes a BeamSearchParams or a list of them, got {shortened(params)}")
        return self.generate(prompts, params, progress, shared_prefix, add_special_tokens)

    @explains_names(ELSEWHERE)
    def watch_beams(
        self, prompt: Any, params: BeamSearchParams, add_special_tokens: bool = True
    ) -> Iterator[BeamSnapshot]:
        """Search for one prompt and yield where the search stands after every step; the last one has the `output`.

        The request is checked when this is called; the pool is taken with the first snapshot. Leaving the loop early
        ends the search.
        """
        if not isinstance(params, BeamSearchParams):
            raise ValueError(f"watch_beams takes a BeamSearchParams, got {shortened(params)}")
        engine = self.engine
        groups = self._requests.read_all(prompt, params, None, engine, add_special_tokens=add_special_tokens)
        if len(groups) != 1:
            raise ValueError(f"watch_beams takes one prompt, got {len(groups)}")
        return self._opened(self._watch(groups[0], weakref.ref(engine)))

    def _watch(self, group: SequenceGroup, checked_for: weakref.ref[Engine]) -> Iterator[BeamSnapshot]:
        step = 0
        with (
            self._begin("watch_beams", [group], checked_for) as hold,
            closing(self.engine.run_steps([group], hold)) as steps,
        ):
            for finished in steps:
                if finished or max(state.num_generated for state in group.beams) > step:
                    step += 1
                    yield take_snapshot(group, step, make_output(group, self.tokenizer) if finished else None)

    def tree(self) -> Tree:
        """Sequences that you fork, append to and free yourself (tree.py): for searches that `generate` does not have.

        It owns the page pool until it is closed or dropped, so it is to be used as `with llm.tree() as tree`.
        RuntimeError while another is open or a run is in progress.
        """
        return self._opened(Tree(EngineSteps(self.engine), self.tokenizer))

    def warm_up(
        self, sampling_params: RequestParams | SequenceOf[RequestParams] | None = None, progress: bool = True
    ) -> WarmUp:
        """Compile everything that requests with such parameters can need, in several threads; no later run of them
        compiles anything. What an earlier process has compiled is read from its files (`compilation_cache`).

        Otherwise programs are compiled when they are first needed. Runs whose parameters together ask for another set
        of features (sampling, filters, penalties, log-probabilities, ...) need programs of their own. So do, with
        `LLM(cascade_attention=True)`, requests of one sample that read a `shared_prefix`.

        `progress` shows a line where stderr is a terminal. Returns how many programs were compiled and read, the
        seconds, and where they are kept.
        """
        given: Any = SamplingParams() if sampling_params is None else sampling_params
        params = given if is_list(given) else [given]
        groups = [self._requests.read(Prompt(None, [0]), one, "", 0, self.engine) for one in params]
        with CompilingLine(progress) as line:
            first, *others = [engine.warm_up(groups, line.update) for engine in self._engines]
        return first.with_others(others)

    def rebuild(self, **options: Any) -> None:
        """Make the engine anew with other options, the weights kept: `llm.rebuild(kv_cache="contiguous-max")`.

        Takes the constructor's options, except those that choose the weights. The old pool is freed before the new
        one is made. Raises ValueError as the constructor does; after one, the LLM can only be rebuilt, from the options
        of the last engine that there was. RuntimeError, which costs nothing, while a run or a tree is open.
        """
        if fixed := sorted({*FOUND_BY, "mesh", *FIXED_OPTIONS} & set(options)):
            raise ValueError(
                f"{', '.join(fixed)} cannot change without another LLM; rebuild takes the engine's options"
            )
        check_names("rebuild", options, [name for name in OPTION_NAMES if name not in FIXED_OPTIONS], OTHER_OPTIONS)
        new = dataclasses.replace(self._options, **options)
        self._check_usable()
        with self._owner.held("rebuild"):
            self._engines = []  # and with them the pools
            self._engines = build_engines(self._checkpoint, new, self._weights, self._owner, self._mesh)
            self._options = new

    def reset_prefix_cache(self) -> None:
        """Forget what the pool still holds of ended requests: whatever comes next is computed.

        RuntimeError while a run or a tree is open.
        """
        _ = self.engine  # there is one
        for engine in self._engines:
            engine.forget_pages()

    def check_request(
        self, prompt: Any, params: RequestParams, shared_prefix: Any = None, add_special_tokens: bool = True
    ) -> None:
        """Raise ValueError where this one request could not run: the errors of `generate`, without running anything."""
        self._requests.read_one(prompt, params, self.engine, shared_prefix, add_special_tokens)

    def _opened(self, iterator: T) -> T:
        """Noted, for `close`."""
        self._open.add(iterator)
        return iterator

    def _run_steps(
        self, who: str, groups: Groups, checked_for: weakref.ref[Engine]
    ) -> Generator[list[tuple[SequenceGroup, RequestOutput]], None, None]:
        """What each step has finished, often nothing."""
        with self._begin(who, groups, checked_for) as hold, closing(self._steps_of(groups, hold)) as steps:
            for finished in steps:
                yield [(group, make_output(group, self.tokenizer)) for group in finished]
        if isinstance(groups, StreamedGroups) and groups.error is not None:
            raise groups.error

    def _steps_of(self, groups: Groups, hold: Hold) -> Generator[list[SequenceGroup], None, None]:
        engines = self._engines
        return run_together(engines, groups, hold) if len(engines) > 1 else self.engine.run_steps(groups, hold)

    @contextmanager
    def _begin(self, who: str, groups: Groups, checked_for: weakref.ref[Engine]) -> Iterator[Hold]:
        """The pool for a run of these groups, which get their seeds now; a call that is refused takes no numbers."""
        self._check_usable()
        with self._owner.held(who) as hold:
            engine = checked_for()
            if engine is None or engine is not self._engine:
                raise RuntimeError(f"the engine was rebuilt since {who} checked these requests: call it again")
            if isinstance(groups, list):  # others get theirs when they are read
                self._requests.give_seeds(groups)
            yield hold
