"""The code of the README, of docs/search.md and of docs/guide.md runs as it is written."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import ROOT

from jaxpaged import SamplingParams


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/search.md", "README.md"])
def test_every_example_of_the_page_runs(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = python_blocks(page)
    assert len(blocks) >= 4
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
        assert capsys.readouterr().out.strip() or block.startswith("import matplotlib")


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic GPU kernels need JAX 0.11")
def test_every_fragment_of_the_guide_runs_with_what_it_takes_for_granted(monkeypatch, tmp_path):
    """Its prompts, parameters and arrays are given here; its kernel runs in Pallas' interpreter, in two programs."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels import paged_decode

    few = functools.partial(paged_decode.paged_decode, num_programs=2)
    monkeypatch.setattr(paged_decode, "paged_decode", few)
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "scripts" / "step_times" / "opt-13b-h100.json", "times.json")
    pages = jnp.ones((4, 16, 2, 64), jnp.bfloat16)
    scope: dict[str, object] = dict(
        model=ROOT / "checkpoints" / "tiny-python", prompts=["def f(", "class A:"], seconds=[0.0, 0.1], jnp=jnp,
        instruction="# Python 3.\n",
        sampling_params=SamplingParams(max_tokens=4), params=SamplingParams(n=2, max_tokens=4), Path=Path,
        q=jnp.ones((1, 4, 64), jnp.bfloat16), k_pages=pages, v_pages=pages, D=64,
        block_tables=jnp.asarray([[2, 1]], jnp.int32), context_lens=jnp.asarray([20], jnp.int32),
    )  # fmt: skip
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        for block in python_blocks("docs/guide.md"):
            exec(compile(block, "docs/guide.md", "exec"), scope)
    assert len(scope["outputs"]) == 2 and "<html" in Path("pool.html").read_text(encoding="utf-8")
    assert np.asarray(scope["out"]).shape == (1, 4, 64)
