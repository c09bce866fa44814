"""A hub of Hugging Face on loopback: the few routes by which files of a repository are read."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "o/n"
COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """The server of one repository."""

    def __init__(self, files: dict[str, bytes], *, kind: str, seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.seconds = seconds
        """How long every answer takes."""
        self.api = f"/api/{kind}/{REPOSITORY}"
        prefix = "" if kind == "models" else f"/{kind}"
        self.places = tuple(f"{prefix}/{REPOSITORY}/resolve/{at}/" for at in ("main", COMMIT))
        self.sent: list[str] = []
        """Names of the files that were fetched, in order."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub(files: dict[str, bytes], *, kind: str = "datasets", seconds: float = 0.0) -> Iterator[Hub]:
    """Serve a repository until the block ends, every answer after some seconds."""
    with Hub(files, kind=kind, seconds=seconds) as server, serving(server):
        yield server


@contextmanager
def serving(server: BaseServer) -> Iterator[None]:
    """Let a server answer until the block ends."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.server.seconds)
        split = urlsplit(self.path)
        path, files, api = unquote(split.path), self.server.files, self.server.api
        place = next((each for each in self.server.places if path.startswith(each)), None)
        name = path.removeprefix(place or "")
        if path in (api, f"{api}/revision/main"):
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": []})
        elif path.startswith(f"{api}/tree/main"):
            deep = parse_qs(split.query).get("recursive") == ["true"]
            found = self._tree(path.removeprefix(f"{api}/tree/main").strip("/"), deep=deep)
            if found:
                self._json(found)
            else:
                self._missing("EntryNotFound")
        elif place and name in files:
            if self.command == "GET":
                self.server.sent.append(name)
            tag = f'"{_hash(files[name])}"'
            self._send(200, files[name], {"ETag": tag, "X-Repo-Commit": COMMIT})
        else:
            known = place or path.startswith(f"{api}/")
            self._missing("EntryNotFound" if known else "RepoNotFound")

    do_HEAD = do_GET

    def _tree(self, folder: str, *, deep: bool) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        below = {n: c for n, c in self.server.files.items() if n.startswith(prefix)}
        rests = [name.removeprefix(prefix).split("/") for name in below]
        folders = {prefix + "/".join(r[:n]) for r in rests for n in range(1, len(r))}
        found = [_entry("file", n, len(c), _hash(c)) for n, c in below.items()]
        found += [_entry("directory", name, 0, "0" * 40) for name in sorted(folders)]
        return [each for each in found if deep or "/" not in each["path"].removeprefix(prefix)]

    def _missing(self, code: str) -> None:
        self._send(404, b'{"error": "not found"}', {"X-Error-Code": code})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(kind: str, name: str, size: int, oid: str) -> dict[str, Any]:
    return {"type": kind, "oid": oid, "size": size, "path": name}


def _hash(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
