"""A small Hub on localhost, for the unmodified `huggingface_hub` client: models, commits, large files, tokens.

Large files travel as in Git LFS (`transfer: basic`). Xet, the Hub's other way, is not imitated: from huggingface_hub 2
on, the tests switch it off in the client's process (`HF_HUB_DISABLE_XET=1`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".png")


@dataclass(frozen=True)
class Blob:
    """A file's content; a large one lies elsewhere and is fetched after a redirect."""

    content: bytes
    large: bool

    @property
    def etag(self) -> str:
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits and the branches that point at them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        names = [f"{name}:{blob.etag}" for name, blob in sorted(files.items())]
        sha = hashlib.sha1("\n".join([str(len(self.commits)), *names]).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class RefusedError(Exception):
    """An answer that is an error, with the code by which the client knows it."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Answer:
    """An answer to a request: JSON, or bytes."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """The server, with the name of the user of each token; a test sees it and may change it while it runs."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        # How many of the next downloads of large files end in the middle, and whether uploads of them fail.
        self.cuts, self.refuses_uploads = 0, 0
        # Large files are kept by another host, as on the Hub: there the client sends no token.
        self.endpoint, self.large_files = "", ""
        self.lock = threading.Lock()

    def user(self, authorization: str | None) -> str | None:
        if not authorization:
            return None
        user = self.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return user

    def repository(self, name: str, user: str | None) -> Repository:
        found = self.repositories.get(name)
        if found is None or (found.private and user is None):
            raise RefusedError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return found

    def commit_of(self, name: str, revision: str, user: str | None) -> str:
        sha = self.repository(name, user).find(revision)
        if sha is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, name: str, revision: str, user: str | None) -> tuple[str, dict[str, Blob]]:
        repository = self.repository(name, user)
        if repository.gated and user != name.split("/")[0]:
            raise RefusedError(403 if user else 401, "GatedRepo", "Access to this model is restricted")
        sha = self.commit_of(name, revision, user)
        return sha, repository.commits[sha]

    def writable(self, name: str, user: str | None) -> Repository:
        if user != name.split("/")[0]:
            raise RefusedError(403 if user else 401, message="You may not write here")
        return self.repository(name, user)

    def whoami(self, user: str | None, **_: Any) -> Answer:
        if user is None:
            raise RefusedError(401, message="Log in first")
        return Answer({"type": "user", "name": user, "auth": {"accessToken": {"role": "write"}}})

    def create(self, user: str | None, body: Any, **_: Any) -> Answer:
        owner = body.get("organization") or user
        if user is None or owner != user:
            raise RefusedError(403 if user else 401, message="You may not create repositories there")
        name = f"{owner}/{body['name']}"
        exists = name in self.repositories
        if not exists:
            self.repositories[name] = Repository(bool(body.get("private")) or body.get("visibility") == "private")
            self.repositories[name].commit("main", {".gitattributes": Blob(b"", large=False)})
        return Answer({"url": f"{self.endpoint}/{name}", "name": name}, 409 if exists else 200)

    def validate(self, **_: Any) -> Answer:
        return Answer({"errors": [], "warnings": []})

    def info(self, user: str | None, name: str, revision: str = "main", **_: Any) -> Answer:
        repository, sha = self.repository(name, user), self.commit_of(name, revision, user)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        facts = {"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings}
        return Answer({**facts, "gated": "manual" if repository.gated else False, "tags": [], "downloads": 0})

    def tree(self, user: str | None, name: str, revision: str, path: str = "", **_: Any) -> Answer:
        files = self.files(name, revision, user)[1]
        inside = {file: blob for file, blob in files.items() if file.startswith(f"{path}/" if path else "")}
        if path and not inside:
            raise RefusedError(404, "EntryNotFound", f"{path} does not exist")
        return Answer([entry(file, blob) for file, blob in sorted(inside.items())])

    def paths_info(self, user: str | None, name: str, revision: str, raw: bytes, **_: Any) -> Answer:
        files = self.files(name, revision, user)[1]
        return Answer([entry(path, files[path]) for path in parse_qs(raw.decode())["paths"] if path in files])

    def branch(self, user: str | None, name: str, branch: str, **_: Any) -> Answer:
        repository = self.writable(name, user)
        if branch in repository.branches:
            raise RefusedError(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return Answer({})

    def preupload(self, user: str | None, name: str, body: Any, query: dict[str, Any], **_: Any) -> Answer:
        if "create_pr" not in query:
            self.writable(name, user)
        kinds = {True: "lfs", False: "regular"}
        paths = [file["path"] for file in body["files"]]
        files = [{"path": path, "uploadMode": kinds[path.endswith(LARGE)], "shouldIgnore": False} for path in paths]
        return Answer({"files": files})

    def lfs_batch(self, user: str | None, name: str, body: Any, **_: Any) -> Answer:
        self.repository(name, user)
        objects = [dict(one) for one in body["objects"]]
        for one in objects:
            if one["oid"] not in self.large:
                one["actions"] = {"upload": {"href": f"{self.large_files}/large/{one['oid']}"}}
        return Answer({"transfer": "basic", "objects": objects})

    def put_large(self, oid: str, raw: bytes, **_: Any) -> Answer:
        # As on the Hub, this address carries its own permission.
        if self.refuses_uploads:
            raise RefusedError(403, message="No room")
        if hashlib.sha256(raw).hexdigest() != oid:
            raise RefusedError(400, message="Not what was announced")
        self.large[oid] = raw
        return Answer({})

    def get_large(self, oid: str, **_: Any) -> Answer:
        if oid not in self.large:
            raise RefusedError(404, "EntryNotFound")
        return Answer(self.large[oid], headers={"ETag": f'"{oid}"'})

    def commit(
        self, user: str | None, name: str, revision: str, query: dict[str, Any], raw: bytes, **_: Any
    ) -> Answer:
        proposed = "create_pr" in query
        repository = self.repository(name, user) if proposed else self.writable(name, user)
        files = dict(repository.commits[self.commit_of(name, revision, user)])
        for line in raw.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif operation["key"] == "lfsFile":
                files[value["path"]] = Blob(self.large[value["oid"]], large=True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
        sha = repository.commit(f"refs/pr/{number}" if proposed else revision, files)
        page = f"{self.endpoint}/{name}"
        address = {"pullRequestUrl": f"{page}/discussions/{number}"} if proposed else {}
        return Answer({"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", **address})

    def set(self, name: str, number: str, **_: Any) -> Answer:
        setattr(self, name, int(number))
        return Answer({})

    def resolve(self, user: str | None, name: str, revision: str, path: str, **_: Any) -> Answer:
        sha, files = self.files(name, revision, user)
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            raise RefusedError(404, "EntryNotFound", f"{path} does not exist")
        blob = files[path]
        if not blob.large:
            return Answer(blob.content, headers={**headers, "ETag": f'"{blob.etag}"'})
        headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.etag}"'}
        return Answer(b"", 302, {**headers, "Location": f"{self.large_files}/large/{blob.etag}"})


def entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file as the tree lists it."""
    facts = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.etag}
    return facts | ({"lfs": {"oid": blob.etag, "size": len(blob.content), "pointerSize": 134}} if blob.large else {})


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate),
    ("GET", rf"/api/models/{NAME}", Hub.info),
    ("GET", rf"/api/models/{NAME}/revision/{REVISION}", Hub.info),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}(?:/(?P<path>.+))?", Hub.tree),
    ("POST", rf"/api/models/{NAME}/paths-info/{REVISION}", Hub.paths_info),
    ("POST", rf"/api/models/{NAME}/branch/(?P<branch>[^/]+)", Hub.branch),
    ("POST", rf"/api/models/{NAME}/preupload/{REVISION}", Hub.preupload),
    ("POST", rf"/api/models/{NAME}/commit/{REVISION}", Hub.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("PUT", r"/large/(?P<oid>\w+)", Hub.put_large),
    ("GET", r"/large/(?P<oid>\w+)", Hub.get_large),
    # For a test in another process.
    ("POST", r"/test/(?P<name>cuts|refuses_uploads)/(?P<number>\d+)", Hub.set),
    ("GET", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Hub.resolve),
]


class Handler(BaseHTTPRequestHandler):
    """Reads a request, finds its route, writes the answer."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def answer(self) -> None:
        raw = self.read_body()
        address = urlsplit(self.path)
        with self.hub.lock:
            self.hub.requests.append((self.command, address.path))
            try:
                answer = self.route(address.path, parse_qs(address.query, keep_blank_values=True), raw)
            except RefusedError as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
                answer = Answer({"error": refused.message}, refused.status, headers)
        self.write(answer, address.path)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self, path: str, query: dict[str, Any], raw: bytes) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                is_json = self.headers.get_content_type().endswith(("/json", "+json"))
                body = json.loads(raw) if raw and is_json else None
                if path.startswith("/large/") and "Authorization" in self.headers:
                    raise RefusedError(400, message="A token was sent to another host")
                user = self.hub.user(self.headers.get("Authorization"))
                return handle(self.hub, user=user, body=body, raw=raw, query=query, **values)
        raise RefusedError(404, message=f"There is no {method} {path} here")

    def write(self, answer: Answer, path: str) -> None:
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        start, asked = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and answer.status == 200:
            start = int(asked[1])
            answer.status = 206
            answer.headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        content = content[start:]
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.hub.lock:
            cut = self.hub.cuts > 0 and self.command == "GET" and path.startswith("/large/")
            self.hub.cuts -= cut
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut


@contextmanager
def running_hub(tokens: dict[str, str]) -> Iterator[Hub]:
    """A Hub that runs until the context ends."""
    hub = Hub(tokens)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint, hub.large_files = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
