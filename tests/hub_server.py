"""A Hugging Face Hub on the loopback address: the endpoints that the client calls for models, kept in memory.

Large files go by plain LFS. It can break the connection in the middle of an upload, and before or after a commit.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Commit(NamedTuple):
    oid: str
    title: str
    files: dict[str, bytes]


class Repo:
    def __init__(self, private, files):
        self.private, self.commits = private, []
        self.add("initial commit", files)

    def add(self, title, files):
        oid = hashlib.sha1(repr((len(self.commits), title, sorted(files))).encode()).hexdigest()
        self.commits.append(Commit(oid, title, files))

    @property
    def head(self):
        return self.commits[-1]

    @property
    def names(self):
        """The names of the files, without what each new repo of the Hub has."""
        return sorted(self.head.files.keys() - {".gitattributes"})


class Hub(ThreadingHTTPServer):
    """`repos` by their id; `blobs` and `uploads`, how often each was sent whole, by their SHA-256.

    `cuts` uploads of more than `cut_after` bytes break off after that many. Each of `accidents` happens to one
    request to commit: "cut" before the commit is made, "answer lost" after it, "busy", "overtaken" by another commit.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.repos, self.blobs, self.uploads = {}, {}, Counter()
        self.cuts, self.cut_after, self.accidents = 0, 0, []

    def add_repo(self, repo_id, private=False, files=()):
        self.repos[repo_id] = Repo(private, {".gitattributes": b"", **dict(files)})
        return self.repos[repo_id]

    def handle_error(self, request, client_address):
        pass  # the client went away, as it does after a cut


@contextmanager
def running_hub():
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        hub.shutdown()


def is_large(path):
    return path.endswith((".safetensors", ".bin"))


def oid_of(path, content):
    """What the Hub calls a file: SHA-256 of a large one, else the name of git's blob."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refusal(Exception):
    def __init__(self, status, message, code=None):
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    routes = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "upload"),
        ("POST", r"/lfs/verify", "verify"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def handle_request(self):
        method = "GET" if self.command == "HEAD" else self.command
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            for wanted, pattern, name in self.routes:
                match = re.fullmatch(pattern, url.path)
                if match and wanted == method:
                    return getattr(self, name)(**{k: v and unquote(v) for k, v in match.groupdict().items()})
            raise Refusal(404, f"{self.command} {url.path} is no endpoint of this Hub")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, **({"X-Error-Code": refusal.code} if refusal.code else {})}
            self.answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, headers=()):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **dict(headers)}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def cut(self):
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def repo(self, repo_id):
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and not self.headers["Authorization"]):
            raise Refusal(401 if not self.headers["Authorization"] else 404, "Repository not found", "RepoNotFound")
        return repo

    def at(self, repo_id, revision):
        commit = next((c for c in self.repo(repo_id).commits if c.oid == revision), None)
        if commit is None and revision not in (None, "main"):
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit or self.repo(repo_id).head

    # what a read asks for

    def info(self, repo, revision):
        commit = self.at(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        self.answer({"id": repo, "sha": commit.oid, "private": self.repo(repo).private, "siblings": siblings})

    def tree(self, repo, revision, path):
        prefix = f"{path}/" if path else ""
        commit = self.at(repo, revision)
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": oid_of(name, content)}
            for name, content in commit.files.items()
            if name.startswith(prefix)
        ]
        if not entries:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        self.answer(entries)

    def resolve(self, repo, revision, path):
        commit = self.at(repo, revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            self.answer(
                b"Entry not found", 404, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "not found"}
            )
            return
        content = commit.files[path]
        self.answer(content, headers={**headers, "ETag": f'"{oid_of(path, content)}"'})

    # what a push asks for, in this order

    def create(self):
        wanted = json.loads(self.body())
        if not self.headers["Authorization"]:
            raise Refusal(401, "Invalid credentials")
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}"}
        if repo_id in self.server.repos:
            self.answer({**answer, "error": "You already created this model repo"}, 409)
            return
        # huggingface_hub 0.x sends the one, 2.x the other
        self.server.add_repo(repo_id, wanted.get("private") or wanted.get("visibility") == "private")
        self.answer(answer)

    def validate(self):
        self.body()
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        files = self.at(repo, revision).files
        self.answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": oid_of(file["path"], files[file["path"]]) if file["path"] in files else None,
                    }
                    for file in json.loads(self.body())["files"]
                ]
            }
        )

    def batch(self, repo):
        self.repo(repo)
        objects = json.loads(self.body())["objects"]
        for blob in objects:
            if blob["oid"] not in self.server.blobs:
                blob["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{blob['oid']}"},
                    "verify": {"href": f"{self.server.url}/lfs/verify"},
                }
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        length = int(self.headers["Content-Length"])
        with self.server.lock:
            broken = self.server.cuts > 0 and length > self.server.cut_after
            self.server.cuts -= broken
        if broken:
            self.rfile.read(self.server.cut_after)
            return self.cut()
        content = self.rfile.read(length)
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content is not what its name says")
        with self.server.lock:
            self.server.blobs[oid] = content
            self.server.uploads[oid] += 1
        self.answer(b"")

    def verify(self):
        blob = json.loads(self.body())
        if len(self.server.blobs[blob["oid"]]) != blob["size"]:
            raise Refusal(400, "The size is wrong")
        self.answer({})

    def commit(self, repo, revision):
        lines = [json.loads(line) for line in self.body().splitlines()]
        accident = self.server.accidents.pop(0) if self.server.accidents else None
        if accident == "cut":
            return self.cut()
        if accident == "busy":
            raise Refusal(503, "Come back later")
        with self.server.lock:
            if accident == "overtaken":
                files = self.repo(repo).head.files
                self.repo(repo).add("overtaking", {**files, "model-00009-of-00009.safetensors": b"theirs"})
            oid = self.change(self.repo(repo), lines)
        if accident == "answer lost":
            return self.cut()
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def change(self, repo, lines):
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", repo.head.oid) != repo.head.oid:
            raise Refusal(412, "A commit has happened since")
        files = dict(repo.head.files)
        for line in lines:
            path = line["value"].get("path")
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.server.blobs:
                    raise Refusal(400, f"The content of {path} was never uploaded")
                files[path] = self.server.blobs[line["value"]["oid"]]
            elif line["key"] == "deletedFile":
                if path not in files:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                del files[path]
        repo.add(header["summary"], files)
        return repo.head.oid
