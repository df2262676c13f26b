"""Small models, engines and requests that many tests share."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import tokenizers

from jaxpaged.api.beam_params import BeamSearchParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.checkpoint import open_checkpoint, save_checkpoint
from jaxpaged.config import CacheConfig, EngineConfig, ModelConfig, PreemptionConfig
from jaxpaged.device.attention import REFERENCE
from jaxpaged.device.params import random_params
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.runner import StepRunner
from jaxpaged.host.beams.beam_state import BeamState, best_hypotheses
from jaxpaged.host.sequence import Sequence, SequenceGroup
from jaxpaged.host.step.cascade import Cascade, CascadeRule
from pallas_kernels import reference

TOY = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)


@functools.cache
def toy_params(config: ModelConfig = TOY):
    """Random float32 weights, large enough that the next token depends on more than the last."""
    params = random_params(config, "float32", seed=1)
    return jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim == 2 else leaf, params)


def toy_engine(
    num_pages=128,
    page_size=4,
    max_num_seqs=16,
    max_num_batched_tokens=64,
    max_model_len=128,
    preemption=None,
    kv_cache="paged",
    kernels=REFERENCE,
    kv_dtype="float32",
    async_scheduling=True,
    mixed_steps=True,
    prefix_caching=False,
    model=TOY,
) -> Engine:
    limits = EngineConfig(
        max_model_len, max_num_seqs, max_num_batched_tokens, preemption=preemption or PreemptionConfig(),
        kv_cache=kv_cache, async_scheduling=async_scheduling, mixed_steps=mixed_steps,
        prefix_caching=prefix_caching,
    )  # fmt: skip
    cache = CacheConfig(page_size, num_pages, kv_dtype)
    return Engine(StepRunner(toy_params(), model, cache, limits, kernels, jax.devices()[0]))


def few_programs(engine: Engine) -> Engine:
    """Its steps padded to the largest sizes alone: for tests of other things than sizes, which compile little then."""
    buckets = engine.runner.buckets
    lists = ("decode_rows", "prefill_rows", "prefill_tokens", "mixed_rows", "mixed_tokens")
    largest = {name: getattr(buckets, name)[-1:] for name in lists}
    engine.runner.buckets = dataclasses.replace(buckets, **largest)
    return engine


def save_small_model(directory: Path) -> Path:
    """A checkpoint with the bundled one's tokenizer, but of one layer and with random weights: little to compile."""
    bundled = open_checkpoint("demo")
    config = dataclasses.replace(
        bundled.config, num_layers=1, hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=16
    )
    save_checkpoint(directory, config, random_params(config, config.dtype, seed=0))
    assert bundled.tokenizer_file is not None
    shutil.copy(bundled.tokenizer_file, directory)
    return directory


#: Every page that two rows have in common is read once.
ALWAYS = CascadeRule(min_saved_tokens=0, min_run_pages=1)


def cascade_engine(**sizes) -> Engine:
    """A `toy_engine` with `cascade_attention`, which needs the Pallas kernels, over what stands for them in XLA."""
    engine = toy_engine(**sizes)
    engine.runner.kernels = REFERENCE._replace(cascade_decode=reference.cascade_decode)
    engine.runner.cascade = Cascade(max_members=4, rule=ALWAYS)
    return engine


def run_checked(engine: Engine, groups: list[SequenceGroup]) -> dict[str, list]:
    """Tokens of all samples, or of all hypotheses, of each request; the books are checked whenever one has finished."""
    results = {}
    for group in engine.run(groups):
        results[group.request_id] = (
            [h.token_ids for h in best_hypotheses(group.beams, 99)]
            if group.beams
            else [sequence.output_ids for sequence in group.sequences]
        )
        engine.scheduler.check_invariants()
    return results


def make_group(
    prompt: list[int], params: SamplingParams, request_id="0", seed=0, max_model_len=128, eos=()
) -> SequenceGroup:
    budget = max_model_len if params.max_tokens is None else len(prompt) + params.max_tokens
    return SequenceGroup(
        request_id, None, params, params.seed if params.seed is not None else seed,
        [Sequence(0, list(prompt), len(prompt))], max_len=min(budget, max_model_len),
        eos_ids=frozenset() if params.ignore_eos else frozenset(eos), stop_ids=frozenset(params.stop_token_ids or ()),
    )  # fmt: skip


def beam_group(prompt: list[int], params: BeamSearchParams, ends, request_id="0") -> SequenceGroup:
    group = SequenceGroup(
        request_id, None, params, 0, [Sequence(0, list(prompt), len(prompt))],
        max_len=len(prompt) + params.max_tokens, eos_ids=frozenset(ends),
    )  # fmt: skip
    group.beams = BeamState.of(params, ends, params.max_tokens)
    return group


def random_prompts(count: int, low=1, high=30, seed=0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, TOY.vocab_size, rng.integers(low, high + 1)).tolist() for _ in range(count)]


def run_tokens(engine: Engine, groups: list[SequenceGroup]) -> dict[str, list[list[int]]]:
    """Run to the end: output tokens of every sample, by request id."""
    return {group.request_id: [s.output_ids for s in group.sequences] for group in engine.run(groups)}


def char_tokenizer() -> tokenizers.Tokenizer:
    """One token a printable ASCII character (id = code - 30), "<s>" is 0 and "</s>" is 1: 97 tokens, as TOY has."""
    vocab = {"<s>": 0, "</s>": 1, **{chr(code): code - 30 for code in range(32, 127)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def save_toy_checkpoint(directory: Path, with_tokenizer: bool = True) -> Path:
    """A native checkpoint of TOY, whose end-of-sequence id is 1."""
    save_checkpoint(directory, dataclasses.replace(TOY, eos_token_ids=(1,), dtype="float32"), toy_params())
    if with_tokenizer:
        char_tokenizer().save(str(directory / "tokenizer.json"))
    return directory
