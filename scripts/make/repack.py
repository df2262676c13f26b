"""Rewrite the tensors of a native checkpoint smaller, to the bit the same.

    python scripts/make/repack.py jaxpaged/demo_model/tiny-python smaller

Of a bfloat16 number the byte with the exponent repeats itself and the other does not: all first bytes before all second
ones (blosc's shuffle) compress a tenth better than orbax's zstd over both, and are read by whatever reads the others.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import tensorstore as ts

PARAMS = "params"
NOTES = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding", "array_metadatas")  # of orbax, about the tensors
COMPRESSOR = {"id": "blosc", "cname": "zstd", "clevel": 9, "shuffle": 1}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint directory in the native format")
    parser.add_argument("destination", type=Path, metavar="DST", help="directory to write: a new one")
    args = parser.parse_args(argv)
    shutil.copytree(args.source, args.destination, ignore=shutil.ignore_patterns(PARAMS))
    (args.destination / PARAMS).mkdir()
    for name in NOTES:
        copy = shutil.copytree if (args.source / PARAMS / name).is_dir() else shutil.copy
        copy(args.source / PARAMS / name, args.destination / PARAMS / name)
    repack(args.source / PARAMS, args.destination / PARAMS)
    print(f"{_size(args.source):,} bytes -> {_size(args.destination):,}")
    return 0


def repack(source: Path, destination: Path) -> None:
    """Every tensor of one orbax key-value store, written to another at once, which makes few files."""
    read, written = (ts.KvStore.open(_store(folder)).result() for folder in (source, destination))
    names = {key.decode().rpartition("/")[0] for key in read.list().result()}
    context = ts.Context()
    memory: dict[str, object] = {"driver": "memory"}
    for name in sorted(names):
        tensor = ts.open(_zarr(name, _store(source)), open=True, read=True).result()
        metadata = {**tensor.spec().to_json()["metadata"], "compressor": COMPRESSOR}
        packed = ts.open({**_zarr(name, memory), "metadata": metadata}, create=True, context=context).result()
        packed.write(tensor.read().result()).result()
    store = ts.KvStore.open(memory, context=context).result()
    with ts.Transaction() as transaction:
        for key in store.list().result():
            written.with_transaction(transaction)[key] = store[key]


def _store(folder: Path) -> dict[str, object]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}


def _zarr(name: str, store: dict[str, object]) -> dict[str, object]:
    return {"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    raise SystemExit(main())
