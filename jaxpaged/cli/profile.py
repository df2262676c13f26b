"""`jaxpaged profile`: a run under jax's profiler, as a trace for Perfetto with the phases of every step named."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxpaged.cli.errors import usage_errors
from jaxpaged.cli.flags import MODEL_FLAGS, MODEL_HELP, add_flags, given, with_defaults
from jaxpaged.cli.output_files import check_outputs
from jaxpaged.host.account.phases import PHASES
from jaxpaged.study.workloads import make_workload

DEFAULTS = {"max_model_len": 1024, "max_num_seqs": 64}
SUFFIX = ".json.gz"

EPILOG = f"""\
The workload runs twice: once to compile, then under the profiler. The trace opens in https://ui.perfetto.dev, which
reads it in the browser. On the host's thread each step has its phases ({", ".join(PHASES)}): the next
step is launched before the last one is fetched. Workloads are those of `jaxpaged simulate`. Tracing costs time itself:
how long a step takes is for scripts/bench/generate.py to say.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add = parser.add_argument
    add("-o", "--output", default="trace" + SUFFIX, metavar="FILE", help=f"(default trace{SUFFIX})")
    add("--workload", default="fixed:128:32", metavar="NAME", help="prompt and output lengths (default fixed:128:32)")
    add("--requests", type=int, default=16, metavar="N", help="requests drawn (default 16)")
    add("--n", type=int, default=1, metavar="N", help="samples of each request (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="of lengths, prompts and samples (default 0)")
    add_flags(parser, "model and memory", with_defaults(MODEL_FLAGS, DEFAULTS))


@usage_errors()
def run(args: argparse.Namespace, make_llm: Callable[..., Any]) -> int:
    output = Path(args.output)
    if not args.output.endswith(SUFFIX):
        raise ValueError(f"--output {output}: the trace is compressed JSON: name it as trace{SUFFIX}")
    check_outputs({"--output": output}, models={"model": args.model})
    options = {**DEFAULTS, **given(args, MODEL_FLAGS)}
    workload = make_workload(args.workload, args.requests, args.seed, max_len=options["max_model_len"])
    llm = make_llm(model=args.model, seed=args.seed, **options)
    from jaxpaged.study.compare import make_requests

    requests = make_requests(workload, llm.engine.model.vocab_size, args.seed, args.n)
    llm.generate(requests.prompts, requests.params, progress=False)
    llm.reset_prefix_cache()
    with llm.profile(output):
        llm.generate(requests.prompts, requests.params, progress=False)
    num_steps = llm.last_run.steps
    print(f"{num_steps} steps of {len(requests.prompts)} requests, written to {output}")
    print("milliseconds a step, tracing included:")
    for name, seconds in phase_seconds(output).items():
        print(f"{name:>10} {seconds / num_steps * 1e3:8.3f}")
    return 0


def phase_seconds(trace: Path) -> dict[str, float]:
    """Seconds of the host in each phase, over all steps of a trace."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    seconds: dict[str, float] = {name: 0.0 for name in PHASES}
    for event in events:
        if event.get("name") in seconds and event.get("ph") == "X":
            seconds[event["name"]] += event["dur"] / 1e6
    return seconds
