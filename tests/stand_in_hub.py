"""Hubs of one process on 127.0.0.1: one takes a commit, through LFS too, and serves what it took; one serves a set."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

TOKEN = "hf_stand_in_token"
COMMIT = "1" * 40


class Handler(BaseHTTPRequestHandler):
    """How both answer."""

    commit_id = COMMIT

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def answer_file(self, content: bytes, status: int = 200) -> None:
        self.answer(status, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=self.commit_id)

    def log_message(self, *_: object) -> None:
        """Nothing: the test knows what it asked."""


class StandInHub(Handler):
    """repos: files by repository and path; private: those that were made private; blobs: what LFS holds, by SHA-256;
    seen: method, path, authorization.
    """

    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, bytes]]
    private: set[str]
    blobs: dict[str, bytes]
    seen: list[tuple[str, str, str | None]]
    refuses = False

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.seen.append((self.command, path, self.headers.get("Authorization")))
        for pattern, method in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                writes = self.command == "POST"
                if writes and (self.refuses or self.headers.get("Authorization") != f"Bearer {TOKEN}"):
                    return self.answer_json({"error": "This token may not write."}, 403)
                return method(self, body, *match.groups())
        self.answer_json({"error": f"no such path: {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        existed = name in self.repos
        self.repos.setdefault(name, {})
        # newer clients send visibility, older ones private
        if not existed and (asked.get("visibility") == "private" or asked.get("private") is True):
            self.private.add(name)
        self.answer_json({"url": f"{self.base}/{name}", "name": name, "id": name}, 409 if existed else 200)

    def model_info(self, body: bytes, repo: str) -> None:
        if repo not in self.repos:
            return self.answer(404, X_Error_Code="RepoNotFound")
        self.answer_json({"id": repo, "sha": COMMIT, "private": repo in self.private, "tags": [], "siblings": []})

    def validate_yaml(self, body: bytes) -> None:
        self.answer_json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        modes = {True: "lfs", False: "regular"}
        files = [
            {"path": file["path"], "uploadMode": modes[file["path"].endswith(".safetensors")], "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self.answer_json({"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.base}/blobs/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self.answer_json({"transfer": "basic", "objects": objects})

    def put_blob(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.blobs[oid] = body
        self.answer(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                self.repos[repo][line["value"]["path"]] = self.blobs[line["value"]["oid"]]
        self.answer_json({"commitUrl": f"{self.base}/{repo}/commit/1", "commitOid": COMMIT})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        content = self.repos.get(repo, {}).get(path)
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound" if repo in self.repos else "RepoNotFound")
        self.answer_file(content)

    ROUTES = [
        ("/api/repos/create", create),
        ("/api/validate-yaml", validate_yaml),
        ("/api/models/([^/]+/[^/]+)", model_info),
        ("/api/models/([^/]+/[^/]+)/preupload/([^/]+)", preupload),
        ("/([^/]+/[^/]+)[.]git/info/lfs/objects/batch", lfs_batch),
        ("/blobs/(.+)", put_blob),
        ("/api/models/([^/]+/[^/]+)/commit/([^/]+)", commit),
        ("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
    ]

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves on a free port until the end; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def stand_in_hub(refuses: bool = False) -> Iterator[tuple[str, type[StandInHub]]]:
    """Its address, and the class that holds what it took."""
    state = type("Hub", (StandInHub,), {"repos": {}, "private": set(), "blobs": {}, "seen": [], "refuses": refuses})
    with serving(state) as address:
        yield address, state


class SetHub(Handler):
    """What is asked of the Hub for a set, to download or to stream it: one set, whose files lie in a folder."""

    folder: Path
    asked: list[tuple[str, int, int]]  # the ranges of files that were served
    fail: Callable[[str, int], int]  # file name and first byte to a status, 0 for none

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        files = sorted(self.folder.iterdir())
        if path.startswith("/api/") and "/tree/" in path:
            found = [
                {"type": "file", "path": file.name, "oid": file.name, "size": file.stat().st_size} for file in files
            ]
            return self.answer_json([] if path.endswith("/data") else found)
        if path.startswith("/api/"):
            siblings = [{"rfilename": file.name} for file in files]
            facts = {
                "id": "owner/pets",
                "sha": self.commit_id,
                "private": False,
                "tags": [],
                "downloads": 0,
                "siblings": siblings,
            }
            return self.answer_json(facts)
        file = self.folder / path.rpartition("/")[2]
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        data, status = file.read_bytes(), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            first, last = map(int, asked.groups())
            status = self.fail(file.name, first) or 206
            if status == 206:
                self.asked.append((file.name, first, last))
            data = data[first : last + 1] if status == 206 else b""
        if status == 404:
            return self.answer(404, X_Error_Code="EntryNotFound")
        self.answer_file(data, status)

    do_HEAD = do_GET


@contextmanager
def set_hub(folder: Path) -> Iterator[tuple[str, type[SetHub]]]:
    """Its address, and the class that tells what it served."""
    state = type("Hub", (SetHub,), {"folder": folder, "asked": [], "fail": staticmethod(lambda name, first: 0)})
    with serving(state) as address:
        yield address, state
