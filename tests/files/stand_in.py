"""A stand-in of the Hugging Face Hub on this machine: as much of its API as putting and fetching small files takes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Repositories, each with commits in order.

    Attributes:
        commits: by repository, (name of the commit, files by path) each.
        broken_off: let downloads end in the middle.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.broken_off = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, repo: str, files: dict[str, bytes]) -> str:
        """Another commit, with these files besides those that are there; gives its name."""
        before = self.commits.setdefault(repo, [])
        kept = dict(before[-1][1]) if before else {}
        name = hashlib.sha1(repr((repo, len(before))).encode()).hexdigest()
        before.append((name, kept | files))
        return name

    def found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits.get(repo, [])
        if revision == "main" and commits:
            return commits[-1]
        return next((commit for commit in commits if commit[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            repo = f"{json.loads(body).get('organization') or 'me'}/{json.loads(body)['name']}"
            self.server.commits.setdefault(repo, [])
            return self._json({"url": f"{self.server.address}/{repo}"})
        if self.path == "/api/validate-yaml":  # of a card
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/(\w+)", self.path):
            files = json.loads(body)["files"]
            return self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if found := re.fullmatch(r"/api/models/(.+)/commit/(\w+)", self.path):
            parts = [json.loads(line) for line in body.decode().splitlines()]
            files = {
                part["value"]["path"]: base64.b64decode(part["value"]["content"])
                for part in parts
                if part["key"] == "file"
            }
            name = self.server.put(found[1], files)
            url = f"{self.server.address}/{found[1]}/commit/{name}"
            return self._json({"success": True, "commitOid": name, "commitUrl": url})
        return self._error(404, "EntryNotFound")

    def do_HEAD(self) -> None:
        self._resolve(head=True)

    def do_GET(self) -> None:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.path.partition("?")[0]):
            commit = self.server.found(found[1], found[2] or "main")
            if commit is None:
                return self._error(404, "RevisionNotFound" if found[1] in self.server.commits else "RepoNotFound")
            siblings = [{"rfilename": name} for name in commit[1]]
            return self._json({"id": found[1], "sha": commit[0], "siblings": siblings, "tags": [], "downloads": 0})
        return self._resolve(head=False)

    def _resolve(self, head: bool) -> None:
        found = re.fullmatch(r"/(.+/.+)/resolve/([^/]+)/(.+)", self.path)
        if found is None or found[1] not in self.server.commits:
            return self._error(404, "RepoNotFound")
        commit = self.server.found(found[1], found[2])
        if commit is None:
            return self._error(404, "RevisionNotFound")
        content = commit[1].get(found[3])
        if content is None:
            return self._error(404, "EntryNotFound", commit[0])
        self.send_response(200)
        for key, value in (
            ("Content-Length", str(len(content))),
            ("ETag", f'"{hashlib.sha1(content).hexdigest()}"'),
            ("X-Repo-Commit", commit[0]),
        ):
            self.send_header(key, value)
        if self.server.broken_off:
            self.send_header("Connection", "close")
        self.end_headers()
        if not head:
            self.wfile.write(content[: len(content) // 2] if self.server.broken_off else content)
            self.close_connection = self.server.broken_off
        return None

    def _json(self, said: Any) -> None:
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, code: str, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
