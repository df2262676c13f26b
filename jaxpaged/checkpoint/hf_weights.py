"""Streams the weights of a Hugging Face checkpoint to the device, one tensor at a time.

`LLAMA_NAMES` and its relatives say which modules of the checkpoint make each of ours; everything else follows from
`param_shapes`. Every name and shape is checked from the files' headers before any tensor is read. Then one tensor is in
host memory at a time; transposition ([out, in] there, [in, out] here), the fusion of q, k, v and of gate and up, and
the conversion to the wanted dtype happen on the device.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.checkpoint.files import INDEX_NAME, find_weight_files, read_weight_map
from jaxpaged.checkpoint.safetensors_files import DTYPES, StoredTensor, read_headers, read_tensor
from jaxpaged.checkpoint.tensor_check import Shape, check_shapes
from jaxpaged.config import ModelConfig
from jaxpaged.device.params import Params, param_shapes

# Our module -> the checkpoint's, below "layers.N." for modules of a layer. Several are laid side by side.
LLAMA_NAMES = {
    "embedding": ("embed_tokens",),
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "query_norm": ("self_attn.q_norm",),
    "key_norm": ("self_attn.k_norm",),
    "attention_out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.down_proj",),
    "final_norm": ("norm",),
}
GEMMA_NAMES = {
    **LLAMA_NAMES,
    "post_attention_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "post_mlp_norm": ("post_feedforward_layernorm",),
}
OPT_NAMES = {
    "embedding": ("embed_tokens",),
    "position_embedding": ("embed_positions",),
    "embedding_in": ("project_in",),
    "embedding_out": ("project_out",),
    "attention_norm": ("self_attn_layer_norm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.out_proj",),
    "mlp_norm": ("final_layer_norm",),
    "mlp_in": ("fc1",),
    "mlp_out": ("fc2",),
    "final_norm": ("final_layer_norm",),
}
NAMES = {"gemma2": GEMMA_NAMES, "gemma3": GEMMA_NAMES, "opt": OPT_NAMES}  # the others are named as in Llama

# What stands before "embed_tokens" and "layers": causal models, bare models, OPT, Gemma 3 with vision (two versions).
PREFIXES = ("model.", "", "model.decoder.", "decoder.", "language_model.model.", "model.language_model.")
VISION_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
LOOKUP_TABLES = ("embedding", "position_embedding")  # rows are looked up: stored as they are used
ROWS_COMPARED = 512  # at a time, of an output head that should equal the embedding

Stored = dict[str, StoredTensor]  # by name


@dataclass(frozen=True)
class Source:
    """Which stored tensors, of which shapes, make one parameter: laid side by side, transposed if they are matrices."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transpose: bool


def load_params(directory: Path, config: ModelConfig, *, dtype: str, device: jax.Device) -> Params:
    """The weights in `directory` as `dtype` on `device`; ValueError names every tensor that does not fit `config`."""
    treedef = jax.tree.structure(param_shapes(config, dtype))
    stored = _read_headers(directory)
    sources = _find_sources(stored, config)
    _check(stored, config, sources, directory)
    return jax.tree.unflatten(treedef, [_load(stored, source, dtype, device) for source in sources])


def stored_dtype(directory: Path) -> str:
    """The dtype of the first tensor, for a config.json that does not say."""
    stored_as = next((tensor.dtype for tensor in read_headers(find_weight_files(directory)[:1]).values()), "F32")
    return DTYPES.get(stored_as, stored_as)


def _read_headers(directory: Path) -> Stored:
    stored = read_headers(find_weight_files(directory))
    for name, file in read_weight_map(directory).items():
        if name in stored and stored[name].file.name != file:
            raise ValueError(f"{directory / INDEX_NAME} has {name} in {file}, but it is in {stored[name].file.name}")
    return stored


def _load(stored: Stored, source: Source, dtype: str, device: jax.Device) -> jax.Array:
    parts = []
    for name in source.names:
        # Without may_alias a CPU "device" would keep the host's copy alive; waiting frees it before the next is read.
        parts.append(jax.block_until_ready(jax.device_put(read_tensor(stored[name]), device, may_alias=False)))
    return jax.block_until_ready(_assemble(parts, source.transpose, dtype))


@functools.partial(jax.jit, static_argnames=("transpose", "dtype"))
def _assemble(parts: list[jax.Array], transpose: bool, dtype: str) -> jax.Array:
    parts = [(part.T if transpose else part).astype(dtype) for part in parts]
    return jnp.concatenate(parts, axis=-1)


def _find_sources(stored: Stored, config: ModelConfig) -> list[Source]:
    """One source per leaf of the parameters, under whichever prefix the files have the most of the names."""
    candidates = [_sources(config, prefix) for prefix in PREFIXES]
    return max(candidates, key=lambda sources: sum(name in stored for source in sources for name in source.names))


def _sources(config: ModelConfig, prefix: str) -> list[Source]:
    leaves = jax.tree_util.tree_flatten_with_path(param_shapes(config, "float32"))[0]
    return [
        _source(jax.tree_util.keystr(path, simple=True, separator=".").split("."), leaf.shape, config, prefix)
        for path, leaf in leaves
    ]


def _source(path: list[str], shape: Shape, config: ModelConfig, prefix: str) -> Source:
    """path: ["layers", "3", "qkv", "weight"], ["final_norm", "bias"] or ["embedding"]."""
    suffix = path.pop() if path[-1] in ("weight", "bias") else "weight"
    module = path.pop()
    if module == "lm_head":
        names = (_head_name(prefix),)
    else:
        stored_modules = NAMES.get(config.family, LLAMA_NAMES)[module]
        names = tuple(prefix + ".".join([*path, stored_module, suffix]) for stored_module in stored_modules)
    if module in LOOKUP_TABLES:
        return Source(names, (shape,), transpose=False)
    shapes = tuple((width, *shape[:-1]) for width in _widths(module, shape[-1], len(names), config))
    return Source(names, shapes, transpose=len(shape) == 2)


def _widths(module: str, total: int, parts: int, config: ModelConfig) -> list[int]:
    if module == "qkv":
        return [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    return [total // parts] * parts


def _head_name(prefix: str) -> str:
    """The output head is beside the model, not in it."""
    return "language_model.lm_head.weight" if prefix == "language_model.model." else "lm_head.weight"


def _check(stored: Stored, config: ModelConfig, sources: list[Source], directory: Path) -> None:
    expected = {name: shape for source in sources for name, shape in zip(source.names, source.shapes, strict=True)}
    embedding = next(name for name in expected if name.endswith("embed_tokens.weight"))
    head = _head_name(embedding.removesuffix("embed_tokens.weight"))
    tied_copy = config.tie_word_embeddings and head in stored
    if tied_copy:
        expected[head] = expected[embedding]
    found = {name: tensor.shape for name, tensor in stored.items() if name in expected or not _is_harmless(name)}
    check_shapes(found, expected, str(directory))
    _check_dtypes({name: stored[name] for name in expected})
    if tied_copy:
        _check_tied(stored[head], stored[embedding])


def _check_dtypes(tensors: Stored) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} in {tensor.file} is {tensor.dtype}; supported are {', '.join(DTYPES)}")


def _is_harmless(name: str) -> bool:
    """Rotary frequencies, which old files store and we compute, and the vision half of a multimodal model."""
    return name.endswith("rotary_emb.inv_freq") or name.startswith(VISION_PREFIXES)


def _check_tied(head: StoredTensor, embedding: StoredTensor) -> None:
    """A stored copy of the embedding is fine, in whichever dtype; other values mean that config.json is wrong."""
    different, largest = 0, 0.0
    for start in range(0, head.shape[0], ROWS_COMPARED):
        left, right = (read_tensor(tensor, slice(start, start + ROWS_COMPARED)) for tensor in (head, embedding))
        if left.dtype == right.dtype and left.tobytes() == right.tobytes():
            continue
        left, right = left.astype(np.float32), right.astype(np.float32)
        unequal = (left != right) & ~(np.isnan(left) & np.isnan(right))
        different += int(np.count_nonzero(unequal))
        largest = max(largest, float(np.abs(left[unequal] - right[unequal]).max(initial=0.0)))
    if different:
        raise ValueError(
            f"{head.name} ({head.dtype}) differs from {embedding.name} ({embedding.dtype}) in {different:,} of "
            f"{math.prod(head.shape):,} values, by at most {largest:.3g}, but config.json ties them: "
            "set tie_word_embeddings to false in it"
        )
