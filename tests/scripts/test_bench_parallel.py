"""scripts/bench/parallel.py and collectives.py: what a divided model gains and pays, and what it sends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import collectives as bench_collectives
import parallel as bench_parallel
import pytest
from paths import ROOT
from toy import TOY

from jaxpaged.config.shard import shard_config

MODEL = ROOT / "checkpoints" / "tiny-python"
LOWERED = """
  %1 = "stablehlo.all_reduce"(%0) <{replica_groups = dense<[[0, 1]]> : tensor<1x2xi64>}> ({
  ^bb0(%a: tensor<bf16>, %b: tensor<bf16>):
    %c = stablehlo.add %a, %b : tensor<bf16>
    stablehlo.return %c : tensor<bf16>
  }) : (tensor<64x4096xbf16>) -> tensor<64x4096xbf16>
  %2 = "stablehlo.all_gather"(%1) <{all_gather_dim = 1 : i64}> : (tensor<64x500xf32>) -> tensor<64x1000xf32>
"""


def test_bytes_that_a_device_sends_are_read_off_the_lowered_step():
    sent = bench_collectives.collectives_of(LOWERED, num_devices=2)
    assert sent == (1, 1, 64 * 4096 * 2, 64 * 1000 * 4 // 2)
    assert bench_collectives.collectives_of(LOWERED, num_devices=4).reduced_bytes == 64 * 4096 * 2 * 2 * 3 // 4


def test_the_floor_adds_up_what_a_device_reads_and_sends():
    options = ["--context", "10", "--memory-tb", "1e-6", "--link-gb", "1e-3", "--latency-us", "1000"]
    args = bench_collectives.parse_args(options)
    sent = bench_collectives.Sent(2, 1, 3000, 500)
    parts = bench_collectives.floor(shard_config(TOY, 2), sent, 3, args)
    assert parts["kv_ms"] == pytest.approx(
        3 * 10 * 2 * 2 * 1 * 8 * 2 / 1000
    )  # two layers, one KV head, 1,000 bytes a ms
    assert (parts["sums_ms"], parts["gathers_ms"]) == (2 + 3.0, 1 + 0.5)
    assert parts["floor_ms"] == pytest.approx(sum(parts.values()) - parts["floor_ms"], abs=1e-3)


def test_options_of_xla_are_numbers_and_truths_where_they_look_like_them():
    assert bench_parallel.options_of("a=true,b=1,c=COLLECTIVE_KERNEL_ALL_REDUCE") == {
        "a": True, "b": 1, "c": "COLLECTIVE_KERNEL_ALL_REDUCE",
    }  # fmt: skip


@pytest.mark.slow
def test_one_device_and_two_are_measured_and_choose_the_same_tokens():
    options = (
        "--dtype float32 --rows 2 --context 20 --workload 4x8+8 --steps 2 --repeats 2 --runs 1 "
        "--xla xla_backend_optimization_level=0"
    )
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "parallel.py"), str(MODEL), *options.split()]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])["results"]
    assert [(step["devices"], step["xla"]) for step in report["steps"]] == [
        (1, ""), (2, ""), (2, "xla_backend_optimization_level=0"),
    ]  # fmt: skip
    assert all(step["aliased_share"] == 1 for step in report["steps"])
    assert report["tokens"]["different"] == {"1": 0, "2": 0}
    assert all(run["tokens_per_second"] > 0 for run in report["workload"])
