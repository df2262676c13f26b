"""jaxpaged: language-model inference in JAX over a paged KV cache. The public names, nothing else."""

from typing import TYPE_CHECKING

from jaxpaged.beam_params import BeamSearchParams
from jaxpaged.beam_snapshot import BeamSnapshot
from jaxpaged.outputs import CompletionOutput, KVUsage, Logprob, RequestMetrics, RequestOutput
from jaxpaged.sampling_params import SamplingParams

if TYPE_CHECKING:
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


def __getattr__(name: str):
    """`LLM` is imported when it is first used: the host side and `jaxpaged --help` need no jax."""
    if name == "LLM":
        from jaxpaged.llm import LLM

        return LLM
    raise AttributeError(f"module 'jaxpaged' has no attribute {name!r}")
