"""Wide beams, as generative retrieval has them: one prompt, few tokens, thousands of beams. Where a step's time goes.

    python scripts/bench/wide_beams.py                                    # a GPU: Qwen3-0.6B shapes, 64 to 5,000 beams
    python scripts/bench/wide_beams.py --widths 5000 --tokens 16 --profile /tmp/wide    # with a trace for Perfetto
    python scripts/bench/wide_beams.py checkpoints/tiny-python --widths 8 64 --tokens 3 16 --prompt-len 64

Each case is a width and a number of generated tokens: it runs once to compile and `--repeats` times for the clock, of
which the median counts. `ms` is the whole call, prompt and answer included; `first` is until the prompt is computed and
the first beams are chosen; `step` is one of the others. `host` is what the host works on a step, most of it while the
device computes; `gap` is the part of a step in which nothing is on the device or on its way to it. Weights are random
where the model is a directory of shapes; end-of-sequence is ignored. Ends with the same as JSON on one line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*"))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    llm = make_llm(args)
    print(f"{'width':>6} {'tokens':>6} {'ms':>9} {'first':>8} {'step':>8} {'host':>7} {'gap':>7}  copies  pages")
    results = []
    for width in args.widths:
        for tokens in args.tokens:
            results.append(result := measure_case(llm, width, tokens, args))
            print_case(result)
    if args.profile is not None:
        profile(llm, args)
    print(json.dumps({**vars(args), "model": str(args.model), "cases": results, **describe(llm)}, default=str))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = ROOT / ("scripts/shapes/qwen3-0.6b" if HAS_GPU else "checkpoints/tiny-python")
    parser.add_argument("model", nargs="?", type=Path, default=model)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512, 5000] if HAS_GPU else [8, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[3, 16, 128] if HAS_GPU else [3, 16])
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--prompt-len", type=int, default=256 if HAS_GPU else 64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--profile", type=Path, help="a directory for a trace of the last case")
    return parser.parse_args(argv)


def make_llm(args: argparse.Namespace) -> Any:
    from jaxpaged import LLM

    length = args.prompt_len + max(args.tokens)
    own = -(-length // args.page_size) - args.prompt_len // args.page_size + 1
    pages = args.prompts * (args.prompt_len // args.page_size + max(args.widths) * (own + 1))
    return LLM(
        args.model,
        load_format="dummy" if args.model.parent.name == "shapes" else "auto",
        attention=args.attention,
        prefix_caching=False,  # every repeat computes its prompts
        max_num_seqs=args.prompts * max(args.widths),
        max_model_len=length,
        page_size=args.page_size,
        num_pages=2 + int(1.02 * pages),
    )


def describe(llm: Any) -> dict[str, Any]:
    import jax

    import jaxpaged

    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    return {
        "attention": llm.engine.kernels.name,
        "dtype": llm.engine.dtype,
        "pool_gib": round(llm.engine.cache_config.num_pages * llm.engine.runner.page_bytes / 2**30, 2),
        "peak_gib": round(memory.get("peak_bytes_in_use", 0) / 2**30, 2),
        "device": device.device_kind,
        "jax": jax.__version__,
        "jaxpaged": jaxpaged.__version__,
    }


def search(llm: Any, width: int, tokens: int, args: argparse.Namespace) -> Any:
    from jaxpaged import BeamSearchParams

    vocab_size = llm.engine.model.vocab_size
    prompts = np.random.default_rng(width).integers(0, vocab_size, (args.prompts, args.prompt_len)).tolist()
    params = BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True, detokenize=False)
    return llm.beam_search(prompts, params, progress=False)


def measure_case(llm: Any, width: int, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    search(llm, width, tokens, args)
    compiled = time.perf_counter() - began
    runs = []
    for _ in range(args.repeats):
        with HostClock() as clock:
            began = time.perf_counter()
            search(llm, width, tokens, args)
            seconds = time.perf_counter() - began
        runs.append((seconds, clock.seconds, llm.last_run))
    seconds, host, run = runs[sorted(range(len(runs)), key=lambda i: runs[i][0])[len(runs) // 2]]
    began_at, ended_at = run.step_times
    steps = np.diff(ended_at[run.prefill_steps - 1 :])
    return {
        "width": width,
        "tokens": tokens,
        "ms": round(1e3 * seconds, 2),
        "all_ms": [round(1e3 * one[0], 2) for one in runs],
        "first_ms": round(1e3 * (ended_at[run.prefill_steps - 1] - began_at[0]), 2),
        "step_ms": round(1e3 * statistics.median(steps), 3) if len(steps) else None,
        "answer_ms": round(1e3 * (seconds - run.seconds["total"]), 2),
        "host_ms": round(1e3 * host / run.steps, 3),
        "gap_ms": round(1e3 * (run.seconds["total"] - run.seconds["device"]) / run.steps, 3),
        "beam_tokens_per_second": round(args.prompts * width * tokens / seconds),
        "page_copies": run.page_copies,
        "peak_pages": int(run.pages_used.max()),
        "first_call_s": round(compiled, 1),
        "compilations": run.compilations,
    }


def print_case(case: dict[str, Any]) -> None:
    print(
        f"{case['width']:>6} {case['tokens']:>6} {case['ms']:>9.1f} {case['first_ms']:>8.1f} "
        f"{case['step_ms'] or 0:>8.2f} {case['host_ms']:>7.2f} {case['gap_ms']:>7.2f} {case['page_copies']:>7} "
        f"{case['peak_pages']:>6}  answer {case['answer_ms']:.1f} ms, compiled in {case['first_call_s']} s",
        flush=True,
    )


class HostClock:
    """Seconds that the host works on steps while it is entered: deciding, making arrays, learning."""

    def __enter__(self) -> HostClock:
        from jaxpaged.engine.record import RunRecord
        from jaxpaged.engine.runner import StepRunner
        from jaxpaged.host.scheduler import Scheduler

        self.seconds, self._whole = 0.0, []
        for owner, name in (
            (Scheduler, "schedule"), (Scheduler, "commit"), (StepRunner, "prepare"), (RunRecord, "planned"),
        ):  # fmt: skip
            self._whole.append((owner, name, getattr(owner, name)))
            setattr(owner, name, self._timed(getattr(owner, name)))
        return self

    def _timed(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            return result

        return timed

    def __exit__(self, *_: object) -> None:
        for owner, name, function in self._whole:
            setattr(owner, name, function)


def profile(llm: Any, args: argparse.Namespace) -> None:
    import jax

    with jax.profiler.trace(str(args.profile)):
        search(llm, args.widths[-1], args.tokens[-1], args)
    print(f"a trace of {args.widths[-1]} beams, {args.tokens[-1]} tokens: {args.profile}")


if __name__ == "__main__":
    sys.exit(main())
