"""Servers of object stores on loopback, a switch on the way to them, and runs that use them."""

import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import boto3
import orjson
import pytest
from botocore.config import Config

from srft_prep import object_storage
from tests.faults import commands
from tests.faults.commands import started
from tests.stages import short_runs

KEY_CANARY = "AKIACANARYOFATEST000"
SECRET_CANARY = "canary/of+a/test/that/no/file/may/hold00"
NUM_RUNS = 600
"""More than two parts of 256."""

_METHODS = (b"GET ", b"PUT ", b"HEAD ", b"DELETE ", b"POST ")
_GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"
"""What comes before an answer, by itself or with it."""

commands.LOADED.append("s3fs")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def program(words: Sequence[str], port: int, **environment: str) -> Iterator[None]:
    """Run a server until the block ends; it is ready when its port is."""
    server = subprocess.Popen(
        words,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while True:
            assert server.poll() is None, f"{words} ended"
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < until, f"{words} does not listen"
            time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


class Switch:
    """A way to a server on loopback that can be closed and opened again."""

    def __init__(self, server: int) -> None:
        self.port = free_port()
        self._server = server
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.open()

    def open(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def close(self) -> None:
        """Refuse connections, and cut those that there are."""
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._server))
            except OSError:
                client.close()
                continue
            self._open |= {client, server}
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while (data := source.recv(1 << 16)) and self._passes(data, source, target):
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open -= {source, target}

    def _passes(self, data: bytes, source: socket.socket, target: socket.socket) -> bool:
        """Return whether what came is passed on, or lost with the connection."""
        return True


class Way(Switch):
    """A way to the server on which something happens before an answer arrives, or loses it."""

    def __init__(self, server: int) -> None:
        self.answered: Counter[str] = Counter()
        """Requests by method and name of the object, once they were answered.

        LIST and the bucket where all below a prefix is listed.
        """
        self.happens: Callable[[str], bool] = lambda request: True
        """Called with a request before its answer is passed on; False loses it."""
        self._asked: dict[socket.socket, str] = {}
        super().__init__(server)

    def _passes(self, data: bytes, source: socket.socket, target: socket.socket) -> bool:
        if data.startswith(_METHODS):
            method, url = data.decode(errors="replace").split()[:2]
            path, _, query = url.partition("?")
            if "list-type=" in query and "delimiter=%2F" not in query:
                method = "LIST"
            self._asked[target] = f"{method} {path.rpartition('/')[2]}"
        elif data.startswith(b"HTTP/1.1 ") and not data.endswith(_GO_ON):
            if not self.happens(self._asked[source]):
                return False
            self.answered[self._asked[source]] += 1
        return True


class Gate(Switch):
    """A way to the server on which some objects that are to be written wait."""

    def __init__(self, server: int) -> None:
        self.put: list[str] = []
        """The keys of all objects that were to be written, in order."""
        self.held: list[str] = []
        """The keys of those that wait."""
        self._holds: Callable[[str], bool] = lambda key: False
        self._opened = threading.Event()
        self._is_lost = False
        super().__init__(server)

    def hold(self, holds: Callable[[str], bool]) -> None:
        """Let objects wait from now on, by their keys."""
        self.held.clear()
        self._holds, self._opened, self._is_lost = holds, threading.Event(), False

    def let_go(self) -> None:
        """Let those that wait go to the server, and none wait from now on."""
        self._holds = lambda key: False
        self._opened.set()

    def lose(self) -> None:
        """Lose those that wait with their connections, and let none wait from now on."""
        self._is_lost = True
        self.let_go()

    def _passes(self, data: bytes, source: socket.socket, target: socket.socket) -> bool:
        if asked := re.match(rb"PUT /[^/ ]+/([^ ?]+)", data):
            self.put.append(key := asked[1].decode())
            if self._holds(key):
                self.held.append(key)
                assert self._opened.wait(120), f"{key} waits for ever"
                return not self._is_lost
        return True


class Bucket:
    """A bucket of the S3 server, as another program sees it."""

    def __init__(self, port: int, name: str) -> None:
        self.port, self.name, self.url = port, name, f"s3://{name}"
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
            config=Config(retries={"max_attempts": 5}),
        )
        self.client.create_bucket(Bucket=name)

    def names(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.name, Prefix=prefix
        )
        return [each["Key"] for page in pages for each in page.get("Contents", ())]

    def get(self, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return content

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def put_folder(self, folder: Path, prefix: str) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())

    def get_folder(self, prefix: str, folder: Path) -> Path:
        for name in self.names(f"{prefix}/"):
            path = folder / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.get(name))
        return folder


class Machine:
    """A machine with a cache of its own and credentials for the server."""

    def __init__(self, folder: Path, port: int, **environment: str) -> None:
        self.folder, self.port = folder, port
        self.cache = folder / "cache"
        self.log = folder / "log"
        folder.mkdir(parents=True, exist_ok=True)
        self.gate = Gate(port)
        """The way to the server."""
        self.environment = {
            "SRFT_CACHE": str(self.cache),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.gate.port}",
            "AWS_ACCESS_KEY_ID": KEY_CANARY,
            "AWS_SECRET_ACCESS_KEY": SECRET_CANARY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "SRFT_STORAGE_PATIENCE_SECONDS": "20",
            **environment,
        }

    def start(self, *words: object) -> Any:
        """Start a command, which does not outlive the block."""
        return started(words, self.log, environment=self.environment)

    def run(self, *words: object, status: int = 0) -> str:
        """Run a command to its end and return what it said."""
        with self.start(*words) as command:
            assert command.wait() == status, command.said
            assert "Traceback" not in command.said, command.said
            return str(command.said)

    def run_anew(self, *words: object, status: int = 0) -> str:
        """Run a command in a new interpreter, whose libraries read the environment as they load."""
        done = subprocess.run(
            [sys.executable, "-m", "srft_prep", *map(str, words)],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    @contextmanager
    def held(self, holds: Callable[[str], bool], *words: object) -> Iterator[Any]:
        """Start a command, and give it once something that it writes waits at the gate."""
        self.gate.hold(holds)
        with self.start(*words) as command:
            assert command.wait_until(lambda: bool(self.gate.held)), command.said
            yield command

    def kill_when(self, ready: Any, *words: object) -> None:
        """Start a command and kill -9 it once `ready`; it must still be at work then.

        However fast it is: a manifest, with which outputs end, waits until the command is dead.
        """
        self.gate.hold(lambda key: key.endswith("/manifest.json"))
        with self.start(*words) as command:
            assert command.wait_until(ready), command.said
            command.process.kill()
            command.wait()
        self.gate.lose()

    def again(self, name: str) -> Self:
        """Return another machine: one with an empty cache."""
        other = type(self)(self.folder.parent / name, self.port)
        own = {name: other.environment[name] for name in ("SRFT_CACHE", "AWS_ENDPOINT_URL")}
        other.environment = self.environment | own
        return other


@contextmanager
def reaching(machine: Machine) -> Iterator[None]:
    """Let this process reach the store as a machine does."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in machine.environment.items():
            patch.setenv(name, value)
        object_storage._file_system.cache_clear()  # it remembers the server of an earlier test
        yield
    object_storage._file_system.cache_clear()


@contextmanager
def s3_server() -> Iterator[int]:
    """Run moto's S3 server and give its port."""
    port = free_port()
    words = [sys.executable, "-c", "from moto.server import main; main()"]
    with program([*words, "-H", "127.0.0.1", "-p", str(port)], port):
        yield port


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first of the processes that share the tests fills for all."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def write_raw(folder: Path, *, num_runs: int = NUM_RUNS) -> Path:
    """Write some hundred short runs into a folder and its folders, with broken ones among them."""
    rows = short_runs(num_runs, messages=6)
    half = num_runs // 2
    (folder / "more").mkdir(parents=True)
    lines = [*map(orjson.dumps, rows[:half]), b"{", *map(orjson.dumps, rows[:3])]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "more" / "b.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows[half:])) + b"\n")
    (folder / "notes.txt").write_text("not a run")
    return folder
