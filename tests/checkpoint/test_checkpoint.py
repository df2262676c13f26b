"""Opening directories, the native format, conversion, random weights, and what `info` says."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import GOLDENS, ROOT

from jaxpaged.checkpoint import (
    convert_checkpoint,
    load_params,
    open_checkpoint,
    save_checkpoint,
)
from jaxpaged.checkpoint.native import _batches
from jaxpaged.config import ModelConfig, RopeConfig
from jaxpaged.device.params import param_shapes, random_params

CPU = jax.devices("cpu")[0]
CONFIG = ModelConfig(
    family="llama", vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=12, num_heads=4, num_kv_heads=2,
    head_dim=4, max_position_embeddings=32, rope=RopeConfig(100.0, "llama3", 2.0), eos_token_ids=(2, 3),
    sliding_window=4, sliding_layers=(True, False) * 6,
)  # fmt: skip


@pytest.fixture
def native(tmp_path):
    save_checkpoint(tmp_path / "native", CONFIG, random_params(CONFIG, "bfloat16", seed=0))
    return tmp_path / "native"


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


# Opening


def test_hugging_face_directory_with_either_tokenizer(tmp_path):
    directory = Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama"))
    checkpoint = open_checkpoint(str(directory))
    assert (checkpoint.format, checkpoint.directory, checkpoint.tokenizer_file) == ("huggingface", directory, None)
    (directory / "tokenizer.model").touch()
    assert open_checkpoint(directory).tokenizer_file == directory / "tokenizer.model"
    (directory / "tokenizer.json").touch()
    assert open_checkpoint(directory).tokenizer_file == directory / "tokenizer.json"


def test_generation_config_gives_the_end_of_sequence_ids(tmp_path):
    directory = Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama"))
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert open_checkpoint(directory).config.eos_token_ids == (7, 9)
    (directory / "generation_config.json").unlink()
    assert open_checkpoint(directory).config.eos_token_ids == (2,)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="meta-llama/Llama-3.1-8B does not exist.*nothing is downloaded"):
        open_checkpoint("meta-llama/Llama-3.1-8B")
    with pytest.raises(ValueError, match=r"has no config.json \(it holds nothing\)"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"has no config.json \(it holds model.safetensors\)"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="model.safetensors is a file: give the directory"):
        open_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not valid JSON: "),
        ("[]", "config.json must hold a JSON object, found list"),
        ("{}", "config.json: architecture None is not supported"),
        ('{"architectures": ["T5ForConditionalGeneration"]}', "config.json: architecture T5ForConditionalGeneration"),
        (
            '{"format": "jaxpaged", "format_version": 99}',
            "config.json: native format version is 99; .* reads versions 1 and 2",
        ),
        ('{"format": "jaxpaged", "format_version": 1}', "config.json: model configuration lacks the keys"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


# The native format


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_native_round_trip(native, dtype):
    checkpoint = open_checkpoint(native)
    assert (checkpoint.format, checkpoint.config, checkpoint.tokenizer_file) == ("native", CONFIG, None)
    params = load_params(checkpoint, dtype=dtype, device=CPU)
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(CONFIG, "bfloat16", seed=0))
    assert_equal(params, expected)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), param_shapes(CONFIG, dtype)
    )
    assert all(leaf.devices() == {CPU} for leaf in jax.tree.leaves(params))


def test_what_is_written_has_not_changed(tmp_path):
    """The bundled checkpoint is of the version in which parameters were nested dictionaries and tuples."""
    bundled = ROOT / "checkpoints" / "tiny-python"
    checkpoint = open_checkpoint(bundled)
    params = load_params(checkpoint, dtype=checkpoint.config.dtype, device=CPU)
    save_checkpoint(tmp_path / "again", checkpoint.config, params)

    def tree(directory):
        values = json.loads((directory / "params" / "_METADATA").read_text())["tree_metadata"]
        return {name: entry["key_metadata"] for name, entry in values.items()}

    assert tree(tmp_path / "again") == tree(bundled)
    assert "('layers', '5', 'qkv', 'weight')" in tree(bundled)
    assert (tmp_path / "again" / "checksums.json").read_bytes() == (bundled / "checksums.json").read_bytes()


def test_saving_never_overwrites(native):
    with pytest.raises(FileExistsError, match="native already holds params: save to another directory"):
        save_checkpoint(native, CONFIG, random_params(CONFIG, "bfloat16", seed=0))


def test_saving_checks_the_params_against_the_config(tmp_path):
    params = random_params(CONFIG, "bfloat16", seed=0)
    with pytest.raises(ValueError, match=r"1 unexpected: lm_head.weight \[16, 64\]"):
        save_checkpoint(tmp_path / "tied", dataclasses.replace(CONFIG, tie_word_embeddings=True), params)
    assert not (tmp_path / "tied").exists()


def test_restoring_names_tensors_that_do_not_fit(native):
    values = json.loads((native / "config.json").read_text())
    values |= {"intermediate_size": 20, "qkv_bias": True, "tie_word_embeddings": True}
    (native / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError) as error:
        load_params(open_checkpoint(native), dtype="float32", device=CPU)
    assert "12 missing: layers.0.qkv.bias [32]" in str(error.value)
    assert "1 unexpected: lm_head.weight [16, 64]" in str(error.value)
    assert "24 of another shape: layers.0.mlp_in.weight is [16, 48], expected [16, 40]" in str(error.value)


def test_native_without_its_tensors(native):
    shutil.rmtree(native / "params")
    with pytest.raises(FileNotFoundError, match="params does not exist: a native checkpoint keeps its tensors there"):
        load_params(open_checkpoint(native), dtype="float32", device=CPU)


def test_an_interrupted_save_is_no_checkpoint(native):
    (native / "config.json").unlink()  # it is written last
    with pytest.raises(ValueError, match=r"has no config.json \(it holds checksums.json, params\)"):
        open_checkpoint(native)


def test_orbax_does_not_fill_the_log(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        save_checkpoint(tmp_path / "native", CONFIG, random_params(CONFIG, "bfloat16", seed=0))
        load_params(open_checkpoint(tmp_path / "native"), dtype="bfloat16", device=CPU)
    assert [record for record in caplog.records if record.name == "absl"] == []


@given(st.lists(st.integers(1, 100), min_size=1, max_size=50))
def test_batches_cover_all_leaves_and_are_no_larger_than_the_largest(sizes):
    batches = _batches(sizes)
    assert [i for batch in batches for i in batch] == list(range(len(sizes)))
    assert max(sum(sizes[i] for i in batch) for batch in batches) == max(sizes)


# Load formats


def test_dummy_needs_only_a_config(tmp_path):
    shutil.copy(GOLDENS / "gemma2" / "config.json", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    params = load_params(checkpoint, dtype="bfloat16", device=CPU, load_format="dummy", seed=3)
    assert_equal(params, random_params(checkpoint.config, "bfloat16", 3, CPU))
    assert jax.tree.structure(params) == jax.tree.structure(param_shapes(checkpoint.config, "bfloat16"))


@pytest.mark.parametrize("load_format", ["auto", "huggingface", "safetensors"])
def test_load_formats_of_a_hugging_face_directory(load_format):
    params = load_params(open_checkpoint(GOLDENS / "opt"), dtype="float32", device=CPU, load_format=load_format)
    assert len(params.layers) == 2


def test_a_load_format_that_does_not_fit(native):
    with pytest.raises(ValueError, match="load_format is 'safetensors', but .* has the native format"):
        load_params(open_checkpoint(native), dtype="float32", device=CPU, load_format="safetensors")
    with pytest.raises(ValueError, match="load_format is 'native', but .* has the huggingface format"):
        load_params(open_checkpoint(GOLDENS / "opt"), dtype="float32", device=CPU, load_format="native")
    with pytest.raises(ValueError, match="load_format is 'gguf'; choose one of auto, native"):
        load_params(open_checkpoint(native), dtype="float32", device=CPU, load_format="gguf")
    with pytest.raises(ValueError, match="dtype is 'int8'; choose one of float32"):
        load_params(open_checkpoint(native), dtype="int8", device=CPU)


# Conversion


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDENS.glob("*/logits.npz")))
def test_convert_keeps_everything(tmp_path, name):
    source = open_checkpoint(GOLDENS / name)
    convert_checkpoint(GOLDENS / name, tmp_path / "converted")
    converted = open_checkpoint(tmp_path / "converted")
    assert (converted.format, converted.config) == ("native", source.config)
    dtype = source.config.dtype
    assert_equal(load_params(converted, dtype=dtype, device=CPU), load_params(source, dtype=dtype, device=CPU))


def test_convert_takes_the_tokenizer_along(tmp_path):
    source = Path(shutil.copytree(GOLDENS / "llama", tmp_path / "source"))
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    (source / "added_tokens.json").write_text('{"<|im_start|>": 97}')
    (source / "special_tokens_map.json").write_text("{}")
    (source / "chat_template.jinja").write_text("a template")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("another")
    convert_checkpoint(source, tmp_path / "converted")
    assert open_checkpoint(tmp_path / "converted").tokenizer_file == tmp_path / "converted" / "tokenizer.json"
    assert (tmp_path / "converted" / "tokenizer_config.json").read_text() == '{"add_bos_token": false}'
    assert (tmp_path / "converted" / "added_tokens.json").read_text() == '{"<|im_start|>": 97}'
    assert (tmp_path / "converted" / "special_tokens_map.json").read_text() == "{}"
    assert (tmp_path / "converted" / "chat_template.jinja").read_text() == "a template"
    assert (tmp_path / "converted" / "additional_chat_templates" / "rag.jinja").read_text() == "another"


def test_convert_refuses_a_destination_in_use(tmp_path):
    (tmp_path / "notes.txt").touch()
    for destination in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="is not an empty directory: convert to a new one"):
            convert_checkpoint(GOLDENS / "llama", destination)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_convert_writes_nothing_when_the_source_is_broken(tmp_path):
    source = Path(shutil.copytree(GOLDENS / "llama", tmp_path / "source"))
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        convert_checkpoint(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
