"""What follows a run into a store: finished units of work, and files that grow.

A thread looks for what is due: the units that the journal recorded, files before their entry, and
every few seconds the ledgers that grew. While the store does not answer it tries again, and the run
goes on. Nothing is written without the lease, and nothing begins after a limit that `limit` sets.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from srft_prep.errors import ConfigError, StorageError
from srft_prep.hashes import sha256_of
from srft_prep.manifest import BATCHES, LEDGERS, PROGRESS
from srft_prep.object_lease import Lease
from srft_prep.object_mirror import Index, address_of, version_of
from srft_prep.object_storage import (
    Object,
    each_of,
    found_object,
    patiently,
    remove_object,
    upload,
    write_object,
)
from srft_prep.progress import plain

APPENDED: Final = (LEDGERS, BATCHES)
"""Files that grow, and that critics and providers were paid for."""
LOOK_SECONDS: Final = 2.0
"""Time between two looks at the files that grow, at least; a fifth of the time goes into them."""
MOST_SECONDS: Final = 30.0
"""Time between two tries, at most."""


class Uploads:
    """What the store has of a folder, and what it lacks."""

    def __init__(self, folder: Path, lease: Lease) -> None:
        """Know nothing of the store yet, and upload nothing before `start`."""
        self.folder = folder
        self.url = address_of(folder)
        self.lease = lease
        self.objects: dict[str, Object] = {}
        """What the store has, by name; but for the lease."""
        self.same: dict[str, str] = {}
        """SHA-256 of the files that the store has as they are here, by name."""
        self.units: dict[str, dict[str, str]] = {}
        """Journal entries that are to be uploaded, and the SHA-256 of their files by name."""
        self.index = Index(folder)
        self.appended: dict[str, int] = {}
        """Bytes that the store has of the files that grow."""
        self.also: Callable[[], None] = lambda: None
        """Uploads what else is due at each look; a store that does not answer is its error."""
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._until = math.inf
        """When nothing more may begin, by the monotonic clock."""
        self._num_at_work = 0
        """The thread, and files under way."""
        self._last: Callable[[], None] | None = None

    def start(self) -> None:
        """Let the thread begin."""
        self._thread = threading.Thread(target=self._follow, daemon=True, name="uploads")
        self._thread.start()

    def stop(self) -> None:
        """End the thread; from now on uploads are the caller's.

        Raises:
            StorageError: the thread is at a file still, and the limit is over.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is not None:
            left = self._until - time.monotonic()
            self._thread.join(None if left == math.inf else max(0.0, left))
            if self._thread.is_alive():
                raise self._cut_short()
            self._thread = None

    def limit(self, seconds: float) -> None:
        """Let nothing more begin after some seconds; what is under way then goes on to its end."""
        self._until = time.monotonic() + seconds

    def when_idle(self, work: Callable[[], None]) -> None:
        """Do something now or, where something is under way, at the end of the last of it."""
        with self._changed:
            if self._num_at_work:
                self._last = work
                return
        work()

    def assure(self) -> None:
        """Make sure that no other run took over, as far as is known; the store is not asked.

        Raises:
            ConfigError: another run has the lease now.
        """
        if self.lease.is_lost:
            self.lease.assure()

    def add(self, key: str, files: Mapping[str, str]) -> None:
        """Let a unit of work follow: its files, then its journal entry.

        Raises:
            ConfigError: another run took over.
        """
        self.assure()
        with self._changed:
            self.units[f"{PROGRESS}/{key}.json"] = dict(files)
            self._changed.notify()

    def forget(self) -> None:
        """Let nothing follow that was added, and take nothing for uploaded."""
        self.same.clear()
        with self._changed:
            self.units.clear()

    def persist(self, patience: float) -> None:
        """Upload all that is due, and try again for a time, in seconds.

        Raises:
            StorageError: the store does not answer, or refuses.
            ConfigError: another run took over.
        """
        patiently(self._step, patience=patience, progress=lambda: len(self.same))

    def send(self, files: Mapping[str, str]) -> None:
        """Upload the files that the store has not as they are here, several at once.

        Args:
            files: SHA-256 by name.

        Raises:
            StorageError: the store does not answer, or refuses.
            ConfigError: another run took over.
        """

        def send(name: str) -> None:
            path = self.folder / name
            if self._is_same(name, files[name]) or not path.exists():  # it was dropped since
                return
            with self._at_work():
                upload(path, self.at(name))
                is_entry = name.startswith(f"{PROGRESS}/")
                one = None if is_entry else found_object(self.at(name))
            self.objects[name] = one or Object(size=path.stat().st_size, token="")
            self.note(name, files[name])

        shown = plain(f"upload {self.url}", total=len(files), unit="files")
        for _ in each_of(send, list(files)):
            shown.advance()

    def note(self, name: str, sha256: str) -> None:
        """Keep in mind that the store has a file as it is here, and in which version."""
        self.same[name] = sha256
        if version := self._version(name, sha256):
            self.index.add(name, version)

    def is_noted(self, name: str, sha256: str) -> bool:
        """Return whether the store lists the version of a file that was fetched or written here."""
        version = self._version(name, sha256)
        return version is not None and self.index.token(name) == version

    def _version(self, name: str, sha256: str) -> str | None:
        one = self.objects[name]
        return f"{sha256} {version_of(one)}" if one.token else None

    def write(self, name: str, content: bytes, *, patience: float | None = None) -> None:
        """Write a small object; a store that does not answer is tried for `patience` seconds.

        Raises:
            StorageError: the store does not answer, or refuses.
            ConfigError: another run took over.
        """
        self.lease.assure()
        patiently(lambda: write_object(self.at(name), content), patience=patience)
        self.objects[name] = Object(size=len(content), token="")

    def remove(self, names: Sequence[str], *, patience: float | None = None) -> None:
        """Delete those objects that are there; as patiently as `write`.

        Raises:
            StorageError: the store does not answer, or refuses.
            ConfigError: another run took over.
        """
        present = [name for name in names if name in self.objects]
        if present:
            self.lease.assure()

        def remove(name: str) -> None:
            patiently(lambda: remove_object(self.at(name)), patience=patience)

        for _ in each_of(remove, present):
            pass
        for name in present:
            del self.objects[name]
            self.same.pop(name, None)

    def at(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{name}"

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Upload within this, under the lease and the limit; what waits for the last comes after.

        Raises:
            StorageError: the limit is over, or the store does not answer.
            ConfigError: another run took over.
        """
        self.lease.assure()
        with self._counted():
            if time.monotonic() >= self._until:
                raise self._cut_short()
            yield

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._changed:
            self._num_at_work += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_at_work -= 1
                work = None if self._num_at_work else self._last
            if work is not None:
                work()

    def _cut_short(self) -> StorageError:
        return StorageError(f"{self.url}: not all was uploaded: the run ended", is_final=True)

    def _follow(self) -> None:
        with self._counted():
            self._follow_on()

    def _follow_on(self) -> None:
        pause, failed = LOOK_SECONDS, False
        while self._is_due(pause, at_once=not failed):
            begun = time.monotonic()
            try:
                self._send_due()
                seconds = time.monotonic() - begun
                self.also()
            except (StorageError, ConfigError, OSError, ValueError) as error:
                if not (failed or self._is_closing):
                    self.say(f"{error}; trying again while the run goes on")
                pause, failed = min(2 * pause, MOST_SECONDS), True
            else:
                if failed:
                    self.say(f"{self.url}: the store answers again")
                pause, failed = max(LOOK_SECONDS, 4 * seconds), False

    def _is_due(self, seconds: float, *, at_once: bool) -> bool:
        """Wait for a time, or for a unit of work; return False once the thread is to end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closing or (at_once and bool(self.units)), timeout=seconds
            )
            return not self._is_closing

    def _step(self) -> None:
        """Upload what is due."""
        self._send_due()
        self.also()

    def _send_due(self) -> None:
        """Upload units of work, and the files that grow."""
        with self._changed:
            units = dict(self.units)
        if units:
            self.send({name: sha256 for each in units.values() for name, sha256 in each.items()})
            self.send({name: sha256_of(self.folder / name) or "" for name in units})
            with self._changed:
                for name, files_of in units.items():
                    if self.units.get(name) == files_of:
                        del self.units[name]
        for path in appended_in(self.folder):
            self._send_appended(path)

    def _send_appended(self, path: Path) -> None:
        size = path.stat().st_size
        if size > self.appended.get(path.name, -1):
            with self._at_work():
                upload(path, self.at(path.name))
            self.appended[path.name] = size
            self.objects[path.name] = Object(size=size, token="")

    def _is_same(self, name: str, sha256: str) -> bool:
        if is_appended(name):
            return self.appended.get(name) == (self.folder / name).stat().st_size
        return self.same.get(name) == sha256

    def say(self, text: str) -> None:
        """Tell the user something beside what the run shows."""
        plain("upload", total=None, unit="files").say(text)


def is_appended(name: str) -> bool:
    """Return whether a file is one that grows."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in APPENDED)


def appended_in(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that grow."""
    for pattern in APPENDED:
        yield from sorted(path for path in folder.glob(pattern) if path.is_file())
