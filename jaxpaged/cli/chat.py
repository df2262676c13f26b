"""`jaxpaged chat`: a conversation with a model, its answers written as they grow.

On a terminal Control-C stops an answer, not the command. What does not come from a terminal is taken line by line, each
answered in turn. Whatever can be refused is refused before the model is loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from jaxpaged.api.messages import read_conversation
from jaxpaged.api.outputs import RequestOutput
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.cli.chat_template_file import read_template
from jaxpaged.cli.errors import reason, usage_errors
from jaxpaged.cli.flags import MODEL_FLAGS, MODEL_HELP, SAMPLING_FLAGS, add_flags, given, with_defaults
from jaxpaged.cli.interrupts import exit_at_interrupt, noted_interrupt
from jaxpaged.cli.model import settle_model
from jaxpaged.text.chat_template import find_chat_templates

MAX_TOKENS = 512
#: An answer is one text, so there are no flags for several, or for numbers beside it.
NOT_HERE = ("n", "best_of", "logprobs", "prompt_logprobs", "detokenize")
CHAT_FLAGS = with_defaults(
    tuple(flag for flag in SAMPLING_FLAGS if flag.name not in NOT_HERE), {"max_tokens": MAX_TOKENS}
)
COMMANDS = "/reset forgets the conversation, /exit ends it"
EPILOG = f"""\
{COMMANDS}; Control-C stops an answer. What is no terminal is read line by line.
"""


class Chat:
    """What was said so far, and who answers.

    Attributes:
        messages: of the whole conversation; begins with the system message, if there is one.
    """

    def __init__(self, system: str | None, options: dict[str, Any]):
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._options = options
        self.messages = list(self._system)

    def reset(self) -> None:
        self.messages = list(self._system)

    def prompt(self, question: str) -> dict[str, Any]:
        """What is asked of the model: all that was said, and the question."""
        return {"messages": [*self.messages, {"role": "user", "content": question}], **self._options}

    def add(self, question: str, answer: str) -> None:
        """Remember a question and its answer; one without a word is as if it had not been asked."""
        if answer:
            self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation begins")
    parser.add_argument("--chat-template", metavar="FILE", help="in place of the model's own")
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="more variables of the template, as '{\"enable_thinking\": false}'",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="that all answers follow from (default 0)")
    add_flags(parser, "sampling", CHAT_FLAGS)
    add_flags(parser, "model and memory", MODEL_FLAGS)


def run(args: argparse.Namespace, make_llm: Callable[..., Any]) -> int:
    with usage_errors():
        params = SamplingParams(**{"max_tokens": MAX_TOKENS, **given(args, CHAT_FLAGS)})
    settle_model(args)
    options = given(args, MODEL_FLAGS)
    chat = Chat(args.system, _template_options(args))
    with usage_errors():
        find_chat_templates(options.get("tokenizer"), Path(args.model)).render(read_conversation(chat.prompt("hello")))
    with usage_errors(kinds=(ValueError, OSError, RuntimeError)):
        llm = make_llm(model=args.model, seed=args.seed, **options)
    if sys.stdin.isatty():
        return _talk(llm, chat, params)
    with exit_at_interrupt():
        return _answer_lines(llm, chat, params)


def _template_options(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if (template := read_template(args.chat_template)) is not None:
        options["chat_template"] = template
    if args.chat_template_kwargs is not None:
        with usage_errors("--chat-template-kwargs is not JSON: "):
            options["chat_template_kwargs"] = json.loads(args.chat_template_kwargs)
    return options


def _talk(llm: Any, chat: Chat, params: SamplingParams) -> int:
    """Questions from a terminal until /exit or the end of input."""
    if importlib.util.find_spec("readline") is not None:
        import readline  # noqa: F401 - lines can be edited, and earlier ones found again
    print(f"{COMMANDS}, Control-C stops an answer", file=sys.stderr)
    for question in _questions(chat):
        try:
            with noted_interrupt() as pressed:
                output = _answer(llm, chat, params, question, pressed.is_set)
        except ValueError as error:  # too long by now, perhaps
            print(f"jaxpaged: {reason(error)} (/reset forgets the conversation)", file=sys.stderr)
            continue
        print(flush=True)
        if note := _note(output, params):
            print(note, file=sys.stderr)
    return 0


def _questions(chat: Chat) -> Iterator[str]:
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # of the line that was being written
            print()
            continue
        if line.strip() == "/exit":
            return
        if (question := _read(line, chat)) is not None:
            yield question


def _read(line: str, chat: Chat) -> str | None:
    """The question in a line; None for a line without one, of which a command is carried out."""
    text = line.strip()
    if text == "/reset":
        chat.reset()
    elif text.startswith("/") and " " not in text:
        print(f"jaxpaged: there is no {text}: {COMMANDS}", file=sys.stderr)
    elif text:
        return line
    return None


def _answer_lines(llm: Any, chat: Chat, params: SamplingParams) -> int:
    """An answer for each line of standard input."""
    failed = False
    with usage_errors("standard input: "):
        lines = [line.rstrip("\r\n") for line in sys.stdin]
    for number, line in enumerate(lines, start=1):
        if line.strip() == "/exit":
            break
        if (question := _read(line, chat)) is None:
            continue
        with usage_errors(f"line {number}: "):
            output = _answer(llm, chat, params, question, lambda: False)
        print(flush=True)
        if output is not None and output.error is not None:
            print(f"jaxpaged: line {number}: {output.error}", file=sys.stderr)
            failed = True
    return 1 if failed else 0


def _answer(
    llm: Any, chat: Chat, params: SamplingParams, question: str, is_stopped: Callable[[], bool]
) -> RequestOutput | None:
    """Write the answer as it grows; None where it was stopped, of which the conversation keeps what was written."""
    answer, output = "", None
    with closing(llm.stream(chat.prompt(question), params)) as pieces:
        while output is None and not is_stopped():
            try:
                piece = next(pieces)
            except StopIteration as end:
                output = end.value
            else:
                answer += piece
                sys.stdout.write(shown(piece) if sys.stdout.isatty() else piece)
                sys.stdout.flush()
    chat.add(question, answer)
    return output


def shown(text: str) -> str:
    """Text as a terminal may have it: without characters that command it."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def _note(output: RequestOutput | None, params: SamplingParams) -> str | None:
    if output is None:
        return "(stopped)"
    if output.error is not None:
        return f"jaxpaged: {output.error}"
    if output.outputs[0].finish_reason == "length":
        most = params.max_tokens
        was_whole = most is None or len(output.outputs[0].token_ids) < most
        return f"(cut off: {'the model takes no longer conversation' if was_whole else f'--max-tokens is {most}'})"
    return None
