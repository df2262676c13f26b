"""The flags that become `SamplingParams`, `BeamSearchParams` and arguments of `LLM`: one table each,
the last made of `EngineOptions`.

A flag that is not given leaves no attribute behind, so the defaults stay where they are: in those classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxpaged.cli.errors import UsageError
from jaxpaged.config.choices import RENAMED_CHOICES
from jaxpaged.config.options import Option, engine_options


class Flag(NamedTuple):
    name: str  # of the field or argument; the flag is --name-with-dashes
    read: Callable[[str], Any] | bool  # of the value; a bool is what a flag without value sets
    help: str
    option: str | None = None  # the flag's own spelling, where it is not made from the name
    repeated: bool = False
    choices: tuple[str, ...] = ()  # all values that there are; of any other flag, what reads them knows


def integer_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)


def token_ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def token_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    return int(token_id), float(bias)


def early_stopping(text: str) -> bool | str:
    known: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
    if text not in known:
        raise ValueError
    return known[text]


def choice(text: str) -> str:
    """The text as it is, or what it is called now; which choices there are is argparse's to say."""
    if text in RENAMED_CHOICES:
        raise argparse.ArgumentTypeError(f"{text!r} is called {RENAMED_CHOICES[text]!r} now")
    return text


# argparse names the type in its messages: "invalid integer or none value: 'x'".
integer_or_none.__name__ = "integer or 'none'"
token_ids.__name__ = "token ids (1,2,3)"
token_bias.__name__ = "bias (token=number)"
early_stopping.__name__ = "'true', 'false' or 'never'"

SAMPLING_FLAGS = (
    Flag("n", int, "samples for each prompt (default 1)"),
    Flag("best_of", int, "samples drawn, of which the n likeliest are kept (default n)"),
    Flag("temperature", float, "0 is greedy (default 1)"),
    Flag("top_p", float, "keep the smallest set of tokens with this probability in sum (default 1: all)"),
    Flag("top_k", int, "keep the k likeliest tokens (default 0: all)"),
    Flag("min_p", float, "keep tokens at least this likely relative to the likeliest (default 0: all)"),
    Flag("max_tokens", integer_or_none, "tokens generated at most; 'none': up to the model's length (default 16)"),
    Flag("min_tokens", int, "tokens before which no end or stop token is chosen (default 0)"),
    Flag("stop", str, "a string that ends a sample; repeat for more", repeated=True),
    Flag("stop_token_ids", token_ids, "token ids that end a sample, as 1,2,3"),
    Flag("include_stop_str_in_output", True, "leave the stop string in the text"),
    Flag("ignore_eos", True, "go on past the model's end of sequence"),
    Flag("repetition_penalty", float, "above 1: tokens of prompt and output become less likely (default 1)"),
    Flag("presence_penalty", float, "subtracted once for each generated token (default 0)"),
    Flag("frequency_penalty", float, "subtracted for each occurrence of a generated token (default 0)"),
    Flag("logit_bias", token_bias, "token=number added to the token's logit; repeat for more", repeated=True),
    Flag("allowed_token_ids", token_ids, "only these tokens can be chosen, as 1,2,3"),
    Flag("bad_words", str, "a string that is never generated; repeat for more", repeated=True),
    Flag("logprobs", int, "log-probabilities of that many likeliest tokens for each generated one; -1: all"),
    Flag("prompt_logprobs", int, "the same for every prompt token but the first"),
    Flag("detokenize", False, "leave the text empty", option="--no-detokenize"),
    Flag("skip_special_tokens", False, "write special tokens in the text", option="--keep-special-tokens"),
)  # fmt: skip

BEAM_FLAGS = (
    Flag("beam_width", int, "search with so many beams; --n of them are returned (default all)"),
    Flag("length_penalty", float, "score is log-probability / length ** this (default 1)"),
    Flag("early_stopping", early_stopping, "true: end with as many hypotheses as beams; false (default): when no beam "
         "of its present length can better them; never: when none of any length can"),
    Flag("do_sample", True, "draw beams without replacement instead of taking the likeliest"),
    Flag("num_beam_groups", int, "groups of beams that avoid each other's tokens (default 1)"),
    Flag("diversity_penalty", float, "what a token costs that an earlier group has chosen in the same step"),
)  # fmt: skip

PROMPT_FLAGS = (
    Flag("add_special_tokens", False, "encode prompts without the tokenizer's beginning- and end-of-sequence tokens",
         option="--no-special-tokens"),
)  # fmt: skip


def _flag_of(option: Option) -> Flag:
    if option.kind is bool and option.default:
        return Flag(option.name, False, f"do not {option.help}", option="--no-" + option.name.replace("_", "-"))
    if option.kind is bool:
        return Flag(option.name, True, option.help)
    return Flag(option.name, option.kind, option.help_text, choices=option.choices)


#: Of a MODEL; `main` finds it by them.
MODEL_HELP = "checkpoint directory, demo (the bundled model), or a name of the Hugging Face Hub that is in its cache"
HUB_FLAGS = (
    Flag("revision", str, "branch, tag or commit, of a model of the Hub (default main)"),
    Flag("download", True, "fetch what the cache lacks of a model of the Hub"),
)  # fmt: skip
#: `seed` is a flag of each command, which says what it is the seed of there.
MODEL_FLAGS = (
    *HUB_FLAGS,
    Flag("tokenizer", str, "file or directory; by default the checkpoint's own"),
    *(_flag_of(option) for option in engine_options() if option.name != "seed"),
)


def with_defaults(flags: tuple[Flag, ...], defaults: Mapping[str, Any]) -> tuple[Flag, ...]:
    """The flags, whose help names the defaults of a command that has its own."""
    return tuple(
        flag._replace(help=f"{flag.help.split(' (default')[0]} (default {defaults[flag.name]})")
        if flag.name in defaults
        else flag
        for flag in flags
    )


def add_flags(parser: argparse.ArgumentParser, title: str, flags: tuple[Flag, ...]) -> None:
    group = parser.add_argument_group(title)
    for flag in flags:
        option = flag.option or "--" + flag.name.replace("_", "-")
        if isinstance(flag.read, bool):
            group.add_argument(
                option, dest=flag.name, action="store_const", const=flag.read, default=argparse.SUPPRESS, help=flag.help
            )
        else:
            action = "append" if flag.repeated else "store"
            metavar = "N" if flag.read in (int, integer_or_none) else "X" if flag.read is float else "VALUE"
            group.add_argument(
                option, dest=flag.name, type=choice if flag.choices else flag.read, action=action, metavar=metavar,
                default=argparse.SUPPRESS, help=flag.help, choices=flag.choices or None,
            )  # fmt: skip


def given(args: argparse.Namespace, flags: tuple[Flag, ...]) -> dict[str, Any]:
    """The flags of a table that the command line has, as keyword arguments."""
    values = {flag.name: getattr(args, flag.name) for flag in flags if hasattr(args, flag.name)}
    if "logit_bias" in values:
        bias = dict(values["logit_bias"])
        if len(bias) < len(values["logit_bias"]):
            raise UsageError("--logit-bias names a token id twice: give each once")
        values["logit_bias"] = bias
    return values
