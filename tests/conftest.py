"""Where the tests run: on the CPU unless JAX has a CUDA plugin, with the promotions that hide mistakes switched off."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest

#: The same cases at every run, so that a change fails for what it did; HYPOTHESIS_PROFILE=default looks for others.
hypothesis.settings.register_profile("same", derandomize=True, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

HAS_CUDA_PLUGIN = any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin"))

# Set before anything imports jax; what the caller sets stands.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["JAXPAGED_CACHE_DIR"] = ""  # programs of tests are not for the user's own cache, nor his for them
if not HAS_CUDA_PLUGIN:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Most of the time goes into compiling toy models; unoptimised code is as right, and compiled in half of it.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


#: Linux gives a process 65,530 memory maps, and XLA takes several for each program that it compiles and keeps: without
#: them it aborts. From this many on, a file begins without the programs of those before it.
MANY_MEMORY_MAPS = 25_000


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists():
        with maps.open() as lines:
            count = sum(1 for _ in lines)
        if count > MANY_MEMORY_MAPS:
            if "jaxpaged.device.programs" in sys.modules:
                sys.modules["jaxpaged.device.programs"].PROGRAMS.give_back_all()
            sys.modules["jax"].clear_caches()


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
