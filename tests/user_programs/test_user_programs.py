"""A type checker takes the program of a user for what it is, from the sources and from the wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

from jaxpaged import __version__

HERE = Path(__file__).parent
PACKAGES = ("jaxpaged", "pallas_kernels")
#: With PYTHONPATH, the sources would be found before what is installed.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def found_errors(directory: Path, python: str | Path, extra_paths: list[str]) -> dict[str, list[int]]:
    """File -> lines of the programs in which the type checker finds an error, as a user's project sees them."""
    for program in ("user_program.py", "mistakes.py"):
        shutil.copy(HERE / program, directory)
    config = {"typeCheckingMode": "standard", "pythonVersion": "3.11", "extraPaths": extra_paths}
    (directory / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--project", directory, "--pythonpath", python]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    report = json.loads(ran.stdout)
    assert report["summary"]["filesAnalyzed"] == 2
    lines: dict[str, list[int]] = {}
    for error in report["generalDiagnostics"]:
        lines.setdefault(Path(error["file"]).name, []).append(error["range"]["start"]["line"] + 1)
    return lines


def mistakes() -> dict[str, list[int]]:
    lines = (HERE / "mistakes.py").read_text().splitlines()
    return {"mistakes.py": [i for i, line in enumerate(lines, 1) if "# mistake: " in line]}


def test_types_say_which_line_of_a_user_is_wrong(tmp_path):
    assert found_errors(tmp_path, sys.executable, [str(ROOT)]) == mistakes()


def fresh_environment(directory: Path) -> tuple[Path, Path]:
    """An environment with what the running one has but jaxpaged: its python, and its folder of packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return directory / "bin" / "python", packages


def files_of(directory: Path) -> set[Path]:
    files = [file for package in PACKAGES for file in (directory / package).rglob("*") if file.is_file()]
    return {file.relative_to(directory) for file in files}


@pytest.mark.slow
def test_the_wheel_is_whole_runs_alone_and_is_typed(tmp_path):
    """Built of a copy, as builds leave files behind; needs a package index, for setuptools."""
    source = tmp_path / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source], check=True)
    python, packages = fresh_environment(tmp_path / "environment")
    with zipfile.ZipFile(tmp_path / f"jaxpaged-{__version__}-py3-none-any.whl") as wheel:
        wheel.extractall(packages)

    assert files_of(packages) == files_of(source)
    for arguments in (["--version"], ["trace", "--example", "beam-search", "--html", "pool.html"]):
        subprocess.run([python, "-I", "-m", "jaxpaged", *arguments], cwd=tmp_path, check=True, capture_output=True)
    assert "<html" in (tmp_path / "pool.html").read_text(encoding="utf-8")
    (tmp_path / "program").mkdir()
    assert found_errors(tmp_path / "program", python, []) == mistakes()
