"""Names among which options choose."""

from __future__ import annotations

DTYPES = ("float32", "bfloat16", "float16")
FP8 = "float8_e4m3fn"  # of pages alone
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")  # the last is vLLM's other word for fp8
LOAD_FORMATS = ("auto", "native", "huggingface", "safetensors", "dummy")  # safetensors: vLLM's word for huggingface
ATTENTIONS = ("auto", "pallas", "reference")
PREEMPTION_MODES = ("auto", "swap", "recompute")
#: Rows of `max_model_len` in one array, with continuous batching or batches that end as a whole (dense_rows.py).
DENSE_CACHES = ("dense", "dense-static", "dense-static-global")
#: How KV memory is kept: paged, reserved in one piece for each sequence (systems/reservation.py), dense, or not at all.
KV_CACHES = ("paged", "contiguous-max", "contiguous-pow2", "contiguous-oracle", *DENSE_CACHES, "none")

#: What choices were called in files and programs of before, and are now.
RENAMED_CHOICES = {"dense-slots": "dense"}


def choices_in_words(value: object, choices: tuple[str, ...]) -> str:
    """The end of an error about a value that is none of these: what it is called now, or which there are."""
    if isinstance(value, str) and RENAMED_CHOICES.get(value) in choices:
        return f"it is called {RENAMED_CHOICES[value]!r} now"
    return f"choose one of {', '.join(choices)}"
