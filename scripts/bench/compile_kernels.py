"""Compiles every kernel, and steps of an 8B model, to machine code for an H200 on a machine without a GPU.

    make compile-check                                                        # fetches what it needs into build/cuda
    PYTHONPATH=build/cuda python scripts/bench/compile_kernels.py [--only decode]

What a GPU is not needed to know: whether the kernels compile, how many registers they take, whether any spill to
memory or wait for one another where they should overlap; of the decode step, that the pool is updated in place and that
it is one CUDA graph; of swapping, that it is in place, too, and takes no more memory than was accounted for. Exit code
1 when one of these is not so. Needs JAX's CUDA plugin and NVIDIA's assembler, which pip installs anywhere (about 265
MB), but neither a GPU nor a driver.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.config import CacheConfig
from jaxpaged.device import steps
from jaxpaged.device.attention import resolve_attention
from jaxpaged.device.cache import make_paged_cache
from jaxpaged.engine.lowering import step_to_make
from jaxpaged.engine.preemption import resolve_preemption
from jaxpaged.host.step.batching import StepShape
from jaxpaged.host.step.features import SamplingFeatures

MODEL = Path(__file__).parent.parent / "shapes" / "llama-3.1-8b"
DTYPE = "bfloat16"
STEP_ROWS, STEP_CONTEXT, STEP_PAGE_SIZE = 256, 540, 16
POOL_BYTES = 80e9
#: Temporaries of the step, as a share of the pool: a copy of one layer's keys would be more.
MOST_TEMPORARIES = 0.015

#: A `GpuTargetConfigProto` of XLA. The limits are those of compute capability 9.0 in the CUDA programming guide, the
#: sizes those of NVIDIA's H200 SXM data sheet; XLA has the same in xla/backends/gpu/target_config/specs/h200.txtpb.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 12 }
gpu_device_info {
  name: "NVIDIA H200"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
"""

REPORT = re.compile(
    r"Compiling entry function '(?P<function>[^']+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill "
    r"loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Assembly(NamedTuple):
    """What ptxas says of one function."""

    function: str
    registers: int
    spilled_bytes: int


class Case(NamedTuple):
    """A kernel at some shapes."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    spilled_bytes: int = 0  # so many are known


class PagedShape(NamedTuple):
    """What makes a kernel another program; by default as in Llama 3.1 8B."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    pages_dtype: str | None = None  # None: as the queries
    soft_cap: float | None = None
    sliding_window: int | None = None


class StepFacts(NamedTuple):
    """What is asked of the compiled step."""

    pool_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    pool_copies: int
    graphs: int  # CUDA graphs that hold it all


DECODE_SHAPES = (
    *(PagedShape(head_dim=head_dim) for head_dim in (64, 80, 96, 128, 256)),
    PagedShape(page_size=8),
    PagedShape(page_size=256),
    PagedShape(kv_heads=32),
    PagedShape(kv_heads=4),
    PagedShape(heads=24),
    PagedShape(dtype="float16"),
    PagedShape(pages_dtype="float8_e4m3fn"),
    PagedShape(soft_cap=50.0, sliding_window=4096),
)
PREFILL_SHAPES = (
    *(PagedShape(head_dim=head_dim) for head_dim in (64, 128, 256)),
    PagedShape(page_size=8),
    PagedShape(page_size=256),
    PagedShape(kv_heads=32),
    PagedShape(soft_cap=50.0, sliding_window=4096),
    *(PagedShape(head_dim=head_dim, pages_dtype="float8_e4m3fn") for head_dim in (64, 128, 256)),
)
SHARED_SHAPES = (
    *(PagedShape(head_dim=head_dim) for head_dim in (64, 128, 256)),
    PagedShape(kv_heads=32),
    PagedShape(heads=64),
)
ROWS, TABLE_WIDTH, TOKENS, NUM_PAGES = 64, 512, 8192, 16_000
NUM_GROUPS = 16
#: The compute warpgroups of prefill hold a whole tile of scores and one of outputs: a row's scalars do not fit beside.
#: At head_dim 128 they are spilled outside of the loop over key tiles; at 256 nobody has looked.
PREFILL_SPILLS = {64: 0, 128: 192, 256: 640}


class Compiled(NamedTuple):
    program: jax.stages.Compiled
    assembler_said: str
    thunks: str  # XLA's list of what the program launches
    lower_seconds: float
    compile_seconds: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only what has this in its name")
    args = parser.parse_args(argv)
    if obstacle := missing_requirement():
        print(f"compile_kernels: {obstacle}", file=sys.stderr)
        return 2
    prepare_jax()
    target = h200_sharding()
    checks = {case.name: functools.partial(check_kernel, case) for case in kernel_cases(target)}
    for kv_dtype in (DTYPE, "float8_e4m3fn"):
        checks[f"step {kv_dtype}"] = functools.partial(check_step, target, kv_dtype)
    checks["swap"] = functools.partial(check_swap, target)
    faults = []
    print(f"{'':42} {'registers':>12} {'lower s':>8} {'compile s':>10}")
    for name, check in checks.items():
        if args.only in name:
            faults += [f"{name}: {fault}" for fault in faults_of(check)]
    for fault in faults:
        print(f"FAULT {fault}")
    print("all is well" if not faults else f"{len(faults)} faults")
    return 1 if faults else 0


def missing_requirement() -> str | None:
    if jax.__version_info__ < (0, 11):
        return f"the kernels need JAX 0.11 or newer, this is {jax.__version__}"
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "jax-cuda13-plugin is not on the path: run `make compile-check`"
    return None


def prepare_jax() -> None:
    """To be called before JAX looks for devices: no driver is expected, and ptxas speaks up."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a program from the cache is not assembled


def h200_sharding() -> jax.sharding.NamedSharding:
    """One H200 that is not there."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = topologies.make_mesh(topology, mesh_shape=(1,), axis_names=("gpu",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def kernel_cases(target: jax.sharding.Sharding) -> list[Case]:
    from pallas_kernels.paged_decode import paged_decode  # needs a newer JAX than this file
    from pallas_kernels.paged_prefill import paged_prefill

    tensor = functools.partial(jax.ShapeDtypeStruct, sharding=target)
    lengths = tensor((ROWS,), jnp.int32)
    cases = [_case("decode", paged_decode, shape, ROWS, [lengths], tensor) for shape in DECODE_SHAPES]
    cases += [
        _case("prefill", paged_prefill, shape, TOKENS, [lengths] * 3, tensor)._replace(
            spilled_bytes=PREFILL_SPILLS[shape.head_dim]
        )
        for shape in PREFILL_SHAPES
    ]
    cases += [_shared_case(shape, lengths, tensor) for shape in SHARED_SHAPES]
    return [*cases, _copy_case(PagedShape(), tensor)]


def _copy_case(shape: PagedShape, tensor: Any) -> Case:
    from pallas_kernels.page_copy import copy_pages

    pool = tensor((NUM_PAGES, shape.page_size, shape.kv_heads, shape.head_dim), shape.dtype)
    ids = tensor((ROWS,), jnp.int32)
    return Case("page copy in 64 pools", copy_pages, ((pool,) * 64, ids, ids))


def _shared_case(shape: PagedShape, lengths: Any, tensor: Any) -> Case:
    from pallas_kernels.cascade import cascade_decode
    from pallas_kernels.cascade_groups import CascadeGroups
    from pallas_kernels.decode_tile import max_members

    members = max_members(shape.heads, shape.kv_heads, shape.head_dim)
    of_group = tensor((NUM_GROUPS,), jnp.int32)
    groups = CascadeGroups(
        tensor((NUM_GROUPS, members), jnp.int32), of_group, of_group, lengths, tensor((2, ROWS), jnp.int32)
    )

    def decode(*arguments: Any, sliding_window: None, **options: Any) -> jax.Array:
        return cascade_decode(*arguments, **options)

    return _case("shared prefix", decode, shape, ROWS, [lengths, groups], tensor)


def _case(kernel: str, function: Any, shape: PagedShape, queries: int, lengths: list, tensor: Any) -> Case:
    pages = tensor((NUM_PAGES, shape.page_size, shape.kv_heads, shape.head_dim), shape.pages_dtype or shape.dtype)
    q = tensor((queries, shape.heads, shape.head_dim), shape.dtype)
    options = {"scale": shape.head_dim**-0.5, "soft_cap": shape.soft_cap, "sliding_window": shape.sliding_window}
    tables = tensor((ROWS, TABLE_WIDTH), jnp.int32)
    changes = [f"{name}={value}" for name, value in shape._asdict().items() if value != getattr(PagedShape(), name)]
    return Case(
        " ".join([kernel, *changes]), functools.partial(function, **options), (q, pages, pages, tables, *lengths)
    )


def faults_of(check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except Exception as error:  # whatever stops a compiler is what we came to learn, and the other kernels' turn comes
        return [f"does not compile: {type(error).__name__}: {str(error).splitlines()[0]}"]


def check_kernel(case: Case) -> list[str]:
    compiled = compile_for(lambda: jax.jit(case.function).lower(*case.shapes))
    functions = read_assembler(compiled.assembler_said)
    print_line(case.name, functions, compiled)
    return kernel_faults(compiled.assembler_said, functions, case.spilled_bytes)


def check_step(target: jax.sharding.Sharding, kv_dtype: str) -> list[str]:
    """A decode step of an 8B model over a pool of most of an H200."""
    model = open_checkpoint(MODEL).config
    (device,) = target.device_set
    kernels = resolve_attention(
        "pallas", device, head_dim=model.head_dim, page_size=STEP_PAGE_SIZE, dtype=DTYPE, kv_dtype=kv_dtype
    )
    page_bytes = STEP_PAGE_SIZE * model.kv_bytes_per_token(jnp.dtype(kv_dtype).itemsize)
    num_pages = int(POOL_BYTES / page_bytes)
    cache = CacheConfig(STEP_PAGE_SIZE, num_pages, kv_dtype)
    shape = StepShape(STEP_ROWS, -(-STEP_CONTEXT // STEP_PAGE_SIZE))
    features = SamplingFeatures(has_samples=True, is_random=True)
    compiled = compile_for(lambda: step_to_make(shape, model, DTYPE, cache, kernels, features, target).lower())
    functions = read_assembler(compiled.assembler_said)
    print_line(f"step of {model.num_layers} layers, {STEP_ROWS} rows, {kv_dtype}", functions, compiled)
    memory, text = compiled.program.memory_analysis(), compiled.program.as_text()
    assert memory is not None and text is not None, "the compiler gave no account of its program"
    layer = f"[{num_pages},{STEP_PAGE_SIZE},{model.num_kv_heads},{model.head_dim}]"
    facts = StepFacts(
        num_pages * page_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes, count_copies(text, layer),
        count_graphs(compiled.thunks),
    )  # fmt: skip
    print(f"  {facts}")
    return kernel_faults(compiled.assembler_said, functions) + step_faults(facts)


def check_swap(target: jax.sharding.Sharding) -> list[str]:
    """The largest transfer of swapped pages out of the same pool, and back into it."""
    model = open_checkpoint(MODEL).config
    page_bytes = STEP_PAGE_SIZE * model.kv_bytes_per_token(2)
    num_pages = int(POOL_BYTES / page_bytes)
    pool = jax.eval_shape(lambda: make_paged_cache(model, CacheConfig(STEP_PAGE_SIZE, num_pages, "bfloat16")))
    size = resolve_preemption("swap", 4.0, model, STEP_PAGE_SIZE, 2, "gpu").transfer_pages
    page_ids = jax.ShapeDtypeStruct((size,), jnp.int32)
    pages = jax.eval_shape(steps.gather_pages, pool, page_ids)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target), (pool, page_ids, pages)
    )
    gather = compile_for(lambda: steps.gather_pages.lower(*arguments[:2]))
    scatter = compile_for(lambda: steps.scatter_pages.lower(*arguments))
    print_line(f"swap of {size} pages, out", [], gather)
    print_line(f"swap of {size} pages, in", [], scatter)
    out, back = gather.program.memory_analysis(), scatter.program.memory_analysis()
    assert out is not None and back is not None, "the compiler gave no account of its programs"
    faults = []
    if back.alias_size_in_bytes < num_pages * page_bytes:
        faults.append(
            f"only {back.alias_size_in_bytes} of the pool's {num_pages * page_bytes} bytes are updated in place"
        )
    temporaries = max(out.temp_size_in_bytes, back.temp_size_in_bytes)
    print(f"  temporaries {temporaries} bytes, a transfer {size * page_bytes}")
    if temporaries > size * page_bytes:
        faults.append(f"{temporaries} bytes of temporaries are more than a transfer's {size * page_bytes}")
    return faults


def step_faults(facts: StepFacts) -> list[str]:
    faults = []
    if facts.aliased_bytes < facts.pool_bytes:
        faults.append(f"only {facts.aliased_bytes} of the pool's {facts.pool_bytes} bytes are updated in place")
    if facts.temporary_bytes > MOST_TEMPORARIES * facts.pool_bytes:
        faults.append(
            f"{facts.temporary_bytes} bytes of temporaries are {facts.temporary_bytes / facts.pool_bytes:.1%} of the "
            f"pool, more than {MOST_TEMPORARIES:.1%}"
        )
    if facts.pool_copies:
        faults.append(f"{facts.pool_copies} instructions copy the keys or values of a layer, expected none")
    if facts.graphs != 1:
        faults.append(f"{facts.graphs} CUDA graphs, expected one for the whole step")
    return faults


def compile_for(lower: Callable[[], jax.stages.Lowered]) -> Compiled:
    """Lower and compile, and keep what ptxas prints and what XLA lists."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        lowered = lower()
        lowered_at = time.perf_counter()
        with captured_stdout() as said:
            program = lowered.compile(compiler_options={"xla_dump_to": folder})
        done = time.perf_counter()
        thunks = "".join(file.read_text() for file in Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt"))
    return Compiled(program, "".join(said), thunks, lowered_at - began, done - lowered_at)


@contextlib.contextmanager
def captured_stdout() -> Iterator[list[str]]:
    """What is written to file descriptor 1, by C too; the list has it when the block has ended."""
    said: list[str] = []
    sys.stdout.flush()
    before = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield said
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def read_assembler(said: str) -> list[Assembly]:
    return [
        Assembly(match["function"], int(match["registers"]), int(match["stores"]) + int(match["loads"]))
        for match in REPORT.finditer(said)
    ]


def kernel_faults(said: str, functions: list[Assembly], known: int = 0) -> list[str]:
    faults = [f"{f.function} spills {f.spilled_bytes} bytes of registers" for f in functions if f.spilled_bytes > known]
    if not functions:
        faults.append("ptxas reported no function: nothing was assembled")
    # Such as: wgmma instructions are serialized, setmaxnreg is ignored.
    return faults + [line.strip() for line in said.splitlines() if "Potential Performance Loss" in line]


def count_copies(program: str, pool_shape: str) -> int:
    """Instructions of the compiled program that copy an array of this shape, whatever its dtype."""
    return len(re.findall(rf"= \(?\w+{re.escape(pool_shape)}.* copy(?:-start)?\(", program))


def count_graphs(thunks: str) -> int:
    """Command buffers that no other thunk holds: what they hold is indented."""
    return len(re.findall(r"^\d+: kCommandBuffer", thunks, re.MULTILINE))


def print_line(name: str, functions: list[Assembly], compiled: Compiled) -> None:
    registers = ",".join(str(function.registers) for function in functions)
    print(f"{name:42} {registers:>12} {compiled.lower_seconds:8.2f} {compiled.compile_seconds:10.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
