"""What one of several devices has of a model: a share of its heads, of its feed-forward and of its vocabulary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxpaged.config import ModelConfig


@dataclass(frozen=True)
class ShardConfig(ModelConfig):
    """The configuration of one shard. Heads, KV heads and the intermediate size are the shard's; the vocabulary is the
    model's, since whoever looks at logits looks at whole rows."""

    shards: int = 1

    @property
    def num_shards(self) -> int:
        return self.shards

    @property
    def num_vocab_rows(self) -> int:
        return -(-self.vocab_size // self.shards)


def shard_config(model: ModelConfig, num_shards: int) -> ModelConfig:
    """What each of so many devices computes: the model itself where there is one. ValueError, with the numbers that
    would do, where the model cannot be divided by this one.

    Where there are more shards than KV heads, several have the same one.
    """
    if num_shards == 1:
        return model
    if not _divides(model, num_shards):
        possible = ", ".join(str(n) for n in range(1, model.num_heads + 1) if _divides(model, n))
        raise ValueError(
            f"tensor_parallel_size={num_shards} does not divide num_heads={model.num_heads}, "
            f"num_kv_heads={model.num_kv_heads} and intermediate_size={model.intermediate_size} of this model among "
            f"devices (KV heads may also be fewer than devices, by a whole factor): it can be {possible}"
        )
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(ModelConfig)}
    shares = {
        "num_heads": model.num_heads // num_shards,
        "num_kv_heads": max(1, model.num_kv_heads // num_shards),
        "intermediate_size": model.intermediate_size // num_shards,
    }
    return ShardConfig(**{**values, **shares}, shards=num_shards)


def _divides(model: ModelConfig, n: int) -> bool:
    kv_heads = model.num_kv_heads
    has_kv_heads = kv_heads % n == 0 or n % kv_heads == 0
    return has_kv_heads and model.num_heads % n == 0 and model.intermediate_size % n == 0 and n <= model.vocab_size
