"""Names among which options choose."""

from __future__ import annotations

DTYPES = ("float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "native", "huggingface", "safetensors", "dummy")  # safetensors: vLLM's word for huggingface
ATTENTIONS = ("auto", "pallas", "reference")
PREEMPTION_MODES = ("auto", "swap", "recompute")
#: Rows of `max_model_len` in one array: with continuous batching, or batches that end as a whole (systems/slots.py).
DENSE_CACHES = ("dense-slots", "dense-static", "dense-static-global")
#: How KV memory is kept: paged, reserved in one piece for each sequence (systems/reservation.py), dense, or not at all.
KV_CACHES = ("paged", "contiguous-max", "contiguous-pow2", "contiguous-oracle", *DENSE_CACHES, "none")
