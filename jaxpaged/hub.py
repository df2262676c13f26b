"""Names of models on the Hugging Face Hub: where its cache has their files, and what is fetched when that is asked for.

A path that is there goes before a name. Looking up takes the cache as it lies on the disk, and asks nobody:

    <cache>/models--<owner>--<name>/refs/<revision>         a commit
                                    snapshots/<commit>/     its files, links to those of the cache
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from pathlib import Path

from jaxpaged import demo_model
from jaxpaged.api.values import shortened

logger = logging.getLogger("jaxpaged")

DEFAULT_REVISION = "main"
REPO_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
REVISION = re.compile(r"\w[\w.+/-]*", re.ASCII)
INDEX_NAME = "model.safetensors.index.json"
#: What loading reads of a repository (batch/model_files.py says so of a directory), and what it does not though it is
#: called so: the same weights once more.
PATTERNS = ("*.json", "*.model", "merges.txt", "*.jinja", "additional_chat_templates/*")
WEIGHT_PATTERNS = ("*.safetensors", "params/*")
NOT_READ = ("original/*", "consolidated*.safetensors", "onnx/*", "openvino/*", "coreml/*")
HOW = "download=True, on the command line --download, fetches it"


def find_model(
    model: str | Path, revision: str | None = None, download: bool = False, needs_weights: bool = True
) -> str | Path:
    """The directory of a model: `model` itself where it is a path, that of the bundled model by its name, else the
    snapshot that the Hub's cache has of it.

    With `download`, what the cache lacks is fetched before. FileNotFoundError that says what was looked for where, and
    what is missing; `needs_weights`: weights count.
    """
    model = demo_model.find_model(model)
    name = str(model).removesuffix("/")
    is_path = os.path.lexists(os.path.expanduser(name)) or not REPO_NAME.fullmatch(name) or ".." in name
    if revision is not None:
        _check_revision(revision, name if is_path else None)
    if is_path:
        return model
    cache = cache_folder()
    if download:
        _download(name, revision, cache, needs_weights)
    snapshot = _find_snapshot(name, revision or DEFAULT_REVISION, cache)
    missing = missing_files(snapshot, needs_weights)
    if missing:
        what = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"{name} is in the Hugging Face cache, but without {what} (in {snapshot}): "
            + ("the repository on the Hub has none" if download else HOW)
        )
    return snapshot


def download_remedy(directory: Path, download: bool) -> str:
    """What helps where a file is not in the directory of a model, in brackets; "" where nothing does."""
    return f" ({HOW})" if not download and directory.is_relative_to(cache_folder()) else ""


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it has downloaded, by the variables that it reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := os.environ.get(variable):
            return Path(folder).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def missing_files(snapshot: Path, needs_weights: bool) -> list[str]:
    """What a model cannot do without, of the files that an interrupted or partial download leaves out."""
    needed = ["config.json"]
    if needs_weights and not (snapshot / "params").is_dir():
        needed += _weight_names(snapshot)
    return [name for name in needed if not (snapshot / name).exists()]


def _weight_names(snapshot: Path) -> list[str]:
    """Of the files with weights; none where there are some of which loading will say what they are."""
    if (snapshot / INDEX_NAME).exists():
        try:
            names = json.loads((snapshot / INDEX_NAME).read_bytes())["weight_map"].values()
            return sorted({name for name in names if isinstance(name, str)})
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return []  # loading says what is wrong with it
    others = [file for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for file in snapshot.glob(pattern)]
    return [] if any(file.exists() for file in others) else ["model.safetensors"]


def _find_snapshot(name: str, revision: str, cache: Path) -> Path:
    folder = cache / f"models--{name.replace('/', '--')}"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name} does not exist: give the directory of a checkpoint, or the name of a model on the Hub. "
            f"There is no {Path.cwd() / name}, and the cache {cache} has no {folder.name}: {HOW}"
        )
    reference = folder / "refs" / revision
    commit = (reference.read_text().strip() if reference.is_file() else "") or revision
    snapshot = folder / "snapshots" / commit
    if not snapshot.is_dir():
        references = (file for file in (folder / "refs").rglob("*") if file.is_file())
        known = sorted(str(file.relative_to(folder / "refs")) for file in references)
        has = f"it has {', '.join(known)}" if known else "it has no revision by name"
        raise FileNotFoundError(
            f"{name} is in the Hugging Face cache, but not its revision {revision!r} ({has}; looked for {snapshot}): "
            f"{HOW}"
        )
    return snapshot


def _check_revision(revision: object, path: str | None) -> None:
    if not isinstance(revision, str) or not REVISION.fullmatch(revision) or ".." in revision:
        raise ValueError(f"revision must be a branch, a tag or a commit, got {shortened(revision)}")
    if path is not None:
        raise ValueError(
            f"revision={revision!r} is of a model of the Hugging Face Hub, and {path} is a path: leave it out"
        )


def _download(name: str, revision: str | None, cache: Path, needs_weights: bool) -> None:
    """Fetch what the cache lacks. Where that fails, what it has may do, of which the caller makes sure."""
    import huggingface_hub  # half a second that those who download nothing need not wait
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    patterns = [*PATTERNS, *(WEIGHT_PATTERNS if needs_weights else ())]
    try:
        huggingface_hub.snapshot_download(
            name, revision=revision, cache_dir=cache, allow_patterns=patterns, ignore_patterns=list(NOT_READ)
        )
    except Exception as error:  # of the library, or of whichever one it speaks HTTP with: they share no class
        if not _is_of_download(error):
            raise
        why = " ".join(str(error).split())
        if not _has_model(name, revision or DEFAULT_REVISION, cache, needs_weights):
            raise FileNotFoundError(
                f"{name} could not be downloaded from the Hugging Face Hub to {cache}: {why} (HF_TOKEN lets you in "
                "where a model asks for it; HF_HUB_OFFLINE=1 forbids all downloads)"
            ) from None
        logger.warning("%s: nothing was downloaded, what the cache has is taken: %s", name, why)


def _is_of_download(error: Exception) -> bool:
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(modules & {"huggingface_hub", "httpx", "httpx2", "requests"})


def _has_model(name: str, revision: str, cache: Path, needs_weights: bool) -> bool:
    try:
        return not missing_files(_find_snapshot(name, revision, cache), needs_weights)
    except FileNotFoundError:
        return False
