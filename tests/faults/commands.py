"""The program in processes that can be killed: forked from a server that has its packages loaded.

The server costs its imports once; a command is then there in some milliseconds, and dies like any
other process. Its output goes to a file.
"""

import multiprocessing
import os
import resource
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from srft_prep.cli import main
from tests.gates import MANIFEST, FileGate, wait_before_naming
from tests.processes import processes_with

LOADED = [
    "srft_prep.cli",
    "srft_prep.ingest",
    "srft_prep.labeling",
    "srft_prep.tokens",
    "srft_prep.shards",
    "srft_prep.verification",
    "srft_prep.export.stage",
    "srft_prep.train.training",
    "transformers.models.auto.tokenization_auto",
    "tests.faults.commands",
]

Words = Sequence[object]

POLL_SECONDS = 0.005
"""Looking costs time that the command then lacks."""


def run_command(
    words: Sequence[str],
    environment: dict[str, str],
    log: str,
    most_file_bytes: int | None,
    gate: tuple[Path, str] | None,
) -> None:
    """Be the command."""
    os.environ.update(environment)
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may run in the background
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if most_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_file_bytes, most_file_bytes))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if gate is not None:
        wait_before_naming(*gate)
    sys.argv = ["srft-prep", *words]
    main()


class Command:
    """A command that was started, in a process group of its own."""

    def __init__(
        self,
        words: Words,
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        most_file_bytes: int | None = None,
        holds: str | None = None,
    ) -> None:
        """Start a command.

        Args:
            words: what stands behind `srft-prep`.
            log: the file for all that it says.
            environment: what it has beside this process's.
            most_file_bytes: the size at which no file of it grows any more.
            holds: the names of files (a pattern) before which it waits until it is let go.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        self.log = log
        self.mark = f"srft-test-{uuid.uuid4()}"
        own = {"SRFT_TEST_MARK": self.mark, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        own |= environment or {}
        self._gate = FileGate(log.with_name(f"{self.mark}.gate")) if holds is not None else None
        gate = (self._gate.path, holds) if self._gate is not None else None
        self.process = context.Process(
            target=run_command, args=(list(map(str, words)), own, str(log), most_file_bytes, gate)
        )
        self.process.start()

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid or 0, number)

    def wait(self, seconds: float = 120.0) -> int | None:
        """Return the exit status; None where it goes on."""
        self.process.join(seconds)
        return self.process.exitcode

    @property
    def is_held(self) -> bool:
        """Whether it waits at its gate."""
        return self._gate is not None and self._gate.is_reached

    def let_go(self) -> None:
        """Open its gate."""
        if self._gate is not None:
            self._gate.open()

    def wait_until(self, ready: Callable[[], bool], seconds: float = 300.0) -> bool:
        """Wait for something, or for the command's gate or end; return whether it goes on."""
        until = time.monotonic() + seconds
        while self.is_alive and not self.is_held and not ready():
            assert time.monotonic() < until, self.said
            time.sleep(POLL_SECONDS)
        return self.is_alive

    def started_by_it(self) -> list[int]:
        """Return the processes that the command started."""
        return processes_with(self.mark)


@contextmanager
def started(words: Words, log: Path, **settings: object) -> Iterator[Command]:
    """Start a command; it does not outlive the block."""
    command = Command(words, log, **settings)  # type: ignore[arg-type]
    try:
        yield command
    finally:
        command.process.kill()
        command.process.join()


def finish(words: Words, log: Path, *, status: int = 0) -> float:
    """Run a command to its end, which is to have a status; return the seconds that it took."""
    begun = time.monotonic()
    with started(words, log) as command:
        assert command.wait() == status, command.said
        assert "Traceback" not in command.said, command.said
    return time.monotonic() - begun


def kill_when(words: Words, log: Path, ready: Callable[[], bool]) -> None:
    """Start a command and kill -9 it once `ready`, or when it is about to end."""
    with started(words, log, holds=MANIFEST) as command:
        assert command.wait_until(ready), command.said
        command.process.kill()
        command.wait()
        wait_for_orphans(command)


def wait_for_orphans(command: Command, seconds: float = 30.0) -> None:
    """Wait for what a dead process started to die too; a loaded machine may need a while."""
    until = time.monotonic() + seconds
    while command.started_by_it() and time.monotonic() < until:
        time.sleep(0.05)
    assert not command.started_by_it(), "processes outlived the one that was killed"


def after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until
