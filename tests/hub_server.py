"""A small Hub on localhost, for the unmodified `huggingface_hub` client: models, data sets, commits, tokens.

Files of every size come with the commit, as small ones do on the Hub. Xet, its way for large ones, is not imitated:
the tests switch it off in the client's process (`HF_HUB_DISABLE_XET=1`).
"""

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


@dataclass
class Repository:
    """Commits and the branches that point at them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        names = [f"{name}:{etag(content)}" for name, content in sorted(files.items())]
        sha = hashlib.sha1("\n".join([str(len(self.commits)), *names]).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


def etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class RefusedError(Exception):
    """An answer that is an error, with the code by which the client knows it."""

    status: int
    code: str = ""
    message: str = ""


@dataclass
class Answer:
    """An answer to a request: JSON, or bytes."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """The server, with the name of the user of each token; a test sees it and may change it while it runs."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens, self.endpoint = tokens, ""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
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

    def files(self, name: str, revision: str, user: str | None) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(name, user)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def create(self, user: str | None, body: Any, **_: Any) -> Answer:
        owner = body.get("organization") or user
        if user is None or owner != user:
            raise RefusedError(403 if user else 401, message="You may not create repositories there")
        kind = body.get("type") or "model"
        name = f"{'' if kind == 'model' else f'{kind}s/'}{owner}/{body['name']}"
        exists = name in self.repositories
        if not exists:
            self.repositories[name] = Repository(bool(body.get("private")) or body.get("visibility") == "private")
            self.repositories[name].commit("main", {".gitattributes": b""})
        return Answer({"url": f"{self.endpoint}/{name}", "name": name}, 409 if exists else 200)

    def validate(self, **_: Any) -> Answer:
        return Answer({"errors": [], "warnings": []})

    def info(self, user: str | None, name: str, revision: str = "main", **_: Any) -> Answer:
        sha, files = self.files(name, revision, user)
        private, siblings = self.repositories[name].private, [{"rfilename": path} for path in sorted(files)]
        name = name.removeprefix("datasets/")
        return Answer({"id": name, "sha": sha, "private": private, "siblings": siblings, "tags": [], "downloads": 0})

    def tree(self, user: str | None, name: str, revision: str, query: Any, path: str = "", **_: Any) -> Answer:
        found = sorted(self.files(name, revision, user)[1].items())
        inside = [(file, content) for file, content in found if file.startswith(f"{path}/" if path else "")]
        if path and not inside:
            raise RefusedError(404, "EntryNotFound", f"{path} does not exist")
        about = {file: {"type": "file", "size": len(content), "oid": etag(content)} for file, content in inside}
        if query.get("recursive", ["false"])[0].lower() == "false":
            depth = len(path.split("/")) + 1 if path else 1
            tops = {"/".join(file.split("/")[:depth]): one for file, one in about.items()}
            about = {top: one if top in about else {**one, "type": "directory"} for top, one in tops.items()}
        return Answer([{"path": file, **one} for file, one in about.items()])

    def branch(self, user: str | None, name: str, branch: str, **_: Any) -> Answer:
        repository = self.repository(name, user)
        if branch in repository.branches:
            raise RefusedError(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return Answer({})

    def preupload(self, body: Any, **_: Any) -> Answer:
        kind = {"uploadMode": "regular", "shouldIgnore": False}
        return Answer({"files": [{"path": file["path"], **kind} for file in body["files"]]})

    def commit(self, user: Any, name: str, revision: str, query: Any, raw: bytes, **_: Any) -> Answer:
        repository, files = self.repository(name, user), dict(self.files(name, revision, user)[1])
        for operation in map(json.loads, raw.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        proposed = "create_pr" in query
        number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
        sha = repository.commit(f"refs/pr/{number}" if proposed else revision, files)
        page = f"{self.endpoint}/{name}"
        address = {"pullRequestUrl": f"{page}/discussions/{number}"} if proposed else {}
        return Answer({"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", **address})

    def resolve(self, user: str | None, name: str, revision: str, path: str, **_: Any) -> Answer:
        sha, files = self.files(name, revision, user)
        if path not in files:
            raise RefusedError(404, "EntryNotFound", f"{path} does not exist")
        return Answer(files[path], headers={"X-Repo-Commit": sha, "ETag": f'"{etag(files[path])}"'})


# Of Spaces and data sets, the kind is part of the name.
NAME, REVISION = r"(?P<name>(?:spaces/|datasets/)?[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ANY = rf"(?:models/)?{NAME}"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate),
    ("GET", rf"/api/{ANY}", Hub.info),
    ("GET", rf"/api/{ANY}/revision/{REVISION}", Hub.info),
    ("GET", rf"/api/{ANY}/tree/{REVISION}(?:/(?P<path>.+))?", Hub.tree),
    ("POST", rf"/api/{ANY}/branch/(?P<branch>[^/]+)", Hub.branch),
    ("POST", rf"/api/{ANY}/preupload/{REVISION}", Hub.preupload),
    ("POST", rf"/api/{ANY}/commit/{REVISION}", Hub.commit),
    ("GET", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Hub.resolve),
]


class Handler(BaseHTTPRequestHandler):
    """Reads a request, finds its route, writes the answer."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

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
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = answer  # noqa: N815

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
                user = self.hub.user(self.headers.get("Authorization"))
                return handle(self.hub, user=user, body=body, raw=raw, query=query, **values)
        raise RefusedError(404, message=f"There is no {method} {path} here")


@contextmanager
def running_hub(tokens: dict[str, str]) -> Iterator[Hub]:
    """A Hub that runs until the context ends."""
    hub = Hub(tokens)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub})) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
