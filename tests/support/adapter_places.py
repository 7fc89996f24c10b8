"""A hub and a registry of containers on loopback, for adapters: what their clients ask of them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TITLE = "org.opencontainers.image.title"
Files = Mapping[str, bytes]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass
class Places:
    """Both, on one port. `asked`: the paths of all requests."""

    address: str = ""
    repositories: dict[tuple[str, str], Files] = field(default_factory=dict)  # name, revision
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], bytes] = field(default_factory=dict)  # repository, tag
    asked: list[str] = field(default_factory=list)
    fails: int = 0  # answer so, to everything

    def publish(self, name: str, files: Files, revision: str = "main") -> str:
        """Put a commit into a repository of the hub; its id."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repositories[name, revision] = self.repositories[name, commit] = files
        return commit

    def push(self, repository: str, tag: str, files: Files) -> str:
        """Put an artifact into the registry; its manifest's digest."""
        layers = []
        for name, content in files.items():
            digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
            self.blobs[digest] = content
            layers.append({"digest": digest, "size": len(content), "annotations": {TITLE: name}})
        manifest = json.dumps({"schemaVersion": 2, "layers": layers}).encode()
        digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        self.manifests[repository, tag] = self.manifests[repository, digest] = manifest
        return digest

    def answer(self, path: str) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body."""
        path = path.partition("?")[0]
        if self.fails:
            return self.fails, {}, b"{}"
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            name, revision = found[1], found[2] or "main"
            files = self.repositories.get((name, revision))
            if files is None:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            siblings = [{"rfilename": each, "size": len(files[each])} for each in files]
            told = {"id": name, "sha": self.publish(name, files, revision), "siblings": siblings}
            return 200, {"Content-Type": "application/json"}, json.dumps(told).encode()
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            content = self.repositories.get((found[1], found[2]), {}).get(found[3])
            if content is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            etag = hashlib.sha1(content).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": found[2]}, content
        if found := re.fullmatch(r"/v2/(.+)/manifests/(.+)", path):
            manifest = self.manifests.get((found[1], found[2]))
            return (404, {}, b"{}") if manifest is None else (200, {}, manifest)
        if found := re.fullmatch(r"/v2/(.+)/blobs/(.+)", path):
            blob = self.blobs.get(found[2])
            return (404, {}, b"{}") if blob is None else (200, {}, blob)
        return 404, {}, b""


@contextmanager
def adapter_places() -> Iterator[Places]:
    """Run both on a free port; the hub's library asks this hub."""
    from huggingface_hub import constants

    places = Places()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            places.asked.append(self.path)
            status, headers, body = places.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    places.address = f"127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", f"http://{places.address}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"http://{places.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        try:
            yield places
        finally:
            server.shutdown()
            server.server_close()
