"""scripts/bench/compile_kernels.py reads what ptxas and XLA say. Compiling itself is `make compile-check`."""

from __future__ import annotations

import os
import sys

import pytest
from paths import ROOT

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'decode' for 'sm_90a'
ptxas info    : Function properties for decode
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 62 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 101.781 ms
ptxas info    : Compiling entry function 'prefill' for 'sm_90a'
ptxas info    : Function properties for prefill
    96 bytes stack frame, 120 bytes spill stores, 80 bytes spill loads
ptxas info    : Used 168 registers, used 4 barriers, 1 bytes smem
"""


@pytest.fixture(scope="module")
def compile_kernels():
    scripts = str(ROOT / "scripts")
    sys.path.insert(0, scripts)
    try:
        import compile_kernels
    finally:
        sys.path.remove(scripts)
    return compile_kernels


def test_spills_and_serialised_instructions_are_faults(compile_kernels):
    functions = compile_kernels.read_assembler(PTXAS)
    assert functions == [("decode", 62, 0), ("prefill", 168, 200)]
    assert compile_kernels.kernel_faults(PTXAS, functions) == ["prefill spills 200 bytes of registers"]
    assert compile_kernels.kernel_faults("", []) == ["ptxas reported no function: nothing was assembled"]
    warning = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert compile_kernels.kernel_faults(warning, functions[:1]) == [warning]


def test_a_copy_of_the_pool_is_told_from_other_copies(compile_kernels):
    program = """
  %copy.1 = bf16[100,16,8,128]{3,2,1,0} copy(%p), metadata={}
  %copy-start.2 = (bf16[100,16,8,128]{3,2,1,0}, u32[]) copy-start(%p)
  %copy.3 = bf16[64,128]{1,0} copy(%q)
  %scatter = bf16[100,16,8,128]{3,2,1,0} fusion(%copy.3)
"""
    assert compile_kernels.count_copies(program, "[100,16,8,128]") == 2


def test_graphs_are_counted_at_the_top_level(compile_kernels):
    thunks = """000: kCommandBuffer [source | sink]
    001: kCustomKernel [source] fusion
    002: kCommandBuffer nested
003: kWhile
"""
    assert compile_kernels.count_graphs(thunks) == 1


def test_each_thing_asked_of_the_step_can_fail(compile_kernels):
    good = compile_kernels.StepFacts(pool_bytes=1000, aliased_bytes=1000, temporary_bytes=10, pool_copies=0, graphs=1)
    assert compile_kernels.step_faults(good) == []
    for change in ({"aliased_bytes": 999}, {"temporary_bytes": 16}, {"pool_copies": 1}, {"graphs": 2}):
        assert len(compile_kernels.step_faults(good._replace(**change))) == 1


def test_c_and_python_output_is_captured(compile_kernels, capfd):
    with compile_kernels.captured_stdout() as said:
        os.write(1, b"from ptxas\n")
    print("afterwards")
    assert said == ["from ptxas\n"]
    assert capfd.readouterr().out == "afterwards\n"


def test_without_the_plugin_it_says_what_to_do(compile_kernels, capsys):
    if compile_kernels.missing_requirement() is None:
        pytest.skip("JAX's CUDA plugin is here")
    assert compile_kernels.main([]) == 2
    assert "compile_kernels: " in capsys.readouterr().err
