"""Tokens per second of a checkpoint on this device, over random prompts.

    python scripts/bench/generate.py checkpoints/tiny-python [--prompts 256] [--prompt-len 32] [--max-tokens 128] ...
    python scripts/bench/generate.py scripts/shapes/llama-3.1-8b --load-format dummy --max-model-len 1024

The workload runs once to compile and `--repeats` times for the clock; end-of-sequence is ignored, so every run
generates the same number of tokens. Prints a table, and the same as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

import jax
import numpy as np

import jaxpaged
from jaxpaged import LLM, SamplingParams


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    llm = LLM(
        args.model,
        load_format=args.load_format,
        dtype=args.dtype,
        max_num_seqs=args.max_num_seqs,
        num_pages=args.num_pages,
        max_model_len=args.max_model_len,
        page_size=args.page_size,
        attention=args.attention,
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, llm.engine.model.vocab_size, (args.prompts, args.prompt_len)).tolist()
    params = SamplingParams(
        n=args.n, temperature=args.temperature, max_tokens=args.max_tokens, ignore_eos=True, seed=0, detokenize=False
    )
    runs = []
    for repeat in range(1 + args.repeats):
        llm.generate(prompts, params, progress=False)
        run = llm.last_run
        if repeat:
            runs.append({"tokens_per_second": round(run.tokens_per_second, 1), **run.seconds, "steps": run.steps})
    medians = {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
    for name, value in medians.items():
        print(f"{name:>18} {value:12,.3f}")
    print(
        json.dumps(
            {
                **vars(args),
                "attention": llm.engine.kernels.name,
                "medians": medians,
                "peak_pages": int(llm.last_run.pages_used.max()),
                "compilations_in_the_last_run": llm.last_run.compilations,
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "jaxpaged": jaxpaged.__version__,
            },
            allow_nan=False,
        )
    )
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--n", type=int, default=1, help="samples a prompt")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--num-pages", type=int, default=None)
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--attention", default="auto")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
