"""`jaxpaged compare`: one workload on every way to keep KV memory, as a table, as JSON and as pictures.

Whatever is known to be impossible is refused before the model is loaded; what turns out to be is reported with its
reason beside the systems that ran.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxpaged.cli.compare_table import print_table
from jaxpaged.cli.errors import usage_errors
from jaxpaged.cli.flags import MODEL_FLAGS, MODEL_HELP, add_flags, given, with_defaults
from jaxpaged.cli.model import settle_model
from jaxpaged.cli.output_files import check_new_folder, check_outputs
from jaxpaged.config import KV_CACHES, CacheConfig, EngineOptions
from jaxpaged.config.options import FIXED_OPTIONS
from jaxpaged.requests.progress import ProgressBar
from jaxpaged.study.compare import (
    PAPER_MAX_LEN,
    Refusal,
    Requests,
    Result,
    at_rate,
    check_systems,
    default_num_pages,
    find_refusals,
    join_reasons,
    make_requests,
    measure,
    num_equal_requests,
)
from jaxpaged.study.workloads import Workload, make_workload, read_workload

DEFAULT_SYSTEMS = ("paged", "contiguous-oracle", "contiguous-pow2", "contiguous-max")
# Small enough that a CPU compiles and runs it all in minutes, enough that requests wait in every system for a while.
DEFAULT_LIMITS = {
    "page_size": EngineOptions.page_size, "max_num_seqs": 64, "max_num_batched_tokens": 512,
    "watermark": EngineOptions.watermark,
}  # fmt: skip
DEFAULT_REQUESTS = 48

EPILOG = f"""\
systems: {", ".join(KV_CACHES)}
workloads: sharegpt, alpaca, alpaca-lognormal, azure-code, azure-chat, exponential:PROMPT:MEAN:CAP,
  fixed:PROMPT:OUTPUT, or a .jsonl file with {{"prompt_len": ..., "output_len": ...}} a line (and "arrival", in seconds)

Prompts are random tokens; output lengths are forced. Drawn requests that reach --max-model-len are drawn again, as the
vLLM paper left out those of 2,048 tokens; by default it is the model's length, {PAPER_MAX_LEN} at most. The pool is the
same for all; by default it is to --max-model-len what the paper's 983 pages of 16 tokens are to 2,048 tokens. Batch and
memory are means over the steps in which requests wait for admission, but for the first tenth of all steps; over all
steps where there are none such. Everything is compiled before the clock starts.
"""


class Setting(NamedTuple):
    """What the command was asked for, checked."""

    systems: list[str]
    rates: list[float | None] | None  # None: the arrivals of the workload's own file
    workload: Workload
    options: dict[str, Any]  # of LLM, besides kv_cache
    refusals: dict[str, str]  # systems that cannot run it, and why

    def options_of(self, system: str) -> dict[str, Any]:
        """Only pages give way to others and are shared, so how they are is a setting of theirs."""
        options = {**self.options, "kv_cache": system}
        return options if system == "paged" else {**options, "preemption": "auto", "cascade_attention": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add = parser.add_argument
    add(
        "--systems", type=_names, default=list(DEFAULT_SYSTEMS), metavar="NAME,NAME,...",
        help=f"see below (default {','.join(DEFAULT_SYSTEMS)})",
    )  # fmt: skip
    add("--workload", default="sharegpt", metavar="NAME", help="or a .jsonl file; see below (default sharegpt)")
    add(
        "--requests", type=int, metavar="N",
        help=f"requests drawn, or taken from a file (default {DEFAULT_REQUESTS}, or all of the file)",
    )  # fmt: skip
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--rate", type=_rate, metavar="X", help="requests a second, or 'burst': all at once (default)")
    rates.add_argument("--rates", type=_rates, metavar="X,X,...", help="several rates, one after the other")
    add("--n", type=int, default=1, metavar="N", help="samples of each request (default 1, greedy)")
    add("--beam-width", type=int, default=0, metavar="N", help="beams of each request")
    add("--seed", type=int, default=0, metavar="N", help="of lengths, prompts, arrivals and samples (default 0)")
    add("--json", metavar="FILE", help="write all figures; '-': as the last line of standard output")
    add("--plot", metavar="DIR", help="draw memory, batch, throughput and, with --rates, latency, as PNG")
    flags = tuple(flag for flag in MODEL_FLAGS if flag.name not in ("kv_cache", "tokenizer"))
    own = {**DEFAULT_LIMITS, "max_model_len": "see below", "num_pages": "see below"}
    add_flags(parser, "model and memory", with_defaults(flags, own))


@usage_errors()
def run(args: argparse.Namespace, make_llm: Callable[..., Any]) -> int:
    _check_outputs(args)
    name = str(args.model)
    setting = _setting(args)
    if args.plot is not None:
        Path(args.plot).mkdir(parents=True, exist_ok=True)
    llm: Any = None
    facts: dict[str, Any] = {}
    results: list[Result] = []
    refusals = [Refusal(system, reason) for system, reason in setting.refusals.items()]
    for system in setting.systems:
        if system in setting.refusals:
            continue
        try:
            if llm is None:
                llm = make_llm(model=args.model, seed=args.seed, **setting.options_of(system))
            else:
                llm.rebuild(**_changes(setting.options_of(system)))
            facts = facts or _facts(args, name, setting, llm.engine)
            requests = make_requests(setting.workload, llm.engine.model.vocab_size, args.seed, args.n, args.beam_width)
            results += _run_system(llm, system, requests, setting.rates, args.seed)
        except (ValueError, RuntimeError) as error:  # RuntimeError: what jax raises without memory
            results = [result for result in results if result.system != system]
            refusals.append(Refusal(system, " ".join(str(error).split())))
    if not results:
        raise ValueError("no system can run this workload: " + join_reasons({r.system: r.reason for r in refusals}))
    _report(args, facts, results, refusals)
    return 0


def _run_system(
    llm: Any, system: str, requests: Requests, rates: list[float | None] | None, seed: int
) -> Iterator[Result]:
    if sys.stderr.isatty():
        print(f"{system}: compiling", file=sys.stderr)
    llm.warm_up(requests.params[:1])
    for rate in rates or [None]:
        timed = requests if rates is None else at_rate(requests, rate, seed)
        label = f"{system:18}" if rate is None else f"{system:18} {rate:g}/s"
        with ProgressBar(len(timed.prompts), lambda: llm.last_run, label=label) as bar:
            yield measure(llm, timed, system, rate, bar.update)


def _setting(args: argparse.Namespace) -> Setting:
    check_systems(args.systems)
    if args.n < 1 or args.beam_width < 0 or (args.beam_width and args.n > 1):
        raise ValueError(f"give --n (samples, at least 1) or --beam-width: got {args.n} and {args.beam_width}")
    settle_model(args)
    options = {**DEFAULT_LIMITS, **given(args, MODEL_FLAGS)}
    from jaxpaged.checkpoint import open_checkpoint  # imports jax, which a mistyped system need not wait for

    checkpoint = open_checkpoint(args.model)
    options.setdefault("max_model_len", min(checkpoint.config.default_model_len, PAPER_MAX_LEN))
    longest = options["max_model_len"]
    if longest > checkpoint.config.max_position_embeddings:
        raise ValueError(
            f"max_model_len={longest} exceeds the {checkpoint.config.max_position_embeddings} positions "
            "that the model was made for"
        )
    options.setdefault("num_pages", default_num_pages(options["page_size"], longest))
    rates = args.rates if args.rates is not None else None if args.rate is None else [args.rate]
    is_file = Path(args.workload).suffix == ".jsonl"
    if is_file:
        workload = read_workload(args.workload, _token_counter(checkpoint.tokenizer_file))
        workload = Workload(*(array[: args.requests] for array in workload))
    else:
        workload = make_workload(args.workload, args.requests or DEFAULT_REQUESTS, args.seed, max_len=longest)
    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "watermark")
    refusals = find_refusals(
        args.systems, workload, max(args.n, args.beam_width), CacheConfig(options["page_size"], options["num_pages"]),
        {name: options[name] for name in names},
    )  # fmt: skip
    return Setting(args.systems, rates if is_file else rates or [None], workload, options, refusals)


def _check_outputs(args: argparse.Namespace) -> None:
    if args.requests is not None and args.requests < 1:
        raise ValueError(f"--requests must be at least 1, got {args.requests}")
    is_file = Path(args.workload).suffix == ".jsonl"
    check_outputs(
        {"--json": None if args.json == "-" else args.json}, {"workload": args.workload if is_file else None},
        {"MODEL": args.model},
    )  # fmt: skip
    if args.plot is not None:
        check_new_folder(Path(args.plot), "--plot")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install 'jaxpaged[plots]'")


def _report(args: argparse.Namespace, facts: dict[str, Any], results: list[Result], refusals: list[Refusal]) -> None:
    facts["requests_with_equal_tokens"] = num_equal_requests(results)
    print_table(facts, results, refusals)
    if args.plot is not None:
        from jaxpaged.cli.compare_plots import draw

        for path in draw(results, args.plot):
            print(f"wrote {path}")
    document = {
        **facts,
        "results": [result.summary() for result in results],
        "not_run": {refusal.system: refusal.reason for refusal in refusals},
    }
    if args.json == "-":
        print(json.dumps(document, allow_nan=False))
    elif args.json is not None:
        text = json.dumps(document, indent=1, allow_nan=False)
        Path(args.json).write_text(text + "\n", encoding="utf-8")


def _facts(args: argparse.Namespace, name: str, setting: Setting, engine: Any) -> dict[str, Any]:
    """What is the same for all systems."""
    workload = setting.workload
    return {
        "model": name,
        "weights": "random" if setting.options.get("load_format") == "dummy" else "of the checkpoint",
        "workload": args.workload,
        "requests": len(workload.prompt_lens),
        "mean_prompt_len": round(float(workload.prompt_lens.mean()), 2),
        "mean_output_len": round(float(workload.output_lens.mean()), 2),
        "samples": args.n,
        "beam_width": args.beam_width,
        "seed": args.seed,
        **{name: setting.options[name] for name in ("max_model_len", "num_pages", *DEFAULT_LIMITS)},
        "kv_bytes": setting.options["num_pages"] * engine.runner.page_bytes,
        "dtype": engine.dtype,
        "kv_dtype": engine.cache_config.dtype,
        "device": engine.device.device_kind,
        **{package: importlib.metadata.version(package) for package in ("jax", "jaxpaged")},
    }


def _changes(options: dict[str, Any]) -> dict[str, Any]:
    """Of LLM's options, those with which it can be rebuilt."""
    return {name: value for name, value in options.items() if name not in FIXED_OPTIONS}


def _token_counter(tokenizer_file: Path | None) -> Callable[[str], int] | None:
    if tokenizer_file is None:
        return None

    def count(text: str) -> int:
        from jaxpaged.text.tokenizer import load_tokenizer

        return len(load_tokenizer(tokenizer_file).encode(text))

    return count


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _rate(text: str) -> float | None:
    if text == "burst":
        return None
    rate = float(text)
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"a rate is above 0 requests a second, or 'burst', got {text!r}")
    return rate


def _rates(text: str) -> list[float | None]:
    return [_rate(part.strip()) for part in text.split(",")]


_rate.__name__ = "rate (requests a second, or 'burst')"
_rates.__name__ = "rates (1,2,4)"
