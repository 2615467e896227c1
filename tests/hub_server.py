"""A small Hub on the loopback address, so that pushing and loading are tested through huggingface_hub itself.

It keeps model repositories in memory and serves the calls that a push and a download make; everything else is a 404.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_that_may_write"
USER = "tester"


class HubServer:
    """Repositories as {id: {branch: commit}}, commits as {hash: {path: bytes}}; `requests` is what was asked.

    Only `TOKEN` may write, and only under `USER`. Files whose path ends in `lfs_suffix` go through LFS.
    """

    def __init__(self):
        self.repos, self.commits, self.lfs_objects, self.private = {}, {}, {}, set()
        self.requests, self.lfs_suffix = [], None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.handle_error = lambda *_: None  # of a client that was killed, which is what some tests are about
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def start(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.repos[repo_id].get(revision, revision)]

    def commit(self, repo_id: str, revision: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(f"{len(self.commits)} {repo_id} {sorted(files)}".encode()).hexdigest()
        self.commits[digest] = files
        self.repos[repo_id][revision] = digest
        return digest


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args):
        pass

    def _answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                return getattr(self, name)(**match.groupdict())
        return self._answer(404, {"error": "no such page"}, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _commit_of(self, repo, revision="main"):
        """The commit asked for, or None after a 401 or 404 has been sent."""
        if repo not in self.hub.repos or (repo in self.hub.private and not self.known):
            self._answer(404 if self.known else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        digest = self.hub.repos[repo].get(revision or "main", revision)
        if digest not in self.hub.commits:
            self._answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return None
        return digest

    def _may_write(self, owner):
        if not self.known:
            self._answer(401, {"error": "Invalid user token."})
        elif owner != USER:
            self._answer(403, {"error": f"You don't have the rights to write to {owner}"})
        return self.known and owner == USER

    def create(self):
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or USER
        if not self._may_write(owner):
            return
        repo = f"{owner}/{wanted['name']}"
        exists = repo in self.hub.repos
        if not exists:
            self.hub.repos[repo] = {}
            self.hub.commit(repo, "main", {})
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(repo)
        self._answer(409 if exists else 200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def branch(self, repo, revision):
        if self._may_write(repo.split("/")[0]):
            exists = revision in self.hub.repos[repo]
            self.hub.repos[repo].setdefault(revision, self.hub.repos[repo]["main"])
            self._answer(409 if exists else 200, {})

    def validate_yaml(self):
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        if self._may_write(repo.split("/")[0]):
            suffix = self.hub.lfs_suffix
            files = [{"path": file["path"], "shouldIgnore": False} for file in json.loads(self.body)["files"]]
            for file in files:
                file["uploadMode"] = "lfs" if suffix and file["path"].endswith(suffix) else "regular"
            self._answer(200, {"files": files})

    def lfs_batch(self, repo):
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        self.hub.lfs_objects[oid] = self.body
        self._answer(200)

    def commit(self, repo, revision):
        if not self._may_write(repo.split("/")[0]) or self._commit_of(repo, revision) is None:
            return
        files = dict(self.hub.files(repo, revision))
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"])
        digest = self.hub.commit(repo, revision, files)
        url = f"{self.hub.url}/{repo}/commit/{digest}"
        self._answer(200, {"success": True, "commitOid": digest, "commitUrl": url})

    def info(self, repo, revision=None):
        if (digest := self._commit_of(repo, revision)) is not None:
            siblings = [{"rfilename": path} for path in sorted(self.hub.commits[digest])]
            private = repo in self.hub.private
            self._answer(200, {"id": repo, "sha": digest, "private": private, "tags": [], "siblings": siblings})

    def tree(self, repo, revision):
        if (digest := self._commit_of(repo, revision)) is not None:
            files = self.hub.commits[digest].items()
            oids = {path: hashlib.sha1(content).hexdigest() for path, content in files}
            self._answer(200, [{"type": "file", "path": p, "size": len(c), "oid": oids[p]} for p, c in files])

    def resolve(self, repo, revision, path):
        if (digest := self._commit_of(repo, revision)) is None:
            return None
        content = self.hub.commits[digest].get(path)
        if content is None:
            return self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=digest)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._answer(200, content, ETag=etag, X_Repo_Commit=digest, Accept_Ranges="none")


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", f"/api/models/{_REPO}/branch/{_REVISION}", "branch"),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]+)", "lfs_put"),
    ("GET", f"/api/models/{_REPO}", "info"),
    ("GET", f"/api/models/{_REPO}/revision/{_REVISION}", "info"),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}", "tree"),
    ("HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
]
