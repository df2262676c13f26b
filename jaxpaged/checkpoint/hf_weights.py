"""Streams the weights of a Hugging Face checkpoint to the device, one tensor at a time.

What makes each parameter stands in its record (`param_records`), by the names of Llama's modules; `NAMES` says which
modules have other names in a family. Every name and shape is checked from the files' headers before any tensor is read.
Then few tensors are in host memory at a time, the one that moves to the device and what is read ahead of it;
transposition ([out, in] there, [in, out] here), the fusion of q, k, v and of gate and up, and the conversion to the
wanted dtype happen on the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.checkpoint.files import INDEX_NAME, find_weight_files, read_weight_map
from jaxpaged.checkpoint.safetensors_files import DTYPES, StoredTensor, read_ahead, read_headers, read_tensor
from jaxpaged.checkpoint.tensor_check import Shape, check_shapes
from jaxpaged.config import ModelConfig
from jaxpaged.device.mesh import Placement
from jaxpaged.device.param_nodes import Params, by_name
from jaxpaged.device.params import Tensor, param_records, stored_names
from jaxpaged.device.shards import place_parts

# Modules that a family names differently, below "layers.N." those of a layer: the name in `param_records` -> its own.
GEMMA_NAMES = {
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}
OPT_NAMES = {
    "input_layernorm": "self_attn_layer_norm",
    "self_attn.o_proj": "self_attn.out_proj",
    "post_attention_layernorm": "final_layer_norm",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
    "norm": "final_layer_norm",
}
NAMES = {"gemma2": GEMMA_NAMES, "gemma3": GEMMA_NAMES, "opt": OPT_NAMES}  # the others are named as in Llama

# What stands before "embed_tokens" and "layers": causal models, bare models, OPT, Gemma 3 with vision (two versions).
PREFIXES = ("model.", "", "model.decoder.", "decoder.", "language_model.model.", "model.language_model.")
VISION_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
ROWS_COMPARED = 512  # at a time, of an output head that should equal the embedding

Stored = dict[str, StoredTensor]  # by name


@dataclass(frozen=True)
class Source:
    """Which stored tensors, of which shapes, make one parameter: laid side by side, transposed if they are matrices."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    record: Tensor

    @property
    def transpose(self) -> bool:
        return self.record.is_transposed


def load_params(directory: Path, config: ModelConfig, *, dtype: str, device: jax.Device | Placement) -> Params:
    """The weights in `directory` as `dtype` on `device`, or divided among several; ValueError names every tensor that
    does not fit `config`."""
    placement = Placement.of(device)
    treedef = jax.tree.structure(param_records(config))
    stored = _read_headers(directory)
    sources = _find_sources(stored, config)
    _check(stored, config, sources, directory)
    reading = read_ahead([stored[name] for source in sources for name in source.names])
    with closing(reading):
        return jax.tree.unflatten(treedef, [_load(reading, source, config, dtype, placement) for source in sources])


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


def _load(
    reading: Iterator[np.ndarray], source: Source, config: ModelConfig, dtype: str, placement: Placement
) -> jax.Array:
    if placement.size > 1:
        stored = [next(reading) for _ in source.names]
        return place_parts(stored, source.record, config, placement, dtype=dtype, is_transposed=source.transpose)
    parts = []
    for _ in source.names:
        # A CPU "device" that may alias would keep the host's copy alive; waiting frees it before the next is taken.
        parts.append(jax.block_until_ready(jax.device_put(next(reading), placement.device, may_alias=False)))
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
    renamed = NAMES.get(config.family, {})
    return [_source(name, record, renamed, prefix) for name, record in by_name(param_records(config)).items()]


def _source(name: str, record: Tensor, renamed: Mapping[str, str], prefix: str) -> Source:
    """name: "layers.3.qkv.weight", "final_norm.bias" or "embedding"."""
    if name == "lm_head.weight":
        names = (_head_name(prefix),)
    else:
        names = tuple(prefix + stored for stored in stored_names(name, record, renamed))
    shapes = [(*record.shape[:-1], part.width) for part in record.parts]
    if record.is_transposed:
        shapes = [shape[::-1] for shape in shapes]
    return Source(names, tuple(shapes), record)


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
