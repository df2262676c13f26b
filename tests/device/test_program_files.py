"""Compiled programs in files: what is damaged is gone, what is old makes room, what cannot be used costs a warning."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from paths import ROOT
from toy import save_small_model

from jaxpaged.device import program_files as module
from jaxpaged.device.program_files import (
    UNFINISHED,
    ProgramFiles,
    cache_root,
    keep_programs,
    kept_programs,
    program_files,
    program_folder,
    recall,
    remember,
)

SET_HERE = ("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_enable_xla_caches")
ONE, OTHER = b"a program" * 100, b"another one" * 100


@pytest.fixture
def files(tmp_path):
    return ProgramFiles(tmp_path)


@pytest.fixture
def untold():
    """JAX as if nobody had told it where to keep programs, until the test is over."""
    names = ("dir", "max_size")
    before = {f"jax_compilation_cache_{name}": getattr(jax.config, f"jax_compilation_cache_{name}") for name in names}
    before |= {name: getattr(jax.config, name) for name in SET_HERE}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_what_one_process_has_put_there_another_finds(files):
    files.put("key", ONE)
    assert ProgramFiles(files.path).get("key") == ONE
    assert ProgramFiles(files.path).get("other key") is None
    assert os.listdir(files.path) == ["key"]


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:10], lambda b: b[:-1], lambda b: b[:50] + b"x" + b[51:]]
)
def test_a_damaged_file_is_as_if_it_were_not_there_and_is_written_anew(files, damage):
    files.put("key", ONE)
    file = files.path / "key"
    file.write_bytes(damage(file.read_bytes()))
    assert files.get("key") is None
    files.put("key", OTHER)
    assert files.get("key") == OTHER


def test_the_programs_not_used_for_longest_make_room(tmp_path):
    files = ProgramFiles(tmp_path, max_bytes=3 * 1100)
    for age, key in enumerate(("first", "second", "third")):
        files.put(key, bytes(1000))
        os.utime(tmp_path / key, (age, age))
    assert files.get("first") is not None  # and so it is the latest now
    files.put("fourth", bytes(1000))
    assert sorted(os.listdir(tmp_path)) == ["first", "fourth", "third"]
    files.put("too large", bytes(4000))
    assert sorted(os.listdir(tmp_path)) == ["first", "fourth", "third"]


def test_what_a_stopped_process_left_unfinished_goes_and_what_is_being_written_stays(files):
    for name, began in (("old", 0.0), ("new", time.time())):
        (files.path / (UNFINISHED + name)).write_bytes(b"half")
        os.utime(files.path / (UNFINISHED + name), (began, began))
    files.put("key", ONE)
    assert sorted(os.listdir(files.path)) == [UNFINISHED + "new", "key"]


def test_a_full_disk_costs_one_warning_and_leaves_nothing_behind(files, monkeypatch, caplog, untold):
    def full(*_):
        raise OSError(28, "No space left on device")

    files.put("key", ONE)
    monkeypatch.setattr(module.os, "replace", full)
    files.put("second", ONE)
    files.put("third", ONE)
    (warning,) = warnings(caplog)
    assert "cannot be written in" in warning and "No space left on device" in warning
    assert os.listdir(files.path) == ["key"] and files.get("key") == ONE


def test_a_program_that_jax_got_and_compiled_all_the_same_is_the_last_that_it_gets(files, caplog):
    files.put("key", ONE)
    assert files.get("key") == ONE
    files.put("key", ONE)
    assert files.get("key") is None
    assert len(warnings(caplog)) == 1 and "cannot be loaded on this machine" in warnings(caplog)[0]


def test_the_folder_is_the_one_named_or_of_the_users_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXPAGED_CACHE_DIR", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_root() == tmp_path / "named"
    monkeypatch.delenv("JAXPAGED_CACHE_DIR")
    assert cache_root() == tmp_path / "caches" / "jaxpaged"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "jaxpaged"
    monkeypatch.setenv("JAXPAGED_CACHE_DIR", "")
    assert cache_root() is None and program_folder() is None


def test_machines_with_other_cpus_have_other_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXPAGED_CACHE_DIR", str(tmp_path))
    here = program_folder()
    monkeypatch.setattr(module.platform, "machine", lambda: "another")
    assert program_folder() != here


def spoil_by_a_file(root):
    root.write_text("a file where the folder should be")


def spoil_by_other_writers(root):
    program_folder().mkdir(parents=True)
    program_folder().chmod(0o777)


@pytest.mark.parametrize("spoil", [spoil_by_a_file, spoil_by_other_writers])
def test_a_folder_that_is_not_ours_to_write_in_costs_one_warning(spoil, monkeypatch, tmp_path, caplog, untold):
    monkeypatch.setenv("JAXPAGED_CACHE_DIR", str(tmp_path / "root"))
    spoil(tmp_path / "root")
    keep_programs()
    (warning,) = warnings(caplog)
    assert f"cannot be kept in {program_folder()}" in warning and program_files() is None


def test_files_are_put_in_place_once_and_taken_away_when_they_are_not_wanted(monkeypatch, tmp_path, untold):
    monkeypatch.setenv("JAXPAGED_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    keep_programs()
    files = program_files()
    assert files is not None and files.path == program_folder()
    keep_programs()
    assert program_files() is files
    assert float(jax.jit(lambda x: x * 3 + 1)(2.0)) == 7 and kept_programs()[1] > 1000
    keep_programs(False)
    assert program_files() is kept_programs() is None


def test_a_number_is_there_for_later_processes_with_the_same_code(monkeypatch, tmp_path, untold):
    monkeypatch.setenv("JAXPAGED_CACHE_DIR", str(tmp_path))
    remember("what", 3)
    assert recall("what") is None  # without files
    keep_programs()
    remember("what", 4)
    remember("what", 5)
    assert (recall("what"), recall("what else")) == (5, None)
    monkeypatch.setattr(module, "code_digest", lambda: "other code")
    assert recall("what") is None


def test_a_folder_that_the_program_gave_jax_itself_stands(monkeypatch, tmp_path, untold):
    monkeypatch.setenv("JAXPAGED_CACHE_DIR", str(tmp_path / "unused"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    keep_programs()
    keep_programs(False)
    assert program_files() is None and jax.config.jax_compilation_cache_dir == str(tmp_path / "told")
    assert not (tmp_path / "unused").exists()


def test_the_bound_is_the_one_that_jax_was_told_if_it_was(monkeypatch, tmp_path, untold):
    monkeypatch.setenv("JAXPAGED_CACHE_DIR", str(tmp_path))
    jax.config.update("jax_compilation_cache_max_size", 12345)
    keep_programs()
    assert program_files().max_bytes == 12345


def test_a_folder_of_another_user_is_not_read(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("JAXPAGED_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module.os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="and this is user 12345"):
        module._prepare(program_folder())


#: A run of a small model in a process of its own, and what it compiled and read, in all and for its steps.
PROGRAM = """
import jax, sys
made = {"lowered": 0, "compiled": 0, "read": 0}
def note(event, *args, **kwargs):
    made["lowered"] += event == "/jax/core/compile/jaxpr_to_mlir_module_duration"
    made["compiled"] += event == "/jax/core/compile/backend_compile_duration"
    made["read"] += event == "/jax/compilation_cache/cache_hits"
jax.monitoring.register_event_duration_secs_listener(note)
jax.monitoring.register_event_listener(note)
from jaxpaged import LLM, SamplingParams
llm = LLM(sys.argv[2], num_pages=40, max_model_len=64, **eval(sys.argv[1]))
(output,) = llm.generate(["def f"], SamplingParams(temperature=0, max_tokens=3), progress=False)
run = llm.last_run
print(made["lowered"], made["compiled"] - made["read"], made["read"])
print(run.compilations, run.programs_read, output.outputs[0].token_ids)
"""


class Process:
    """The program above, begun; `counts` waits for it."""

    def __init__(self, folder, model, options: str = "{}"):
        told = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(told)}
        env = {**kept, "PYTHONPATH": str(ROOT), "JAXPAGED_CACHE_DIR": str(folder)}
        arguments = [sys.executable, "-c", PROGRAM, options, str(model)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(arguments, env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    def result(self) -> tuple[list[int], str, str]:
        """Programs lowered, compiled and read as JAX counts them, and compiled and read as the run does; the tokens;
        what is on standard error."""
        out, err = self._process.communicate()
        assert self._process.returncode == 0, err
        *counts, tokens = out.split(maxsplit=5)
        return list(map(int, counts)), tokens, err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def filled(tmp_path_factory, model):
    """A folder that two processes at once have filled, and what they said."""
    folder = tmp_path_factory.mktemp("programs")
    both = [Process(folder, model), Process(folder, model)]
    return folder, [process.result() for process in both]


def test_two_processes_at_once_fill_one_folder(filled):
    folder, (first, second) = filled
    assert first[1] == second[1] and first[2] == second[2] == ""
    assert not list(folder.rglob(UNFINISHED + "*"))


def test_a_second_process_compiles_nothing_and_does_not_even_trace_its_steps(filled, model):
    folder, (first, _) = filled
    (lowered, compiled, read, in_run, read_in_run), tokens, err = Process(folder, model).result()
    assert compiled == in_run == 0
    assert read_in_run == 2  # a prefill step and a decode step
    assert lowered == read == first[0][0] - 2 and (tokens, err) == first[1:]


@pytest.mark.slow
def test_damaged_programs_are_compiled_anew_once(filled, model):
    folder, (first, _) = filled
    for file in folder.rglob("step-*"):
        file.write_bytes(file.read_bytes()[:-100])
    (_, compiled, _, in_run, read_in_run), tokens, err = Process(folder, model).result()
    assert compiled == in_run == 2 and read_in_run == 0 and (tokens, err) == first[1:]
    assert Process(folder, model).result()[0][1] == 0


@pytest.mark.slow
def test_without_files_the_run_goes_on_and_says_why_only_if_it_was_to_have_some(filled, model, tmp_path):
    _, (first, _) = filled
    spoil_by_a_file(tmp_path / "file")
    refused, off = (
        Process(tmp_path / "file", model),
        Process(tmp_path / "unused", model, "dict(compilation_cache=False)"),
    )
    _, tokens, err = refused.result()
    assert tokens == first[1] and err.count("cannot be kept in") == len(err.splitlines()) == 1
    assert off.result()[1:] == first[1:] and not (tmp_path / "unused").exists()
