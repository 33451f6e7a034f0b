"""Which little hub do the tests download from, without a network?"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class FakeHub:
    """A server on this machine with the addresses that huggingface_hub asks for files; a context manager.

    Attributes:
        files: of each commit, by repository: ``{"a/b": {"<commit>": {"config.json": b"..."}}}``; data sets are
            ``"datasets/a/b"``.
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

            def do_POST(self) -> None:
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
        asked = [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in asked]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        address = urlsplit(request.path)
        path, asked = address.path, parse_qs(address.query)
        if request.command == "POST":
            asked |= parse_qs(request.rfile.read(int(request.headers["Content-Length"])).decode())
        self.asked.append((request.command, path, request.headers.get("Range")))
        found = re.fullmatch(r"/api/(?:models/|(datasets/))([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.+))?)?)?", path)
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found:
            repository, verb, ref = (found[1] or "") + found[2], found[3] or "revision", unquote(found[4] or "main")
            name = found[5] or ""
        elif file:
            verb, repository, ref, name = "resolve", file[1], unquote(file[2]), file[3]
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
            rows = list(_list_tree(files, unquote(name), is_recursive=asked.get("recursive") == ["true"]))
            return self.send(request, json.dumps(rows).encode())
        if verb == "paths-info":
            everything = {row["path"]: row for row in _list_tree(files, "", is_recursive=True)}
            rows = [everything[path] for path in asked["paths"] if path in everything]
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
        if request.command != "HEAD":
            request.wfile.write(content[:sent])


def _list_tree(files: Mapping[str, bytes], folder: str, *, is_recursive: bool) -> Iterator[dict[str, Any]]:
    """The files under a folder, and the folders in it."""
    prefix, folders = f"{folder}/" if folder else "", set[str]()
    for path, content in files.items():
        if not path.startswith(prefix):
            continue
        inner = path.removeprefix(prefix).split("/")
        parents = ["/".join(inner[: depth + 1]) for depth in range(len(inner) - 1)]
        for parent in parents if is_recursive else parents[:1]:
            if parent not in folders:
                folders.add(parent)
                yield {"type": "directory", "path": prefix + parent, "size": 0, "oid": _blob(parent.encode())}
        if is_recursive or not parents:
            yield {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}


def _blob(content: bytes) -> str:
    """Git's name for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
