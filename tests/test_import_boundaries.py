"""Who may import whom: the two sides meet in engine.py only, and the kernels stand alone (docs say why)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ABOVE_ENGINE = (
    "jaxpaged.pool_size", "jaxpaged.llm", "jaxpaged.request_input", "jaxpaged.request_output", "jaxpaged.cli",
    "jaxpaged.cli_errors", "jaxpaged.cli_options", "jaxpaged.interrupts",
    "jaxpaged.__main__", "jaxpaged.generate_command",
    "jaxpaged.beams_command", "jaxpaged.beam_plot", "jaxpaged.batch", "jaxpaged.tree", "jaxpaged.tree_steps",
    "jaxpaged.toy", "jaxpaged.search", "jaxpaged.trace_command", "jaxpaged.trace_page",
)  # fmt: skip
ABOVE_STEPS = ("jaxpaged.engine", "jaxpaged.loading", *ABOVE_ENGINE)
DEVICE_STACK = ("jax", "jaxlib", "flax", "orbax", "jaxpaged.device", "pallas_kernels")

#: module prefix -> what neither it nor anything below it may import. The longest matching prefix alone counts.
FORBIDDEN = {
    "jaxpaged.host": (*DEVICE_STACK, "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.device": ("jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.checkpoint": ("jaxpaged.host", *ABOVE_STEPS),
    "jaxpaged.config": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.step_io": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.sampling_params": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.beam_params": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.param_checks": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.values": ("jaxpaged", *DEVICE_STACK),
    "jaxpaged.beam_text": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.beam_snapshot": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.beam_tree": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.beam_plot": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", "jaxpaged.engine", "jaxpaged.llm"),
    "jaxpaged.ownership": ("jaxpaged", *DEVICE_STACK),
    "jaxpaged.outputs": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.tokenizer": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.text_stream": ("jaxpaged", "sentencepiece", "tokenizers", *DEVICE_STACK),
    "jaxpaged.added_tokens": ("jaxpaged", "sentencepiece", "tokenizers", *DEVICE_STACK),
    "jaxpaged.workloads": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.simulate": (*DEVICE_STACK, "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.compare": (*DEVICE_STACK, "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.progress": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.batch": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", "jaxpaged.engine", "jaxpaged.llm"),
    "jaxpaged.trace_page": ("jaxpaged", *DEVICE_STACK),
    "jaxpaged.trace_command": (
        *DEVICE_STACK,
        "jaxpaged.host",
        "jaxpaged.checkpoint",
        "jaxpaged.engine",
        "jaxpaged.llm",
    ),
    "jaxpaged.engine": ("jaxpaged.checkpoint", *ABOVE_ENGINE),
    "jaxpaged.pool_size": ("jaxpaged.host", "jaxpaged.checkpoint", "jaxpaged.loading", "jaxpaged.llm"),
    "jaxpaged.tree_outputs": (*DEVICE_STACK, "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.tree_input": (*DEVICE_STACK, "jaxpaged.host", "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged.tree": (*DEVICE_STACK, "jaxpaged.checkpoint", "jaxpaged.engine", "jaxpaged.llm", "jaxpaged.tree_steps"),
    "jaxpaged.tree_steps": ("jaxpaged.device", "jaxpaged.checkpoint", "jaxpaged.llm", "jaxpaged.tree"),
    "jaxpaged.toy": (*DEVICE_STACK, "jaxpaged.checkpoint", "jaxpaged.engine", "jaxpaged.llm", "jaxpaged.tree_steps"),
    "jaxpaged.search": (*DEVICE_STACK,),
    "jaxpaged.llm": (
        "jaxpaged.device",
        "jaxpaged.cli",
        "jaxpaged.generate_command",
        "jaxpaged.beams_command",
        "jaxpaged.batch",
    ),
    "jaxpaged.request_input": (*DEVICE_STACK, "jaxpaged.checkpoint", "jaxpaged.loading", "jaxpaged.llm"),
    "jaxpaged.request_output": (*DEVICE_STACK, "jaxpaged.checkpoint", *ABOVE_STEPS),
    "jaxpaged": ("scripts", "tests"),
    "pallas_kernels": ("jaxpaged", "flax", "scripts", "tests"),
}
#: module prefix -> all of jaxpaged that it may import: searches are what a user could have written.
ALLOWED = {"jaxpaged.search": ("jaxpaged.search", "jaxpaged.tree")}
SIDES = ("jaxpaged.host", "jaxpaged.device")
THE_DOOR = "jaxpaged.engine"


def source_modules() -> dict[str, str]:
    """Dotted name -> source of every module of the two packages."""
    files = [file for package in ("jaxpaged", "pallas_kernels") for file in (ROOT / package).rglob("*.py")]
    return {_module_name(file): file.read_text() for file in files}


def _module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: str, source: str) -> Iterator[str]:
    """Every name that the source imports, in functions too; `from a import b` gives a.b, which names a or a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute, so that this test can read them"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(modules: dict[str, str]) -> list[str]:
    found = []
    for module, source in modules.items():
        imported = set(imports(module, source))
        rule = max((prefix for prefix in FORBIDDEN if is_below(module, prefix)), key=len)
        for name in sorted(imported):
            if any(is_below(name, prefix) for prefix in FORBIDDEN[rule]):
                found.append(f"{module} imports {name}")
        for prefix, allowed in ALLOWED.items():
            if is_below(module, prefix):
                ours = [name for name in sorted(imported) if is_below(name, "jaxpaged")]
                found += [f"{module} imports {n}" for n in ours if not any(is_below(n, other) for other in allowed)]
        sides = [side for side in SIDES if any(is_below(name, side) for name in imported)]
        if len(sides) > 1 and module != THE_DOOR:
            found.append(f"{module} imports both sides")
    return found


def test_no_module_imports_what_it_must_not():
    assert violations(source_modules()) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("jaxpaged.host.scheduler", "import jax.numpy as jnp"),
        ("jaxpaged.host.scheduler", "def f():\n    from jaxpaged.device import steps"),
        ("jaxpaged.host.scheduler", "from jaxpaged import engine"),
        ("jaxpaged.device.cache", "from jaxpaged.host.sequence import Sequence"),
        ("jaxpaged.step_io", "import jax"),
        ("jaxpaged.config", "from jax import Array"),
        ("jaxpaged.engine", "import jaxpaged.llm"),
        ("jaxpaged.batch.run", "from jaxpaged.llm import LLM"),
        ("jaxpaged.search.mcts", "from jaxpaged.host.tree_state import Node"),
        ("jaxpaged.search.mcts", "from jaxpaged.llm import LLM"),
        ("jaxpaged.search.mcts", "import jax"),
        ("jaxpaged.tree", "from jaxpaged.tree_steps import EngineSteps"),
        ("jaxpaged.tree", "import jax.numpy as jnp"),
        ("jaxpaged.toy", "from jaxpaged.engine import Engine"),
        ("jaxpaged.engine", "import jaxpaged.tree_steps"),
        ("jaxpaged.host.tree_compute", "from jaxpaged.tree import Tree"),
        ("jaxpaged.loading", "import jaxpaged.host.scheduler\nimport jaxpaged.device.steps"),
        ("pallas_kernels.paged_decode", "from jaxpaged.step_io import NULL_PAGE"),
    ],
)
def test_a_planted_violation_is_found(module, source):
    assert len(violations({module: source})) == 1


def test_what_is_allowed_is_not_reported():
    allowed = {
        "jaxpaged.engine": "from jaxpaged.device import steps\nfrom jaxpaged.host.scheduler import Scheduler",
        "jaxpaged.checkpoint.native": "from jaxpaged.device.params import param_shapes\nimport orbax.checkpoint",
        "jaxpaged.host.batching": "import numpy\nfrom jaxpaged.step_io import NULL_PAGE",
        "jaxpaged.search.mcts": "from jaxpaged.tree import Node\nfrom jaxpaged.search.rollout import rollout",
        "jaxpaged.hostile": "import jax",  # a prefix is of names, not of letters
    }
    assert violations(allowed) == []


def test_every_rule_is_about_modules_that_exist():
    modules = source_modules()
    for prefix in FORBIDDEN:
        assert any(is_below(module, prefix) for module in modules), prefix
