"""Keyword arguments that a call does not take: the error says which it does, and what vLLM's names are here."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_BY_HEADS = "a model is divided among devices by heads alone, which is tensor_parallel_size, so leave it out"
_ONE_PROCESS = "one process runs all devices of an LLM, so leave it out"
_NO_ADAPTERS = "jaxpaged has no adapters, so leave it out"
_NO_IMAGES = "jaxpaged runs models of text alone, so leave it out"

#: What vLLM's arguments of `LLM` are here.
VLLM_OPTIONS = {
    "gpu_memory_utilization": "here it is memory_utilization",
    "block_size": "here it is page_size",
    "num_gpu_blocks_override": "here it is num_pages",
    "max_seq_len": "here it is max_model_len",
    "max_seq_len_to_capture": "the device's programs are compiled for all lengths up to max_model_len, so leave it out",
    "max_num_batched_seqs": "here it is max_num_seqs",
    "swap_space": "here it is swap_space_gib",
    "preemption_mode": "here it is preemption",
    "attention_backend": "here it is attention",
    "enable_prefix_caching": "here it is prefix_caching",
    "disable_cascade_attn": "here cascade_attention=True enables it",
    "enable_chunked_prefill": "prompts beyond max_num_batched_tokens are always computed in chunks, so leave it out",
    "pipeline_parallel_size": _BY_HEADS,
    "distributed_executor_backend": _ONE_PROCESS,
    "disable_custom_all_reduce": "sums of several devices are NCCL's, so leave it out",
    "enforce_eager": "every step is a compiled program, so leave it out",
    "trust_remote_code": "no code of a checkpoint is ever run, so leave it out",
    "quantization": "weights are kept in dtype, 16 or 32 bits",
    "calculate_kv_scales": "pages of fp8 have scale 1, so leave it out",
    "cpu_offload_gb": "weights stay on the device; swap_space_gib is host memory for pages",
    "kv_cache_memory_bytes": "here the pool's size is num_pages, or what memory_utilization leaves",
    "served_model_name": "jaxpaged serves nothing, so leave it out",
    "speculative_config": "jaxpaged does not speculate, so leave it out",
    "enable_lora": _NO_ADAPTERS,
    "max_loras": _NO_ADAPTERS,
    "tokenizer_revision": "revision is of model and tokenizer; for another tokenizer give its directory as tokenizer=",
    "download_dir": "the variable HF_HUB_CACHE names the folder of downloads",
    "hf_token": "the variable HF_TOKEN has it, or huggingface_hub's login",
    "limit_mm_per_prompt": _NO_IMAGES,
    "tokenizer_mode": "give an object with encode and decode as tokenizer=",
    "skip_tokenizer_init": "give prompts as token ids and SamplingParams(detokenize=False)",
    "hf_overrides": "edit the directory's config.json instead",
    "disable_log_stats": "what a run did is in llm.last_run, and nothing is logged at intervals, so leave it out",
}
#: Options that had another name before.
RENAMED_OPTIONS = {"shared_prefixes": "cascade_attention"}
#: What vLLM's arguments and those of before are here.
OTHER_OPTIONS = {**VLLM_OPTIONS, **{old: f"it is called {new} now" for old, new in RENAMED_OPTIONS.items()}}
#: What vLLM's arguments of `generate` and its kind are here.
VLLM_REQUESTS = {
    "use_tqdm": "here it is progress",
    "prompt_token_ids": "here token ids are prompts: generate([[1, 2, 3]])",
    "lora_request": _NO_ADAPTERS,
    "priority": "requests run in the order of the list",
    "concurrency_limit": "here LLM(max_num_seqs=...) is how many sequences run together",
    "tokenization_kwargs": "here it is add_special_tokens",
}
#: And of `chat`.
VLLM_CHAT = {
    "chat_template_content_format": "contents of parts become one text for templates that know none, so leave it out",
    "mm_processor_kwargs": _NO_IMAGES,
}


def check_names(call: str, given: Iterable[str], known: Collection[str], elsewhere: Mapping[str, str]) -> None:
    """Raise TypeError for names that `call` does not take: all of them at once, with what `elsewhere` says of each."""
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    said = [f"{name!r} ({_advice(name, known, elsewhere)})" for name in unknown]
    unguessed = [name for name in unknown if name not in elsewhere and not _close(name, known)]
    listed = f"; it takes {', '.join(known)}" if unguessed else ""
    raise TypeError(f"{call} takes no argument {', '.join(said)}{listed}")


def _advice(name: str, known: Collection[str], elsewhere: Mapping[str, str]) -> str:
    close = _close(name, known)
    return elsewhere.get(name) or (f"did you mean {' or '.join(close)}?" if close else "there is none like it")


def _close(name: str, known: Collection[str]) -> list[str]:
    return difflib.get_close_matches(name.lower(), known, n=2)


def explains_names(elsewhere: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A method that answers keyword arguments which it does not take as `check_names` does."""

    def explained(method: Callable[P, R]) -> Callable[P, R]:
        known = [name for name in inspect.signature(method).parameters if name != "self"]

        @functools.wraps(method)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            check_names(method.__name__, kwargs, known, elsewhere)
            return method(*args, **kwargs)

        return checked

    return explained
