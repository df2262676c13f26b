"""Any program of tree calls gives what recomputing everything gives: on a real model, and on a toy one, exactly."""

from __future__ import annotations

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beam_reference import log_softmax, toy_model
from helpers import all_but_slow, full_logits
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from toy import TOY, cascade_engine, toy_params
from tree_program import MAX_LEN, TreeProgram

from jaxpaged.config import CacheConfig, EngineConfig, ModelConfig
from jaxpaged.device.attention import REFERENCE
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.runner import StepRunner
from jaxpaged.host.pages.block_table import append_slots
from jaxpaged.tree import state as tree_state
from jaxpaged.tree.on_engine import EngineSteps
from jaxpaged.tree.toy import ToyLM
from jaxpaged.tree.tree import Tree

SETTINGS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}


def shuffle_pages(tree: Tree, seed: int) -> Tree:
    random.Random(seed).shuffle(tree._model.allocator._free)
    return tree


class ToyProgram(TreeProgram):
    vocab_size = 11
    tolerance = 0.0
    logprobs = staticmethod(toy_model())

    def make_tree(self, seed):
        toy = ToyLM(
            lambda prefix: self.logprobs([prefix])[0], 11, page_size=1 + seed % 5, num_pages=30, max_model_len=MAX_LEN
        )
        return shuffle_pages(toy.tree(), seed)

    def logprobs_after(self, tokens):
        logits = self.logprobs([tokens])[0].astype(np.float64)
        return (logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())).astype(np.float32)


TestToyProgram = ToyProgram.TestCase
TestToyProgram.settings = settings(max_examples=60, stateful_step_count=30, **SETTINGS)


class FindingProgram(ToyProgram):
    """Two tokens, so that prompts begin alike, and pages that are known: of nodes, and of those that are freed."""

    def make_tree(self, seed):
        tree = super().make_tree(seed)
        tree._model.allocator.known.is_on = True
        return tree

    def draw_tokens(self, data, most=6):
        return data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=most))


TestFindingProgram = FindingProgram.TestCase
TestFindingProgram.settings = settings(max_examples=30, stateful_step_count=30, **SETTINGS)


class EngineProgram(TreeProgram):
    """Limits so small that calls are cut into several steps, and a pool so small that it runs out."""

    config = TOY
    vocab_size = TOY.vocab_size
    tolerance = 2e-4

    def make_tree(self, seed):
        return shuffle_pages(Tree(EngineSteps(small_engine(self.config))), seed)

    def logprobs_after(self, tokens):
        return recomputed(self.config, tuple(tokens))


@functools.cache
def small_engine(config: ModelConfig) -> Engine:
    return Engine(
        StepRunner(
            toy_params(),
            config,
            CacheConfig(4, 24, "float32"),
            EngineConfig(MAX_LEN, 4, 8),
            REFERENCE,
            jax.devices()[0],
        )
    )


@functools.cache
def recomputed(config: ModelConfig, tokens: tuple[int, ...]) -> np.ndarray:
    padded = np.zeros(MAX_LEN, np.int32)
    padded[: len(tokens)] = tokens
    return log_softmax(np.asarray(full_logits(toy_params(), config, jnp.asarray(padded))))[len(tokens) - 1]


class WindowedProgram(EngineProgram):
    """A sliding window, in which the positions that run again must not see one more or less."""

    config = dataclasses.replace(TOY, sliding_window=5, sliding_layers=(True, False))


class SharingProgram(EngineProgram):
    """Decode steps that read the pages which several nodes name once."""

    def make_tree(self, seed):
        return shuffle_pages(Tree(EngineSteps(small_cascade_engine())), seed)


@functools.cache
def small_cascade_engine() -> Engine:
    return cascade_engine(num_pages=24, max_num_seqs=8, max_num_batched_tokens=16, max_model_len=MAX_LEN)


TestEngineProgram = pytest.mark.slow(EngineProgram.TestCase)
TestEngineProgram.settings = settings(max_examples=12, stateful_step_count=20, **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("program", [EngineProgram, WindowedProgram, SharingProgram])
def test_long_programs_on_the_engine_equal_recomputation(program):
    run_state_machine_as_test(program, settings=settings(max_examples=40, stateful_step_count=40, **SETTINGS))


@pytest.mark.parametrize("program", all_but_slow([ToyProgram, EngineProgram], ToyProgram))
def test_a_missing_copy_on_write_is_found(program, monkeypatch):
    """With the copies planted out, some node reads what another wrote: the programs can fail."""

    def append_in_place(tables, counts, allocator):
        append_slots(tables, counts, allocator)
        return []

    monkeypatch.setattr(tree_state, "append_slots", append_in_place)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(program, settings=settings(max_examples=60, phases=[Phase.generate], **SETTINGS))
