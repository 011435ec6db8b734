"""A hub in this process: as much of huggingface.co's HTTP as its client needs to download and upload models."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    """A model: the files of every commit, and the commits of branches.

    gated    its files are for those who have asked, and TOKEN has not
    private  it is there for TOKEN only
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Makes these the files of the branch."""
        digest = hashlib.sha1(f"{branch} {len(self.commits)}".encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + hashlib.sha256(content).digest())
        self.commits[digest.hexdigest()] = dict(files)
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


@dataclass(frozen=True)
class Request:
    """range: as the header says; sent: bytes of the answer's body."""

    method: str
    path: str
    range: str | None
    sent: int


class Hub(ThreadingHTTPServer):
    """Of repositories by name. Faults that tests ask for:

    refused  pattern of a path -> the status it is answered with
    cut      file name -> bytes after which the connection breaks, once
    room     commits that are still accepted; None for any number
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.refused: dict[str, int] = {}
        self.cut: dict[str, int] = {}
        self.room: int | None = None
        self.changed: list[set[str]] = []  # names of the files in every commit that was uploaded
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, folder: Path, **traits: bool) -> Repository:
        repository = self.repositories[name] = Repository(**traits)
        repository.commit({path.name: path.read_bytes() for path in folder.iterdir()})
        return repository

    def fetched(self, suffix: str, *, ranges: bool = False) -> list[str]:
        """Names of the files of which bodies were sent, whole or, if asked for, in part."""
        return [
            request.path.rsplit("/", 1)[-1]
            for request in self.requests
            if request.method == "GET" and request.path.endswith(suffix) and (request.range is not None) == ranges
        ]


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **document: str):
        self.status, self.code, self.message, self.document = status, code, message, document


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for pattern, status in self.server.refused.items():
                if fnmatch(path, pattern):
                    raise _Refused(status, message="as the test wants it")
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._send_file(path, *found.groups())
            elif self.command == "POST":
                self._send_json(path, self._change(path, body))
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", path):
                name, kind, revision = found.groups()
                commit, files = self._files(name, revision or "main")
                listed = [_entry(name, content) for name, content in files.items()]
                siblings = [{"rfilename": name} for name in files]
                document = listed if kind == "tree" else {"id": name, "sha": commit, "siblings": siblings}
                self._send_json(path, document)
            else:
                raise _Refused(404, message=f"this hub has no {path}")
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            document = {"error": refused.message, **refused.document}
            self._send(path, json.dumps(document).encode(), refused.status, headers)

    def _repository(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            raise _Refused(401, message="Invalid credentials in Authorization header")
        if repository is None or (repository.private and not token):
            raise _Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        return repository

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(name)
        commit = repository.find(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def _send_file(self, path: str, name: str, revision: str, file: str) -> None:
        commit, files = self._files(name, revision)
        if self._repository(name).gated:
            raise _Refused(403, "GatedRepo", f"Access to model {name} is restricted")
        if file not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        content, status = files[file], 200
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_digest(content)}"', "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        whole = self.command == "GET" and status == 200
        self._send(path, content, status, headers, cut=self.server.cut.pop(file, None) if whole else None)

    def _change(self, path: str, body: bytes) -> Any:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused(401, message="Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "me":
                raise _Refused(
                    403, message=f"You don't have the rights to create a model under {asked['organization']}"
                )
            if name in self.server.repositories:
                url = f"{self.server.url}/{name}"
                raise _Refused(409, message="You already created this model repo", url=url)
            private = asked.get("private") is True or asked.get("visibility") == "private"
            self.server.repositories[name] = Repository(private=private)
            self.server.repositories[name].commit({".gitattributes": b""})
            return {"url": f"{self.server.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return {"warnings": [], "errors": []}
        name, kind, revision = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path).groups()
        if kind == "branch":
            repository = self._repository(name)
            if revision in repository.branches:
                raise _Refused(409, message="Reference already exists")
            repository.branches[revision] = repository.branches["main"]
            return {}
        _, files = self._files(name, revision)
        if kind == "preupload":
            asked = [entry["path"] for entry in json.loads(body)["files"]]
            oids = {name: _git_oid(files[name]) for name in asked if name in files}
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in asked]
            return {"files": [mode | {"oid": oids.get(mode["path"])} for mode in modes]}
        if self.server.room is not None:
            self.server.room -= 1
            if self.server.room < 0:
                raise _Refused(403, message="storage limit reached")
        lines = [json.loads(line) for line in body.splitlines()]
        added = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
        deleted = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
        kept = {name: content for name, content in files.items() if name not in deleted}
        new = {name: base64.b64decode(content) for name, content in added.items()}
        self.server.changed.append(set(new))
        commit = self._repository(name).commit(kept | new, revision)
        return {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit}

    def _send_json(self, path: str, document: Any) -> None:
        self._send(path, json.dumps(document).encode(), 200, {"Content-Type": "application/json"})

    def _send(self, path: str, content: bytes, status: int, headers: dict[str, str], cut: int | None = None) -> None:
        sent = content if self.command != "HEAD" else b""
        sent = sent if cut is None else sent[:cut]
        self.server.requests.append(Request(self.command, path, self.headers.get("Range"), len(sent)))
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection = self.close_connection or (len(sent) < len(content) and self.command != "HEAD")


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _git_oid(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
