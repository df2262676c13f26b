"""Train the bundled checkpoint, a five-million-parameter Llama, on the source of Python's own standard library.

The runtime needs a real model that travels with the repository and that anyone can make again, offline, from data that
every machine with Python already has. Tokenizer, training and export are all here; the model is nnx_llama.py's, and
what is measured of it is what inference computes with its weights.

    python scripts/make/train_tiny.py --output checkpoints/tiny-python --minutes 90
    python scripts/make/train_tiny.py --output checkpoints/tiny-python --resume       after a kill, with the same flags
    python scripts/make/train_tiny.py --output checkpoints/tiny-python --export-only  the last snapshot, as it is

On a GPU, where many more tokens take less time:

    python scripts/make/train_tiny.py --output checkpoints/tiny-python --dtype bfloat16 --batch-size 32 --steps 4000

A run stops after --steps or after --minutes, whichever comes first; the learning rate falls linearly to zero at the
nearer of the two. The log and the snapshots are in --work-dir. The last line of the output is the result as JSON.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import math
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from flax import nnx
from nnx_llama import Llama, to_params

from jaxpaged.checkpoint.native import save_checkpoint
from jaxpaged.config import ModelConfig
from jaxpaged.device.model import compute_logits, forward
from jaxpaged.device.param_nodes import Params

# Code of other people, and tables that a program wrote: none of it is the style that we want to teach.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "pydoc_data", "encodings", "msilib", "__pycache__"}
TEST_FOLDERS = {"test", "tests", "idle_test"}  # where a Python has them: more than half of all its source
EXCLUDED_FILES = {"html/entities.py", "stringprep.py", "locale.py"}
HELD_OUT_SHARE = 25  # one file in so many
INDENTS = ("    ", " " * 8, " " * 12, " " * 16, " " * 20)
BOS, EOS = 1, 2


def find_sources(root: Path) -> dict[str, str]:
    """Relative name -> text of every file to learn from."""
    sources = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if is_excluded(name):
            continue
        try:
            sources[name.as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return sources


def is_excluded(name: Path) -> bool:
    if EXCLUDED_FOLDERS & set(name.parts) or name.name.startswith("_sysconfigdata"):
        return True
    return name.as_posix() in EXCLUDED_FILES


def is_held_out(name: str) -> bool:
    """Decided by the file's name alone, so that training, evaluation and other machines agree. Tests never are."""
    if TEST_FOLDERS & set(Path(name).parts):
        return False
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def split_sources(sources: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """-> the files to train on, the files held out."""
    train = {name: text for name, text in sources.items() if not is_held_out(name)}
    return train, {name: text for name, text in sources.items() if is_held_out(name)}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A lossless sentencepiece model for code: whitespace is kept, and an indentation is one piece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n", *INDENTS],
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        minloglevel=1,
    )
    return model.getvalue()


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def encode_files(tokenizer: sentencepiece.SentencePieceProcessor, sources: dict[str, str]) -> np.ndarray:
    """All files, each between bos and eos, as one stream i32[N]; refuses a tokenizer that loses a character."""
    stream: list[int] = []
    for name, text in sources.items():
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            raise ValueError(f"the tokenizer does not give {name} back exactly")
        stream += [BOS, *ids, EOS]
    return np.asarray(stream, np.int32)


def find_top_level(tokenizer: sentencepiece.SentencePieceProcessor, stream: np.ndarray) -> np.ndarray:
    """Positions of the newlines that a line of column 0 follows."""
    newline = tokenizer.piece_to_id("\n")
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    visible = np.array([not piece.startswith(("\n", "\u2581", "<")) for piece in pieces])
    return np.flatnonzero((stream[:-1] == newline) & visible[stream[1:]])


def sample_windows(stream: np.ndarray, top_level: np.ndarray, rows: int, length: int, seed: tuple) -> np.ndarray:
    """Random training windows, i32[rows, length + 1].

    A quarter of them starts at a top-level line with bos in place of the newline: the shape of a prompt.
    """
    rng = np.random.default_rng(seed)
    num_starts = len(stream) - length
    starts = rng.integers(0, num_starts, rows)
    top_level = top_level[top_level < num_starts]
    num_prompts = rows // 4 if len(top_level) else 0
    starts[:num_prompts] = rng.choice(top_level, num_prompts) if num_prompts else []
    windows = stream[starts[:, None] + np.arange(length + 1)]
    windows[:num_prompts, 0] = BOS
    return windows


def make_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_layers=args.num_layers,
        num_heads=args.hidden_size // 64,
        num_kv_heads=max(1, args.hidden_size // 128),
        head_dim=64,
        max_position_embeddings=args.final_seq_len,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_ids=(EOS,),
        dtype="bfloat16",
    )


def train_loss(model: Llama, windows: jax.Array) -> jax.Array:
    """Cross entropy in nats per token of windows i32[B, T + 1]."""
    return optax.softmax_cross_entropy_with_integer_labels(model(windows[:, :-1]), windows[:, 1:]).mean()


@functools.cache  # one object, so that train_step compiles once
def make_optimizer() -> optax.GradientTransformation:
    """Muon for the layers' matrices, AdamW for embedding and norms; both at rate 1, which `train_step` scales."""

    def uses_muon(params: Any) -> Any:
        muon = optax.contrib.MuonDimensionNumbers()
        layers = jax.tree.map(lambda x: muon if x.ndim == 2 else None, params["layers"])
        return {**jax.tree.map(lambda _: None, params), "layers": layers}

    muon = optax.contrib.muon(
        1.0, weight_decay=0.1, consistent_rms=0.2, adam_b2=0.95, muon_weight_dimension_numbers=uses_muon
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def weights_of(model: Llama) -> dict[str, Any]:
    """The module's arrays, as optax takes them."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def set_weights(model: Llama, weights: dict[str, Any]) -> None:
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, weights)
    nnx.update(model, state)


@functools.partial(nnx.jit, static_argnames="optimizer", donate_argnames=("model", "state"))
def train_step(model: Llama, state: optax.OptState, windows: jax.Array | np.ndarray, rate: float, *, optimizer):
    """Update the model -> new optimizer state, loss of these windows before the update."""
    loss, grads = nnx.value_and_grad(train_loss)(model, windows)
    weights = weights_of(model)
    updates, state = optimizer.update(nnx.to_pure_dict(grads), state, weights)
    set_weights(model, jax.tree.map(lambda w, u: w + rate * u, weights, updates))
    return state, loss


@functools.partial(jax.jit, static_argnames="config")
def eval_step(params: Params, windows: jax.Array, *, config: ModelConfig) -> jax.Array:
    """The loss of windows i32[B, T + 1] by what inference computes, in float32."""
    params = jax.tree.map(lambda x: x.astype("float32"), params)
    rows, length = windows.shape[0], windows.shape[1] - 1

    def attend(cache, layer, heads):
        q, k, v = (x.reshape(rows, length, *x.shape[1:]) for x in heads.split())
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return out.reshape(rows * length, *out.shape[2:]), cache

    positions = jnp.tile(jnp.arange(length), rows)
    hidden, _ = forward(params, config, windows[:, :-1].reshape(-1), positions, None, attend)
    logits = compute_logits(params, config, hidden)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:].reshape(-1)).mean()


def stream_loss(
    params: Params, config: ModelConfig, stream: np.ndarray, length: int, limit: int = sys.maxsize
) -> float:
    """Nats per token, in float32, over windows of `length` that do not overlap: at most `limit`, evenly spread."""
    num_windows = (len(stream) - 1) // length
    if num_windows < 1:
        raise ValueError(
            f"{len(stream)} tokens are too few for a window of {length}: give more files or shorter windows"
        )
    chosen = np.linspace(0, num_windows - 1, min(limit, num_windows)).astype(int)
    windows = stream[chosen[:, None] * length + np.arange(length + 1)]
    losses = [eval_step(params, windows[i : i + 1], config=config) for i in range(len(windows))]
    return float(np.mean(jax.device_get(losses)))


def learning_rate(peak: float, step: int, progress: float, warmup: int) -> float:
    """Linear warm-up by steps, then linear to zero by progress, the larger share used of the step and time budgets."""
    return peak * min(1.0, (step + 1) / warmup) * max(0.0, 1.0 - progress)


def save_snapshot(path: Path, model: Llama, state, step: int, elapsed: float) -> None:
    """Everything that --resume needs; replaced in one rename, so that a kill leaves the old one or the new one."""
    leaves = jax.device_get(jax.tree.leaves((weights_of(model), state)))
    partial = path.with_name("partial.npz")
    np.savez(partial, *leaves, step=step, elapsed=elapsed)
    partial.replace(path)


def load_snapshot(path: Path, model: Llama, state) -> tuple[optax.OptState, int, float]:
    """The model gets its weights -> optimizer state, step, seconds trained; the arguments give the structure."""
    treedef = jax.tree.structure((weights_of(model), state))
    with np.load(path) as saved:
        leaves = [jnp.asarray(saved[f"arr_{i}"]) for i in range(treedef.num_leaves)]
        step, elapsed = int(saved["step"]), float(saved["elapsed"])
    weights, state = jax.tree.unflatten(treedef, leaves)
    set_weights(model, weights)
    return state, step, elapsed


def train(args: argparse.Namespace, config: ModelConfig, tokenizer, stream: np.ndarray, held_out: np.ndarray) -> dict:
    """Run the loop to the end of its budget; -> params, and the numbers that the README reports."""
    optimizer = make_optimizer()
    model = Llama(config, rngs=nnx.Rngs(args.seed), dtype=args.dtype)
    state = optimizer.init(weights_of(model))
    step, before = 0, 0.0
    snapshot = args.work_dir / "snapshot.npz"
    if args.resume or args.export_only:
        state, step, before = load_snapshot(snapshot, model, state)
    top_level = find_top_level(tokenizer, stream)
    start, recent, elapsed = time.monotonic(), [], before
    while not args.export_only:
        elapsed = before + time.monotonic() - start
        progress = max(step / args.steps if args.steps else 0.0, elapsed / (args.minutes * 60) if args.minutes else 0.0)
        if progress >= 1:
            break
        length = args.final_seq_len if progress >= 1 - args.final_share else args.seq_len
        rows = max(1, args.batch_size * args.seq_len // length)
        windows = sample_windows(stream, top_level, rows, length, (args.seed, step))
        rate = learning_rate(args.learning_rate, step, progress, args.warmup)
        state, loss = train_step(model, state, windows, rate, optimizer=optimizer)
        recent.append(float(loss))
        step += 1
        if step % args.log_every == 0:
            log(args, step=step, minutes=round(elapsed / 60, 2), progress=round(progress, 4), rate=round(rate, 6),
                loss=round(float(np.mean(recent[-args.log_every :])), 4))  # fmt: skip
        if step % args.snapshot_every == 0:
            save_snapshot(snapshot, model, state, step, elapsed)
            loss = stream_loss(to_params(model, config), config, held_out, args.seq_len)
            log(args, step=step, held_out_loss=round(loss, 4))
    save_snapshot(snapshot, model, state, step, elapsed)
    return dict(
        params=to_params(model, config),
        steps=step,
        tokens_seen=step * args.batch_size * args.seq_len,
        train_seconds=round(elapsed, 1),
        last_losses=round(float(np.mean(recent[-100:])), 4) if recent else None,
    )


def log(args: argparse.Namespace, **values) -> None:
    line = json.dumps(values, allow_nan=False)
    print(line, flush=True)
    with (args.work_dir / "log.jsonl").open("a") as file:
        file.write(line + "\n")


def export(args: argparse.Namespace, config: ModelConfig, params: Params) -> None:
    """Write the native checkpoint directory: config.json, the orbax weights, tokenizer.model."""
    args.output.mkdir(parents=True, exist_ok=True)
    save_checkpoint(args.output, config, jax.tree.map(lambda x: x.astype(config.dtype), params))
    shutil.copyfile(args.work_dir / "tokenizer.model", args.output / "tokenizer.model")


def measure(config: ModelConfig, params: Params, streams: dict[str, np.ndarray], num_bytes: dict[str, int]) -> dict:
    """Loss of the weights as they are exported (rounded to bfloat16), in nats per token and bits per byte."""
    params = jax.tree.map(lambda x: x.astype(config.dtype).astype("float32"), params)
    result, length = {}, config.max_position_embeddings
    for name, stream in streams.items():
        limit = len(streams["held_out"]) // length  # of the training files, as much as there is held out
        loss = stream_loss(params, config, stream, length, limit)
        result[f"{name}_nats_per_token"] = round(loss, 4)
        result[f"{name}_bits_per_byte"] = round(loss * len(stream) / num_bytes[name] / math.log(2), 4)
    return result


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the finished checkpoint")
    parser.add_argument("--work-dir", type=Path, default=Path("build/tiny-python"), help="log, tokenizer, snapshots")
    parser.add_argument(
        "--source", type=Path, default=Path(sysconfig.get_path("stdlib")), help="the files to learn from"
    )
    parser.add_argument("--steps", type=int, default=None, help="budget of the training loop in optimizer steps")
    parser.add_argument("--minutes", type=float, default=None, help="budget of the training loop in wall-clock time")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of --seq-len tokens; longer rows are fewer")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--final-seq-len", type=int, default=1024, help="context length, reached in the last steps")
    parser.add_argument("--final-share", type=float, default=0.12, help="share of the run at --final-seq-len")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=50, help="steps")
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 64: heads have 64 dimensions")
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--snapshot-every", type=int, default=250)
    parser.add_argument("--resume", action="store_true", help="continue from the snapshot in --work-dir")
    parser.add_argument("--export-only", action="store_true", help="export the snapshot in --work-dir")
    args = parser.parse_args(argv)
    if args.steps is None and args.minutes is None and not args.export_only:
        parser.error("the run needs a budget: give --steps, --minutes or both")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if (args.output / "config.json").exists():
        raise SystemExit(f"{args.output} already holds a checkpoint: remove it first, or give another --output")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    train_files, held_out_files = split_sources(find_sources(args.source))
    tokenizer_path = args.work_dir / "tokenizer.model"
    if not (args.resume or args.export_only):
        tokenizer_path.write_bytes(train_tokenizer(train_files.values(), args.vocab_size))
    tokenizer = load_tokenizer(tokenizer_path)
    streams = {"train": encode_files(tokenizer, train_files), "held_out": encode_files(tokenizer, held_out_files)}
    num_bytes = {
        "train": sum(len(text.encode()) for text in train_files.values()),
        "held_out": sum(len(text.encode()) for text in held_out_files.values()),
    }
    config = make_config(args)
    log(
        args,
        python=platform.python_version(),
        device=jax.devices()[0].device_kind,
        train_files=len(train_files),
        held_out_files=len(held_out_files),
        **{f"{name}_tokens": len(stream) for name, stream in streams.items()},
        **{f"{name}_bytes": count for name, count in num_bytes.items()},
    )
    result = train(args, config, tokenizer, streams["train"], streams["held_out"])
    params = result.pop("params")
    result["parameters"] = sum(x.size for x in jax.tree.leaves(params))
    log(args, **result, **measure(config, params, streams, num_bytes))
    export(args, config, params)
    return 0


if __name__ == "__main__":
    sys.exit(main())
