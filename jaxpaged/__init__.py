"""jaxpaged: language-model inference in JAX over a paged KV cache. The public names, nothing else."""

from importlib import import_module

TYPE_CHECKING = False  # as typing's, which takes longer to import than the rest of this
if TYPE_CHECKING:
    from jaxpaged.api.beam_params import BeamSearchParams
    from jaxpaged.api.beam_snapshot import BeamSnapshot
    from jaxpaged.api.outputs import CompletionOutput, KVUsage, Logprob, RequestMetrics, RequestOutput
    from jaxpaged.api.sampling_params import SamplingParams
    from jaxpaged.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BeamSearchParams",
    "BeamSnapshot",
    "CompletionOutput",
    "KVUsage",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]
_MODULES = {
    "LLM": "jaxpaged.llm",
    "BeamSearchParams": "jaxpaged.api.beam_params",
    "BeamSnapshot": "jaxpaged.api.beam_snapshot",
    "CompletionOutput": "jaxpaged.api.outputs",
    "KVUsage": "jaxpaged.api.outputs",
    "Logprob": "jaxpaged.api.outputs",
    "RequestMetrics": "jaxpaged.api.outputs",
    "RequestOutput": "jaxpaged.api.outputs",
    "SamplingParams": "jaxpaged.api.sampling_params",
}


def __getattr__(name: str):
    """Names are imported when they are first used: the host side and `jaxpaged --help` need no jax, and a command that
    is interrupted as it starts has begun."""
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxpaged' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
