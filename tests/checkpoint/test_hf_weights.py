"""Weights of Hugging Face directories: what loads, what is refused and in which words, and the memory it takes."""

import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from paths import GOLDENS
from safetensors.numpy import load_file, save_file

from jaxpaged.checkpoint import hf_weights, load_params, open_checkpoint

CPU = jax.devices("cpu")[0]
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def llama(tmp_path):
    """A copy of the untied Llama golden, to be broken."""
    return Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama"))


def load(directory, dtype="float32"):
    return load_params(open_checkpoint(directory), dtype=dtype, device=CPU)


def change_tensors(directory, change):
    """`change` gets the dict of tensors and alters it in place."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def change_config(directory, **changes):
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, **changes}))


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_fused_and_transposed_as_documented(llama):
    stored = load_file(llama / "model.safetensors")
    layer = load(llama).layers[1]
    q, k, v = (stored[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    gate, up = (stored[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    np.testing.assert_array_equal(layer.qkv.weight, np.concatenate([q.T, k.T, v.T], axis=1))
    np.testing.assert_array_equal(layer.mlp_in.weight, np.concatenate([gate.T, up.T], axis=1))


def test_one_file_and_shards_load_alike(tmp_path):
    sharded = GOLDENS / "qwen2"
    tensors = {}
    for file in sharded.glob("*.safetensors"):
        tensors |= load_file(file)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    shutil.copy(sharded / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal(load(sharded), load(tmp_path))


@pytest.mark.parametrize(
    ("name", "new_prefix"),
    [("llama", ""), ("opt", "decoder."), ("gemma3", "language_model.model."), ("gemma3", "model.language_model.")],
)
def test_other_prefixes_of_the_same_tensors(tmp_path, name, new_prefix):
    directory = Path(shutil.copytree(GOLDENS / name, tmp_path / name))
    expected = load(directory)
    old_prefix = "model.decoder." if name == "opt" else "model."

    def rename(tensors):
        for key in [key for key in tensors if key.startswith(old_prefix)]:
            tensors[new_prefix + key.removeprefix(old_prefix)] = tensors.pop(key)

    change_tensors(directory, rename)
    assert_equal(load(directory), expected)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_every_dtype_loads_as_every_other(llama, stored, wanted):
    change_tensors(llama, lambda tensors: tensors.update({k: v.astype(stored) for k, v in tensors.items()}))
    tensors = load_file(llama / "model.safetensors")
    params = load(llama, wanted)
    assert all(leaf.dtype == wanted for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(params.embedding, tensors["model.embed_tokens.weight"].astype(wanted))


def test_the_stored_dtype_counts_where_config_json_has_none(tmp_path):
    directory = Path(shutil.copytree(GOLDENS / "llama_tied", tmp_path / "llama"))
    change_config(directory, dtype=None)
    assert open_checkpoint(directory).config.dtype == "bfloat16"


def test_harmless_extra_tensors_are_ignored(tmp_path):
    directory = Path(shutil.copytree(GOLDENS / "gemma3", tmp_path / "gemma3"))
    expected = load(directory)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["vision_tower.post_layernorm.weight"] = np.ones(4, np.float32)

    change_tensors(directory, add)
    assert_equal(load(directory), expected)


def test_a_head_that_is_no_copy_of_the_embedding_it_is_tied_to(tmp_path):
    directory = Path(shutil.copytree(GOLDENS / "qwen3", tmp_path / "qwen3"))
    change_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"4,096 of 4,096 values, by at most 1, .*tie_word_embeddings"):
        load(directory)


def test_missing_tensors_are_named(llama):
    change_tensors(llama, lambda tensors: [tensors.pop(QUERY), tensors.pop("lm_head.weight")])
    with pytest.raises(ValueError, match=rf"2 missing: {QUERY} \[32, 32\], lm_head.weight \[128, 32\]"):
        load(llama)


def test_extra_tensors_are_named(llama):
    change_tensors(llama, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}))
    with pytest.raises(ValueError, match=r"1 unexpected: model.layers.0.self_attn.q_proj.bias \[32\]"):
        load(llama)


def test_wrong_shapes_are_named_with_the_expected_one(llama):
    change_tensors(llama, lambda tensors: tensors.update({QUERY: tensors[QUERY][:16].copy()}))
    with pytest.raises(ValueError, match=rf"1 of another shape: {QUERY} is \[16, 32\], expected \[32, 32\]"):
        load(llama)


def test_a_config_of_another_model_lists_a_few_tensors_and_counts_the_rest(llama):
    change_config(llama, num_hidden_layers=5)
    with pytest.raises(ValueError, match=r"27 missing: .* and 19 more"):
        load(llama)


def test_integer_weights_are_refused(llama):
    change_tensors(llama, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(np.int8)}))
    with pytest.raises(ValueError, match=f"{QUERY} in .*model.safetensors is I8; supported are F32, BF16, F16"):
        load(llama)


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, 5_000, -1])
def test_truncated_files_are_refused(llama, kept_bytes):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        load(llama)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        (20).to_bytes(8, "little") + b"this is not any JSON",
        (2).to_bytes(8, "little") + b"[]",
        (10).to_bytes(8, "little") + b'{"x": {}} ',
        (64).to_bytes(8, "little") + b'{"x": {"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'.ljust(64) + bytes(4),
    ],
)
def test_corrupt_files_are_refused(llama, content):
    (llama / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        load(llama)


def test_a_shard_that_is_missing_is_named(tmp_path):
    directory = Path(shutil.copytree(GOLDENS / "qwen2", tmp_path / "qwen2"))
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="index.json names model-00002-of-00002.safetensors, which is not in"):
        load(directory)


def test_an_index_without_a_weight_map(llama):
    (llama / "model.safetensors.index.json").write_text('{"weights": {}}')
    with pytest.raises(ValueError, match='has no "weight_map"'):
        load(llama)


def test_a_tensor_in_two_files(tmp_path):
    directory = Path(shutil.copytree(GOLDENS / "qwen2", tmp_path / "qwen2"))
    first, second = sorted(directory.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    with pytest.raises(ValueError, match=f"tensor {name} is both in .*{first.name} and in {second.name}"):
        load(directory)


def test_pickled_weights_are_refused_with_the_way_out(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin, a pickle, .*transformers.*save_pretrained"):
        load(llama)


def test_no_weights_at_all(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors file in .*load_format='dummy'"):
        load(llama)


def test_everything_is_checked_before_any_tensor_is_read(llama, monkeypatch):
    change_tensors(llama, lambda tensors: tensors.pop("model.norm.weight"))
    for name in ("read_tensor", "read_ahead"):
        monkeypatch.setattr(hf_weights, name, lambda *args, **kwargs: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="model.norm.weight"):
        load(llama)


def write_large_llama(directory, hidden=256, inner=1024, layers=8, vocab=2048):
    """Random weights of about 30 MB; returns the bytes of the largest tensor and of all of them."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
    }
    shapes["model.norm.weight"] = (hidden,)
    for layer in (f"model.layers.{i}." for i in range(layers)):
        shapes |= {layer + f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= {layer + f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {layer + f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[layer + "mlp.down_proj.weight"] = (hidden, inner)
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    sizes = dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=vocab)
    values = dict(architectures=["LlamaForCausalLM"], num_attention_heads=4, max_position_embeddings=64, **sizes)
    (directory / "config.json").write_text(json.dumps(values))
    num_bytes = [tensor.nbytes for tensor in tensors.values()]
    return max(num_bytes), sum(num_bytes)


def traced_peak(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_host_memory_stays_under_three_of_the_largest_tensors(tmp_path):
    """numpy reports its buffers to tracemalloc; JAX's arrays, also those of its CPU backend, are not among them."""
    largest, total = write_large_llama(tmp_path / "llama")
    assert total > 10 * largest
    for dtype in ("float32", "bfloat16"):  # compiles, which allocates Python objects too
        load(tmp_path / "llama", dtype)
    # A busy runtime lets go of a tensor's bytes only while the next are read; Python's own objects take a few kB.
    bound = 3 * largest + (64 << 10)
    assert traced_peak(lambda: load(tmp_path / "llama")) < bound
    assert traced_peak(lambda: load(tmp_path / "llama", "bfloat16")) < bound


def test_the_memory_test_can_fail(tmp_path):
    largest, total = write_large_llama(tmp_path / "llama")
    assert traced_peak(lambda: load_file(tmp_path / "llama" / "model.safetensors")) > total > 10 * largest
