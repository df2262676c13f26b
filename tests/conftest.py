"""Where the tests run: on the CPU unless JAX has a CUDA plugin, with the promotions that hide mistakes switched off."""

from __future__ import annotations

import importlib.util
import os

import pytest

HAS_CUDA_PLUGIN = any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin"))

# Set before anything imports jax; what the caller sets stands.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if not HAS_CUDA_PLUGIN:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Most of the time goes into compiling toy models; unoptimised code is as right, and compiled in half of it.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that jax can use"))


def _has_gpu() -> bool:
    if not HAS_CUDA_PLUGIN:
        return False
    import jax

    return jax.default_backend() == "gpu"
