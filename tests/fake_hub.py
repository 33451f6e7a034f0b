"""Which little hub do the tests download from, without a network?"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """A server on this machine with the addresses that huggingface_hub asks for a model's files; a context manager.

    Attributes:
        files: of each commit, by repository: ``{"a/b": {"<commit>": {"config.json": b"..."}}}``.
        refs: commits by repository and branch or tag.
        refused: status codes and error codes by repository, such as ``(403, "GatedRepo")``.
        cut: files whose next download breaks in the middle.
        lost: files whose next download breaks in the middle, and which are gone from then on.
        asked: ``(method, path, range or None)`` of every request.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[tuple[str, str], str] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.cut: set[str] = set()
        self.lost: set[str] = set()
        self.gone: set[str] = set()
        self.asked: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repository: str, files: Mapping[str, bytes], *, refs: tuple[str, ...] = ("main",)) -> str:
        """A new commit, which the refs point at from now on."""
        content = repr(sorted(files.items())).encode()
        commit = hashlib.sha1(content).hexdigest()
        self.files.setdefault(repository, {})[commit] = dict(files)
        self.refs |= {(repository, ref): commit for ref in refs}
        return commit

    def downloads(self) -> list[str]:
        """The names of the files that were sent, whole or in part."""
        return [path.split("/", 5)[-1] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        self.asked.append((request.command, path, request.headers.get("Range")))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found:
            repository, verb, ref = found[1], found[2] or "revision", found[3] or "main"
            name = ""
        elif file:
            verb, repository, ref, name = "resolve", *file.groups()
        else:
            return self.refuse(request, 404, "")
        if repository not in self.files or repository in self.refused:
            return self.refuse(request, *self.refused.get(repository, (404, "RepoNotFound")))
        commit = self.refs.get((repository, ref), ref)
        if commit not in self.files[repository]:
            return self.refuse(request, 404, "RevisionNotFound")
        files = self.files[repository][commit]
        if verb == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self.send(request, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode())
        if verb == "tree":
            rows = [
                {"type": "file", "path": file, "size": len(content), "oid": _blob(content)}
                for file, content in files.items()
            ]
            return self.send(request, json.dumps(rows).encode())
        if name not in files or name in self.gone:
            return self.refuse(request, 404, "EntryNotFound")
        return self.send_file(request, name, files[name], commit)

    def send_file(self, request: BaseHTTPRequestHandler, name: str, content: bytes, commit: str) -> None:
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if request.command == "GET" and name in self.cut | self.lost:
            self.gone |= self.lost & {name}
            self.cut -= {name}
            self.send(request, content, headers, sent=len(content) // 2)
        else:
            self.send(request, content[start:], headers, status=206 if start else 200)

    def refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        self.send(request, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status=status)

    def send(
        self,
        request: BaseHTTPRequestHandler,
        content: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        status: int = 200,
        sent: int | None = None,
    ) -> None:
        request.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content[:sent])


def _blob(content: bytes) -> str:
    """Git's name for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
