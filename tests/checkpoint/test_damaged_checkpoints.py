"""Checkpoints that are damaged or hostile: the same weights are loaded, or one line says what is wrong."""

import json
import os
import random
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from paths import GOLDENS
from safetensors.numpy import load_file, save_file

from jaxpaged.checkpoint import convert_checkpoint, load_params, open_checkpoint
from jaxpaged.checkpoint.checksums import compute_checksums
from jaxpaged.engine.describe import describe_checkpoint

CPU = jax.devices("cpu")[0]
QUERY = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def llama(tmp_path):
    return Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama"))


@pytest.fixture
def sharded(tmp_path):
    return Path(shutil.copytree(GOLDENS / "qwen2", tmp_path / "qwen2"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "native"
    convert_checkpoint(GOLDENS / "llama", directory)
    return directory


@pytest.fixture
def native(converted, tmp_path):
    return Path(shutil.copytree(converted, tmp_path / "native"))


def load(directory):
    return load_params(open_checkpoint(directory), dtype="float32", device=CPU)


def weights(directory):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(load(directory))]


def is_refused(directory, expected):
    """Whether loading ends in one line; otherwise the weights must be the expected ones."""
    try:
        found = weights(directory)
    except (ValueError, FileNotFoundError) as error:
        assert len(str(error).splitlines()) == 1, error
        return True
    assert found == expected
    return False


# Headers of safetensors files


def change_entry(header, rng):
    """Another place, size, type or name of one tensor; not what nothing can tell: the places of two alike exchanged."""
    name, other = rng.sample([name for name in header if name != "__metadata__"], 2)
    entry = header[name]
    start, stop = entry["data_offsets"]
    step = rng.choice([1, 2, 4, 8, 64, stop - start, 2**31, 2**63, 2**64])
    changes = {
        "data_offsets": [
            [start + step, stop + step], [start - step, stop - step], [start, stop + step], [start - step, stop],
            [stop, start], header[other]["data_offsets"], [start, stop, stop], [start], None, "0", [start, None],
            [float(start), float(stop)], [True, stop],
        ],
        "shape": [
            entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][1:], [step, *entry["shape"][1:]], [0], [-1], [],
            [2**63, 2], None, {}, [float(n) for n in entry["shape"]],
        ],
        "dtype": ["F64", "I32", "U32", "I16", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "BF16", "", None, 4],
    }  # fmt: skip
    kind = rng.choice([*changes, "name", "gone", "entry"])
    if kind == "name":
        header[rng.choice([other, name + "x", "__metadata__", ""])] = header.pop(name)
    elif kind == "gone":
        del header[name]
    elif kind == "entry":
        header[name] = rng.choice([None, [], {}, 1, "x", {**entry, "more": 1}])
    else:
        header[name] = {**entry, kind: rng.choice(changes[kind])}


def mutate(content, rng):
    """The bytes of a safetensors file with one mistake in its header or its length."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    kind = rng.choice(["entry", "entry", "entry", "flip", "flip", "twice", "cut", "more", "length", "bytes"])
    if kind == "entry":
        values = json.loads(header)
        change_entry(values, rng)
        header = json.dumps(values).encode()
    elif kind == "twice":
        name, entry = rng.choice([item for item in json.loads(header).items() if item[0] != "__metadata__"])
        again = json.dumps({name: {**entry, "shape": entry["shape"][::-1]}}).encode()
        header = header.rstrip()[:-1] + b"," + again[1:]
    elif kind == "flip":
        content = bytearray(content)
        content[rng.randrange(8 + size)] ^= 1 << rng.randrange(8)
        return bytes(content)
    elif kind == "cut":
        return content[: rng.choice([rng.randrange(len(content)), len(content) - 1])]
    elif kind == "more":
        return content + bytes(rng.choice([1, 4, 4096]))
    elif kind == "length":
        return rng.choice([0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1]).to_bytes(8, "little") + header + data
    else:
        place, length = rng.randrange(size), rng.randrange(1, 9)
        header = header[:place] + rng.choice([b"", rng.randbytes(length)]) + header[place + length :]
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize("count", [300, pytest.param(12_000, marks=pytest.mark.slow)])
def test_no_header_with_a_mistake_loads_other_weights(llama, count):
    file = llama / "model.safetensors"
    content, expected, rng = file.read_bytes(), weights(llama), random.Random(count)
    refused = 0
    for _ in range(count):
        file.write_bytes(mutate(content, rng))
        refused += is_refused(llama, expected)
    assert 0.9 * count < refused < count  # the rest are flips of spaces, of metadata and in what means the same


@pytest.mark.parametrize(
    "entries",
    [
        {"a": [0, 8], "b": [4, 12]},  # overlap
        {"a": [0, 8], "b": [12, 20]},  # a gap
        {"a": [4, 12], "b": [12, 20]},  # not from the first byte
        {"a": [0, 8]},  # not to the last
    ],
)
def test_tensors_must_fill_the_data_exactly(llama, entries):
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": place} for name, place in entries.items()}
    text = json.dumps(header).encode()
    (llama / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(20))
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        load(llama)


def test_a_name_that_a_header_has_twice(llama):
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f'{{"x":{entry},"x":{entry}}}'.encode()
    (llama / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match="model.safetensors is not a whole .*its header has x twice"):
        load(llama)


# Names in an index


@pytest.mark.parametrize(
    "name",
    ["../outside/w.safetensors", "{outside}/w.safetensors", "a/b", "a\\b", "C:w", "", ".", "..", "a\0b", "\ud800"],
)
def test_an_index_names_files_beside_it_and_no_others(llama, name):
    outside = llama.parent / "outside"
    outside.mkdir()
    (llama / "model.safetensors").rename(outside / "w.safetensors")
    tensors = load_file(outside / "w.safetensors")
    name = name.format(outside=outside)
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    with pytest.raises(ValueError, match="index.json has .*: only names of files in the same directory are read"):
        load(llama)


def test_links_to_a_cache_of_files_are_followed(llama):
    expected = weights(llama)
    blobs = llama.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(list(llama.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../blobs/{number}")
    assert weights(llama) == expected


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json"])
def test_a_link_that_leads_nowhere_is_no_missing_file(llama, name):
    (llama / name).unlink(missing_ok=True)
    (llama / name).symlink_to("../blobs/0")
    with pytest.raises(FileNotFoundError, match=f"{name} is a link to ../blobs/0, which does not exist"):
        load(llama)


def test_a_tensor_in_another_file_than_the_index_says(sharded):
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    here, there = sorted(set(values["weight_map"].values()))
    tensor = next(name for name, file in values["weight_map"].items() if file == here)
    values["weight_map"][tensor] = there
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"index.json has {tensor} in {there}, but it is in {here}"):
        load(sharded)


def test_one_file_beside_an_index_of_others(sharded):
    (sharded / "model.safetensors").write_bytes(min(sharded.glob("model-*.safetensors")).read_bytes())
    with pytest.raises(ValueError, match="has model.safetensors, and model.safetensors.index.json names other files"):
        load(sharded)


# Regular files only

FILES = ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"]
FILES += ["tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a pipe"), (os.mkdir, "a directory")])
def test_whatever_is_no_regular_file_is_refused_before_it_is_opened(llama, name, make, kind):
    (llama / name).unlink(missing_ok=True)
    make(llama / name)
    with pytest.raises(ValueError, match=f"{name} is {kind}: a checkpoint has regular files only"):
        load(llama)


def test_a_device_is_refused_too(llama):
    (llama / "generation_config.json").unlink()
    (llama / "generation_config.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="generation_config.json is a device"):
        open_checkpoint(llama)


def test_a_pipe_among_the_tensors_of_the_native_format(native):
    (native / "params" / "manifest.ocdbt").unlink()
    os.mkfifo(native / "params" / "manifest.ocdbt")
    with pytest.raises(ValueError, match="manifest.ocdbt is a pipe"):
        load(native)


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800", b"tiny", 3, None, "~no-such-user-here/model"])
def test_what_is_no_path(path):
    for use in (open_checkpoint, describe_checkpoint):
        with pytest.raises(ValueError, match="path|home directory"):
            use(path)


def test_names_that_are_too_long_for_a_file_system(llama):
    with pytest.raises(FileNotFoundError, match="aaa does not exist"):
        open_checkpoint("a" * 300)
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a" * 300}}))
    with pytest.raises(FileNotFoundError, match="index.json names a{300}, which is not in"):
        load(llama)


def test_a_link_to_itself(llama):
    (llama / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(FileNotFoundError, match="tokenizer.json is a link to tokenizer.json, which does not exist"):
        open_checkpoint(llama)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "generation_config.json is not valid JSON"),
        ('{"eos_token_id": "</s>"}', "generation_config.json: eos_token_id is '</s>'; it must be a token id or a list"),
        ('{"bos_token_id": [true]}', r"generation_config.json: bos_token_id is \[True\]; it must be a token id"),
    ],
)
def test_a_broken_generation_config_is_named_and_no_other_file(llama, content, message):
    (llama / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(llama)
    assert "/config.json" not in str(error.value)


# An output head that is stored although it is tied


def store_head(directory, head):
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "lm_head.weight": head(tensors[EMBEDDING])}, directory / "model.safetensors")


def test_a_tied_head_of_another_dtype_with_equal_values_loads(tmp_path):
    directory = Path(shutil.copytree(GOLDENS / "llama_tied", tmp_path / "llama"))
    assert load_file(directory / "model.safetensors")[EMBEDDING].dtype == ml_dtypes.bfloat16
    expected = weights(directory)
    store_head(directory, lambda embedding: embedding.astype(np.float32))
    assert weights(directory) == expected


def test_a_tied_head_with_other_values_is_refused_with_numbers(tmp_path):
    directory = Path(shutil.copytree(GOLDENS / "llama_tied", tmp_path / "llama"))

    def change_two(embedding):
        head = embedding.astype(np.float32)
        head[3, 1] += 0.5
        head[70, 0] -= 0.25
        return head

    store_head(directory, change_two)
    message = r"lm_head.weight \(F32\) differs from .* \(BF16\) in 2 of [\d,]+ values, by at most 0.5, .*tie_word_embed"
    with pytest.raises(ValueError, match=message):
        load(directory)


# The native format


def open_tensor(directory, name):
    kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/params/"}, "path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()


def test_a_tensor_of_other_values_is_named(native):
    tensor = open_tensor(native, "layers.1.qkv.weight")
    changed = tensor.read().result()
    changed.view(np.uint8)[0, 0] ^= 1
    tensor.write(changed).result()
    with pytest.raises(
        ValueError, match=r"another checksum for 1 of its tensors: layers.1.qkv.weight is float32 \w{8}"
    ):
        load(native)


def test_the_checksum_of_known_bytes():
    tensor = np.array([[1, 2]], np.float32)  # zlib.crc32(b"\0\0\x80\x3f\0\0\0\x40")
    assert compute_checksums({"x": tensor}) == {"x": "float32 2e3fa576"}
    assert compute_checksums({"x": tensor.view(np.int32)}) == {"x": "int32 2e3fa576"}


def test_checkpoints_from_before_there_were_checksums_load(native):
    expected = weights(native)
    values = json.loads((native / "config.json").read_text())
    assert values["format_version"] == 2
    (native / "config.json").write_text(json.dumps({**values, "format_version": 1}))
    (native / "checksums.json").unlink()
    assert weights(native) == expected


def test_checksums_count_whatever_version_stands_beside_them(native):
    config, checksums = native / "config.json", native / "checksums.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "format_version": 1}))
    values = json.loads(checksums.read_text())
    checksums.write_text(json.dumps({**values, "tensors": {**values["tensors"], "embedding": "float32 00000000"}}))
    with pytest.raises(ValueError, match="embedding is float32 .*, expected float32 00000000"):
        load(native)


def test_checksums_that_are_lost_or_of_another_model(native):
    file = native / "checksums.json"
    values = json.loads(file.read_text())
    values["tensors"].pop("embedding")
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match='checksums.json: "tensors" must have a checksum for each of the 15 tensors'):
        load(native)
    file.write_text(json.dumps({**values, "algorithm": "md5"}))
    with pytest.raises(ValueError, match="checksums.json: algorithm is 'md5'; this jaxpaged knows crc32"):
        load(native)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="has no checksums.json"):
        load(native)


def damage(file, rng):
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "flip", "flip", "cut", "empty", "zeros", "gone", "directory"])
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        content = content[: rng.randrange(len(content))]
    else:
        content = bytes(len(content) if kind == "zeros" else 0)
    file.write_bytes(content)
    if kind in ("gone", "directory"):
        file.unlink()
    if kind == "directory":
        file.mkdir()


@pytest.mark.parametrize("count", [60, pytest.param(1_000, marks=pytest.mark.slow)])
def test_no_damage_to_the_native_format_loads_other_weights(converted, tmp_path, count):
    expected, rng, refused = weights(converted), random.Random(count), 0
    names = sorted(str(file.relative_to(converted)) for file in converted.rglob("*") if file.is_file())
    for _ in range(count):
        directory = Path(shutil.copytree(converted, tmp_path / "native"))
        damage(directory / rng.choice([name for name in names if name != "config.json"]), rng)
        refused += is_refused(directory, expected)
        shutil.rmtree(directory)
    assert 0.1 * count < refused < count  # orbax keeps files that the weights do not depend on
