"""What is asked of several devices, in a process that has eight of them: JAX must be told before it starts.

python tests/parallel_program.py CASE...      # prints a JSON object, case -> what came of it
"""

from __future__ import annotations

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAXPAGED_CACHE_DIR"] = ""

import dataclasses
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from paths import GOLDENS
from toy import TOY, beam_group, few_programs, make_group, run_checked, save_toy_checkpoint

from jaxpaged import LLM, SamplingParams
from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.checkpoint import Checkpoint, load_params, open_checkpoint
from jaxpaged.config import CacheConfig, EngineConfig, ModelConfig, PreemptionConfig, RopeConfig
from jaxpaged.device import steps
from jaxpaged.device.attention import REFERENCE
from jaxpaged.device.mesh import Placement
from jaxpaged.device.param_nodes import Params, by_name
from jaxpaged.device.params import param_records, param_shapes, random_params
from jaxpaged.device.shards import place_parts, place_random
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.lowering import step_to_make
from jaxpaged.engine.runner import StepRunner
from jaxpaged.host.step.batching import StepShape
from jaxpaged.host.step.features import SamplingFeatures

#: Eight heads, so that there can be eight shards; a vocabulary that no number of them divides.
LLAMA = dataclasses.replace(TOY, num_heads=8, num_kv_heads=4, num_layers=2)
GEMMA = dataclasses.replace(
    LLAMA, family="gemma3", num_kv_heads=2, qk_norm=True, norm_offset=1.0, norm_placement="sandwich",
    activation="gelu_tanh", sliding_window=6, sliding_layers=(True, False), local_rope=RopeConfig(theta=100.0),
    embedding_scale=5.5, attention_soft_cap=20.0, final_soft_cap=15.0,
)  # fmt: skip
OPT = dataclasses.replace(
    LLAMA, family="opt", num_kv_heads=8, norm="layer", activation="relu", gated_mlp=False, mlp_bias=True, qkv_bias=True,
    attention_out_bias=True, rope=None, learned_position_offset=2, embedding_size=16, norm_placement="post",
)  # fmt: skip
QWEN = dataclasses.replace(LLAMA, family="qwen3", qkv_bias=True, qk_norm=True, tie_word_embeddings=False)
MODELS = {"llama": LLAMA, "gemma": GEMMA, "opt": OPT, "qwen": QWEN}
#: Half of what there is to compile.
SHALLOW = {
    name: dataclasses.replace(model, num_layers=1, sliding_layers=model.sliding_layers[:1])
    for name, model in MODELS.items()
}
#: Runs that nobody ends.
LEFT_OPEN: list[Any] = []
PROMPTS = [[3, 5, 7, 11, 2], [9, 8], [1] * 9, [4, 4, 5, 96]]


def placement(num_shards: int) -> Placement:
    return Placement(tuple(jax.devices()[:num_shards]))


def weights(model: ModelConfig) -> Params:
    """Random ones, biases and norms too; numpy's, which need no compiling."""
    rng = np.random.default_rng(7)

    def random(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        scale, middle = (0.3, 0.0) if len(shape.shape) == 2 else (0.1, 1.0 - model.norm_offset)
        return (rng.standard_normal(shape.shape) * scale + middle).astype(np.float32)

    return jax.tree.map(random, param_shapes(model, "float32"))


def placed(params: Params, model: ModelConfig, where: Placement) -> Params:
    if where.size == 1:
        return params
    records = by_name(param_records(model))
    leaves = []
    for name, leaf in by_name(params).items():
        ends = np.cumsum([part.width for part in records[name].parts])[:-1]
        parts = np.split(np.asarray(leaf), ends, axis=-1)
        leaves.append(place_parts(parts, records[name], model, where, dtype="float32"))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def engine(model: ModelConfig, num_shards: int, kv_dtype="float32", kv_cache="paged", num_pages=64, **limits) -> Engine:
    where = placement(num_shards)
    config = EngineConfig(64, 8, 32, kv_cache=kv_cache, **{"mixed_steps": False, "prefix_caching": False, **limits})
    cache = CacheConfig(4, num_pages, kv_dtype)
    return Engine(StepRunner(placed(weights(model), model, where), model, cache, config, REFERENCE, where))


def greedy(count: int = 6) -> list:
    return [make_group(p, SamplingParams(temperature=0, max_tokens=count), str(i)) for i, p in enumerate(PROMPTS)]


def all_kinds() -> list:
    """Greedy, drawn, filtered, penalised, with log-probabilities, of several samples, and beams."""
    params = [
        SamplingParams(temperature=0, max_tokens=12, logprobs=3),
        SamplingParams(temperature=0.8, n=3, top_p=0.9, top_k=40, seed=1, max_tokens=10),
        SamplingParams(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5, seed=2, max_tokens=9),
    ]
    groups = [make_group(PROMPTS[i], one, str(i)) for i, one in enumerate(params)]
    return [*groups, beam_group(PROMPTS[3], BeamSearchParams(beam_width=3, max_tokens=7), ends=[1], request_id="b")]


def same_tokens(name: str, num_shards: list[int], groups: Callable[[], list] = greedy, **options) -> dict[str, Any]:
    tokens = [run_checked(few_programs(engine(MODELS[name], n, **options)), groups()) for n in (1, *num_shards)]
    distinct = {token for found in tokens[0].values() for sample in found for token in sample}
    return {"same": [found == tokens[0] for found in tokens[1:]], "distinct": len(distinct)}


def prompts_alone(name: str, num_shards: int) -> list[Any]:
    """The tokens that follow the prompts, and how likely they are."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    groups = [make_group(p, params, str(i)) for i, p in enumerate(PROMPTS)]
    run_checked(few_programs(engine(SHALLOW[name], num_shards)), groups)
    samples = [group.sequences[0] for group in groups]
    return [[s.output_ids[0] for s in samples], [round(s.cumulative_logprob, 5) for s in samples]]


def aliasing(name: str, shape: StepShape, num_shards: int = 2) -> dict[str, Any]:
    """Bytes of each device, for a pool of which a copy would be seen."""
    where, cache = placement(num_shards), CacheConfig(16, 2000, "float32")
    model = SHALLOW["llama"]
    lowered = step_to_make(shape, model, "float32", cache, REFERENCE, SamplingFeatures(), where).lower()
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    pool = 2000 * 16 * model.kv_bytes_per_token(4) // num_shards
    return {"pool": pool, name: (memory.alias_size_in_bytes, memory.temp_size_in_bytes)}


def random_weights(names: list[str], divisions: tuple[tuple[int, str], ...]) -> dict[str, bool]:
    same = {}
    for name in names:
        model = SHALLOW[name]
        for n, dtype in divisions:
            expected = placed_as(random_params(model, dtype, 3), model, placement(n), dtype)
            found = place_random(model, dtype, 3, placement(n))
            pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
            same[f"{name} {n}"] = all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
    return same


def placed_as(params: Params, model: ModelConfig, where: Placement, dtype: str) -> Params:
    wide = placed(jax.tree.map(lambda leaf: leaf.astype("float32"), params), model, where)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), wide)


def one_device() -> dict[str, Any]:
    """What is lowered for one device, however that is named, and for two."""
    cache, shape = CacheConfig(4, 16, "float32"), StepShape(4, 4)
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    texts = [
        step_to_make(shape, SHALLOW["llama"], "float32", cache, REFERENCE, SamplingFeatures(), where).lower().as_text()
        for where in (single, placement(1), placement(2))
    ]
    words = ("all_reduce", "all_gather", "manual_computation")
    return {"same": texts[0] == texts[1], "words": [[word in text for word in words] for text in texts[1:]]}


def collectives() -> dict[str, int]:
    """In the program of a decode step."""
    shape, cache = StepShape(4, 4), CacheConfig(4, 16, "float32")
    text = (
        step_to_make(shape, SHALLOW["llama"], "float32", cache, REFERENCE, SamplingFeatures(), placement(2))
        .lower()
        .as_text()
    )
    return {name: text.count(f'"stablehlo.{name}"') for name in ("all_reduce", "all_gather", "all_to_all")}


def refusals() -> dict[str, str]:
    """A directory with a config.json and no weights: whoever gets to these is told that they are missing."""
    from jax.sharding import Mesh

    devices = np.array(jax.devices())
    wanted: dict[str, dict[str, Any]] = {
        "three": {"tensor_parallel_size": 3},
        "nine": {"tensor_parallel_size": 9},
        "nine engines": {"tensor_parallel_size": 2, "data_parallel_size": 5},
        "mesh and engines": {"mesh": Mesh(devices[:2], ("model",)), "data_parallel_size": 2},
        "two axes": {"mesh": Mesh(devices.reshape(2, 4), ("data", "model"))},
        "another size": {"mesh": Mesh(devices[:2], ("model",)), "tensor_parallel_size": 4},
        "no mesh": {"mesh": [devices[0]]},
        "fits": {"mesh": Mesh(devices[:2].reshape(1, 2), ("data", "model"))},
    }
    with tempfile.TemporaryDirectory() as folder:
        values = {"format": "jaxpaged", "format_version": 2, **LLAMA.to_dict()}
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return {name: refusal(lambda options=options: LLM(folder, **options)) for name, options in wanted.items()}


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def programs_of_meshes() -> list[int]:
    """Programs made by a run on two devices, by the same run on two others, and by the first once more."""
    made = []
    for first in (0, 2, 0):
        where = Placement(tuple(jax.devices()[first : first + 2]))
        cache, limits = CacheConfig(4, 48, "float32"), EngineConfig(64, 8, 32)
        runner = StepRunner(placed(weights(LLAMA), LLAMA, where), LLAMA, cache, limits, REFERENCE, where)
        before = steps.num_programs()
        run_checked(few_programs(Engine(runner)), greedy(3))
        made.append(steps.num_programs() - before)
    return made


def toy_llm(folder: str, **options: Any) -> LLM:
    llm = LLM(
        folder, dtype="float32", max_num_seqs=2, num_pages=48, page_size=4, max_model_len=64, max_num_batched_tokens=32,
        prefix_caching=False, **options,
    )  # fmt: skip
    for one in llm._engines:
        few_programs(one)
    return llm


def replicas(num_shards: int, num_engines: int) -> dict[str, Any]:
    params = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
    prompts = [[3 + i, 5, 7, 90 - i][: 2 + i % 3] for i in range(9)]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_toy_checkpoint(Path(folder) / "toy", with_tokenizer=False)
        together = toy_llm(f"{folder}/toy", tensor_parallel_size=num_shards, data_parallel_size=num_engines)
    alone = run_checked(together.engine, [make_group(p, params, str(i)) for i, p in enumerate(prompts)])
    expected = [alone[str(i)][0] for i in range(len(prompts))]
    found["tokens"] = expected

    def run() -> list[list[int]]:
        outputs = together.generate(prompts, params, progress=False)
        found["order"] = [output.request_id for output in outputs]
        return [output.outputs[0].token_ids for output in outputs]

    found["same"] = run() == expected
    streamed = together.generate_iter((prompt for prompt in prompts), params)
    found["same from a generator"] = sorted(output.outputs[0].token_ids for output in streamed) == sorted(expected)
    found["same"] &= run() == expected
    found["requests"] = [one.stats.num_requests for one in together._engines]
    found["total"] = together.last_run.num_requests
    assert len(together.last_run.memory.used) == together.last_run.steps > 0
    broken = together._engines[-1].runner
    launch, broken.launch = broken.launch, fail  # pyright: ignore[reportAttributeAccessIssue]
    found["error"] = refusal(run)
    broken.launch = launch
    found["same after the error"] = run() == expected
    left: Any = together.generate_iter(prompts, params)
    next(left)
    left.close()
    LEFT_OPEN.append(together.generate_iter(prompts, params))
    found["used after leaving"] = [one.scheduler.allocator.num_used for one in together._engines]
    found["threads"] = [thread.name for thread in threading.enumerate() if thread.name.startswith("engine")]
    next(LEFT_OPEN[-1])
    return found


def fail(*_: Any) -> None:
    raise RuntimeError("out of order")


def checkpoints() -> dict[str, list[bool]]:
    """Weights that are read to 2 and to 4 devices, against those of one device that are divided."""
    with tempfile.TemporaryDirectory() as folder:
        directories = {"huggingface": GOLDENS / "qwen2", "native": save_toy_checkpoint(Path(folder) / "toy")}
        return {
            name: [is_divided(open_checkpoint(directory), placement(n)) for n in (2, 4)]
            for name, directory in directories.items()
        }


def is_divided(checkpoint: Checkpoint, where: Placement) -> bool:
    whole = load_params(checkpoint, dtype="float32", device=jax.devices()[0])
    expected = placed(whole, checkpoint.config, where)
    found = load_params(checkpoint, dtype="float32", device=where)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(a.sharding == b.sharding and np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def trees() -> float:
    """The largest difference of log-probabilities, after forks in the middle of a page."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        save_toy_checkpoint(Path(folder) / "toy", with_tokenizer=False)
        for n in (1, 2):
            llm = toy_llm(f"{folder}/toy", tensor_parallel_size=n)
            with llm.tree() as tree:
                root = tree.open([3, 5, 7, 11, 2])
                kids = tree.fork(root, 2)
                tree.append(kids, [[8, 9], [4]])
                found.append(tree.next_tokens(kids, 97).logprobs)
    return float(np.abs(np.sort(found[0]) - np.sort(found[1])).max())


PROMPT_CASES = (("gemma", 1), ("gemma", 4), ("opt", 1), ("opt", 8))
SWAPPING = {"preemption": PreemptionConfig("swap", 64, transfer_pages=4), "num_pages": 14}
CASES: dict[str, Callable[[], Any]] = {
    **{f"{name} {n}": lambda name=name, n=n: prompts_alone(name, n) for name, n in PROMPT_CASES},
    "aliasing": lambda: aliasing("decode", StepShape(4, 4)),
    "prefill aliasing": lambda: aliasing("prefill", StepShape(4, 4, 16)),
    "random weights": lambda: random_weights(["gemma"], ((2, "bfloat16"),)),
    "all random weights": lambda: random_weights(list(MODELS), ((2, "bfloat16"), (8, "float32"))),
    "one engine": lambda: replicas(1, 1),
    "replicas": lambda: replicas(2, 2),
    "replicas of one": lambda: replicas(1, 3),
    "checkpoints": checkpoints,
    "trees": trees,
    "one device": one_device,
    "collectives": collectives,
    "refusals": refusals,
    "programs of meshes": programs_of_meshes,
    "swapping": lambda: same_tokens("llama", [2], all_kinds, **SWAPPING),
    "fp8": lambda: same_tokens("llama", [4], all_kinds, kv_dtype="float8_e4m3fn"),
    "dense": lambda: same_tokens("llama", [2], all_kinds, kv_cache="dense"),
    "none": lambda: same_tokens("llama", [2], kv_cache="none"),
    "mixed": lambda: same_tokens("gemma", [2], all_kinds, mixed_steps=True, prefix_caching=True),
    **{f"{name} all": lambda name=name: same_tokens(name, [2, 4, 8], all_kinds) for name in MODELS},
}


def main(names: list[str]) -> int:
    print(json.dumps({name: CASES[name]() for name in names}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
