"""Every family computes what transformers computes: logits and greedy tokens of scripts/make/goldens.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_but_slow, check_greedy_tokens_of_llm, full_logits, greedy_tokens
from paths import GOLDENS

from jaxpaged.checkpoint import load_params, open_checkpoint
from jaxpaged.device import steps

PADDED_LEN = 48  # one length, so that a model compiles once
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/logits.npz"))


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    checkpoint = open_checkpoint(GOLDENS / request.param)
    params = load_params(checkpoint, dtype="float32", device=jax.devices("cpu")[0])
    return checkpoint.config, params, dict(np.load(GOLDENS / request.param / "logits.npz"))


def test_every_family_has_a_golden():
    families = {open_checkpoint(GOLDENS / name).config.family for name in NAMES}
    assert families == {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "opt"}


def test_logits_agree_to_2e_4(golden):
    config, params, arrays = golden
    for i in range(4):
        prompt = arrays[f"prompt_{i}"]
        padded = np.pad(prompt, (0, PADDED_LEN - len(prompt)))  # behind the prompt, where it sees nothing of it
        logits = full_logits(params, config, jnp.asarray(padded))[: len(prompt)]
        np.testing.assert_allclose(logits, arrays[f"logits_{i}"], rtol=0, atol=2e-4)


def test_greedy_tokens_agree_exactly(golden):
    config, params, arrays = golden
    for i in range(4):
        prompt, expected = arrays[f"prompt_{i}"].tolist(), arrays[f"greedy_{i}"].tolist()
        assert greedy_tokens(params, config, prompt, len(expected), PADDED_LEN) == expected


def test_windows_are_shorter_than_the_prompts(golden):
    config, _, arrays = golden
    if config.sliding_window is not None:
        assert config.sliding_window < len(arrays["prompt_2"])


@pytest.mark.parametrize("name", all_but_slow(NAMES, "llama_tied", "gemma3", "opt", "qwen3"))
def test_the_paged_engine_gives_the_same_greedy_tokens(name):
    check_greedy_tokens_of_llm(GOLDENS / name)


@pytest.mark.parametrize("name", ["gemma3", "opt_post_norm"])
def test_so_it_does_where_a_step_is_two_programs(name, monkeypatch):
    """As of deep models: windows, rotary embeddings and projections are those of the layers' own numbers."""
    monkeypatch.setattr(steps, "DEEP", 2)
    monkeypatch.setattr(steps, "FIRST_SHARE", 0.5)
    check_greedy_tokens_of_llm(GOLDENS / name)
