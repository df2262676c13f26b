"""Makes tests/goldens/*/beams.json: what `generate` of transformers finds with beams, for every model family.

    python scripts/make/beam_goldens.py [--output tests/goldens] [--only llama gemma3 ...]

Needs torch and transformers, and the directories of scripts/make/goldens.py. Every family runs searches that differ in
width, early_stopping, length_penalty and end-of-sequence ids (which are tokens that its beams like, so that searches
end at all lengths), each from one of the golden prompts, in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

MAX_TOKENS = 10
SEARCHES = 30


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[2] / "tests" / "goldens")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    for directory in sorted(path for path in args.output.iterdir() if path.is_dir()):
        if args.only is None or directory.name in args.only:
            searches = make_searches(directory)
            text = ",\n".join(json.dumps(search, allow_nan=False) for search in searches)
            (directory / "beams.json").write_text(f"[\n{text}\n]\n")
            print(f"{directory.name}: {len(searches)} searches")
    return 0


def make_searches(directory: Path) -> list[dict[str, Any]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    arrays = np.load(directory / "logits.npz")
    prompts = [arrays[f"prompt_{i}"].tolist() for i in range(4)]
    grid = list(itertools.product(range(4), (2, 3, 5), (False, True, "never"), (-1.0, 0.0, 0.6, 1.0, 2.0), (0, 1, 2)))
    searches = []
    for prompt, width, early_stopping, length_penalty, num_ends in random.Random(directory.name).sample(grid, SEARCHES):
        liked = beams_of(model, prompts[prompt], width, [], False, 1.0)
        tokens = [token for sequence in liked["sequences"] for token in sequence[1:]]
        ends = sorted(dict.fromkeys(tokens))[:num_ends]
        found = beams_of(model, prompts[prompt], width, ends, early_stopping, length_penalty)
        searches.append(
            {
                "prompt": prompt, "beam_width": width, "early_stopping": early_stopping,
                "length_penalty": length_penalty, "end_ids": ends, **found,
            }
        )  # fmt: skip
    return searches


@torch.no_grad()
def beams_of(
    model: Any, prompt: list[int], width: int, ends: list[int], early_stopping: bool | str, length_penalty: float
) -> dict[str, Any]:
    config = transformers.GenerationConfig(
        num_beams=width, num_return_sequences=width, max_new_tokens=MAX_TOKENS, early_stopping=early_stopping,
        length_penalty=length_penalty, eos_token_id=ends or None, pad_token_id=0, do_sample=False,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    model.generation_config = transformers.GenerationConfig()  # nothing of the checkpoint's own
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    sequences = []
    for sequence in found.sequences[:, len(prompt) :].tolist():
        end = next((i + 1 for i, token in enumerate(sequence) if token in ends), len(sequence))
        sequences.append(sequence[:end])  # what follows is padding
    return {"sequences": sequences, "scores": [round(score, 6) for score in found.sequences_scores.tolist()]}


if __name__ == "__main__":
    raise SystemExit(main())
