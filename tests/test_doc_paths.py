"""What documents, docstrings and comments name is there: files by the end of their path, modules by their dotted name.

All of it is read as text, so nothing is imported, and jax stays out.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from test_import_boundaries import ARROWS

PACKAGES = ("jaxpaged", "pallas_kernels")
FOLDERS = (*PACKAGES, "scripts", "tests", "docs", "checkpoints")
#: CHANGELOG.md is not here: it names what is gone.
DOCUMENTS = sorted(
    file for pattern in ("README.md", "docs/*.md", "jaxpaged/demo_model/*/README.md", "scripts/*/README.md")
    for file in ROOT.glob(pattern)
)  # fmt: skip
SOURCES = sorted(file for folder in FOLDERS[:4] for file in (ROOT / folder).rglob("*.py"))

#: A file of source by its name, after any of the folders that it is in; a `*` stands for letters of one name.
SOURCE_PATH = re.compile(r"(?<![\w.*/<-])((?:[\w*-]+/)*[\w*-]+\.py)\b(?!\.?\w)")
#: Files and folders below one of ours.
PATH_BELOW = re.compile(rf"(?<![\w.*/<-])((?:{'|'.join(FOLDERS)})/[\w*./-]*[\w*])")
DOTTED_NAME = re.compile(rf"(?<![\w./-])((?:{'|'.join(PACKAGES)})(?:\.[a-zA-Z_]\w*)+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
ADDRESS = re.compile(r"https?://\S+")


@functools.cache
def paths() -> tuple[str, ...]:
    """Of every file and folder, from the root, with a slash before it."""
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return tuple(f"/{path.relative_to(ROOT)}" for path in [*ROOT.iterdir(), *below])


@functools.cache
def path_exists(name: str) -> bool:
    """Whether a path ends so, in whichever folder."""
    ending = re.compile("/" + re.escape(name.rstrip("/")).replace(r"\*", "[^/]*") + "$")
    return any(map(ending.search, paths()))


@functools.cache
def names_in(module: Path) -> frozenset[str]:
    """What a module defines or imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return frozenset(names)


@functools.cache
def dotted_name_exists(name: str) -> bool:
    """Whether it is a package or module, or one and what stands in it."""
    path, rest = ROOT, name.split(".")
    while rest and (path / rest[0]).is_dir():
        path, rest = path / rest[0], rest[1:]
    if rest and (path / f"{rest[0]}.py").is_file():
        path, rest = path / f"{rest[0]}.py", rest[1:]
    if not rest:
        return True
    module = path / "__init__.py" if path.is_dir() else path
    return module.is_file() and rest[0] in names_in(module)


def missing(text: str) -> list[str]:
    """What a text names that is not there."""
    text = ADDRESS.sub("", text)
    named = {*SOURCE_PATH.findall(text), *PATH_BELOW.findall(text)}
    absent = [name for name in sorted(named) if not path_exists(name)]
    return absent + sorted({name for name in DOTTED_NAME.findall(text) if not dotted_name_exists(name)})


def mapped_files(tree: str) -> list[str]:
    """Files of a drawn tree, each with the folders that its line is indented below."""
    files, folders = [], []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        if (first := line.split()[0]).endswith("/"):
            folders.append((indent, first))
        files += ["".join(name for _, name in folders) + file for file in re.findall(r"[\w*]+\.py\b", line)]
    return files


def prose_of(source: str) -> Iterator[str]:
    """Docstrings and comments of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if ADDRESS.match(link):
            continue
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_document_names_only_what_is_there(page):
    assert missing(page.read_text()) == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file_or_a_heading(page):
    assert broken_links(page) == []


def test_docstrings_and_comments_name_only_what_is_there():
    stale = {str(file.relative_to(ROOT)): missing("\n".join(prose_of(file.read_text()))) for file in SOURCES}
    assert {file: names for file, names in stale.items() if names} == {}


@pytest.mark.parametrize(
    "text, absent",
    [
        ("see scripts/gone.py and gone.py", ["gone.py", "scripts/gone.py"]),
        ("host/gone/batching.py", ["host/gone/batching.py"]),
        ("`jaxpaged.gone` and jaxpaged.tree.search.Gone", ["jaxpaged.gone", "jaxpaged.tree.search.Gone"]),
        ("batching.py, step/batching.py, jaxpaged/host/step/batching.py, decode_*.py", []),
        ("`jaxpaged.tree.search.best_of_n`, jaxpaged.host.scheduler.Scheduler.schedule, jaxpaged.LLM", []),
        ("https://example.org/gone.py", []),
    ],
)
def test_what_is_gone_is_found_and_what_is_there_is_not(text, absent):
    assert missing(text) == absent


def section(heading: str) -> str:
    return (ROOT / "docs" / "architecture.md").read_text().split(f" {heading}\n")[1].split("\n## ")[0]


def test_every_module_is_on_the_map_in_its_room():
    mapped = mapped_files(section("Rooms").split("```")[1].strip("\n"))
    modules = [str(file.relative_to(ROOT)) for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    rooms = [name for name in modules if name.endswith("/__init__.py")]
    off_the_map = [name for name in modules if not any(fnmatch.fnmatchcase(name, pattern) for pattern in mapped)]
    assert sorted(set(off_the_map) - set(rooms)) == []
    assert [pattern for pattern in mapped if not fnmatch.filter(paths(), f"/{pattern}")] == []


def test_a_drawn_tree_is_read_by_its_indents():
    tree = "a/    what\n  b/   c\n    d.py  e_*.py    words\n  f.py   words\ng.py"
    assert mapped_files(tree) == ["a/b/d.py", "a/b/e_*.py", "a/f.py", "g.py"]


def test_the_arrows_of_the_page_are_those_that_are_held():
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section("Arrows"), re.MULTILINE)
    assert {room: tuple(re.findall(r"`(\w+)`", others)) for room, others in rows} == ARROWS
