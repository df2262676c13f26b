"""What a command cannot write in the end it refuses before it begins, and nothing that it names is harmed by that."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from fake_llm import FakeLLM

from jaxpaged.batch.model_files import model_identity
from jaxpaged.cli.main import main
from jaxpaged.cli.output_files import check_new_folder, check_outputs


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a model and a file, and the current one."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "model" / "params").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("missing/file")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "path, words",
    [
        ("model", "--output model is a directory: name a file in it"),
        ("", r"--output \. is a directory"),
        ("missing/file", "missing is not a directory: create it, or choose another file"),
        ("file/file", "file is not a directory"),
        ("nowhere", "/missing is not a directory: create it"),  # where the link leads
        ("x" * 300 + "/file", "x is not a directory"),
        ("x" * 300, "cannot be written: File name too long"),
        ("loop", "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_named(path, words, place):
    before = sorted(os.listdir())
    with pytest.raises(ValueError, match=words):
        check_outputs({"--output": path})
    assert sorted(os.listdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_may_not_be_written_is_named(place):
    (place / "file").chmod(0o400)
    (place / "model").chmod(0o500)
    for path in ("file", "model/new"):
        with pytest.raises(ValueError, match="cannot be written: Permission denied"):
            check_outputs({"--output": path})
    with pytest.raises(ValueError, match="nothing can be written to model"):
        check_new_folder(place / "model" / "a" / "b", "--plot")


def test_looking_leaves_nothing_behind_and_changes_nothing(place):
    before = sorted(os.listdir())
    check_outputs({"--output": "file", "--account": "new.csv", "--json": "/dev/null", "--html": None})
    check_new_folder(place / "a" / "b", "--plot")
    assert sorted(os.listdir()) == before
    assert (place / "file").read_text() == "kept"


def test_no_output_is_another_or_the_input(place):
    (place / "link").symlink_to("file")
    os.link("file", "second")
    for other in ("./file", "link", "second"):
        with pytest.raises(ValueError, match="is also the input"):
            check_outputs({"--output": other}, {"input": "file"})
    for other in ("./new", place / "new"):
        with pytest.raises(ValueError, match="--output and --account both name .*new: give two files"):
            check_outputs({"--output": "new", "--account": other})


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "other.safetensors", "tokenizer.model", "params/x", "generation_config.json"],
)
def test_no_output_is_a_file_of_the_model(name, place):
    (place / "link").symlink_to("model")
    for folder in ("model", "link"):
        with pytest.raises(ValueError, match="is, or would be taken for, a file of MODEL"):
            check_outputs({"--output": f"{folder}/{name}"}, models={"MODEL": "model"})
    check_outputs({"--output": "model/out.jsonl", "--account": "model/account.json"}, models={"MODEL": "model"})


def test_files_that_an_index_names_are_of_the_model_whatever_they_are_called(place):
    (place / "model" / "weights").write_text("{}")
    before = model_identity("model")
    (place / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "weights"}}')
    with_index = model_identity("model")
    (place / "model" / "weights").write_text("[]")
    assert len({before, with_index, model_identity("model")}) == 3


def test_what_is_written_beside_a_model_does_not_change_it(place):
    before = model_identity("model")
    for name in ("out.txt", "account.csv", "account.json", "pool.html", "tree.png", "results"):
        (place / "model" / name).write_text("{}")
    (place / "model" / "plots").mkdir()
    (place / "model" / "plots" / "memory.png").touch()
    assert model_identity("model") == before
    (place / "model" / "params" / "d").write_text("tensors")
    assert model_identity("model") != before


def run(*arguments):
    return main([str(argument) for argument in arguments], make_llm=FakeLLM)


def test_a_run_with_its_outputs_in_the_models_directory_goes_on(place, capfd):
    arguments = ["generate", "model", "--input", "model/in.txt", "--output", "model/out.json"]
    (place / "model" / "in.txt").write_text("one\ntwo\n")
    assert run(*arguments) == 0
    (place / "model" / "in.txt").write_text("one\ntwo\nthree\n")
    assert run(*arguments) == 0
    rows = [json.loads(line) for line in (place / "model" / "out.json").read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == ["one", "three", "two"]
    assert "model/out.json has 2 of 3 lines already" in capfd.readouterr().err


TOO_LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "model", "--prompt", "a", "--output", TOO_LONG],
        ["generate", "model", "--prompt", "a", "--output", "model/config.json", "--overwrite"],
        ["generate", "model", "--input", "file", "--output", "new", "--account", "new"],
        ["generate", "model", "--prompt", "a", "--output", "o", "--account", "model/tokenizer.json"],
        ["generate", "model", "--prompt", "a", "--output", "o", "--account", TOO_LONG + ".csv"],
        ["generate", "model", "--prompt", "a", "--output", "o", "--account", "account.txt"],
        ["generate", "model", "--input", "file.csv", "--output", "o", "--account", "file.csv"],
        ["trace", "model", "--prompt", "a", "--html", TOO_LONG],
        ["trace", "model", "--prompt", "a", "--html", "a", "--json", "model/config.json"],
        ["beams", "model", "--prompt", "a", "--plot", TOO_LONG + ".png"],
        ["compare", "model", "--json", TOO_LONG],
        ["compare", "model", "--json", "model/config.json"],
        ["compare", "model", "--plot", "file/plots"],
        ["simulate", "--kv-cache", "paged", "--account", TOO_LONG + ".csv"],
        ["convert", "model", "file/new"],
    ],
)
def test_every_command_looks_before_it_loads_anything(arguments, place, capfd):
    (place / "file.csv").write_text("a\n")
    before = {name: (place / name).read_bytes() for name in os.listdir() if os.path.isfile(name)}
    assert main(arguments, make_llm=lambda **_: pytest.fail("loaded")) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert {name: (place / name).read_bytes() for name in os.listdir() if os.path.isfile(name)} == before
    assert (place / "model" / "config.json").read_text() == "{}"


def test_a_model_may_lie_where_nothing_can_be_written(place):
    shutil.copytree("model", "elsewhere")
    (place / "elsewhere").chmod(0o500)
    check_outputs({"--output": "new"}, models={"MODEL": "elsewhere"})
