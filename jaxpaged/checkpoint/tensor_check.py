"""Tells a person which tensors of a checkpoint do not fit its configuration, before any of them is loaded."""

from __future__ import annotations

from collections.abc import Mapping

Shape = tuple[int, ...]
NAMES_SHOWN = 8  # a wrong configuration can misfit hundreds of tensors; the first few say which mistake it is


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Raise ValueError naming every kind of misfit: tensors that are missing, unexpected, or of another shape."""
    missing = [f"{name} {list(expected[name])}" for name in expected if name not in found]
    extra = [f"{name} {list(found[name])}" for name in found if name not in expected]
    wrong = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(lines)} {kind}: {_shorten(lines)}"
        for kind, lines in (("missing", missing), ("unexpected", extra), ("of another shape", wrong))
        if lines
    ]
    if problems:
        raise ValueError(f"the tensors in {where} do not fit its config.json; {'; '.join(problems)}")


def _shorten(lines: list[str]) -> str:
    more = f" and {len(lines) - NAMES_SHOWN} more" if len(lines) > NAMES_SHOWN else ""
    return ", ".join(lines[:NAMES_SHOWN]) + more
