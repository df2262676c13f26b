"""What several test modules need: attention without a cache, greedy decoding by recomputing everything, slow cases."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import TOY, few_programs, toy_params

from jaxpaged import LLM, SamplingParams
from jaxpaged.config import ModelConfig
from jaxpaged.device.model import compute_logits, forward
from jaxpaged.device.params import Params


def all_but_slow(names: Iterable, *quick: object) -> list:
    """Parameters of a test: all names, of which those that are not `quick` are left to `make test-slow`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def small_llm(directory: Path, **options) -> LLM:
    """An LLM of a toy checkpoint with few programs, the same ones wherever its sizes are these."""
    sizes = dict(page_size=4, num_pages=300, max_num_seqs=8, max_num_batched_tokens=32)
    llm = LLM(directory, **{**sizes, **options})
    few_programs(llm.engine)
    return llm


def attend_full(config: ModelConfig):
    """The `attend` of `forward` for one whole sequence: causal, no cache."""
    attend_to = attend_qkv(config)
    return lambda cache, layer, heads: attend_to(cache, layer, *heads.split())


def attend_qkv(config: ModelConfig):
    """The same with q [T, H, D], k and v [T, K, D] in place of a layer's heads."""

    def attend(cache, layer, q, k, v):
        options = config.attention_options(layer)
        group = config.num_heads // config.num_kv_heads
        k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
        scores = jnp.einsum("qhd,khd->hqk", q, k, precision="highest").astype(jnp.float32) * options.scale
        if options.soft_cap is not None:
            scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
        distance = jnp.arange(len(q))[:, None] - jnp.arange(len(k))[None, :]
        visible = distance >= 0
        if options.sliding_window is not None:
            visible &= distance < options.sliding_window
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
        return jnp.einsum("hqk,khd->qhd", weights, v, precision="highest"), cache

    return attend


@functools.partial(jax.jit, static_argnames="config")
def full_logits(params: Params, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Logits f32[T, V] at every position of one sequence i32[T]."""
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    hidden, _ = forward(params, config, tokens, positions, None, attend_full(config))
    return compute_logits(params, config, hidden)


def greedy_tokens(params: Params, config: ModelConfig, prompt: Sequence[int], steps: int, padded_len: int) -> list[int]:
    """`steps` greedy tokens; padding to one length (which causal attention cannot see) compiles only once."""
    tokens = list(prompt)
    for _ in range(steps):
        padded = np.zeros(padded_len, np.int32)
        padded[: len(tokens)] = tokens
        tokens.append(int(full_logits(params, config, jnp.asarray(padded))[len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@functools.cache
def logprobs_after(tokens: tuple[int, ...]) -> np.ndarray:
    """Log-probabilities f32[V] of TOY behind at most 32 tokens; padding, which they cannot see, compiles only once."""
    padded = np.zeros(32, np.int32)
    padded[: len(tokens)] = tokens
    logits = full_logits(toy_params(), TOY, jnp.asarray(padded))[len(tokens) - 1]
    return np.asarray(jax.nn.log_softmax(logits))


def reference_model(sequences: list[list[int]]) -> np.ndarray:
    return np.stack([logprobs_after(tuple(tokens)) for tokens in sequences])


def check_greedy_tokens_of_llm(directory: Path) -> None:
    """A golden checkpoint through `LLM`, paged, all prompts in one batch: transformers' greedy tokens."""
    arrays = np.load(directory / "logits.npz")
    count = sum(name.startswith("prompt_") for name in arrays)
    expected = [arrays[f"greedy_{i}"].tolist() for i in range(count)]
    llm = LLM(directory, dtype="float32", page_size=4, num_pages=80, max_num_seqs=4, max_num_batched_tokens=64)
    params = SamplingParams(temperature=0, max_tokens=len(expected[0]), ignore_eos=True)
    outputs = llm.generate([arrays[f"prompt_{i}"].tolist() for i in range(count)], params)
    assert [output.outputs[0].token_ids for output in outputs] == expected
