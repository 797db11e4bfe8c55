"""A hub on this machine: what huggingface_hub asks of one, over HTTP, for folders of files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"
LARGE = (".safetensors", ".gguf", ".bin")


@dataclass
class Repository:
    """A model on the hub."""

    revisions: dict[str, tuple[str, Path]]  # name -> (commit, folder of its files)
    is_gated: bool = False
    refused: frozenset[str] = frozenset()  # files that are listed, and may not be read


@dataclass
class LocalHub:
    """The hub, and what was asked of it."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    goes_on: Event = field(default_factory=Event)
    pause_after: int | None = None  # bytes of a large file after which nothing more comes
    store: str | None = None  # address of this server under another name, which has the large files
    tokens: list[tuple[str, str | None]] = field(default_factory=list)  # path, Authorization

    def add(self, repo: str, folder: Path, *, is_gated: bool = False) -> None:
        revisions = {"main": (COMMIT, folder), COMMIT: (COMMIT, folder)}
        self.repositories[repo] = Repository(revisions, is_gated)

    def add_revision(self, repo: str, name: str, folder: Path) -> None:
        self.repositories[repo].revisions |= {name: (OTHER, folder), OTHER: (OTHER, folder)}

    def fetched(self) -> list[str]:
        """Paths of the files whose contents were asked for."""
        return [
            path.split("/", 5)[5]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]


def blob_of(path: Path) -> str:
    """The hub's ETag: the SHA-256 of a large file, git's hash of another."""
    raw = path.read_bytes()
    if path.suffix in LARGE:
        return hashlib.sha256(raw).hexdigest()
    return hashlib.sha1(f"blob {len(raw)}\0".encode() + raw).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        wanted = self.headers.get("Range")
        self.hub.requests.append((self.command, self.path, wanted))
        self.hub.tokens.append((self.path, self.headers.get("Authorization")))
        path = self.path.partition("?")[0]
        if path.startswith("/store/"):
            path = path.removeprefix("/store")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3], wanted)
        else:
            self._refuse(404, "EntryNotFound")

    def _find(self, repo: str, revision: str) -> tuple[str, Path] | None:
        if repo not in self.hub.repositories:
            self._refuse(401, "RepoNotFound")  # as the hub says to who has no token
        elif revision not in self.hub.repositories[repo].revisions:
            self._refuse(404, "RevisionNotFound")
        else:
            return self.hub.repositories[repo].revisions[revision]
        return None

    def _info(self, repo: str, revision: str) -> None:
        if (found := self._find(repo, revision)) is None:
            return
        commit, folder = found
        siblings = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            size = path.stat().st_size
            entry = {
                "rfilename": path.relative_to(folder).as_posix(),
                "size": size,
                "blobId": "0" * 40,
            }
            if path.suffix in LARGE:
                entry["lfs"] = {"sha256": blob_of(path), "size": size, "pointerSize": 130}
            else:
                entry["blobId"] = blob_of(path)
            siblings.append(entry)
        self._send(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode(), {})

    def _file(self, repo: str, revision: str, name: str, wanted: str | None) -> None:
        if (found := self._find(repo, revision)) is None:
            return
        commit, folder = found
        is_stored = self.path.startswith("/store/")
        is_gated = self.hub.repositories[repo].is_gated and not is_stored
        if is_gated and not self.headers.get("Authorization"):
            self._refuse(401, "GatedRepo")
            return
        if name in self.hub.repositories[repo].refused:
            self._refuse(403, "Forbidden")
            return
        if not (folder / name).is_file():
            self._refuse(404, "EntryNotFound")
            return
        if self.hub.store and name.endswith(LARGE) and not self.path.startswith("/store/"):
            self._send(302, b"", {"Location": f"{self.hub.store}/store{self.path}?signature=x"})
            return
        raw = (folder / name).read_bytes()
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{blob_of(folder / name)}"',
            "Accept-Ranges": "bytes",
        }
        if wanted is None:
            self._send(200, raw, headers, pauses=name.endswith(LARGE))
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(len(raw), int(last or len(raw)) + 1)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(raw)}"
        self._send(206, raw[start:stop], headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], *, pauses: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if pauses and self.hub.pause_after is not None:
            self.wfile.write(body[: self.hub.pause_after])
            self.wfile.flush()
            self.hub.goes_on.wait()
            self.close_connection = True
            return
        self.wfile.write(body)


@contextmanager
def serve_hub() -> Iterator[LocalHub]:
    """Serve until the end of the block; HF_ENDPOINT is `url`."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub = handler.hub = LocalHub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.goes_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
