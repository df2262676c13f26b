"""Beam search of many prompts: beam-tokens a second, where a step's time goes, and transformers on the same work.

    python scripts/bench/beams.py                               # a GPU: Llama-3.1-8B shapes, 4 and 64 beams
    python scripts/bench/beams.py --quick                       # the same, a quarter of the tokens, once
    python scripts/bench/beams.py checkpoints/tiny-python --cases 8x4 --prompt-len 64 --max-tokens 32

A case PxW is P random prompts searched with W beams each. Beam-tokens a second are W * generated tokens, summed over
all prompts, by the seconds of the whole call. Every case runs once to compile and `--repeats` times for the clock, of
which the median counts. Weights are random where the model is a directory of shapes; end-of-sequence is ignored.

`device` is from a step's launch until its result is on the host, and `choose` the part of it that ranks candidates,
timed alone; `select` is the host's choice among them, with forks and frees; `host` is the rest. The peer,
`transformers.generate(num_beams=W)` in bfloat16, runs first and in a process of its own, which leaves no memory behind;
without torch, transformers or a GPU it is left out. Without a GPU the bundled model is the default, with less work.
Ends with the same as JSON on one line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*"))
#: Tokens of the prompt and generated, where the command line does not say.
LENGTHS = (512, 128) if HAS_GPU else (64, 32)
PEER_SECONDS = 60  # for loading and all cases; what is not begun by then is left out
PEER_TIMEOUT = 90


class Case(NamedTuple):
    prompts: int
    width: int

    def __str__(self) -> str:
        return f"{self.prompts} x {self.width}"


def read_case(text: str) -> Case:
    prompts, _, width = text.partition("x")
    return Case(int(prompts), int(width))


read_case.__name__ = "case, such as 16x4"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.only_peer:
        print(json.dumps(run_peer(args), allow_nan=False))
        return 0
    peer = run_peer_apart(args, argv)  # before jax takes the device's memory
    if "left_out" in peer:
        print(f"transformers was left out: {peer['left_out']}", flush=True)
    llm, results = make_llm(args), []
    for case in args.cases:
        result = measure_case(llm, case, args)
        result["peer"] = peer.get("cases", {}).get(result["case"])
        print_case(result)
        results.append(result)
    options = {**vars(args), "model": str(args.model), "cases": results, **describe(llm)}
    print(json.dumps({**options, "transformers": {k: v for k, v in peer.items() if k != "cases"}}, allow_nan=False))
    return 0


def print_case(result: dict[str, Any]) -> None:
    theirs = result["peer"]
    print(
        f"\n{result['case']} beams: {result['beam_tokens_per_second']:,.0f} beam-tokens/s in {result['seconds']:.2f} s"
    )
    if theirs is not None:
        ratio = result["beam_tokens_per_second"] / theirs["beam_tokens_per_second"]
        print(f"  transformers: {theirs['beam_tokens_per_second']:,.0f} beam-tokens/s; ratio {ratio:.2f}")
    print(f"  {result['steps']} steps of {result['step_ms']:.2f} ms, {result['page_copies']} pages copied")
    for name in ("device", "choose", "select", "host"):
        print(f"  {name:>8} {result[name + '_ms']:8.3f} ms a step {result[name + '_ms'] / result['step_ms']:8.1%}")
    if result["compilations"]:
        print(f"  {result['compilations']} programs were compiled inside the clock")
    sys.stdout.flush()


# jaxpaged


def make_llm(args: argparse.Namespace) -> Any:
    from jaxpaged import LLM

    most = max(case.prompts * case.width for case in args.cases)
    length = args.prompt_len + args.max_tokens
    return LLM(
        args.model,
        load_format=args.load_format or ("dummy" if args.model.parent.name == "shapes" else "auto"),
        attention=args.attention,
        cascade_attention=args.cascade_attention,
        prefix_caching=False,  # every repeat computes its prompts
        max_num_seqs=most,
        max_model_len=length,
        page_size=args.page_size,
        num_pages=2 + max(pages_of(case, args) for case in args.cases),
    )


def describe(llm: Any) -> dict[str, str]:
    import jax

    import jaxpaged

    return {
        "attention": llm.engine.kernels.name,
        "dtype": llm.engine.dtype,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "jaxpaged": jaxpaged.__version__,
    }


def pages_of(case: Case, args: argparse.Namespace) -> int:
    """Of a pool in which the case never preempts, admitted with a page of headroom for each beam."""
    shared = args.prompt_len // args.page_size
    own = -(-(args.prompt_len + args.max_tokens) // args.page_size) - shared + 1
    return int(1.02 * case.prompts * (shared + case.width * (own + 1)))


def measure_case(llm: Any, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    from jaxpaged import BeamSearchParams

    prompts = random_prompts(case, args.prompt_len, llm.engine.model.vocab_size)
    params = BeamSearchParams(beam_width=case.width, max_tokens=args.max_tokens, ignore_eos=True, detokenize=False)
    runs = []
    for repeat in range(1 + args.repeats):
        with CommitClock() as clock:
            began = time.perf_counter()
            outputs = llm.beam_search(prompts, params, progress=False)
            seconds = time.perf_counter() - began
        if repeat:
            runs.append((seconds, llm.last_run.seconds["device"], clock.seconds))
    generated = sum(case.width * max(len(beam.token_ids) for beam in output.outputs) for output in outputs)
    seconds, device, select = statistics.median_low(runs)  # one run: its parts belong together
    run = llm.last_run
    step = 1e3 / run.steps
    return {
        "case": str(case),
        "beam_tokens_per_second": round(generated / seconds, 1),
        "seconds": round(seconds, 4),
        "steps": run.steps,
        "step_ms": round(seconds * step, 4),
        "device_ms": round(device * step, 4),
        "choose_ms": round(choose_ms(llm, case, args), 4),
        "select_ms": round(select * step, 4),
        "host_ms": round((seconds - device - select) * step, 4),
        "host_share": round(1 - device / seconds, 4),
        "page_copies": run.page_copies,
        "preemptions": run.preemptions,
        "peak_pages": int(run.pages_used.max()),
        "peak_pages_without_sharing": int(run.logical_pages.max()),
        "compilations": run.compilations,
    }


def random_prompts(case: Case, length: int, vocab_size: int) -> list[list[int]]:
    return np.random.default_rng(case.width).integers(0, vocab_size, (case.prompts, length)).tolist()


class CommitClock:
    """Seconds that the scheduler takes to commit steps while it is entered."""

    def __enter__(self) -> CommitClock:
        from jaxpaged.host.scheduler import Scheduler

        self.seconds = 0.0
        self._owner, self._commit = Scheduler, Scheduler.commit
        clock = self

        def timed(self: Scheduler, plan: Any, outputs: Any) -> list[Any]:
            began = time.perf_counter()
            finished = clock._commit(self, plan, outputs)
            clock.seconds += time.perf_counter() - began
            return finished

        Scheduler.commit = timed
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.commit = self._commit


def choose_ms(llm: Any, case: Case, args: argparse.Namespace) -> float:
    """Milliseconds that the device takes from logits to a decode step's candidates, in a program of its own."""
    import jax
    import jax.numpy as jnp

    from jaxpaged.device.beam_candidates import choose_beams, group_candidates
    from jaxpaged.host.step.features import SamplingFeatures
    from jaxpaged.step_io import SamplingInputs

    rows, vocab_size = case.prompts * case.width, llm.engine.model.vocab_size
    features = SamplingFeatures.of([_group_of(case, args)] * case.prompts, vocab_size)
    beam_rows = np.arange(rows, dtype=np.int32).reshape(case)
    zeros = np.zeros(rows, np.int32)
    inputs = SamplingInputs(
        np.zeros((rows, 2), np.int32), zeros, zeros, np.zeros(rows, np.float32), beam_rows=beam_rows,
        end_ids=np.zeros((case.prompts, 0), np.int32),
        beam_counts=np.full(case.prompts, features.num_candidates, np.int32),
    )  # fmt: skip

    @jax.jit
    def choose(logits):
        def of_rows(rows, _):
            return logits[rows], jax.nn.log_softmax(logits[rows])

        return choose_beams(group_candidates(of_rows, inputs, features.num_candidates, vocab_size), inputs)

    logits = jax.random.normal(jax.random.key(0), (rows, vocab_size), jnp.float32)
    jax.block_until_ready(choose(logits))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
            columns = choose(logits)
        jax.block_until_ready(columns)
        times.append((time.perf_counter() - began) / 10 * 1e3)
    return statistics.median(times)


def _group_of(case: Case, args: argparse.Namespace) -> Any:
    """A request of the case, for what it asks of a step."""
    from jaxpaged import BeamSearchParams
    from jaxpaged.host.beams.beam_state import BeamState
    from jaxpaged.host.sequence import Sequence, SequenceGroup

    params = BeamSearchParams(beam_width=case.width, max_tokens=args.max_tokens, ignore_eos=True)
    group = SequenceGroup("0", None, params, 0, [Sequence(0, [0], 1)], 1 + args.max_tokens)
    group.beams = BeamState.of(params, (), args.max_tokens)
    return group


# transformers


def run_peer_apart(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """What `run_peer` found, in another process; why it was left out otherwise."""
    if args.peer == "no" or (args.peer == "auto" and not HAS_GPU):
        return {"left_out": "not asked for" if args.peer == "no" else "there is no GPU"}
    command = [sys.executable, __file__, "--only-peer", *argv]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=PEER_TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"left_out": f"not done in {PEER_TIMEOUT} s"}
    if ran.returncode:
        return {"left_out": (ran.stderr.strip().splitlines() or ["no word"])[-1]}
    return json.loads(ran.stdout.splitlines()[-1])


def run_peer(args: argparse.Namespace) -> dict[str, Any]:
    """`generate` of transformers on the same work: seconds of each case, with weights as random as ours."""
    began = time.perf_counter()
    try:
        torch, transformers = import_module("torch"), import_module("transformers")
    except ImportError as error:
        return {"left_out": str(error)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(peer_config(args.model), dtype=dtype).eval()
    found: dict[str, Any] = {}
    for case in args.cases:
        if time.perf_counter() - began < PEER_SECONDS:
            found[str(case)] = time_peer(torch, model, case, args)
    names = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}
    return {"cases": {name: result for name, result in found.items() if result is not None}, **names}


def peer_config(directory: Path) -> Any:
    transformers = import_module("transformers")
    values = json.loads((directory / "config.json").read_text())
    if values.get("format") != "jaxpaged":
        return transformers.AutoConfig.from_pretrained(directory)
    names = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings")
    shapes = {name: values[name] for name in (*names, "tie_word_embeddings")}
    return transformers.LlamaConfig(
        num_hidden_layers=values["num_layers"],
        num_attention_heads=values["num_heads"],
        num_key_value_heads=values["num_kv_heads"],
        **shapes,
    )


def time_peer(torch: Any, model: Any, case: Case, args: argparse.Namespace) -> dict[str, float] | None:
    """The second call counts; None where the memory does not suffice."""
    transformers = import_module("transformers")
    ids = torch.tensor(random_prompts(case, args.prompt_len, model.config.vocab_size), device=model.device)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)

    def search(max_tokens: int) -> Any:
        config = transformers.GenerationConfig(
            num_beams=case.width, max_new_tokens=max_tokens, eos_token_id=None, pad_token_id=0, do_sample=False
        )
        with torch.no_grad():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return found.cpu()

    try:
        search(4)
        began = time.perf_counter()
        found = search(args.max_tokens)
        seconds = time.perf_counter() - began
    except torch.OutOfMemoryError:
        return None
    generated = case.prompts * case.width * (found.shape[1] - args.prompt_len)
    return {"seconds": round(seconds, 4), "beam_tokens_per_second": round(generated / seconds, 1)}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "scripts" / "shapes" / "llama-3.1-8b" if HAS_GPU else ROOT / "checkpoints" / "tiny-python"
    cases = [Case(16, 4), Case(4, 64)] if HAS_GPU else [Case(8, 4), Case(2, 32)]
    parser.add_argument("model", metavar="MODEL", nargs="?", type=Path, default=default)
    parser.add_argument("--cases", type=read_case, nargs="+", default=cases, metavar="PxW", help="prompts x beams")
    parser.add_argument("--prompt-len", type=int, default=LENGTHS[0])
    parser.add_argument("--max-tokens", type=int, default=LENGTHS[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens, once")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--cascade-attention", action="store_true", help="read pages that beams share once a step")
    parser.add_argument("--load-format", default=None, help="by default random weights for a directory of shapes")
    parser.add_argument("--peer", choices=("auto", "yes", "no"), default="auto", help="transformers: auto is on a GPU")
    parser.add_argument("--only-peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.max_tokens, args.repeats = max(2, args.max_tokens // 4), 1
    return args


if __name__ == "__main__":
    sys.exit(main())
