"""A hub on loopback that speaks what huggingface_hub asks of one: info, revision, refs, tree, resolve; lists by tag;
creating a repository and committing to it, large files by LFS (not by Xet, which has a protocol of its own).

Repositories are commits of real files in memory. Faults are put on a path for a number of requests: a status, a body
that breaks off, other bytes than listed, or silence. Run it by hand with `python tests/hub_server.py FOLDER PORT`: each
FOLDER/owner/name becomes a repository, and a change of its files a new commit.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

LFS_FROM = 10_000
"""Files from this size on are large ones (LFS): listed with their SHA-256."""


@dataclass
class Fault:
    """What goes wrong for requests whose path matches the glob `path`, `times` times (None: always)."""

    path: str
    kind: Literal["status", "truncated", "wrong_bytes", "hang"]
    status: int = 500
    seconds: float = 5.0
    times: int | None = None
    method: str = "*"


@dataclass
class Commit:
    sha: str
    files: dict[str, bytes]
    time: str


@dataclass
class Repository:
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    gated: bool = False


class Hub:
    """The server and its repositories; use as a context manager. `requests` lists (method, path) as they came.

    `resumed` lists the files of which a later part was asked for.
    """

    def __init__(self, port: int = 0) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.resumed: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self._guard = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def push(
        self,
        repo_id: str,
        source: Path | Mapping[str, bytes],
        *,
        branch: str = "main",
        tags: tuple[str, ...] = (),
        kind: str = "models",
    ) -> str:
        """Commit the files of a folder (or a mapping) to `branch`; returns the commit's sha."""
        if isinstance(source, Path):
            files = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
        else:
            files = dict(source)
        repository = self.repositories.setdefault((kind, repo_id), Repository())
        whole = hashlib.sha1(f"{repo_id}\0{len(repository.commits)}\0".encode())
        for name in sorted(files):
            whole.update(name.encode() + files[name])
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        repository.commits[whole.hexdigest()] = Commit(whole.hexdigest(), files, stamp)
        repository.refs[branch] = whole.hexdigest()
        repository.tags = list(tags) or repository.tags
        return whole.hexdigest()

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets, counted down."""
        with self._guard:
            self.requests.append((method, path))
            for fault in self.faults:
                if fnmatch.fnmatchcase(path, fault.path) and fnmatch.fnmatchcase(method, fault.method):
                    if fault.times is not None:
                        fault.times -= 1
                        if fault.times <= 0:
                            self.faults.remove(fault)
                    return fault
        return None


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if len(content) >= LFS_FROM else git_blob(content)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            hub.fault("POST", path)
            if "Authorization" not in self.headers:
                self._refuse(401, "RepoNotFound")
            elif path == "/api/repos/create":
                asked = json.loads(body)
                repo_id = f"{asked['organization']}/{asked['name']}"
                made = ("models", repo_id) not in hub.repositories
                if made:
                    hub.push(repo_id, {})
                answer = {"id": repo_id, "url": f"{hub.endpoint}/{repo_id}"}
                self._send(json.dumps(answer).encode(), status=200 if made else 409)
            elif path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
                self._json({"files": [self._upload_mode(file) for file in json.loads(body)["files"]]})
            elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                self._json({"transfer": "basic", "objects": [self._place(one) for one in json.loads(body)["objects"]]})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
                sha = hub.push(match[1], self._committed(match[1], match[2], body), branch=match[2])
                url = f"{hub.endpoint}/{match[1]}/commit/{sha}"
                self._json({"success": True, "commitOid": sha, "commitUrl": url})
            else:
                self._refuse(404, "RepoNotFound")

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            digest = hashlib.sha256(content).hexdigest()
            if self.path != f"/lfs/{digest}":
                self._send(b"", status=400)
                return
            hub.blobs[digest] = content
            self._send(b"")

        def _upload_mode(self, file: dict[str, Any]) -> dict[str, Any]:
            mode = "lfs" if file["size"] >= LFS_FROM else "regular"
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

        def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
            return {**wanted, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}", "header": {}}}}

        def _committed(self, repo_id: str, branch: str, body: bytes) -> dict[str, bytes]:
            repository = hub.repositories["models", repo_id]
            files = dict(repository.commits[repository.refs[branch]].files)
            for line in body.splitlines():
                one = json.loads(line)
                value = one["value"]
                if one["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif one["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                elif one["key"] == "deletedFile":
                    del files[value["path"]]
            return files

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            self.fault = hub.fault(self.command, path)
            if self.fault is not None and self.fault.kind == "hang":
                threading.Event().wait(self.fault.seconds)  # not time.sleep, which tests may shorten
                self.close_connection = True
                return
            if self.fault is not None and self.fault.kind == "status":
                self._send(b"", status=self.fault.status, headers={"Retry-After": "0"})
                return
            try:
                if match := re.fullmatch(r"/api/(models|datasets)", path):
                    self._list(match[1], parse_qs(url.query))
                elif match := re.fullmatch(
                    r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|refs)(?:/(.+))?)?", path
                ):
                    self._api(match[1], match[2], match[3], match[4])
                elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    self._file("datasets" if match[1] else "models", match[2], match[3], match[4])
                else:
                    self._refuse(404, "RepoNotFound")
            except BrokenPipeError:
                self.close_connection = True

        def _list(self, kind: str, query: dict[str, list[str]]) -> None:
            found = []
            for (of, repo_id), repository in sorted(hub.repositories.items()):
                wanted = set(query.get("filter", []))
                if of != kind or query.get("author", [repo_id.split("/")[0]])[0] != repo_id.split("/")[0]:
                    continue
                if wanted <= set(repository.tags) and query.get("search", [""])[0] in repo_id:
                    found.append(self._info(repo_id, repository, repository.commits[repository.refs["main"]]))
            self._json(found)

        def _api(self, kind: str, repo_id: str, what: str | None, rest: str | None) -> None:
            repository = hub.repositories.get((kind, repo_id))
            if repository is None:
                self._refuse(404, "RepoNotFound")
                return
            if what == "refs":
                branches = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                    for name, sha in repository.refs.items()
                ]
                self._json({"branches": branches, "tags": [], "converts": []})
                return
            commit = self._commit(repository, rest or "main")
            if commit is None:
                return
            if what == "tree":
                self._json([self._entry(name, content) for name, content in sorted(commit.files.items())])
            else:
                self._json(self._info(repo_id, repository, commit))

        def _commit(self, repository: Repository, revision: str) -> Commit | None:
            commit = repository.commits.get(repository.refs.get(revision, revision))
            if commit is None:
                self._refuse(404, "RevisionNotFound")
            return commit

        def _info(self, repo_id: str, repository: Repository, commit: Commit) -> dict[str, Any]:
            return {
                "id": repo_id,
                "sha": commit.sha,
                "lastModified": commit.time,
                "private": False,
                "tags": repository.tags,
                "siblings": [{"rfilename": name} for name in sorted(commit.files)],
            }

        def _entry(self, name: str, content: bytes) -> dict[str, Any]:
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_blob(content)}
            if len(content) >= LFS_FROM:
                entry["lfs"] = {"oid": etag(content), "size": len(content), "pointerSize": 134}
            return entry

        def _file(self, kind: str, repo_id: str, revision: str, name: str) -> None:
            repository = hub.repositories.get((kind, repo_id))
            if repository is None:
                self._refuse(404, "RepoNotFound")
                return
            if repository.gated and "Authorization" not in self.headers:
                self._refuse(401, "GatedRepo")
                return
            commit = self._commit(repository, revision)
            if commit is None:
                return
            if name not in commit.files:
                self._refuse(404, "EntryNotFound")
                return
            content = commit.files[name]
            headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
            if len(content) >= LFS_FROM:
                headers |= {"X-Linked-ETag": f'"{etag(content)}"', "X-Linked-Size": str(len(content))}
            status = 200
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if self.fault is not None and self.fault.kind == "wrong_bytes":
                content = bytes(byte ^ 1 for byte in content)
            if wanted and self.command == "GET":
                hub.resumed.append(name)
                status = 206
                headers["Content-Range"] = f"bytes {wanted[1]}-{len(content) - 1}/{len(content)}"
                content = content[int(wanted[1]) :]
            if self.fault is not None and self.fault.kind == "truncated" and self.command == "GET":
                self._send(content, status=status, headers=headers, sent=len(content) // 2)
                self.close_connection = True
            else:
                self._send(content, status=status, headers=headers)

        def _json(self, value: Any) -> None:
            self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

        def _refuse(self, status: int, code: str) -> None:
            self._send(b"{}", status=status, headers={"X-Error-Code": code, "X-Error-Message": code})

        def _send(
            self, content: bytes, *, status: int = 200, headers: dict[str, str] | None = None, sent: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:sent])

    return Handler


def main(folder: Path, port: int) -> None:
    """Serve the repositories in `folder` until the process ends, committing what changes there."""
    with Hub(port) as hub:
        print(f"HF_ENDPOINT={hub.endpoint}", flush=True)  # noqa: T201
        while True:
            for path in sorted(folder.glob("*/*")):
                repo_id = path.relative_to(folder).as_posix()
                files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
                repository = hub.repositories.get(("models", repo_id))
                if repository is None or repository.commits[repository.refs["main"]].files != files:
                    print(f"{repo_id} {hub.push(repo_id, files)}", flush=True)  # noqa: T201
            time.sleep(1.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
