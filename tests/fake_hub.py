"""The part of the Hub's HTTP API that publishing uses, on a real socket of this machine, with faults on
request.

It keeps what a careless client could get wrong: tokens and their rights, private and public repositories, a
head commit that a commit may name as its parent, large files that must have arrived before a commit
mentions them, and the hashes by which files are compared. Faults: a status, silence (a timeout), a dropped
connection; before or after the effect.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SILENCE_S = 30.0  # how long a silent server keeps a connection open
TOKEN = "hf_" + "s3cr3t" * 6


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    large: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    kind: tuple[str, str | None] = ("model", None)  # and the SDK of a Space

    def commit(self) -> str:
        self.commits.append(hashlib.sha1(f"{len(self.commits)}{sorted(self.files)}".encode()).hexdigest())
        return self.commits[-1]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match."""

    method: str
    path: str
    how: int | str  # a status, "silence" or "drop"
    times: int = 1
    after: bool = False  # whether the request takes effect first
    body: dict = field(default_factory=dict)


class FakeHub:
    """Use as a context manager; `url` is the endpoint."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.writers = {TOKEN: "me"}
        self.lose_on_commit: str | None = None  # a path that the server forgets although it answers 200
        self.before_commit = None
        self.create_public = False
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.closing = threading.Event()

    def __enter__(self) -> "FakeHub":
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.closing.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def add(self, repo_id: str, *, private: bool = True, **files: bytes) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.files |= {name.replace("__", "."): content for name, content in files.items()}
        repo.commit()
        return repo

    def fail(self, method: str, path: str, how: int | str, **options) -> None:
        self.faults.append(Fault(method, path, how, **options))

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_HEAD = do_GET

    def _handle(self) -> None:
        path = self.path.split("?")[0]
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._read_chunks()
        self.hub.requests.append(f"{self.command} {path}")
        fault = next(
            (
                f
                for f in self.hub.faults
                if f.times > 0 and f.method == self.command and re.search(f.path, path)
            ),
            None,
        )
        if fault is not None:
            fault.times -= 1
            if not fault.after:
                return self._misbehave(fault)
        try:
            answer = self._route(path)
        except _Refusal as refusal:
            return self._send(refusal.status, {"error": refusal.message}, refusal.code)
        if fault is not None:
            return self._misbehave(fault)
        self._send(200, answer)

    def _misbehave(self, fault: Fault) -> None:
        if fault.how == "silence":
            self.hub.closing.wait(SILENCE_S)
            self.close_connection = True
        elif fault.how == "drop":
            self.close_connection = True
            self.connection.close()
        else:
            self._send(int(fault.how), {"error": "injected"} | fault.body)

    def _send(self, status: int, content: object, code: str | None = None) -> None:
        data = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def _read_chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _route(self, path: str) -> object:
        if path.startswith("/storage/"):
            return self._store(path.removeprefix("/storage/"))
        user = self._user()
        if (self.command, path) == ("POST", "/api/validate-yaml"):
            return {"errors": [], "warnings": []}
        if (self.command, path) == ("POST", "/api/repos/create"):
            return self._create(user)
        path = path.replace("/spaces/", "/models/")  # a Space is a repository like another
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self._info(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            return self._preupload(self._repo(match[1], user))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(match[1], self._repo(match[1], user))
        if match := re.fullmatch(r"(?:/models)?/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(self._repo(match[1], user))
        if path == "/verify":
            body = json.loads(self.body)
            if len(self.hub.storage.get(body["oid"], b"")) != body["size"]:
                raise _Refusal(422, "size differs")
            return {}
        raise _Refusal(404, f"no route {self.command} {path}", "EntryNotFound")

    def _user(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.writers:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.writers[token]

    def _repo(self, repo_id: str, user: str) -> Repo:
        if repo_id not in self.hub.repos:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        if not repo_id.startswith(f"{user}/"):
            raise _Refusal(403, "You don't have the rights to create or change a model under this namespace")
        return self.hub.repos[repo_id]

    def _create(self, user: str) -> object:
        body = json.loads(self.body)
        repo_id = f"{body['organization']}/{body['name']}"
        if body["organization"] != user:
            raise _Refusal(
                403, f"You don't have the rights to create a model under the namespace {body['organization']}"
            )
        if repo_id in self.hub.repos:
            raise _Refusal(409, "You already created this model repo")
        private = body.get("visibility") == "private" or body.get("private") is True
        repo = self.hub.add(repo_id, private=private and not self.hub.create_public)
        repo.kind = body.get("type", "model"), body.get("sdk")
        return {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}

    def _info(self, repo_id: str) -> object:
        if repo_id not in self.hub.repos:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        repo = self.hub.repos[repo_id]
        siblings = []
        for name, content in repo.files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            lfs = {"sha256": sha256, "size": len(content), "pointerSize": 130} if name in repo.large else None
            siblings.append(
                {"rfilename": name, "size": len(content), "blobId": blob, **({"lfs": lfs} if lfs else {})}
            )
        return {
            "id": repo_id,
            "sha": repo.commits[-1],
            "private": repo.private,
            "siblings": siblings,
            "tags": [],
        }

    def _preupload(self, repo: Repo) -> object:
        files = json.loads(self.body)["files"]
        return {
            "files": [
                {
                    "path": f["path"],
                    "uploadMode": "lfs"
                    if f["path"].endswith((".safetensors", ".wav", ".png"))
                    else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
        }

    def _batch(self, repo: Repo) -> object:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.storage:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/storage/{wanted['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.url}/verify", "header": {}},
                }
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _store(self, oid: str) -> object:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "content does not match its hash")
        self.hub.storage[oid] = self.body
        return {}

    def _commit(self, repo_id: str, repo: Repo) -> object:
        if self.hub.before_commit is not None:
            self.hub.before_commit()
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.commits[-1]):
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        files, large = dict(repo.files), set(repo.large)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise _Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = self.hub.storage[value["oid"]]
                large.add(value["path"])
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        files.pop(self.hub.lose_on_commit, None)
        repo.files, repo.large = files, large
        oid = repo.commit()
        return {
            "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}",
            "commitOid": oid,
            "hookOutput": "",
            "success": True,
        }
