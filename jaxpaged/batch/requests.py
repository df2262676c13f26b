"""What one input line asks for, with the fingerprint by which a later run recognises its result.

A fingerprint covers all that decides a result: the line's number, id, prompts, parameters and seed, and the model.
It does not cover what must not change a result (page size, pool, batch limits), so a run may go on on another machine.
An error's fingerprint covers every option: a failed line is tried again as soon as the line or any option changed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.constraint import Constraint, TrieFile
from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.batch.model_files import digest, model_identity

Prompt = str | list[int] | dict[str, Any]  # the last is a conversation, {"messages": [...], ...}

SAMPLING_NAMES = tuple(f.name for f in dataclasses.fields(SamplingParams) if f.name != "logits_processors")
BEAM_NAMES = tuple(f.name for f in dataclasses.fields(BeamSearchParams) if f.name != "logits_processors")
SAMPLING_ONLY = frozenset(SAMPLING_NAMES) - frozenset(BEAM_NAMES)
BEAM_ONLY = frozenset(BEAM_NAMES) - frozenset(SAMPLING_NAMES)
#: What a line may set. Logits processors are functions, which JSON cannot hold.
PARAMETER_NAMES = (*SAMPLING_NAMES, *(name for name in BEAM_NAMES if name in BEAM_ONLY))

#: A setting longer than that, as JSON, stands in a row as its beginning and a digest.
MAX_SETTING = 100


@dataclass(frozen=True)
class BatchContext:
    """What the command line says about every line.

    Attributes:
        params: sampling parameters of lines that do not give their own.
        seed: lines without a seed get one made of this and their number, so results do not depend on the order of work.
        identity: digest of the model and of the options that decide results.
        options: all options in words; part of the fingerprint of errors only.
        add_special_tokens: whether the tokenizer's go around text prompts, of lines that do not say it.
        settings: what `identity` is a digest of, by name, as far as it is not the default; written to rows, so that a
            run which cannot go on says what has changed.
        chat_template: of messages that bring none, in place of the model's.
        prompt_column: the key or column that has the prompts; None: one of those that are known (parse.py).
    """

    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    identity: str = ""
    options: str = ""
    add_special_tokens: bool = True
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None
    prompt_column: str | None = None


@dataclass(frozen=True)
class OpenAIOptions:
    """What an OpenAI line asks for besides sampling; its `id` is the `custom_id`."""

    model: str | None
    echo: bool


@dataclass(frozen=True)
class BatchRequest:
    """One valid input line: a prompt, or in an OpenAI line a list of them, each with its own seed."""

    index: int  # of the input line, from 0, blank lines counted
    id: str | int
    prompts: list[Prompt]
    params: list[RequestParams]  # one a prompt
    openai: OpenAIOptions | None
    fingerprint: str
    error_fingerprint: str  # of this line's row if the model refuses it
    settings: Mapping[str, Any]  # what decides its result, by name and readable; prompts and default values left out
    add_special_tokens: bool = True
    carried: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # from the line to its row
    unit: str = "line"  # what the file calls it

    @property
    def is_openai(self) -> bool:
        return self.openai is not None

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompts[0], dict)

    @property
    def given_prompts(self) -> list[Any]:
        """The prompts, as `LLM.generate` takes them."""
        if self.add_special_tokens:
            return list(self.prompts)
        return [{"prompt": p, "add_special_tokens": False} if isinstance(p, str) else p for p in self.prompts]


@dataclass(frozen=True)
class InvalidLine:
    """One input line that cannot run, and why."""

    index: int
    id: str | int | None  # None: the line gives none that can be read
    reason: str
    is_openai: bool
    error_fingerprint: str
    carried: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unit: str = "line"


def make_request(
    index: int,
    request_id: str | int,
    prompts: list[Prompt],
    values: Mapping[str, Any],
    context: BatchContext,
    openai: OpenAIOptions | None = None,
    add_special_tokens: bool | None = None,
    carried: Mapping[str, Any] | None = None,
) -> BatchRequest:
    """Check the parameters (`ValueError` names the bad one), fill in seeds, take the fingerprint."""
    given_seed = values.get("seed", context.params.get("seed"))
    params = []
    for part in range(len(prompts)):
        seed = derived_seed(context.seed, index, part) if given_seed is None else given_seed
        params.append(make_params(context.params, {**values, "seed": seed}))
    content = [index, request_id, prompts, [_changed_fields(p) for p in params], context.identity]
    settings = {**context.settings, **_changed_fields(params[0])}
    if given_seed is None:
        del settings["seed"]  # it is one prompt's own
    if openai is not None:
        content.append(dataclasses.asdict(openai))
    if add_special_tokens is None:
        add_special_tokens = context.add_special_tokens
    if not isinstance(add_special_tokens, bool):
        raise ValueError(f"add_special_tokens must be true or false, got {add_special_tokens!r:.60}")
    if not add_special_tokens:
        content.append({"add_special_tokens": False})
        settings["add_special_tokens"] = False
    if carried:
        content.append({"carried": carried})
    if openai is not None:
        settings |= {"echo": True} if openai.echo else {}
        settings |= {} if openai.model is None else {"body.model": openai.model}
    fingerprint = digest(content)
    return BatchRequest(
        index, request_id, prompts, params, openai, fingerprint, digest([fingerprint, context.options]),
        {name: readable(value) for name, value in settings.items()}, add_special_tokens, carried or {},
    )  # fmt: skip


def readable(value: Any) -> Any:
    """A setting as a row has it: as JSON gives it back, and no longer than a line."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return json.loads(text) if len(text) <= MAX_SETTING else f"{text[:MAX_SETTING]}... ({digest(value)})"


def make_params(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> RequestParams:
    """What a line asks for: a beam search where it, or the command, gives a `beam_width`.

    Defaults for the other kind of request are left out; values for it are an error.
    """
    merged = {**defaults, **values}
    is_search = merged.get("beam_width") is not None
    foreign = SAMPLING_ONLY if is_search else BEAM_ONLY
    for name, value in values.items():
        if name in foreign and value is not None:
            raise ValueError(
                f"{name} is of no use to a beam search: leave it out, or beam_width"
                if is_search
                else f"{name} belongs to beam search: give beam_width too"
            )
    if not is_search:
        return SamplingParams(**{name: value for name, value in merged.items() if name not in foreign})
    if not merged.get("do_sample") and "temperature" not in values:
        merged.pop("temperature", None)  # a default for samples
    return BeamSearchParams(**{name: value for name, value in merged.items() if name not in foreign})


def derived_seed(seed: int, index: int, part: int = 0) -> int:
    """48 bits, so that every JSON reader keeps them exactly."""
    return int(digest(["seed", seed, index, part])[:12], 16)


def _changed_fields(params: RequestParams) -> dict[str, Any]:
    """Only what differs from the default, so that a parameter which a later version adds leaves old results valid."""
    fields = {f.name: (getattr(params, f.name), f.default) for f in dataclasses.fields(params)}
    changed = {name: value for name, (value, default) in fields.items() if value != default}
    if isinstance(constraint := changed.get("constraint"), Constraint):
        changed["constraint"] = constraint.as_json()
        if isinstance(constraint, TrieFile) and Path(constraint.path).is_file():  # what it holds decides, too
            changed["constraint"]["digest"] = model_identity(constraint.path)
    return changed
