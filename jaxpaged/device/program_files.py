"""Compiled programs in files, so that a later process reads what an earlier one has compiled.

JAX knows which program is which (its key is of the program, the compiler, its options and the device) and how to read
one. Its own folder of them never gets smaller unless one more package is there, keeps a file that was cut off for ever,
and warns of each program anew. So the files are ours: each is written aside and then renamed, carries a digest of what
it holds, and those not used for longest go when there is no more room. Processes need no lock: whoever reads a file has
all of one version of it, or none.

A program is code that this process will run, so a folder in which others may write is not read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Hashable, Iterator
from pathlib import Path

import jax
import jaxlib.version
from jax._src import compilation_cache  # how JAX is given another store of programs; it has no public name
from jax._src.compilation_cache_interface import CacheInterface

logger = logging.getLogger("jaxpaged")

#: Where programs are kept: empty, nowhere. Without it, a folder of the user's caches.
VARIABLE = "JAXPAGED_CACHE_DIR"
#: A program of an 8B model takes a few MB and a run of one kind some tens of programs, so this is many models; and it
#: is little beside the weights of one.
MAX_BYTES = 4 << 30
#: Files of programs that are being written. Who began one so many seconds ago was stopped.
UNFINISHED, STALE_SECONDS = ".unfinished-", 3600
DIGEST_BYTES = 16
#: When this process had begun to read our source.
IMPORTED = time.time()


class ProgramFiles(CacheInterface):
    """A folder of programs by key, as JAX asks for them."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES):
        self.path = self._path = folder
        self.max_bytes = max_bytes
        self._is_readable = self._is_writable = True
        self._given: set[str] = set()  # keys whose programs JAX has got
        self._aside = threading.local()

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """What this thread compiles in the block JAX does not keep here: who compiles it does, under another name."""
        self._aside.is_on = True
        try:
            yield
        finally:
            self._aside.is_on = False

    def get(self, key: str) -> bytes | None:
        """The program, or None: there is none, or its file is damaged, and is then away."""
        program = None if self._is_aside else self.read(key)
        if program is not None:
            self._given.add(key)
        return program

    def put(self, key: str, value: bytes) -> None:
        if key in self._given and self._is_readable:  # JAX has it and compiled it all the same: it could not load it
            self._is_readable = False
            logger.warning("programs in %s cannot be loaded on this machine, and are compiled anew", self.path)
        if not self._is_aside:
            self.write(key, value)

    @property
    def _is_aside(self) -> bool:
        return getattr(self._aside, "is_on", False)

    def read(self, key: str) -> bytes | None:
        if not self._is_readable:
            return None
        file = self.path / key
        try:
            content = file.read_bytes()
            program = _checked(content)
            if program is None:
                file.unlink(missing_ok=True)
                return None
            os.utime(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._is_readable = False
            self._warn("read", error)
            return None
        return program

    def write(self, key: str, value: bytes) -> None:
        if not self._is_writable or len(value) > self.max_bytes:
            return
        try:
            self._make_room(len(value))
            self._replace(self.path / key, _digest(value) + value)
        except OSError as error:
            self._is_writable = False
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own files would fail the same
            self._warn("written", error)

    def _replace(self, file: Path, content: bytes) -> None:
        handle, unfinished = tempfile.mkstemp(prefix=UNFINISHED, dir=self.path)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            os.replace(unfinished, file)
        except OSError:
            Path(unfinished).unlink(missing_ok=True)
            raise

    def _make_room(self, needed: int) -> None:
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for used, size, path in files:
            is_unfinished = path.name.startswith(UNFINISHED)
            if time.time() - used > STALE_SECONDS if is_unfinished else total + needed > self.max_bytes:
                path.unlink(missing_ok=True)
                total -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """When each was last used, its bytes, and its place."""
        files = []
        for path in self.path.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            if path.is_file():
                files.append((status.st_mtime, status.st_size, path))
        return files

    def _warn(self, what: str, error: OSError) -> None:
        logger.warning(
            "compiled programs cannot be %s in %s (%s): they are compiled in every process; set %s to another folder, "
            "or to '' for none", what, self.path, error.strerror or error, VARIABLE,
        )  # fmt: skip


def keep_programs(is_wanted: bool = True) -> None:
    """From here on this process reads and keeps its programs in files, where that is possible, or no more.

    Not where the program has a folder of JAX's own (`jax_compilation_cache_dir`): that stands. What cannot be used
    costs a warning, and programs are compiled as if there were no files.
    """
    ours = program_files()
    if ours is None and jax.config.jax_compilation_cache_dir:
        if is_wanted:
            logger.info("programs: kept in %s, as JAX was told", jax.config.jax_compilation_cache_dir)
        return
    folder = program_folder() if is_wanted else None
    if ours is not None and (folder is None or ours.path != folder):
        _install(None)
    if folder is None or (ours is not None and ours.path == folder):
        return
    try:
        _prepare(folder)
    except OSError as error:
        logger.warning(
            "compiled programs cannot be kept in %s (%s): they are compiled in every process; set %s to another "
            "folder, or to '' for none", folder, error.strerror or error, VARIABLE,
        )  # fmt: skip
        return
    _install(ProgramFiles(folder, _max_bytes()))
    logger.info("programs: kept in %s", folder)


def program_files() -> ProgramFiles | None:
    """What `keep_programs` has put in place."""
    found = compilation_cache._cache  # pyright: ignore[reportPrivateUsage]
    return found if isinstance(found, ProgramFiles) else None


def recall(what: Hashable) -> int | None:
    """A number that an earlier process, with the same code, learnt from its programs; None where there are no files."""
    files = program_files()
    found = files.read(_number_key(what)) if files is not None else None
    return None if found is None else int(found)


def remember(what: Hashable, number: int) -> None:
    if (files := program_files()) is not None:
        files.write(_number_key(what), str(number).encode())


def _number_key(what: Hashable) -> str:
    """Of what its `repr` says, and of all that a program is made by."""
    made_by = (jax.__version__, jaxlib.version.__version__, os.environ.get("XLA_FLAGS"), code_digest())
    return f"number-{_digest(repr((what, made_by)).encode()).hex()}"


@functools.cache
def code_digest() -> str:
    """Of the source of both packages: whoever changes them learns its numbers anew. Nobody else's, if it was changed
    when this process had read it: what is in the files then is not what runs."""
    root = Path(__file__).parents[2]
    sources = sorted(file for package in ("jaxpaged", "pallas_kernels") for file in (root / package).rglob("*.py"))
    if max(file.stat().st_ctime for file in sources) > IMPORTED:  # this process runs what was there before
        return os.urandom(DIGEST_BYTES).hex()
    return _digest(b"".join(_digest(file.read_bytes()) for file in sources)).hex()


def kept_programs() -> tuple[Path, int] | None:
    """Where this process keeps its programs, if it does, and the bytes of all files there."""
    told = jax.config.jax_compilation_cache_dir
    if not told:
        return None
    folder = Path(told)
    return folder, sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) if folder.is_dir() else 0


def program_folder() -> Path | None:
    """None if there is to be none. A program for a CPU runs on such CPUs alone, and JAX's key does not say which: so
    machines with different ones, whose home may be the same, have folders of their own."""
    root = cache_root()
    return None if root is None else root / "programs" / _cpu_digest()


def cache_root() -> Path | None:
    told = os.environ.get(VARIABLE)
    if told is not None:
        return Path(told).expanduser().absolute() if told else None
    caches = os.environ.get("XDG_CACHE_HOME")
    if caches and Path(caches).is_absolute():
        return Path(caches) / "jaxpaged"
    try:
        return Path.home() / ".cache" / "jaxpaged"
    except RuntimeError:  # a user without a home
        return None


def _prepare(folder: Path) -> None:
    """Make the folder; OSError where it is not ours alone to write in."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise PermissionError(0, f"it belongs to user {status.st_uid}, and this is user {os.getuid()}")
    if status.st_mode & 0o022:
        raise PermissionError(0, "other users may write there, and programs are code; chmod go-w makes it yours alone")
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))


def _install(files: ProgramFiles | None) -> None:
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None if files is None else str(files.path))
    if files is None:
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # JAX's second would leave out half of a start
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache._cache = files  # pyright: ignore[reportPrivateUsage]
    compilation_cache._cache_initialized = True  # pyright: ignore[reportPrivateUsage]


def _max_bytes() -> int:
    told = jax.config.jax_compilation_cache_max_size
    return MAX_BYTES if told < 0 else told


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _checked(content: bytes) -> bytes | None:
    """What stands behind the digest, if it is that."""
    program = content[DIGEST_BYTES:]
    return program if content[:DIGEST_BYTES] == _digest(program) else None


def _cpu_digest() -> str:
    """Of what this machine's CPU can do; of the machine's name where the system does not say."""
    lines = Path("/proc/cpuinfo")
    told = {"flags", "Features", "model name", "CPU part"}
    if lines.exists():
        first = lines.read_text(errors="replace").partition("\n\n")[0].splitlines()
        words = [line for line in first if line.partition(":")[0].strip() in told]
    else:
        words = [platform.node(), platform.processor()]
    return hashlib.blake2b("\n".join([platform.machine(), *words]).encode(), digest_size=6).hexdigest()
