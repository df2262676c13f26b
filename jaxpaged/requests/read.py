"""From prompts and parameters to sequence groups: everything that is checked of a request before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.messages import Conversation
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.api.values import is_list, read_strings, shortened
from jaxpaged.engine.engine import Engine
from jaxpaged.host.arrivals import StreamedGroups
from jaxpaged.host.beams.beam_state import BeamState
from jaxpaged.host.possible_tokens import check_some_token
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.requests.limits import LimitReader
from jaxpaged.requests.prompts import Prompt, PromptEncoder, check_add_special_tokens, read_prompt
from jaxpaged.requests.sources import ReadPrompt, open_source, read_source
from jaxpaged.requests.streamed_groups import PromptReader
from jaxpaged.text.beam_text import BeamText
from jaxpaged.text.chat_template import ChatTemplates
from jaxpaged.text.stream import StopStringStream
from jaxpaged.text.tokenizer import Tokenizer, need_tokenizer

#: No token is as long, in characters: not even runs of blanks in vocabularies for source code.
TOKEN_CHARACTERS = 1024


class Prefix(NamedTuple):
    """What comes before every prompt of a run."""

    text: str | None  # None if it was given as token ids
    token_ids: list[int]
    has_special_tokens: bool


class RequestReader:
    """Reads the requests of one LLM, and counts them: those without a seed get one that follows from their number."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        directory: Path,
        seed: int,
        chat_templates: ChatTemplates | None = None,
        remedy: str = "",
    ):
        """`remedy`: what helps where the directory has no tokenizer."""
        self.tokenizer = tokenizer
        self._chat_templates = chat_templates or ChatTemplates(directory)
        self._missing = f"{directory} has no tokenizer.json or tokenizer.model{remedy}"
        self._encoder = PromptEncoder(tokenizer, self._missing)
        self._limits = LimitReader(tokenizer, self._missing)
        self._seed = seed
        self._num_requests = 0
        self._prefix: Prefix | None = None  # the latest that was text: a batch file asks for one with every line

    def close(self) -> None:
        self._chat_templates.close()

    def read_all(
        self,
        prompts: Any,
        params: RequestParams | SequenceOf[RequestParams] | None,
        request_ids: Iterable[str] | None,
        engine: Engine,
        shared_prefix: Any = None,
        add_special_tokens: bool = True,
    ) -> list[SequenceGroup]:
        """A group for each prompt, that `engine` can run; ValueError, which names the prompt, if any cannot be.

        `shared_prefix`: a prompt that comes before each of them. Seeds come when the groups begin to run: `give_seeds`.
        """
        prefix = self.read_prefix(shared_prefix, engine, add_special_tokens)
        read = list(read_source(open_source(prompts)))
        all_params = _one_for_each(params, len(read))
        ids = _request_ids(request_ids, len(read))
        groups = []
        for i, (one, one_params, request_id) in enumerate(zip(read, all_params, ids, strict=True)):
            try:
                groups.append(self._read_item(one, one_params, request_id, engine, prefix, add_special_tokens))
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}" if len(read) > 1 else str(error)) from None
        return groups

    def open(self, prompts: Any, *given: Any) -> list[SequenceGroup] | StreamedGroups:
        """As `read_all`, but of prompts that need not stand in memory as `stream`."""
        stream = self.stream(prompts, *given)
        return self.read_all(prompts, *given) if stream is None else stream

    def stream(
        self,
        prompts: Any,
        params: RequestParams | SequenceOf[RequestParams] | None,
        request_ids: Iterable[str] | None,
        engine: Engine,
        shared_prefix: Any = None,
        add_special_tokens: bool = True,
    ) -> StreamedGroups | None:
        """The same for prompts that need not stand in memory, a group at a time; None for those that do anyway.

        What can be checked without the prompts is checked here: the prefix, and all parameters.
        """
        source = open_source(prompts)
        if not source.is_lazy:
            return None
        prefix = self.read_prefix(shared_prefix, engine, add_special_tokens)
        given: Any = params if is_list(params) else [SamplingParams() if params is None else params]
        distinct = {id(one): one for one in given}.values()
        examples = [self.read(Prompt(None, [0]), one, "", 0, engine, prefix) for one in distinct]

        def make_group(item: ReadPrompt, one: RequestParams, request_id: str) -> SequenceGroup:
            group = self._read_item(item, one, request_id, engine, prefix, add_special_tokens)
            self.give_seeds([group])
            return group

        reader = PromptReader(read_source(source), params, request_ids, make_group)
        return StreamedGroups(reader, examples)

    def _read_item(
        self,
        item: ReadPrompt,
        params: RequestParams,
        request_id: str,
        engine: Engine,
        prefix: Prefix | None,
        adds: bool,
    ) -> SequenceGroup:
        _check_params(params)
        prompt = _with_default(item.prompt, adds)
        group = self.read(prompt, params, request_id, params.seed or 0, engine, prefix)
        group.carried = item.carried
        return group

    def give_seeds(self, groups: list[SequenceGroup]) -> None:
        """Count the requests, and give those without a seed one that follows from the LLM's and their number.

        For who owns the page pool: a call that is refused, or never begins, must not change the seeds of later ones.
        """
        for number, group in enumerate(groups, start=self._num_requests):
            if group.params.seed is None:
                group.seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1, np.uint64)[0])
        self._num_requests += len(groups)

    def read_one(
        self, prompt: Any, params: RequestParams, engine: Engine, shared_prefix: Any, add_special_tokens: bool
    ) -> SequenceGroup:
        """The group of one prompt, for a look at it alone: it does not count as a request."""
        prefix = self.read_prefix(shared_prefix, engine, add_special_tokens)
        return self.read(_with_default(read_prompt(prompt), add_special_tokens), params, "", 0, engine, prefix)

    def read_prefix(self, shared_prefix: Any, engine: Engine, add_special_tokens: bool = True) -> Prefix | None:
        """None for None; ValueError, which names the prefix, for what is no prompt."""
        check_add_special_tokens(add_special_tokens)
        if shared_prefix is None:
            return None
        try:
            prompt = _with_default(read_prompt(shared_prefix), add_special_tokens)
            _check_characters("the text", prompt.text, engine)
            has_special_tokens = prompt.add_special_tokens is not False
            latest = self._prefix
            if latest is not None and (latest.text, latest.has_special_tokens) == (prompt.text, has_special_tokens):
                return latest
            token_ids = self._encoder.encode_prefix(prompt, has_special_tokens)
            _check_vocabulary(token_ids, engine.model.vocab_size)
        except ValueError as error:
            raise ValueError(f"shared_prefix: {error}") from None
        prefix = Prefix(prompt.text, token_ids, has_special_tokens)
        if prefix.text is not None:
            self._prefix = prefix
        return prefix

    def read(
        self,
        prompt: Prompt,
        params: RequestParams,
        request_id: str,
        seed: int,
        engine: Engine,
        prefix: Prefix | None = None,
    ) -> SequenceGroup:
        """The group of one request; ValueError for one that `engine` could not run even alone.

        Its sizes are checked before anything of that size is made.
        """
        _check_params(params)
        model, limits = engine.model, engine.limits
        params.check_token_ids(model.vocab_size)
        if prompt.conversation is not None:
            prompt = self._render(prompt.conversation, prefix)
        _check_characters("the prompt", prompt.text, engine)
        for word in params.bad_words or ():
            _check_characters("a bad word", word, engine)
        encode = self._encoder.encode if prefix is None else self._encoder.encode_behind
        token_ids = encode(prompt, prompt.add_special_tokens is not False)
        _check_vocabulary(token_ids, model.vocab_size)
        text, prefix_len = prompt.text, 0
        if prefix is not None:
            if params.prompt_logprobs is not None:
                raise ValueError(
                    "prompt_logprobs needs the whole prompt computed for this request, which shared_prefix spares: "
                    "leave out one of the two"
                )
            token_ids = prefix.token_ids + token_ids
            text = None if text is None or prefix.text is None else prefix.text + text
            prefix_len = len(prefix.token_ids) if engine.scheduler.policy.shares_pages else 0
        if params.stop_strings or params.bad_words:
            need_tokenizer(self.tokenizer, "stop strings and bad_words need", self._missing)
        budget = limits.max_model_len if params.max_tokens is None else len(token_ids) + params.max_tokens
        max_len = min(budget, limits.max_model_len)
        engine.scheduler.check(len(token_ids), params.num_samples, max_len, prefix_len)
        eos_ids = frozenset() if params.ignore_eos else frozenset(model.eos_token_ids)
        stop_ids = frozenset(params.stop_token_ids or ())
        limit = self._limits.read(params, eos_ids | stop_ids, model.vocab_size, max_len - len(token_ids))
        group = SequenceGroup(
            request_id, text, params, seed,
            sequences=[Sequence(0, token_ids, len(token_ids))],
            max_len=max_len,
            prefix_len=prefix_len,
            eos_ids=eos_ids,
            stop_ids=stop_ids,
            limit=limit,
            banned_words=_banned_words(params, self.tokenizer),
        )  # fmt: skip
        check_some_token(group, model.vocab_size)
        if isinstance(params, BeamSearchParams):
            _prepare_beams(group, params, self.tokenizer)
        else:
            _prepare_samples(group, params, self.tokenizer)
        return group

    def _render(self, conversation: Conversation, prefix: Prefix | None) -> Prompt:
        """The text of messages, which has the special tokens that the model's chat template writes, and no others."""
        if prefix is not None:
            raise ValueError("shared_prefix would come before the conversation begins: leave out one of the two")
        need_tokenizer(self.tokenizer, "messages need", self._missing)
        return Prompt(self._chat_templates.render(conversation), None, add_special_tokens=False)


def _with_default(prompt: Prompt, add_special_tokens: bool) -> Prompt:
    """Says itself whether special tokens are added, if it does not yet."""
    return prompt if prompt.add_special_tokens is not None else prompt._replace(add_special_tokens=add_special_tokens)


def _check_vocabulary(token_ids: list[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"token id {shortened(token_id)} is outside the vocabulary, which has ids 0 to {vocab_size - 1}"
            )


def _check_characters(what: str, text: str | None, engine: Engine) -> None:
    """Refuse text that is far too long by its characters: tokens of it would take minutes, and more memory than it."""
    limit = engine.limits.max_model_len * TOKEN_CHARACTERS
    if text is not None and len(text) > limit:
        raise ValueError(
            f"{what} has {len(text)} characters, and max_model_len={engine.limits.max_model_len}: with more than "
            f"{limit} characters it has too many tokens"
        )


def _check_params(params: Any) -> None:
    if not isinstance(params, RequestParams):
        raise ValueError(
            f"sampling_params must be a SamplingParams or BeamSearchParams or a list of them, got {shortened(params)}"
        )


def _prepare_beams(group: SequenceGroup, params: BeamSearchParams, tokenizer: Tokenizer | None) -> None:
    group.beams = BeamState.of(params, group.eos_ids | group.stop_ids, group.max_len - group.prompt_len)
    if group.limit is not None:
        for state in group.beams:
            state.places = group.limit.begin_beams(state.width)
    if params.stop_strings and tokenizer is not None:
        text = BeamText(tokenizer, group.sequences[0].token_ids[:], params)
        group.ends_text = lambda output_ids: text.find_stop(output_ids) is not None


def _prepare_samples(group: SequenceGroup, params: RequestParams, tokenizer: Tokenizer | None) -> None:
    if params.stop_strings and tokenizer is not None:
        group.make_stream = functools.partial(
            StopStringStream, tokenizer, group.sequences[0].token_ids, params.stop_strings,
            params.include_stop_str_in_output, params.skip_special_tokens,
        )  # fmt: skip
        group.sequences[0].stream = group.make_stream()
    if group.limit is not None:
        group.sequences[0].place = group.limit.begin()


def _banned_words(params: RequestParams, tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ...]:
    """Token ids of `bad_words`, each as it is written at the start of a text and behind a space."""
    if not params.bad_words or tokenizer is None:
        return ()
    words = {}
    for word in params.bad_words:
        for text in (word, " " + word.lstrip()):
            words[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    return tuple(word for word in words if word)


def _one_for_each(params: RequestParams | SequenceOf[RequestParams] | None, count: int) -> list[RequestParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, RequestParams):
        return [params] * count
    for one in params if is_list(params) else [params]:
        _check_params(one)
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts: give one, or one for each prompt")
    return list(params)


def _request_ids(given: Iterable[str] | None, count: int) -> list[str]:
    if given is None:
        return [str(i) for i in range(count)]
    ids = read_strings("request_ids", given)
    if len(ids) != count:
        raise ValueError(f"{len(ids)} request_ids for {count} prompts")
    return list(ids)
