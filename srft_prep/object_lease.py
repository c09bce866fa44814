"""Who writes an output in a store: one run at a time, on whichever machine.

The lease is an object beside the journal. It is created where there is none (a conditional write,
where the store has them), written anew every few seconds, and removed at the end. A run that finds
it is refused, unless its owner is dead: it was not renewed for a time, or was a process of this
very machine that is gone. The time is the store's: a small object is written to learn it, so that
no clock of a machine counts. A run that was cut off for long and finds another's lease stops, and
writes nothing more.
"""

import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import orjson

from srft_prep.errors import ConfigError, StorageError
from srft_prep.object_storage import (
    create_object,
    found_object,
    patiently,
    read_object,
    remove_object,
    replace_object,
    write_object,
    written_at,
)

LEASE: Final = "lease.json"
CLOCK: Final = "clock-"
"""Beginning of the names of the objects that are written to learn the time."""
SECONDS: Final = "SRFT_LEASE_SECONDS"
"""Environment variable: how long a lease stands that is not renewed."""
LEASE_SECONDS: Final = 60.0
_TRIES: Final = 5


class Lease:
    """The right to write an output; held from `take` to `release`."""

    def __init__(self, url: str, folder: str) -> None:
        """Hold nothing yet.

        Args:
            url: the output, for messages.
            folder: the URL of the journal.
        """
        self._url = url
        self._folder = folder
        self._place = f"{folder}/{LEASE}"
        self._seconds = _lease_seconds()
        self._content = orjson.dumps(
            {
                "run": uuid.uuid4().hex,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "machine": _machine(),
                "started": _started(os.getpid()),
            }
        )
        self._renewed = time.monotonic()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self.is_lost = False
        """Set once another run has the lease."""

    def take(self) -> None:
        """Take the lease and keep it.

        Raises:
            ConfigError: another run has it.
            StorageError: the store does not answer, or refuses.
        """
        for _ in range(_TRIES):
            begun = time.monotonic()
            if patiently(self._taken):
                self._renewed = begun
                self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
                self._thread.start()
                return
        raise ConfigError(f"{self._url}: other runs are taking this output; try again")

    def assure(self) -> None:
        """Make sure that the lease is still ours before something is written.

        Raises:
            ConfigError: another run has it now, or it was released.
            StorageError: the store does not answer, or refuses.
        """
        with self._lock:
            if self._end.is_set():
                raise ConfigError(f"{self._url}: this run is over, and writes nothing more")
            if not self.is_lost and time.monotonic() - self._renewed > self._seconds / 2:
                self._renew()
        if self.is_lost:
            raise ConfigError(
                f"{self._url}: another run took over while this one could not reach the store for "
                f"{self._seconds:.0f} seconds; wait for that one, then give the command again: "
                "what was done here is kept"
            )

    def release(self) -> None:
        """Let go of the lease, as far as the store answers; `assure` raises from now on."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._lock, suppress(StorageError):
            if not self.is_lost and self._is_ours():
                remove_object(self._place)

    def _taken(self) -> bool:
        """Return whether the lease is ours now; where it is not, another look may tell more.

        What a write answers does not count, but what is read then: there are stores that do not
        know conditions, and overwrite; and a write of which the answer was lost is repeated by the
        libraries, and refused as it finds what it wrote.
        """
        held = read_object(self._place)
        if held == self._content:
            return True
        if held is None:
            create_object(self._place, self._content)
            return self._is_ours()
        owner = _read(held)
        if owner.get("machine") == _machine():
            if _started(owner.get("pid")) == owner.get("started"):
                self._refuse(owner, "which is alive on this machine")
        else:
            age = self._age()
            if age is None:
                return False
            if age < self._seconds:
                self._refuse(
                    owner,
                    f"which was heard of {age:.0f} seconds ago and counts as dead after "
                    f"{self._seconds:.0f}",
                )
        old = found_object(self._place)
        if old is None or read_object(self._place) != held:
            return False
        replace_object(self._place, self._content, old=old)
        return self._is_ours()

    def _refuse(self, owner: dict[str, Any], state: str) -> None:
        raise ConfigError(
            f"{self._url}: another srft-prep run is writing here: process {owner.get('pid')} of "
            f"{owner.get('host')}, {state}; wait for it, or choose another -o"
        )

    def _age(self) -> float | None:
        """Return how old the lease is, by the store's clock, in seconds; None if it is not known.

        The lease is gone, or a run that began just now removed the object that tells the time.
        """
        probe = f"{self._folder}/{CLOCK}{uuid.uuid4().hex}"
        write_object(probe, b"")
        try:
            now, then = written_at(probe), written_at(self._place)
        finally:
            remove_object(probe)
        return None if now is None or then is None else max(0.0, now - then)

    def _is_ours(self) -> bool:
        return read_object(self._place) == self._content

    def _keep(self) -> None:
        while not self._end.wait(self._seconds / 4):
            with self._lock, suppress(StorageError):  # `assure` tells of it
                if not self.is_lost:
                    self._renew()

    def _renew(self) -> None:
        """Write the lease anew, or find that it is another's.

        The object is looked at before each writing: its ETag may change with each, also with one
        of which the answer was lost.
        """
        for _ in range(_TRIES):
            begun = time.monotonic()
            old = found_object(self._place)
            if old is None or not self._is_ours():
                self.is_lost = True
                return
            if replace_object(self._place, self._content, old=old):
                self._renewed = begun
                return
        raise StorageError(f"{self._place}: the store does not let this run renew its own lease")


def _lease_seconds() -> float:
    word = os.environ.get(SECONDS, "")
    try:
        seconds = float(word) if word else LEASE_SECONDS
    except ValueError:
        seconds = 0.0
    if seconds < 1:
        raise ConfigError(f"{SECONDS}: expected seconds, at least 1, got {word[:40]!r}")
    return seconds


def _read(content: bytes) -> dict[str, Any]:
    try:
        owner = orjson.loads(content)
    except orjson.JSONDecodeError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _machine() -> str:
    """Return what only processes share that see each other: the boot and the process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return uuid.uuid4().hex


def _started(pid: object) -> str | None:
    """Return when a process of this machine was started, in ticks; None where there is none."""
    if not isinstance(pid, int):
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]
