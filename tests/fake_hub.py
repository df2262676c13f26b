"""What stands for the Hugging Face Hub in tests: a folder as its cache, and a server that has one model."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def add_to_cache(cache: Path, name: str, source: Path, revision: str = "main", commit: str = COMMIT) -> Path:
    """The files of `source` as a snapshot of the cache, links to blobs as huggingface_hub makes them."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    for file in (file for file in source.rglob("*") if file.is_file()):
        blob = folder / "blobs" / hashlib.sha1(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    return snapshot


@contextmanager
def serve(name: str, source: Path) -> Iterator[tuple[str, list[str]]]:
    """A Hub that has the files of `source` as its one model: its address, and the paths of files that were fetched."""
    files = {str(file.relative_to(source)): file.read_bytes() for file in source.rglob("*") if file.is_file()}
    fetched: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            file = path.removeprefix(f"/{name}/resolve/{COMMIT}/")
            if path in (f"/api/models/{name}/revision/main", f"/api/models/{name}"):
                siblings = [{"rfilename": file} for file in files]
                self._answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), "list")
            elif path == f"/api/models/{name}/tree/{COMMIT}":
                entries = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in files.items()
                ]
                self._answer(json.dumps(entries).encode(), "tree")
            elif file in files:
                if self.command == "GET":
                    fetched.append(file)
                self._answer(files[file], hashlib.sha1(files[file]).hexdigest())
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _answer(self, data: bytes, etag: str):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
