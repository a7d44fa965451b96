"""The parts of the Hugging Face Hub that its real client asks for, on loopback: model info, resolve, ranges, gates."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repos by name as folders; `gated` ones need the token "hf_good"; `served` lists the files sent, with their bytes."""

    repos: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    served: list[tuple[str, int]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    cut_after: int | None = None
    head_only: bool = False
    url: str = ""
    commit: str = COMMIT

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    @contextmanager
    def as_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
        """Running, and huggingface_hub asks it, whatever the environment says."""
        with self.running():
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(constants, "ENDPOINT", self.url)
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
            yield self

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlparse(request.path).path)
        self.tokens.append(request.headers.get("authorization"))
        repo = next((name for name in self.repos if f"/{name}/" in f"{path}/"), None)
        if repo is None:
            return self.refuse(request, 401, "RepoNotFound")
        if "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", self.commit):
            return self.refuse(request, 404, "RevisionNotFound")
        if path.startswith("/api/"):
            return self.send_json(request, self.info(repo, path))
        if repo in self.gated and request.headers.get("authorization") != "Bearer hf_good":
            return self.refuse(request, 401, "GatedRepo")
        return self.send_file(request, repo, path.split("/resolve/", 1)[1].split("/", 1)[1], body)

    def info(self, repo: str, path: str) -> Any:
        files = {p.relative_to(self.repos[repo]).as_posix(): p for p in sorted(self.repos[repo].rglob("*")) if p.is_file()}
        if "/tree/" in path:
            return [{"type": "file", "path": n, "size": p.stat().st_size, "oid": self.etag(p)} for n, p in files.items()]
        siblings = [{"rfilename": n, "size": p.stat().st_size, "blobId": self.etag(p)} for n, p in files.items()]
        return {"id": repo, "modelId": repo, "sha": self.commit, "siblings": siblings, "tags": [], "private": False}

    @staticmethod
    def etag(path: Path) -> str:
        return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()

    def send_file(self, request: BaseHTTPRequestHandler, repo: str, name: str, body: bool) -> None:
        path = self.repos[repo] / name
        if not path.is_file():
            return self.refuse(request, 404, "EntryNotFound")
        data = path.read_bytes()
        asked = request.headers.get("range", "bytes=0-").removeprefix("bytes=").split("-")
        start, last = int(asked[0]), int(asked[1] or len(data) - 1)
        if self.head_only and name.endswith(".safetensors"):
            last = min(last, 8 + int.from_bytes(data[:8], "little") - 1)
        part = data[start : last + 1]
        partial = len(part) < len(data)
        request.send_response(206 if partial else 200)
        request.send_header("ETag", f'"{self.etag(path)}"')
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("Content-Length", str(len(part)))
        if partial:
            request.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        request.end_headers()
        if not body:
            return None
        sent = part if self.cut_after is None or not name.endswith(".safetensors") else part[: self.cut_after]
        self.served.append((name, len(sent)))
        request.wfile.write(sent)
        if len(sent) < len(part):
            self.cut_after = None
            request.close_connection = True
            request.connection.close()
        return None

    def refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def send_json(self, request: BaseHTTPRequestHandler, value: Any) -> None:
        raw = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(raw)))
        request.end_headers()
        request.wfile.write(raw)
