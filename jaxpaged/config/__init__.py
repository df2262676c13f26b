"""What a model looks like, what its cache looks like, how the engine runs: frozen, self-checking dataclasses.

They are hashable, so jit takes them as static arguments. One `ModelConfig` describes every supported family; the model
file has no copy per family, only these switches.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxpaged.config.checks import (
    LARGEST,
    MAX_COUNT,
    MAX_LAYERS,
    check_choice,
    check_flag,
    check_number,
    check_size,
    check_text,
    check_token_id,
)
from jaxpaged.config.choices import DENSE_CACHES as DENSE_CACHES
from jaxpaged.config.choices import DTYPES, FP8, KV_CACHES, PREEMPTION_MODES
from jaxpaged.config.options import EngineOptions
from jaxpaged.config.rope import RopeConfig


class AttentionOptions(NamedTuple):
    """What one layer's attention does beyond softmax(q k) v: the keyword arguments of every attention kernel."""

    scale: float
    soft_cap: float | None = None
    sliding_window: int | None = None  # a query reads the last `sliding_window` positions, its own included


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer and the switches in which the supported families differ."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    # Normalisation
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # Gemma multiplies by (1 + weight)
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"  # sandwich: before and after each block (Gemma 2, 3)
    qk_norm: bool = False  # RMS norm of every query and key head (Qwen3, Gemma 3)
    # Feed-forward
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    # Attention
    qkv_bias: bool = False
    attention_out_bias: bool = False
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_soft_cap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()  # which layers use the window; empty: all of them, if there is a window
    # Positions: rotary, or learned when `rope` is None (OPT)
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    local_rope: RopeConfig | None = None  # of the sliding layers, where it differs (Gemma 3)
    learned_position_offset: int = 0  # OPT's table starts two rows late
    # Embedding and head
    embedding_size: int | None = None  # None: hidden_size; otherwise projected in and out (OPT-350m)
    embedding_scale: float = 1.0
    tie_word_embeddings: bool = False
    final_soft_cap: float | None = None
    # What the checkpoint says about tokens and storage
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    def __post_init__(self):
        self._check_sizes()
        self._check_switches()
        self._check_layers()
        for name in ("rope", "local_rope"):
            if (rope := getattr(self, name)) is not None:
                if not isinstance(rope, RopeConfig):
                    raise ValueError(f"{name} must be a RopeConfig, got {rope!r}")
                rope.check_head_dim(self.head_dim)
        for token_id in self.eos_token_ids:
            check_token_id("eos_token_ids", token_id, self.vocab_size)
        if self.bos_token_id is not None:
            check_token_id("bos_token_id", self.bos_token_id, self.vocab_size)

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
            "max_position_embeddings",
        ):  # fmt: skip
            check_size(name, getattr(self, name))
        check_size("num_layers", self.num_layers, MAX_LAYERS)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.embedding_size is not None:
            check_size("embedding_size", self.embedding_size)
        if self.sliding_window is not None:
            check_size("sliding_window", self.sliding_window, MAX_COUNT)
        if self.learned_position_offset != 0:
            check_size("learned_position_offset", self.learned_position_offset)

    def _check_switches(self) -> None:
        check_text("family", self.family)
        check_choice("norm", self.norm, ("rms", "layer"))
        check_choice("norm_placement", self.norm_placement, ("pre", "post", "sandwich"))
        check_choice("activation", self.activation, ("silu", "gelu", "gelu_tanh", "relu"))
        check_choice("dtype", self.dtype, DTYPES)
        for name in ("qk_norm", "gated_mlp", "mlp_bias", "qkv_bias", "attention_out_bias", "tie_word_embeddings"):
            check_flag(name, getattr(self, name))
        check_number("norm_eps", self.norm_eps, 0, 1.0)
        check_number("norm_offset", self.norm_offset, -LARGEST)
        check_number("embedding_scale", self.embedding_scale, 0)
        for name in ("attention_scale", "attention_soft_cap", "final_soft_cap"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)

    def _check_layers(self) -> None:
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(f"sliding_layers names {len(self.sliding_layers)} layers, the model has {self.num_layers}")
        for is_sliding in self.sliding_layers:
            check_flag("sliding_layers", is_sliding)
        if any(self.sliding_layers) and self.sliding_window is None:
            raise ValueError("sliding_layers is set but sliding_window is not")

    @property
    def has_final_norm(self) -> bool:
        return self.norm_placement != "post"

    @property
    def embedding_dim(self) -> int:
        return self.embedding_size or self.hidden_size

    @property
    def num_shards(self) -> int:
        """Devices among which the model is divided, of which this is one's part (shard.py)."""
        return 1

    @property
    def num_vocab_rows(self) -> int:
        """Tokens of the vocabulary whose embeddings and logits are here."""
        return self.vocab_size

    def is_sliding(self, layer: int) -> bool:
        if self.sliding_window is None:
            return False
        return self.sliding_layers[layer] if self.sliding_layers else True

    @property
    def window(self) -> int | None:
        """The last positions that any layer reads; None where some layer reads all."""
        return self.sliding_window if all(map(self.is_sliding, range(self.num_layers))) else None

    def attention_options(self, layer: int) -> AttentionOptions:
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return AttentionOptions(scale, self.attention_soft_cap, self.sliding_window if self.is_sliding(layer) else None)

    def rope_of(self, layer: int) -> RopeConfig | None:
        return self.local_rope if self.local_rope is not None and self.is_sliding(layer) else self.rope

    @property
    def default_model_len(self) -> int:
        """The longest sequence unless somebody asks for more: positions at which short ones are computed as alone."""
        ropes = [rope for rope in (self.rope, self.local_rope) if rope is not None and rope.depends_on_length]
        return min([self.max_position_embeddings, *(rope.original_max_position for rope in ropes)])

    def for_length(self, length: int) -> ModelConfig:
        """The same with its rotations settled for an engine whose sequences have at most `length` tokens."""
        ropes = {name: getattr(self, name) for name in ("rope", "local_rope")}
        return dataclasses.replace(self, **{name: rope and rope.for_length(length) for name, rope in ropes.items()})

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token position takes, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `ModelConfig.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        values = dict(values)
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown model configuration keys {unknown}; known keys are {sorted(known)}")
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if missing := sorted(required - set(values)):
            raise ValueError(f"model configuration lacks the keys {missing}")
        for name in ("rope", "local_rope"):
            if values.get(name) is not None:
                values[name] = RopeConfig.from_dict(name, values[name])
        for name in ("sliding_layers", "eos_token_ids"):
            if not isinstance(values.get(name, []), list | tuple):
                raise ValueError(f"{name} must be a list, got {values[name]!r}")
            values[name] = tuple(values.get(name, ()))
        return cls(**values)


@dataclass(frozen=True)
class CacheConfig:
    """The page pool: `num_pages` pages (page 0 is never handed out) of `page_size` token positions in every layer."""

    page_size: int
    num_pages: int
    dtype: str = "bfloat16"  # of keys and values
    window: int | None = None  # so many last positions are read, and pages before them given back; None: all stay

    def __post_init__(self):
        check_size("page_size", self.page_size, MAX_COUNT)
        if self.window is not None:
            check_size("window", self.window, MAX_COUNT)
        check_size("num_pages", self.num_pages, MAX_COUNT)
        check_choice("cache dtype", self.dtype, (*DTYPES, FP8))
        if self.num_pages < 2:
            raise ValueError(
                f"num_pages={self.num_pages}: a pool needs page 0, which stays unused, and at least one more"
            )

    @property
    def num_usable_pages(self) -> int:
        return self.num_pages - 1

    @property
    def num_usable_tokens(self) -> int:
        return self.num_usable_pages * self.page_size


def num_dense_rows(cache: CacheConfig, max_model_len: int) -> int:
    """Rows of `max_model_len` tokens, in whole pages, that the usable pages hold; ValueError if they hold none."""
    row_pages = -(-max_model_len // cache.page_size)
    count = cache.num_usable_pages // row_pages
    if not count:
        raise ValueError(
            f"a dense cache keeps max_model_len={max_model_len} tokens for each sequence, {row_pages} pages of "
            f"{cache.page_size}, and the pool has {cache.num_usable_pages}: raise num_pages, or lower max_model_len"
        )
    return count


@dataclass(frozen=True)
class PreemptionConfig:
    """How a group of sequences gives way when pages run out: by recomputation alone, unless there is swap space."""

    mode: Literal["recompute", "swap", "auto"] = "recompute"  # "auto": whichever is cheaper for the group
    swap_pages: int = 0  # pages that the host memory for swapped groups holds
    page_cost: float = 0.0  # tokens that are recomputed in the time in which one page goes out and comes back
    transfer_pages: int = 1  # most pages that one transfer moves

    def __post_init__(self):
        check_choice("preemption", self.mode, PREEMPTION_MODES)
        check_size("transfer_pages", self.transfer_pages, MAX_COUNT)
        if self.swap_pages < 0 or self.page_cost < 0:
            raise ValueError(f"swap_pages={self.swap_pages} and page_cost={self.page_cost} must be at least 0")

    @property
    def can_swap(self) -> bool:
        return self.mode != "recompute" and self.swap_pages > 0


@dataclass(frozen=True)
class EngineConfig:
    """Limits and policies of the scheduler, as `EngineOptions` says of them. Lengths are in tokens."""

    max_model_len: int
    max_num_seqs: int = EngineOptions.max_num_seqs
    max_num_batched_tokens: int = EngineOptions.max_num_batched_tokens
    cascade_attention: bool = EngineOptions.cascade_attention
    watermark: float = EngineOptions.watermark
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig)
    kv_cache: str = EngineOptions.kv_cache
    async_scheduling: bool = EngineOptions.async_scheduling
    mixed_steps: bool = EngineOptions.mixed_steps
    prefix_caching: bool = EngineOptions.prefix_caching

    def __post_init__(self):
        check_choice("kv_cache", self.kv_cache, KV_CACHES)
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            check_size(name, getattr(self, name), MAX_COUNT)
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark={self.watermark} is not in [0, 1)")

    @property
    def can_mix_steps(self) -> bool:
        """Whether a step may hold prompts and sequences that decode: not where caches are dense, or there is none, nor
        where decode steps read what is shared once, as one with prompts would not."""
        return self.mixed_steps and not self.cascade_attention and self.kv_cache not in (*DENSE_CACHES, "none")
