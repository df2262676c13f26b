"""jaxpaged: language-model inference in JAX over a paged KV cache. The public names, nothing else.

Searches that are written on a `Tree` are in `jaxpaged.tree.search`, simulations without a model in `jaxpaged.study`.
"""

from importlib import import_module

TYPE_CHECKING = False  # as typing's, which takes longer to import than the rest of this
if TYPE_CHECKING:
    from jaxpaged.api.beam_params import BeamSearchParams
    from jaxpaged.api.beam_snapshot import BeamSnapshot
    from jaxpaged.api.dataframe import to_dataframe
    from jaxpaged.api.outputs import CompletionOutput, KVUsage, Logprob, NewToken, RequestMetrics, RequestOutput
    from jaxpaged.api.rows import Rows
    from jaxpaged.api.sampling_params import SamplingParams
    from jaxpaged.llm import LLM
    from jaxpaged.tree import OutOfPagesError, ToyLM, Tree

__version__ = "0.2.0"
__all__ = [
    "LLM",
    "BeamSearchParams",
    "BeamSnapshot",
    "CompletionOutput",
    "KVUsage",
    "Logprob",
    "NewToken",
    "OutOfPagesError",
    "RequestMetrics",
    "RequestOutput",
    "Rows",
    "SamplingParams",
    "ToyLM",
    "Tree",
    "__version__",
    "to_dataframe",
]
_MODULES = {
    "LLM": "jaxpaged.llm",
    "BeamSearchParams": "jaxpaged.api.beam_params",
    "BeamSnapshot": "jaxpaged.api.beam_snapshot",
    "CompletionOutput": "jaxpaged.api.outputs",
    "KVUsage": "jaxpaged.api.outputs",
    "Logprob": "jaxpaged.api.outputs",
    "NewToken": "jaxpaged.api.outputs",
    "OutOfPagesError": "jaxpaged.tree",
    "RequestMetrics": "jaxpaged.api.outputs",
    "RequestOutput": "jaxpaged.api.outputs",
    "Rows": "jaxpaged.api.rows",
    "SamplingParams": "jaxpaged.api.sampling_params",
    "ToyLM": "jaxpaged.tree",
    "Tree": "jaxpaged.tree",
    "to_dataframe": "jaxpaged.api.dataframe",
}

if not TYPE_CHECKING:  # a type checker would take it for a promise of any name

    def __getattr__(name: str):
        """Names are imported when they are first used: the host side and `jaxpaged --help` need no jax, and a command
        that is interrupted as it starts has begun."""
        if name not in _MODULES:
            raise AttributeError(f"module 'jaxpaged' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
