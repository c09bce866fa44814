"""Gates at which a real command waits for the test that started it.

A test that kills a command in its midst would otherwise race with it, and a machine that is faster
than the one it was written on, or a test that is looked after late, lets the command end first.
The gate is shut before the command puts a file in its place (the manifest, with which outputs end):
until then it works as it always does, and a kill may come at any moment.

As a script: `python tests/gates.py GATE WORD...` is `srft-prep WORD...` with a gate.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

MANIFEST = "manifest.json"

_LOOK_SECONDS = 0.01


class FileGate:
    """A gate that is shut: a file that stands beside another one while somebody waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reached = path.with_name(f"{path.name}.reached")
        self._reached.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    @property
    def is_reached(self) -> bool:
        """Whether the command waits, or waited, at it."""
        return self._reached.exists()

    def open(self) -> None:
        """Let the command go on, now or when it comes here."""
        self.path.unlink(missing_ok=True)


def wait_at(gate: Path) -> None:
    """Be the command that came to a gate."""
    if gate.exists():
        gate.with_name(f"{gate.name}.reached").touch()
    while gate.exists():
        time.sleep(_LOOK_SECONDS)


def wait_before_naming(gate: Path, pattern: str) -> None:
    """Let this process wait at a gate whenever it is about to rename a file to a name like this.

    Nothing of the program is changed: the interpreter tells of every rename before it happens.
    """

    def look(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and fnmatch(Path(str(arguments[1])).name, pattern):
            wait_at(gate)

    sys.addaudithook(look)


class GatedCommand:
    """A command in an interpreter of its own, with a gate."""

    def __init__(self, path: Path, words: Sequence[object], environment: Mapping[str, str]) -> None:
        self.gate = FileGate(path)
        self._log = path.with_name(f"{path.name}.log")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(path), *map(str, words)],
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_until(self, ready: Callable[[], bool], seconds: float = 300.0) -> None:
        """Wait for something, or for the command to come to its gate; it must not end."""
        until = time.monotonic() + seconds
        while not ready() and not self.gate.is_reached:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(_LOOK_SECONDS)

    def wait(self, seconds: float = 300.0) -> int:
        """Open the gate, wait for the command's end and return its status."""
        self.gate.open()
        return self.process.wait(seconds)

    def kill(self) -> None:
        """Kill the command with SIGKILL, where it has not ended."""
        self.process.kill()
        self.process.wait()


@contextmanager
def gated(path: Path, *words: object, **environment: str) -> Iterator[GatedCommand]:
    """Start `srft-prep WORDS` with a gate at `path`; it does not outlive the block."""
    command = GatedCommand(path, words, environment)
    try:
        yield command
    finally:
        command.kill()


def kill_when(ready: Callable[[], bool], path: Path, *words: object, **environment: str) -> None:
    """Start `srft-prep WORDS` and kill -9 it once `ready`, or when it is about to end."""
    with gated(path, *words, **environment) as command:
        command.wait_until(ready)


if __name__ == "__main__":
    from srft_prep.cli import main

    place, *given = sys.argv[1:]
    wait_before_naming(Path(place), MANIFEST)
    sys.argv = ["srft-prep", *given]
    main()
