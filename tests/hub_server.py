# SPDX-License-Identifier: MIT
"""A Hugging Face Hub on 127.0.0.1: the requests of huggingface_hub, with faults on demand.

Its responses follow from the source of the client, huggingface_hub 2.4.0:

* a file's metadata: HEAD /REPO/resolve/REVISION/FILE (`file_download.get_hf_file_metadata`): X-Repo-Commit, and for a
  large file a redirect to another host that the HEAD does not follow, with X-Linked-Etag (the SHA-256 of the bytes) and
  X-Linked-Size; for a small one a relative redirect, which is followed
  (`utils._http._httpx2_follow_hub_redirects_with_backoff`), to a response with ETag and Content-Length;
* its bytes: GET of that address (`file_download.http_get`), without the token for the other host
  (`_get_metadata_or_catch_error`); Range is answered by 206 and Content-Range, or by 200 and the whole file
  (`_get_file_length_from_http_response`);
* errors: X-Error-Code RepoNotFound, GatedRepo, RevisionNotFound, EntryNotFound (`utils._http.hf_raise_for_status`),
  429 with Retry-After (`utils._http._parse_retry_after`);
* uploads: POST /api/repos/create (`HfApi.create_repo`), /api/validate-yaml (`_validate_yaml`), GET tree
  (`list_repo_tree`), POST preupload, the LFS batch, PUT, POST commit (`_commit_api._fetch_upload_modes`,
  `lfs.post_lfs_batch_info`, `lfs._upload_single_part`, `_commit_api._send_commit`).

No response has a Xet hash, so the client uses plain HTTP. Other behavior of the real Hub is not modeled.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pth")
_CHUNK = 1 << 20


@dataclass
class Stored:
    """The bytes of a file, in memory or on disk."""

    content: bytes | Path
    name: str
    announced: str | None = None  # stated as ETag instead of the checksum

    def __post_init__(self) -> None:
        self.size = self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)
        self.large = self.name.endswith(LARGE)
        digest = hashlib.sha256() if self.large else hashlib.sha1(b"blob %d\0" % self.size)
        for chunk in self.read(0):
            digest.update(chunk)
        self.etag = digest.hexdigest()
        self.announced = self.announced or self.etag

    def read(self, start: int):
        if isinstance(self.content, bytes):
            yield self.content[start:]
            return
        with self.content.open("rb") as file:
            file.seek(start)
            while chunk := file.read(_CHUNK):
                yield chunk


@dataclass
class Repository:
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # that is needed to see the repository
    gated: bool = False

    def commit(self, files: dict[str, Stored], ref: str = "main") -> str:
        commit = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    cdn: bool


@dataclass
class Fault:
    """A fault of the next `times` requests with `method` that have `path` in their path.

    `status` and `headers`: of the response, instead of the right ones. `cut`: bytes after which the connection breaks.
    `short`: bytes by which the body, and its Content-Length, is shorter than the metadata says. `damage`: position of a
    byte that is changed. `size`: size of the file in the metadata. `ignore_range`: send the whole file, not a part.
    `hold`: called after the body was sent, or its first `cut` bytes.
    """

    path: str
    method: str = "GET"
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    short: int = 0
    damage: int | None = None
    size: int | None = None
    ignore_range: bool = False
    hold: Callable[[], object] | None = None


class Hub:
    """The servers: the Hub itself, and the host of large files."""

    def __init__(self) -> None:
        self._servers: list[ThreadingHTTPServer] = []
        self.reset()
        self._ports = [0, 0]
        self.start()

    def reset(self) -> None:
        """Forget repositories, faults and requests."""
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.writer: str | None = None  # the token that may write

    def start(self) -> None:
        """Start to serve, at the same address as before."""
        if self._servers:
            return
        for i, cdn in enumerate((False, True)):
            server = _Server(("127.0.0.1", self._ports[i]), type("Handler", (_Handler,), {"hub": self, "cdn": cdn}))
            self._ports[i] = server.server_address[1]
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers.append(server)

    def stop(self) -> None:
        """Refuse every connection."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def cdn_url(self) -> str:
        return f"http://127.0.0.1:{self._ports[1]}"

    def add(
        self,
        repo_id: str,
        files: dict[str, bytes | Path] | Path,
        ref: str = "main",
        etags: dict[str, str] | None = None,
        **options,
    ) -> str:
        """Create a repository of files, or of a folder's files, or add a commit to it; returns the commit."""
        if isinstance(files, Path):
            files = {file.relative_to(files).as_posix(): file for file in files.rglob("*") if file.is_file()}
        repository = self.repositories.setdefault(repo_id, Repository(**options))
        stored = {name: Stored(content, name, (etags or {}).get(name)) for name, content in files.items()}
        return repository.commit(stored, ref)

    def seen(self, method: str, part: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.path]

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and fault.path in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that close the connection."""


class _Refused(Exception):
    def __init__(self, status: int, code: str, **headers: str) -> None:
        self.status, self.code, self.headers = status, code, headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    cdn: bool

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    do_GET = do_PUT = do_POST = do_HEAD

    def _serve(self) -> None:
        self.close_connection = True
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(Request(self.command, path, {k.lower(): v for k, v in self.headers.items()}, self.cdn))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.hub.fault(self.command, path)
        if fault is not None and fault.status:
            self._answer(fault.status, fault.headers, b"")
            return
        try:
            if self.command in ("PUT", "POST"):
                self._upload(path, body)
            elif self.cdn:
                self._body(self._blob(path.rpartition("/")[2]), fault, {})
            else:
                self._hub(path, parse_qs(url.query), fault)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.code, **refused.headers}
            self._answer(refused.status, headers, b"")

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: object) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    # ---- download

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.token and sent != repository.token and not repository.gated):
            raise _Refused(401, "RepoNotFound")
        if repository.gated and sent != repository.token:
            raise _Refused(403 if sent else 401, "GatedRepo")
        return repository

    def _blob(self, etag: str) -> Stored:
        for repository in self.hub.repositories.values():
            for files in repository.commits.values():
                for stored in files.values():
                    if stored.etag == etag:
                        return stored
        raise _Refused(404, "EntryNotFound")

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound")
        return commit

    def _hub(self, path: str, query: dict[str, list[str]], fault: Fault | None) -> None:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", path):
            repository = self._repository(match[1])
            files = repository.commits[self._commit(repository, match[2])]
            entries = [{"type": "file", "path": k, "oid": v.etag, "size": v.size} for k, v in files.items()]
            for entry in entries:
                if files[entry["path"]].large:
                    entry["lfs"] = {"oid": entry["oid"], "size": entry["size"], "pointerSize": 130}
            self._json(entries)
            return
        direct = re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)", path)
        match = direct or re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            raise _Refused(404, "EntryNotFound")
        repo_id, revision, name = match.groups()
        repository = self._repository(repo_id)
        commit = self._commit(repository, revision)
        stored = repository.commits[commit].get(name)
        if stored is None:
            raise _Refused(404, "EntryNotFound", **{"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{stored.announced}"', "Accept-Ranges": "bytes"}
        if stored.large:
            size = stored.size if fault is None or fault.size is None else fault.size
            headers |= {
                "X-Linked-Etag": f'"{stored.announced}"',
                "X-Linked-Size": str(size),
                "Location": f"{self.hub.cdn_url}/blobs/{stored.etag}",
            }
            self._answer(302, headers, b"")
        elif not direct:
            self._answer(307, {**headers, "Location": f"/api/resolve-cache/models/{repo_id}/{commit}/{name}"}, b"")
        else:
            self._body(stored, fault, headers)

    def _body(self, stored: Stored, fault: Fault | None, headers: dict[str, str]) -> None:
        fault = fault or Fault("")
        start, status = 0, 200
        if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) and not fault.ignore_range:
            start, status = int(match[1]), 206
            headers = {**headers, "Content-Range": f"bytes {start}-{stored.size - 1}/{stored.size}"}
        length = stored.size - start - fault.short
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = length if fault.cut is None else min(length, fault.cut)
        for chunk in stored.read(start):
            chunk = chunk[:left]
            if fault.damage is not None and 0 <= fault.damage < len(chunk):
                chunk = chunk[: fault.damage] + bytes([chunk[fault.damage] ^ 1]) + chunk[fault.damage + 1 :]
            self.wfile.write(chunk)
            left -= len(chunk)
            if left <= 0:
                break
        self.wfile.flush()
        if fault.hold is not None:
            fault.hold()
        # after a cut, the connection closes before all bytes were sent

    # ---- upload

    def _upload(self, path: str, body: bytes) -> None:
        if self.command == "PUT":  # the URL is signed: no token
            self.hub.uploads[path.rpartition("/")[2]] = body
            self._answer(200, {}, b"")
            return
        if self.hub.writer is None or self.headers.get("Authorization") != f"Bearer {self.hub.writer}":
            raise _Refused(401, "Unauthorized")
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if repo_id in self.hub.repositories:
                self._answer(409, {}, json.dumps({"url": f"{self.hub.url}/{repo_id}"}).encode())
                return
            token = self.hub.writer if asked.get("visibility") == "private" else None
            self.hub.repositories[repo_id] = Repository(token=token)
            self.hub.repositories[repo_id].commit({})
            self._json({"url": f"{self.hub.url}/{repo_id}"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            repository = self._repository(match[1])
            exists = match[2] in repository.refs
            repository.refs.setdefault(match[2], repository.refs["main"])
            self._answer(409 if exists else 200, {}, b"{}")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [dict(path=f, uploadMode="lfs" if f.endswith(LARGE) else "regular") for f in files]
            self._json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            wanted = json.loads(body)["objects"]
            action = {o["oid"]: {"upload": {"href": f"{self.hub.cdn_url}/put/{o['oid']}"}} for o in wanted}
            self._json({"transfer": "basic", "objects": [{**o, "actions": action[o["oid"]]} for o in wanted]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._json(self._make_commit(match[1], match[2], [json.loads(line) for line in body.splitlines()]))
        else:
            raise _Refused(404, "EntryNotFound")

    def _make_commit(self, repo_id: str, ref: str, lines: list[dict]) -> dict:
        repository = self._repository(repo_id)
        files = dict(repository.commits[self._commit(repository, ref)])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), value["path"])
            elif line["key"] == "lfsFile":
                stored = Stored(self.hub.uploads[value["oid"]], value["path"])
                if (stored.etag, stored.size) != (value["oid"], value["size"]):
                    raise _Refused(400, "BadRequest")
                files[value["path"]] = stored
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, ref)
        return {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}", "commitOid": commit, "success": True}
