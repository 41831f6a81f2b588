"""A hub on localhost that serves the files of folders, and a cache laid out as huggingface_hub has it."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_model(folder: Path, cache: Path, name: str) -> Path:
    """Put a folder into a cache as the snapshot of a model on the hub; the path of the snapshot."""
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    return shutil.copytree(folder, model / "snapshots" / COMMIT)


@contextmanager
def hub(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve models by name: the address, and the paths that were downloaded."""
    downloaded: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            downloaded.append(self.path)
            self.answer()

        def answer(self) -> None:
            model, _, file = unquote(self.path.split("?")[0]).strip("/").partition("/resolve/main/")
            path = folders.get(model)
            if path is None or not (path / file).is_file():
                code = "EntryNotFound" if path else "RepoNotFound"
                self.reply(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            else:
                body = (path / file).read_bytes()
                digest = hashlib.sha1(body).hexdigest()
                self.reply(200, body, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})

        def reply(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        server.server_close()
