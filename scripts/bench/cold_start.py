"""From nothing to the first token: a process without files of compiled programs, and a second one that has them.

    python scripts/bench/cold_start.py scripts/shapes/llama-3.1-8b [--workload chat384] [--cache-dir DIR]

Each is a process of its own, which says when it got where, in seconds since it was begun: `import`, `device` (JAX has
it), `load` (weights and pool are there), `first_token`, `end` (of the whole workload). `compiled` and `read` count
programs of steps, up to the end; `logged` are the lines of the log with their seconds. Prints JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGAN = "JAXPAGED_BENCH_BEGAN"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--workload", default="chat384")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--cache-dir", type=Path, default=None, help="by default one that is new and then removed")
    args = parser.parse_args(argv)
    if BEGAN in os.environ:
        print(json.dumps(run(args, float(os.environ[BEGAN]))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = {name: start(argv or sys.argv[1:], args.cache_dir or folder) for name in ("first", "second")}
    for name, result in results.items():
        print(name, *(f"{key} {value}" for key, value in result.items() if key != "logged"))
    print(json.dumps(results))
    return 0


def start(arguments: list[str], folder: str | Path) -> dict[str, Any]:
    env = {**os.environ, "JAXPAGED_CACHE_DIR": str(folder), BEGAN: repr(time.time())}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace, began: float) -> dict[str, Any]:
    seconds: dict[str, Any] = {}

    def note(name: str) -> None:
        seconds[name] = round(time.time() - began, 2)

    import jaxpaged
    from jaxpaged import LLM, SamplingParams
    from jaxpaged.device.memory import start_device

    note("import")
    start_device(0.9)
    note("device")
    logged: list[str] = []
    logger = logging.getLogger(jaxpaged.__name__)
    logger.setLevel(logging.INFO)
    logger.addHandler(Lines(lambda text: logged.append(f"{time.time() - began:.2f} {text}")))
    options = {name: getattr(args, name) for name in ("load_format", "max_num_seqs", "max_model_len")}
    llm = LLM(args.model, **options)
    note("load")

    from generation_workloads import make_workload

    longest = llm.engine.limits.max_model_len
    workload = make_workload(args.workload, llm.engine.model.vocab_size, seed=0, longest=longest)
    first: list[float] = []

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        params = [SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False) for length in lengths]
        begun = time.time() - began
        outputs = llm.generate(prompts, params, progress=False)
        first.append(begun + min(output.metrics.first_token_time for output in outputs))
        return [output.outputs[0].token_ids for output in outputs]

    workload.run(generate)
    seconds["first_token"] = round(first[0], 2)
    note("end")
    stats = llm.last_run
    return {**seconds, "compiled": stats.compilations, "read": stats.programs_read, "logged": logged}


class Lines(logging.Handler):
    def __init__(self, take: Any):
        super().__init__()
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(record.getMessage())


if __name__ == "__main__":
    raise SystemExit(main())
