"""Peers of the generation benchmark, each in a process of its own: `run_peer` runs one, if it is installed.

python scripts/bench/generation_peers.py vllm MODEL --workloads 256x128+512     # one alone; JSON lines
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from generation_workloads import DEFAULT, GenerationWorkload, make_workload

PEERS = ("vllm", "transformers")
#: More rows than that transformers pads to one length at a time.
TRANSFORMERS_BATCH = 64


def installed_peers() -> list[str]:
    return [name for name in PEERS if importlib.util.find_spec(name) is not None]


def run_peer(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Its results by workload; under "left_out" why there are none."""
    command = [
        sys.executable, __file__, name, args.model, "--workloads", *args.workloads, "--seed", str(args.seed),
        "--repeats", str(args.repeats), "--max-model-len", str(args.max_model_len), "--dtype", args.dtype,
        "--max-num-seqs", str(args.max_num_seqs), "--memory-utilization", str(args.memory_utilization),
        "--load-format", args.load_format, *(["--no-prefix-caching"] if args.no_prefix_caching else []),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.peer_timeout)
        lines, failure = done.stdout.splitlines(), (done.stderr.strip().splitlines() or ["no word"])[-1]
        failed = done.returncode != 0
    except subprocess.TimeoutExpired as error:
        lines, failure, failed = str(error.stdout or "").splitlines(), f"not done in {args.peer_timeout} s", True
    results = {one["workload"]: one for line in lines if line.startswith('{"workload"') for one in [json.loads(line)]}
    return {**results, "left_out": failure} if failed else results


def run_vllm(args: argparse.Namespace, workloads: list[GenerationWorkload]) -> None:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it compiles its kernels when it is first used
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    llm = LLM(
        args.model, load_format=args.load_format, dtype=args.dtype, max_model_len=args.max_model_len,
        gpu_memory_utilization=args.memory_utilization, max_num_seqs=args.max_num_seqs, skip_tokenizer_init=True,
        enable_prefix_caching=not args.no_prefix_caching, disable_log_stats=True,
    )  # fmt: skip
    for workload in workloads:

        def generate(prompts: Any, lengths: list[int], num_samples: int = workload.num_samples) -> list[list[int]]:
            params = [
                SamplingParams(n=num_samples, temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
                for new in lengths
            ]
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

        report(workload, generate, args, llm.reset_prefix_cache)


def run_transformers(args: argparse.Namespace, workloads: list[GenerationWorkload]) -> None:
    """`generate` in batches of one length; requests of several lengths are left out, since it pads them all, and so are
    conversations, whose answers it gives padded."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.AutoConfig.from_pretrained(args.model)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=args.dtype).eval()
    for workload in workloads:
        if workload.turns or len(set(map(len, workload.prompts))) > 1 or len(set(workload.output_lens)) > 1:
            continue
        ids = torch.tensor(workload.prompts, device=device)
        new = workload.output_lens[0]

        def generate(
            _prompts: Any, _lengths: Any, ids: Any = ids, new: int = new, workload: GenerationWorkload = workload
        ) -> list[list[int]]:
            for batch in ids.split(max(1, TRANSFORMERS_BATCH // workload.num_samples)):
                model.generate(
                    batch, attention_mask=torch.ones_like(batch), do_sample=True, max_new_tokens=new,
                    min_new_tokens=new, num_return_sequences=workload.num_samples, pad_token_id=0,
                )  # fmt: skip
            return []

        report(workload, generate, args)


def median_of(seconds: list[float]) -> float:
    """Of all who are compared alike: a run that was, and of two runs the slower."""
    return statistics.median_high(seconds)


def report(
    workload: GenerationWorkload, generate: Any, args: argparse.Namespace, reset: Callable[[], Any] = lambda: None
) -> None:
    seconds = []
    for _ in range(1 + args.repeats):
        reset()
        began = time.perf_counter()
        workload.run(generate)
        seconds.append(time.perf_counter() - began)
    median = median_of(seconds[1:])
    result = {
        "workload": workload.name, "tokens_per_second": round(workload.num_generated / median, 1),
        "first_seconds": round(seconds[0], 2), "seconds": round(median, 4),
    }  # fmt: skip
    print(json.dumps(result, allow_nan=False), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    add_shared_flags(parser)
    args = parser.parse_args(argv)
    with open(os.path.join(args.model, "config.json"), encoding="utf-8") as file:
        vocab_size = json.load(file)["vocab_size"]
    workloads = [make_workload(name, vocab_size, args.seed, args.max_model_len) for name in args.workloads]
    {"vllm": run_vllm, "transformers": run_transformers}[args.peer](args, workloads)
    return 0


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """What jaxpaged and its peers are told alike."""
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--workloads", nargs="+", default=list(DEFAULT), metavar="NAME", help="as 256x128+512, chat384")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load-format", default="dummy", help="dummy (default): random weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-model-len", type=int, default=4096, help="(default 4096, or as many as the model has)")
    parser.add_argument("--memory-utilization", type=float, default=0.85)
    parser.add_argument("--no-prefix-caching", action="store_true", help="compute every prompt; vLLM too")


if __name__ == "__main__":
    sys.exit(main())
