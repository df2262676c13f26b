"""Make tests/goldens: tiny random checkpoints of every model family, with what transformers computes on them.

    python scripts/make/goldens.py [--output tests/goldens] [--only gemma2 opt rope]

Needs torch and transformers 5 (the tests that read the goldens do not). Every directory is what `save_pretrained`
writes, plus logits.npz with, for each prompt i: prompt_i int32 [n], logits_i float32 [n, V] at every position, and
greedy_i int32 [24]. All of it is computed in float32 by eager attention without a cache. Weights are large enough that
every bias, norm, window, cap and frequency matters. Where a greedy choice is nearly a tie, or the greedy tokens hardly
vary, another seed is taken, so that the tests neither depend on rounding nor pass by repetition.

"rope" makes one file instead, rope.json: checkpoints of above with other rotary settings, as files of transformers 4 or
5 spell them, and for texts within and beyond the original length frequencies, attention factor and the last logits.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCAB_SIZE = 128
PROMPT_LENGTHS = (1, 5, 12, 21)  # the windows below are 6 or 7 positions
GREEDY_STEPS = 24
MIN_MARGIN = 1e-3  # between the best and the second logit of every greedy step; results may differ by 2e-4
MIN_DISTINCT = 6  # tokens among the greedy ones of every prompt
SIZES = dict(
    vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
OPT_SIZES = dict(
    vocab_size=VOCAB_SIZE, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One checkpoint to make: a configuration class of transformers, what it differs in, and how it is stored."""

    config_class: type
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    save_options: dict[str, Any] = field(default_factory=dict)


# fmt: off
VARIANTS = {
    # Small theta and original length, so that some frequencies are kept, some blended and some divided.
    "llama": Variant(transformers.LlamaConfig, SIZES | dict(
        rope_parameters=dict(
            rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    )),
    "llama_tied": Variant(transformers.LlamaConfig, SIZES | dict(tie_word_embeddings=True), torch.bfloat16),
    "llama_bias": Variant(transformers.LlamaConfig, SIZES | dict(
        attention_bias=True, mlp_bias=True, num_key_value_heads=4,
    )),
    "mistral": Variant(transformers.MistralConfig, SIZES | dict(sliding_window=6)),
    "qwen2": Variant(transformers.Qwen2Config, SIZES | dict(
        use_sliding_window=True, sliding_window=7, max_window_layers=1,
    ), save_options=dict(max_shard_size="60KB")),
    "qwen3": Variant(transformers.Qwen3Config, SIZES | dict(head_dim=16, tie_word_embeddings=True)),
    "gemma2": Variant(transformers.Gemma2Config, SIZES | dict(
        head_dim=12, query_pre_attn_scalar=24, sliding_window=6, attn_logit_softcapping=3.0,
        final_logit_softcapping=8.0,
    )),
    "gemma3": Variant(transformers.Gemma3TextConfig, SIZES | dict(
        num_hidden_layers=3, query_pre_attn_scalar=12, sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=4.0, rope_theta=1000.0),
            sliding_attention=dict(rope_type="default", rope_theta=50.0),
        ),
    )),
    "opt": Variant(transformers.OPTConfig, OPT_SIZES, torch.float16),
    "opt_post_norm": Variant(transformers.OPTConfig, OPT_SIZES | dict(
        do_layer_norm_before=False, word_embed_proj_dim=16,
    )),
}
LONG_FACTORS = dict(short_factor=[1.0, 1.05, 1.1, 1.2], long_factor=[1.1, 1.7, 2.9, 3.8])
YARN = dict(factor=4.0, original_max_position_embeddings=16)
#: name -> (checkpoint, keys of its config.json that are other; None takes one away). Heads of 8 have four rotations.
ROPES = {
    "linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=4.0))),
    "linear, as 4 writes": ("llama", dict(
        rope_parameters=None, rope_theta=100.0, rope_scaling=dict(type="linear", factor=2.5),
    )),
    "dynamic": ("llama", dict(
        max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=4.0),
    )),
    "dynamic, as 4 writes": ("qwen2", dict(
        max_position_embeddings=20, rope_parameters=None, rope_theta=500.0,
        rope_scaling=dict(type="dynamic", factor=2.0),
    )),
    "llama3, as 4 writes": ("llama", dict(
        rope_parameters=None, rope_theta=100.0, rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=24,
        ),
    )),
    "yarn": ("llama", dict(rope_parameters=dict(rope_type="yarn", rope_theta=100.0, **YARN, beta_fast=4.0))),
    "yarn, as 4 writes": ("qwen2", dict(
        max_position_embeddings=16, rope_parameters=None, rope_theta=100.0, rope_scaling=dict(type="yarn", factor=3.0),
    )),
    "yarn, not truncated, two scales": ("mistral", dict(rope_parameters=dict(
        rope_type="yarn", rope_theta=50.0, **YARN, beta_fast=3.0, beta_slow=0.5, truncate=False, mscale=1.0,
        mscale_all_dim=0.5,
    ))),
    "yarn, attention factor": ("qwen3", dict(rope_parameters=dict(
        rope_type="yarn", rope_theta=100.0, **YARN, attention_factor=0.8,
    ))),
    "longrope": ("llama", dict(rope_parameters=dict(
        rope_type="longrope", rope_theta=100.0, original_max_position_embeddings=16, factor=4.0, **LONG_FACTORS,
    ))),
    "longrope, as 4 writes": ("llama", dict(
        original_max_position_embeddings=16, rope_parameters=None, rope_theta=100.0,
        rope_scaling=dict(type="longrope", **LONG_FACTORS),
    )),
    "longrope, attention factor": ("mistral", dict(rope_parameters=dict(
        rope_type="longrope", rope_theta=100.0, original_max_position_embeddings=16, attention_factor=1.25,
        **LONG_FACTORS,
    ))),
    "yarn of Gemma 3": ("gemma3", dict(rope_parameters=dict(
        full_attention=dict(rope_type="yarn", rope_theta=1000.0, **YARN),
        sliding_attention=dict(rope_type="default", rope_theta=50.0),
    ))),
    "yarn of Gemma 3, as 4 writes": ("gemma3", dict(
        rope_parameters=None, rope_theta=1000.0, rope_local_base_freq=50.0,
        rope_scaling=dict(rope_type="yarn", **YARN),
    )),
}
ROPE_LENGTHS = (12, 40)
# fmt: on


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[2] / "tests" / "goldens")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, "rope"], metavar="NAME")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    names = args.only or [*VARIANTS, "rope"]
    for name in (name for name in names if name in VARIANTS):
        seed, margin = make_golden(VARIANTS[name], args.output / name)
        size = sum(file.stat().st_size for file in (args.output / name).iterdir())
        print(f"{name}: seed {seed}, smallest greedy margin {margin:.4f}, {size / 1024:.0f} KiB")
    if "rope" in names:
        cases = [make_rope_golden(name, *ROPES[name], args.output) for name in ROPES]
        text = ",\n".join(json.dumps(case, allow_nan=False) for case in cases)
        (args.output / "rope.json").write_text(f"[\n{text}\n]\n")
    return 0


def make_golden(variant: Variant, directory: Path) -> tuple[int, float]:
    """Write one directory; returns the seed that gave clear margins, and the smallest margin."""
    for seed in range(1000):
        model = random_model(variant, seed)
        arrays, margin = compute_golden(model, random_prompts(seed))
        distinct = min(len(set(tokens.tolist())) for name, tokens in arrays.items() if name.startswith("greedy"))
        if margin > MIN_MARGIN and distinct >= MIN_DISTINCT:
            break
    else:
        raise RuntimeError(f"no seed gives {directory.name} clear and varied greedy tokens")
    if directory.exists():
        shutil.rmtree(directory)
    model.to(variant.dtype).save_pretrained(directory, **variant.save_options)
    np.savez_compressed(directory / "logits.npz", allow_pickle=False, **arrays)
    for file in directory.iterdir():
        file.chmod(0o644)
    return seed, margin


def random_model(variant: Variant, seed: int) -> transformers.PreTrainedModel:
    """Weights that `variant.dtype` represents exactly, in a float32 model."""
    generator = torch.Generator().manual_seed(seed)
    config = variant.config_class(**variant.options, attn_implementation="eager", dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    is_gemma = "Gemma" in variant.config_class.__name__
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            if "norm" in name and name.endswith("weight") and not is_gemma:  # Gemma's norms multiply by 1 + weight
                values += 1
            if "embed_tokens" in name and is_gemma:  # which it scales up, so that it would drown what layers add
                values *= 0.4
            parameter.copy_(values.to(variant.dtype))
    return model


def random_prompts(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB_SIZE, size=length, dtype=np.int32) for length in PROMPT_LENGTHS]


@torch.no_grad()
def compute_golden(
    model: transformers.PreTrainedModel, prompts: list[np.ndarray]
) -> tuple[dict[str, np.ndarray], float]:
    arrays: dict[str, np.ndarray] = {}
    margins = []
    for i, prompt in enumerate(prompts):
        tokens = prompt.tolist()
        for step in range(GREEDY_STEPS):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
            if step == 0:
                arrays[f"prompt_{i}"], arrays[f"logits_{i}"] = prompt, logits.numpy()
            best = torch.topk(logits[-1], 2)
            margins.append(float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
        arrays[f"greedy_{i}"] = np.array(tokens[len(prompt) :], np.int32)
    return arrays, min(margins)


@torch.no_grad()
def make_rope_golden(name: str, source: str, changes: dict[str, Any], goldens: Path) -> dict[str, Any]:
    """What transformers computes with the weights of `source` when the keys `changes` of its config.json are other."""
    values = {**json.loads((goldens / source / "config.json").read_text()), **changes}
    values = {key: value for key, value in values.items() if value is not None}
    config_class = transformers.CONFIG_MAPPING[values["model_type"]]
    config = config_class.from_dict(copy.deepcopy(values), attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        goldens / source, config=config, dtype=torch.float32
    ).eval()
    results = []
    for length in ROPE_LENGTHS:
        prompt = np.random.default_rng(length).integers(3, VOCAB_SIZE, size=length).tolist()
        logits = model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
        rotary = model.model.rotary_emb  # as the forward pass has left it
        prefix = "full_attention_" if "gemma3" in source else ""
        results.append(dict(
            prompt=prompt, logits=[round(float(x), 5) for x in logits],
            frequencies=[float(f"{x:.8g}") for x in getattr(rotary, f"{prefix}inv_freq")],
            attention_factor=float(getattr(rotary, f"{prefix}attention_scaling")),
        ))  # fmt: skip
    return dict(name=name, source=source, changes=changes, results=results)


if __name__ == "__main__":
    raise SystemExit(main())
