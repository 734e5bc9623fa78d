"""A server on this machine that speaks as much of the hub's API as pushing and pulling needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = ".safetensors"


class Hub(ThreadingHTTPServer):
    """Model repositories in memory.

    files: content by name of each repository. sent: bytes of content sent of each file. cut: how many bytes of a file
    to send before the connection breaks, once each. gone: files that are answered with a refusal.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.sent: Counter[str] = Counter()
        self.cut: dict[str, int] = {}
        self.gone: set[str] = set()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def sha(self, repo: str) -> str:
        """The one commit: a digest of the content."""
        parts = (name.encode() + hashlib.sha1(data).digest() for name, data in sorted(self.files[repo].items()))
        return hashlib.sha1(b"".join(parts)).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, data: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, X_Error_Code=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        hub = self.server
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, what, revision = found.groups()
            if repo not in hub.files:
                self.missing("RepoNotFound")
            elif revision not in (None, "main", hub.sha(repo)):
                self.missing("RevisionNotFound")
            elif what == "tree":
                self.answer([self.entry(name, data) for name, data in hub.files[repo].items()])
            else:
                siblings = [{"rfilename": name} for name in hub.files[repo]]
                self.answer({"id": repo, "sha": hub.sha(repo), "siblings": siblings, "tags": [], "downloads": 0})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/([^/]+)", path):
            self.send_file(*found.groups())
        else:
            self.missing("EntryNotFound")

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, Any]:
        row = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return row | ({"lfs": large} if name.endswith(LARGE) else {})

    def send_file(self, repo: str, name: str) -> None:
        hub, data = self.server, self.server.files.get(repo, {}).get(name)
        if data is None:
            self.missing("EntryNotFound")
            return
        if name in hub.gone and self.command == "GET":
            self.answer({"error": "on strike"}, 403)
            return
        begin = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        row = self.entry(name, data)
        self.send_response(206 if begin else 200)
        for key, value in {
            "Content-Length": len(data) - begin,
            "ETag": f'"{row["lfs"]["oid"] if "lfs" in row else row["oid"]}"',
            "X-Repo-Commit": hub.sha(repo),
            "Accept-Ranges": "bytes",
            **({"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}),
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            part = data[begin : begin + hub.cut.pop(name, len(data))]
            hub.sent[name] += len(part)
            self.wfile.write(part)
            self.close_connection = len(part) < len(data) - begin

    def do_PUT(self) -> None:
        oid, data = self.path.rpartition("/")[2], self.body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.objects[oid] = data
        self.server.sent["uploaded"] += len(data)
        self.answer({})

    def do_POST(self) -> None:
        hub, path, body = self.server, self.path.partition("?")[0], self.body()
        if path == "/api/repos/create":
            repo = "me/" + json.loads(body)["name"].rpartition("/")[2]
            status = 409 if repo in hub.files else 200
            hub.files.setdefault(repo, {})
            self.answer({"url": f"{hub.address}/{repo}", "name": repo, "id": repo}, status)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for row in objects:
                if row["oid"] not in hub.objects:
                    row["actions"] = {"upload": {"href": f"{hub.address}/lfs/{row['oid']}", "header": {}}}
            self.answer({"transfer": "basic", "objects": objects})
        elif "/preupload/" in path:
            modes = [
                {"path": row["path"], "uploadMode": "lfs" if row["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False} for row in json.loads(body)["files"]
            ]  # fmt: skip
            self.answer({"files": modes})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            files = hub.files[found[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            url = f"{hub.address}/{found[1]}/commit/{hub.sha(found[1])}"
            self.answer({"success": True, "commitOid": hub.sha(found[1]), "commitUrl": url, "hookOutput": ""})
        else:
            self.missing("EntryNotFound")
