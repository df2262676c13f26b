"""Names of the Hugging Face Hub: found in its cache, downloaded only when asked for; what is missing is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from fake_hub import COMMIT, add_to_cache, serve
from fake_llm import FakeLLM
from paths import GOLDENS, ROOT

from jaxpaged import LLM, SamplingParams
from jaxpaged.batch.model_files import FOLDERS, NAMES, SUFFIXES
from jaxpaged.cli.main import COMMANDS, main
from jaxpaged.hub import NOT_READ, PATTERNS, WEIGHT_PATTERNS, cache_folder, find_model

NAME = "someone/Tiny-0.1B"
MODEL = GOLDENS / "llama_tied"  # without a tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_name_is_the_snapshot_that_the_cache_has(cache):
    snapshot = add_to_cache(cache, NAME, MODEL)
    assert find_model(NAME) == snapshot
    llm = LLM(NAME, num_pages=10)
    with pytest.raises(ValueError, match=r"has no tokenizer.json or tokenizer.model \(download=True.*fetches it\)"):
        llm.check_request("text", SamplingParams())
    assert (llm.engine.model.vocab_size, llm.engine.params.embedding.shape[0]) == (128, 128)


def test_a_name_without_an_owner_is_one(cache):
    snapshot = add_to_cache(cache, "gpt2", MODEL)
    assert find_model("gpt2") == find_model("gpt2/") == snapshot
    (cache / "models--gpt2" / "refs" / "main").write_text("\n")  # cut off
    with pytest.raises(FileNotFoundError, match="but not its revision 'main'"):
        find_model("gpt2")


def test_the_native_format_has_its_weights_in_a_folder(cache, tmp_path):
    (tmp_path / "native" / "params").mkdir(parents=True)
    for file in ("config.json", "params/manifest.ocdbt"):
        (tmp_path / "native" / file).touch()
    snapshot = add_to_cache(cache, NAME, tmp_path / "native")
    assert find_model(NAME) == snapshot


def test_a_path_that_is_there_goes_before_a_name(cache, tmp_path):
    add_to_cache(cache, NAME, MODEL)
    (tmp_path / NAME).mkdir(parents=True)
    assert find_model(NAME) == NAME
    with pytest.raises(ValueError, match="has no config.json"):
        LLM(NAME)
    with pytest.raises(ValueError, match=f"revision='main' is of a model of the .*Hub, and {NAME} is a path"):
        find_model(NAME, revision="main")


def test_a_revision_is_a_branch_a_tag_or_a_commit(cache):
    main_one = add_to_cache(cache, NAME, MODEL)
    other = add_to_cache(cache, NAME, MODEL, "v1.0", "f" * 40)
    assert find_model(NAME) == find_model(NAME, revision=COMMIT) == main_one
    assert find_model(NAME, revision="v1.0") == other
    with pytest.raises(FileNotFoundError, match=r"but not its revision 'v2' \(it has main, v1.0; looked for .*v2\)"):
        find_model(NAME, revision="v2")
    for wrong in ("", "../main", "a b", 3):
        with pytest.raises(ValueError, match="revision must be a branch, a tag or a commit"):
            find_model(NAME, revision=wrong)


def test_what_is_nowhere_is_said_with_the_places(cache, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        LLM(NAME)
    for part in (f"{NAME} does not exist: give the directory", f"There is no {tmp_path / NAME}", str(cache),
                 "has no models--someone--Tiny-0.1B", "download=True, on the command line --download"):  # fmt: skip
        assert part in str(error.value)


def test_a_snapshot_with_files_missing_is_said_with_their_names(cache):
    snapshot = add_to_cache(cache, NAME, MODEL)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="in the Hugging Face cache, but without model.safetensors .*--down"):
        LLM(NAME)
    assert find_model(NAME, needs_weights=False) == snapshot
    assert "llama" in LLM.describe(NAME)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-2.safetensors").symlink_to("lost")
    with pytest.raises(FileNotFoundError, match="without model-1.safetensors, model-2.safetensors "):
        find_model(NAME)
    (snapshot / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="without config.json "):
        find_model(NAME, needs_weights=False)


def test_weights_that_cannot_be_read_are_left_to_loading(cache):
    snapshot = add_to_cache(cache, NAME, MODEL)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="a pickle, which jaxpaged does not read"):
        LLM(NAME)


@pytest.mark.parametrize(
    "variables, folder",
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, "/home/x/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(variables, folder, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/x", **variables}.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == folder


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"simulate"}))
def test_every_command_with_a_model_takes_a_name(command, cache, capfd):
    """What it needs besides is nothing that a wrong name needs to be found out."""
    more = {"generate": ["--prompt", "a"], "beams": ["--prompt", "a"], "trace": ["--prompt", "a", "--html", "x.html"]}
    more |= {"convert": ["new"]}
    assert main([command, NAME, *more.get(command, []), "--revision", "v1"]) == 2
    line = capfd.readouterr().err
    assert line.startswith(f"jaxpaged: {NAME} does not exist: ") and "--download" in line and line.count("\n") == 1


def test_a_command_runs_a_name_and_knows_its_own_results_again(cache, capfd):
    add_to_cache(cache, NAME, MODEL)
    arguments = ["generate", NAME, "--input", "in.jsonl", "--output", "out.jsonl"]
    Path("in.jsonl").write_text('{"prompt": "a"}\n')
    assert main(arguments, make_llm=FakeLLM) == 0
    assert main(arguments, make_llm=FakeLLM) == 0
    assert "out.jsonl has 1 of 1 lines already" in capfd.readouterr().err


def find_in_process(variables: dict[str, str], **arguments) -> subprocess.CompletedProcess[str]:
    """huggingface_hub reads its variables when it is imported."""
    script = f"from jaxpaged.hub import find_model; print(find_model({NAME!r}, **{arguments!r}))"
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_what_the_cache_lacks_is_downloaded_when_that_is_asked_for(cache, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "pytorch_model.bin"):
        (source / name).write_text(f'{{"file": "{name}"}}')
    with serve(NAME, source) as (address, fetched):
        done = find_in_process({"HF_ENDPOINT": address}, download=True)
        assert done.stdout.strip() == str(cache / "models--someone--Tiny-0.1B" / "snapshots" / COMMIT), done.stderr
        assert sorted(fetched) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert find_model(NAME) == find_model(NAME, revision=COMMIT)


def test_a_download_that_fails_says_so_or_takes_what_there_is(cache):
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    failed = find_in_process(nobody, download=True)
    assert f"FileNotFoundError: {NAME} could not be downloaded from the Hugging Face Hub to {cache}" in failed.stderr
    snapshot = add_to_cache(cache, NAME, MODEL)
    taken = find_in_process({"HF_HUB_OFFLINE": "1"}, download=True)
    assert taken.stdout.strip() == str(snapshot), taken.stderr


def test_what_is_downloaded_is_what_loading_reads():
    patterns = (*PATTERNS, *WEIGHT_PATTERNS)
    read = [*NAMES, *(f"x{suffix}" for suffix in SUFFIXES), *(f"{folder}/x" for folder in FOLDERS)]
    assert [name for name in read if not any(fnmatch(name, pattern) for pattern in patterns)] == []
    assert [name for name in read if any(fnmatch(name, pattern) for pattern in NOT_READ)] == []
