"""Who may import whom: a row a room. The two sides, host and device, meet in the engine alone; kernels stand alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from paths import ROOT

#: Room -> the rooms that it may import. A room is a folder, or a module beside the folders.
ARROWS = {
    "api": (),  # what a user writes and gets
    "config": ("api",),
    "constraints": ("api",),  # what a user limits outputs to
    "step_io": ("pallas_kernels",),  # the door between the two sides
    "hub": ("api", "demo_model"),  # names of models to directories
    "text": ("api",),
    "demo_model": (),  # a checkpoint that comes with the package
    "host": ("api", "config", "step_io"),
    "device": ("api", "config", "step_io", "pallas_kernels"),
    "checkpoint": ("config", "demo_model", "device", "text"),
    "engine": ("checkpoint", "config", "device", "host", "step_io"),
    "requests": ("api", "engine", "host", "step_io", "text"),
    "tree": ("api", "config", "engine", "host", "requests", "step_io", "text"),
    "llm": ("api", "checkpoint", "config", "engine", "host", "hub", "requests", "text", "tree"),
    "looks": (),  # words and colours of figures
    "study": ("api", "config", "host", "step_io"),
    "batch": ("api", "text"),
    "trace_page": ("looks",),
    "cli": (
        "api",
        "batch",
        "checkpoint",
        "config",
        "demo_model",
        "host",
        "hub",
        "jaxpaged",
        "llm",
        "looks",
        "requests",
        "study",
        "text",
        "trace_page",
    ),
    "integrations": ("api", "llm"),  # what other systems take
    "jaxpaged": ("api", "llm", "tree"),  # __init__.py, which may be imported by all
    "__main__": ("cli",),
    "pallas_kernels": (),
}
#: The only rooms in which jax is imported; from the others it comes with the engine.
JAX_ROOMS = ("checkpoint", "device", "engine", "pallas_kernels")
JAX = ("jax", "jaxlib", "flax", "orbax")
#: What crosses the door may be what a kernel takes: so this one module has no jax.
NO_JAX = ("pallas_kernels.cascade_groups",)
#: Modules that may import less than their room: searches are what a user could have written, one module of a tree knows
#: the engine, and the door no kernel.
ONLY = {
    "jaxpaged.step_io": NO_JAX,
    "pallas_kernels.cascade_groups": (),
    "jaxpaged.tree.search": ("jaxpaged.tree.search", "jaxpaged.tree.tree"),
    "jaxpaged.tree.toy": ("jaxpaged.tree", "jaxpaged.api", "jaxpaged.config", "jaxpaged.host", "jaxpaged.text"),
    "jaxpaged.tree.tree": ("jaxpaged.tree", "jaxpaged.api", "jaxpaged.host", "jaxpaged.requests", "jaxpaged.text"),
}


def source_modules() -> dict[str, str]:
    """Dotted name -> source of every module of the two packages."""
    files = [file for package in ("jaxpaged", "pallas_kernels") for file in (ROOT / package).rglob("*.py")]
    parts = {file: file.relative_to(ROOT).with_suffix("").parts for file in files}
    return {
        ".".join(names[:-1] if names[-1] == "__init__" else names): file.read_text() for file, names in parts.items()
    }


def room_of(name: str) -> str:
    """The room of a module, or of what is imported from one; names of `jaxpaged/__init__.py` are in "jaxpaged"."""
    package, _, rest = name.partition(".")
    room = rest.partition(".")[0]
    return room if package == "jaxpaged" and room in ARROWS else package


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


def is_allowed(module: str, name: str) -> bool:
    room, other = room_of(module), room_of(name)
    if other in JAX:
        return room in JAX_ROOMS and module not in NO_JAX
    if other in ("scripts", "tests"):
        return False
    if other not in ARROWS:
        return True  # another package
    only = [allowed for prefix, allowed in ONLY.items() if is_below(module, prefix)]
    if any(not any(is_below(name, prefix) for prefix in allowed) for allowed in only):
        return False
    return other == room or other in ARROWS[room]


def violations(modules: dict[str, str]) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, source in modules.items()
        for name in sorted(set(imports(module, source)))
        if not is_allowed(module, name)
    ]


def test_no_module_imports_what_it_must_not():
    assert violations(source_modules()) == []


def test_the_table_has_the_rooms_and_arrows_that_there_are():
    modules = source_modules()
    assert {room_of(module) for module in modules} == set(ARROWS)
    drawn = {(room_of(module), room_of(name)) for module, source in modules.items() for name in imports(module, source)}
    allowed = {(room, other) for room, others in ARROWS.items() for other in others}
    assert allowed <= drawn, "arrows that nobody needs any more"
    assert all(any(is_below(module, prefix) for module in modules) for prefix in (*ONLY, *NO_JAX))


def names_of_two_classes(modules: dict[str, str]) -> dict[str, list[str]]:
    """Class names that several modules define, and which."""
    found: dict[str, list[str]] = {}
    for module, source in modules.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module)
    return {name: where for name, where in found.items() if len(where) > 1}


def test_a_class_has_a_name_of_its_own():
    assert names_of_two_classes(source_modules()) == {}


def test_two_classes_of_one_name_are_found():
    modules = {"a": "class Node: ...", "b": "def f():\n    class Node: ...", "c": "class Tree: ..."}
    assert names_of_two_classes(modules) == {"Node": ["a", "b"]}


def test_arrows_go_one_way():
    rank: dict[str, int] = {}

    def rank_of(room: str, path: tuple[str, ...] = ()) -> int:
        assert room not in path, f"a circle: {' -> '.join((*path, room))}"
        if room not in rank:
            rank[room] = 1 + max((rank_of(other, (*path, room)) for other in ARROWS[room]), default=0)
        return rank[room]

    for room in ARROWS:
        rank_of(room)


def test_what_the_docs_teach_to_import_is_exported_by_a_package():
    """No page sends a reader to a module in a room, whose name may change."""
    rooms = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("jaxpaged/**/__init__.py")}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    blocks = [block for page in pages for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)]
    taught = {name for block in blocks for name in imports("docs", block) if is_below(name, "jaxpaged")}
    assert {"jaxpaged.LLM", "jaxpaged.ToyLM", "jaxpaged.study.StepTable", "jaxpaged.tree.search.best_of_n"} <= taught
    assert [name for name in taught if name.rpartition(".")[0] not in rooms] == []


def test_every_room_says_what_it_is_for():
    rooms = [file for package in ("jaxpaged", "pallas_kernels") for file in ROOT.glob(f"{package}/**/__init__.py")]
    assert len(rooms) > 20
    assert [file for file in rooms if not ast.get_docstring(ast.parse(file.read_text()))] == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("jaxpaged.host.scheduler", "import jax.numpy as jnp"),
        ("jaxpaged.host.step.batching", "def f():\n    from jaxpaged.device import steps"),
        ("jaxpaged.host.scheduler", "from jaxpaged import engine"),
        ("jaxpaged.device.cache", "from jaxpaged.host.sequence import Sequence"),
        ("jaxpaged.step_io", "import jax"),
        ("jaxpaged.step_io", "from pallas_kernels.merge import Pieces"),
        ("pallas_kernels.cascade_groups", "import jax"),
        ("jaxpaged.host.step.cascade", "from pallas_kernels.cascade_groups import CascadeGroups"),
        ("jaxpaged.config", "from jax import Array"),
        ("jaxpaged.engine.engine", "import jaxpaged.llm"),
        ("jaxpaged.batch.run", "from jaxpaged.llm import LLM"),
        ("jaxpaged.batch.run", "from jaxpaged import LLM"),
        ("jaxpaged.tree.search.mcts", "from jaxpaged.tree.state import Node"),
        ("jaxpaged.tree.search.mcts", "from jaxpaged.llm import LLM"),
        ("jaxpaged.tree.search.mcts", "import jax"),
        ("jaxpaged.tree.tree", "from jaxpaged.engine.engine import Engine"),
        ("jaxpaged.tree.toy", "from jaxpaged.engine.engine import Engine"),
        ("jaxpaged.engine.engine", "import jaxpaged.tree.on_engine"),
        ("jaxpaged.study.simulate", "import jaxpaged.engine.loading"),
        ("jaxpaged.cli.main", "from jaxpaged.engine.loading import build_engine"),
        ("pallas_kernels.paged_decode", "from jaxpaged.step_io import NULL_PAGE"),
        ("jaxpaged.llm", "import tests.helpers"),
    ],
)
def test_a_planted_violation_is_found(module, source):
    assert len(violations({module: source})) == 1


def test_what_is_allowed_is_not_reported():
    allowed = {
        "jaxpaged.engine.engine": "from jaxpaged.device import steps\nfrom jaxpaged.host.scheduler import Scheduler",
        "jaxpaged.checkpoint.native": "from jaxpaged.device.params import param_shapes\nimport orbax.checkpoint",
        "jaxpaged.host.step.batching": "import numpy\nfrom jaxpaged.step_io import NULL_PAGE",
        "jaxpaged.tree.search.mcts": "from jaxpaged.tree.tree import Node\nfrom jaxpaged.tree.search import rollout",
        "pallas_kernels.merge": "import jaxtyping",  # a prefix is of names, not of letters
    }
    assert violations(allowed) == []
