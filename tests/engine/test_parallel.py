"""A model on several devices chooses the tokens that it chooses on one; engines beside one another share a run.

The devices are threads of this machine's CPU, of which JAX must be told before it starts: tests/parallel_program.py
does it, in one process for all that is asked here.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from paths import ROOT
from toy import TOY

from jaxpaged import LLM
from jaxpaged.config.shard import shard_config

QUICK = ("replicas", "gemma 4", "opt 8", "aliasing", "random weights", "one device", "collectives", "refusals")
SLOW = (
    "llama all", "gemma all", "opt all", "qwen all", "all random weights", "prefill aliasing", "swapping", "fp8",
    "dense", "none", "mixed", "programs of meshes", "checkpoints", "one engine", "replicas of one", "trees", "gemma 1",
    "opt 1",
)  # fmt: skip
#: What one device chooses, behind nine prompts in a run of steps; and of the first tokens how likely they are.
TOKENS = [
    [10, 42, 55, 83], [5, 8, 59, 4], [95, 71, 89, 4], [20, 55, 73, 55], [38, 60, 19, 69], [13, 89, 90, 32],
    [55, 9, 59, 13], [19, 88, 57, 94], [0, 95, 32, 80],
]  # fmt: skip
PROMPTS_ALONE = {
    "gemma": ([2, 8, 1, 96], [-1.00104, -0.65591, -1.22901, -0.23584]),
    "opt": ([35, 35, 45, 35], [-0.94456, -1.09799, -0.8692, -0.80761]),
}


@functools.cache
def results(cases: tuple[str, ...]) -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, str(ROOT / "tests" / "parallel_program.py"), *cases]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def quick(case: str) -> Any:
    return results(QUICK)[case]


def slow(case: str) -> Any:
    return results(SLOW)[case]


def test_a_model_on_two_devices_chooses_the_tokens_of_one():
    assert quick("replicas")["tokens"] == TOKENS


@pytest.mark.parametrize("case", ["gemma 4", "opt 8"])
def test_and_so_it_does_on_4_and_8(case):
    """On 4 with two KV heads, each of which two devices have, and on 8, where a head is a device's."""
    check_prompts(case, *quick(case))


def check_prompts(case: str, tokens: list[int], logprobs: list[float]) -> None:
    expected, how_likely = PROMPTS_ALONE[case.split()[0]]
    assert tokens == expected and logprobs == pytest.approx(how_likely, abs=1e-4)


@pytest.mark.slow
def test_one_device_chooses_them():
    assert slow("one engine")["tokens"] == TOKENS
    for case in ("gemma 1", "opt 1"):
        check_prompts(case, *slow(case))


def test_each_device_updates_its_part_of_the_pool_in_place():
    found = quick("aliasing")
    aliased, temporary = found["decode"]
    assert aliased == found["pool"] == 2000 * 16 * 2 * 2 * 8 * 4  # one layer, keys and values, 2 of 4 KV heads
    assert temporary < 0.1 * found["pool"]


def test_random_weights_are_those_of_one_device_to_the_last_bit():
    assert quick("random weights") == {"gemma 2": True}


def test_one_device_runs_what_it_ran_before_there_could_be_several():
    found = quick("one device")
    assert found == {"same": True, "words": [[False, False, False], [True, True, True]]}


def test_a_step_adds_up_twice_a_layer_and_once_for_the_embedding_and_lays_logits_side_by_side_once():
    assert quick("collectives") == {"all_reduce": 1 + 2, "all_gather": 1, "all_to_all": 0}


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("three", "ValueError: tensor_parallel_size=3 does not divide num_heads=8, num_kv_heads=4 and inter"),
        ("three", "it can be 1, 2, 4, 8"),
        ("nine", "tensor_parallel_size=9, but this process has 8 devices (cpu): it can be at most 8"),
        ("nine engines", "tensor_parallel_size=2 and data_parallel_size=5 need 10 devices, but this process has 8"),
        ("two axes", "ValueError: mesh has the axes {'data': 2, 'model': 4}"),
        ("another size", "tensor_parallel_size=4, but the mesh has 2 devices"),
        ("mesh and engines", "data_parallel_size=2, but the mesh names the devices of one engine"),
        ("no mesh", "mesh must be a jax.sharding.Mesh of devices, got [CpuDevice(id=0)]"),
        ("fits", "FileNotFoundError"),  # the axis of size 1 is no matter, and only then are weights looked for
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_weights_are_read(case, said):
    assert said in quick("refusals")[case]


@pytest.mark.parametrize("name", ["tensor_parallel_size", "data_parallel_size"])
@pytest.mark.parametrize("number", [0, -1, 1.5, True, "two"])
def test_numbers_of_devices_are_positive_integers(name, number):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
        LLM(ROOT / "checkpoints" / "tiny-python", **{name: number})


def test_the_numbers_that_would_do_are_named():
    assert shard_config(TOY, 1) is TOY
    with pytest.raises(ValueError, match="it can be 1, 2, 4$"):
        shard_config(TOY, 8)
    shard = shard_config(TOY, 4)
    assert (shard.num_heads, shard.num_kv_heads, shard.intermediate_size) == (1, 1, 12)
    assert (shard.vocab_size, shard.num_vocab_rows, shard.num_shards) == (97, 25, 4)


def test_engines_of_two_devices_each_share_a_run():
    found = quick("replicas")
    assert found["same"] and min(found["requests"]) >= 1 and sum(found["requests"]) == found["total"] == 9
    assert found["order"] == [str(i) for i in range(9)]
    assert found["same from a generator"]


def test_an_error_in_one_engine_stops_all_and_the_next_run_is_whole():
    found = quick("replicas")
    assert found["error"] == "RuntimeError: out of order" and found["same after the error"]
    assert found["threads"] == []


def test_a_run_of_several_engines_that_is_left_frees_their_pools():
    """Nor does one that is left open keep Python from its end, which is where the process of these tests leaves it."""
    assert quick("replicas")["used after leaving"] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama all", "gemma all", "opt all", "qwen all"])
def test_so_it_does_for_every_family_and_kind_of_request_on_2_4_and_8(case):
    assert slow(case)["same"] == [True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["swapping", "fp8", "dense", "none", "mixed"])
def test_and_with_every_way_to_keep_keys_and_values(case):
    assert slow(case)["same"] == [True]


@pytest.mark.slow
def test_so_are_the_random_weights_of_every_family():
    assert set(slow("all random weights").values()) == {True}


@pytest.mark.slow
def test_a_prefill_step_updates_in_place_too():
    found = slow("prefill aliasing")
    assert found["prefill"][0] == found["pool"]


@pytest.mark.slow
def test_other_devices_have_programs_of_their_own_and_the_same_ones_find_theirs():
    first, others, again = slow("programs of meshes")
    assert first == others > 0 and again == 0


@pytest.mark.slow
def test_checkpoints_of_both_formats_are_divided_as_they_are_read():
    assert slow("checkpoints") == {"huggingface": [True, True], "native": [True, True]}


@pytest.mark.slow
def test_three_engines_of_one_device_share_a_run():
    found = slow("replicas of one")
    assert found["same"] and found["tokens"] == TOKENS and sum(found["requests"]) == 9


@pytest.mark.slow
def test_a_tree_on_two_devices_gives_the_log_probabilities_of_one():
    assert slow("trees") < 1e-5
