"""The bundled checkpoint can be made again: a short run learns, resumes, exports, and the tokenizer is lossless."""

import json
import shutil
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpaged.config import ModelConfig

STDLIB = Path(sysconfig.get_path("stdlib"))
FILES = (
    "abc.py",
    "argparse.py",
    "ast.py",
    "bisect.py",
    "copy.py",
    "heapq.py",
    "cgitb.py",
    "functools.py",
    "graphlib.py",
)
FLAGS = (
    "--hidden-size=64", "--num-layers=1", "--vocab-size=600", "--batch-size=4", "--seq-len=64", "--final-seq-len=128",
    "--warmup=5", "--log-every=5", "--snapshot-every=20",
)  # fmt: skip


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax mixes dtypes, which conftest.py forbids our own code."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def train_tiny():
    pytest.importorskip("optax")
    import train_tiny

    return train_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for name in FILES:
        if (STDLIB / name).is_file():  # cgitb left in Python 3.13
            shutil.copyfile(STDLIB / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def tokenizer(train_tiny, source, tmp_path_factory):
    train_files, _ = train_tiny.split_sources(train_tiny.find_sources(source))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tiny.train_tokenizer(train_files.values(), vocab_size=600))
    return train_tiny.load_tokenizer(path)


def test_tokenizer_gives_back_every_character(tokenizer, source):
    texts = [path.read_text() for path in source.glob("*.py")]
    texts += ["", " ", "\n", "\n\n  x  =\t1  \n", "    \n\tif x:\r\n", "é ☃ 😀\n", "   leading and trailing   "]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_makes_an_indentation_one_piece(tokenizer):
    pieces = tokenizer.encode("\n        return", out_type=str)
    assert pieces[:2] == ["\n", "\u2581" * 8]


def test_split_depends_on_the_name_alone(train_tiny):
    train, held_out = train_tiny.split_sources({"functools.py": "", "graphlib.py": "", "argparse.py": "", "abc.py": ""})
    assert (sorted(train), sorted(held_out)) == (["abc.py", "argparse.py"], ["functools.py", "graphlib.py"])


def test_tests_are_learnt_from_and_never_held_out(train_tiny):
    train, held_out = train_tiny.split_sources({"functools.py": "", "test/functools.py": ""})
    assert (sorted(train), sorted(held_out)) == (["test/functools.py"], ["functools.py"])


def test_sources_leave_out_installed_packages_and_files_that_are_not_utf8(train_tiny, tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "b.py").write_text("b = 1\n")
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "c.py").write_bytes(b"# -*- coding: latin-1 -*-\nc = '\xe9'\n")
    assert train_tiny.find_sources(tmp_path) == {"a.py": "a = 1\n"}


def test_a_quarter_of_the_windows_looks_like_a_prompt(train_tiny, tokenizer, source):
    stream = train_tiny.encode_files(tokenizer, train_tiny.find_sources(source))
    top_level = train_tiny.find_top_level(tokenizer, stream)
    windows = train_tiny.sample_windows(stream, top_level, rows=8, length=32, seed=(0, 0))
    assert windows.shape == (8, 33)
    assert (windows[:2, 0] == train_tiny.BOS).all()
    for window in windows[:2]:
        assert not tokenizer.decode(window.tolist())[0].isspace()
    again = train_tiny.sample_windows(stream, top_level, rows=8, length=32, seed=(0, 0))
    np.testing.assert_array_equal(windows, again)


def test_learning_rate_warms_up_and_falls_to_zero(train_tiny):
    rates = [train_tiny.learning_rate(1.0, step, progress=step / 10, warmup=2) for step in (0, 1, 5, 10)]
    assert rates == [0.5, 0.9, 0.5, 0.0]


@pytest.mark.slow
def test_a_run_learns_resumes_and_exports(train_tiny, source, tmp_path):
    places = ["--source", str(source), "--output", str(tmp_path / "out"), "--work-dir", str(tmp_path / "work")]
    assert train_tiny.main([*places, *FLAGS, "--steps=40"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 1
    result = lines[-1]
    assert (result["steps"], result["tokens_seen"]) == (40, 40 * 4 * 64)
    assert 0 < result["held_out_nats_per_token"] < np.log(600)

    values = json.loads((tmp_path / "out" / "config.json").read_text())
    config = {name: values[name] for name in ModelConfig.__dataclass_fields__}
    assert ModelConfig.from_dict(config).eos_token_ids == (train_tiny.EOS,)
    assert train_tiny.load_tokenizer(tmp_path / "out" / "tokenizer.model").vocab_size() == 600

    with pytest.raises(SystemExit, match="already holds a checkpoint"):
        train_tiny.main([*places, *FLAGS, "--steps=50", "--resume"])
    shutil.rmtree(tmp_path / "out")
    assert train_tiny.main([*places, *FLAGS, "--steps=50", "--resume"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line][-2:] == [45, 50]
