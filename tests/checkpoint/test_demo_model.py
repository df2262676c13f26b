"""The model that comes with the package: its name, and that a wheel has it."""

from __future__ import annotations

import json
import tomllib
import zlib
from pathlib import Path

import numpy as np
import pytest
import repack
from paths import BUNDLED, ROOT

from jaxpaged import demo_model
from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.checkpoint.native import _open_tensors
from jaxpaged.cli.main import main
from jaxpaged.hub import find_model


def files_below(folder):
    return sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", ["demo", Path("demo")])
def test_its_name_is_known_in_any_folder(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(name).directory == find_model(name) == BUNDLED


def test_it_has_no_revisions(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="revision='main' is of a model of the Hugging Face Hub"):
        find_model("demo", revision="main")


def test_a_folder_of_that_name_hides_it_only_as_a_checkpoint(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert demo_model.find_model("demo") == BUNDLED
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert demo_model.find_model("demo") == "demo"
    assert demo_model.find_model("./demo") == "./demo" and demo_model.find_model("demos") == "demos"


def test_commands_know_the_name_and_keep_outputs_off_its_files(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["info", "demo"]) == 0
    assert "5,475,584" in capsys.readouterr().out
    assert main(["generate", "demo", "--prompt", "a", "--output", str(BUNDLED / "config.json")]) == 2
    assert "is, or would be taken for, a file of MODEL" in capsys.readouterr().err


def test_an_unknown_name_says_which_model_is_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist.*or 'demo', the model"):
        open_checkpoint("nowhere")


def test_a_wheel_has_all_of_it_in_8_megabytes():
    """As setuptools reads pyproject.toml: patterns of files below the package."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / "jaxpaged" / "demo_model"
    patterns = settings["package-data"]["jaxpaged.demo_model"]
    packed = {file for pattern in patterns for file in package.glob(pattern + "/*")}
    assert {file for file in packed if file.is_file()} == {BUNDLED / name for name in files_below(BUNDLED)}
    assert sum((BUNDLED / name).stat().st_size for name in files_below(BUNDLED)) < 8_000_000


def test_it_is_in_the_repository_once():
    assert (ROOT / "checkpoints" / "tiny-python").resolve() == BUNDLED


@pytest.mark.slow
def test_packing_again_changes_no_bit(tmp_path):
    assert repack.main([str(BUNDLED), str(tmp_path / "again")]) == 0
    tensors = _open_tensors(tmp_path / "again" / "params")
    crcs = {name: zlib.crc32(np.ascontiguousarray(tensor.read().result()).view(np.uint8).reshape(-1))
            for name, tensor in tensors.items()}  # fmt: skip
    stored = json.loads((BUNDLED / "checksums.json").read_text())["tensors"]
    assert {name: f"bfloat16 {crc:08x}" for name, crc in crcs.items()} == stored
    assert len(files_below(tmp_path / "again")) == len(files_below(BUNDLED))
