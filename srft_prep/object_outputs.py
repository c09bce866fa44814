"""An output in a store: a local folder that is written as ever, and follows into the store.

The local folder is the run's; the store is what outlives the machine. So that a run can be killed
anywhere, and go on on another machine:

- *Beginning.* The lease is taken (`object_lease`), and the local folder is made what the store has:
  manifest, journal, the files that the journal names, ledgers. Work of this machine that never
  reached the store stays if the store has the same plan, and so does every line of a ledger.
- *While it runs.* Finished units of work and ledgers follow (`object_uploads`).
- *End.* What is missing, then the manifest, then the journal goes, then the lease. Where the store
  stays away the run ends with an error, and the same command uploads the rest.

The plan stands in the store before anything else of it does, and an older plan's manifest goes
before its files. No ledger is ever deleted or overwritten with less than it holds.
"""

import math
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import orjson

from srft_prep.errors import ConfigError, StorageError
from srft_prep.hashes import sha256_of
from srft_prep.manifest import FILES, LEDGERS, MANIFEST, PLAN, PROGRESS, Manifest
from srft_prep.object_lease import CLOCK, LEASE, Lease
from srft_prep.object_mirror import address_of, claim, fetch_object, is_mirrored, unclaim
from srft_prep.object_storage import (
    each_of,
    listed,
    parts_of,
    patience_seconds,
    patiently,
    read_object,
    written_at,
)
from srft_prep.object_uploads import Uploads, is_appended
from srft_prep.progress import plain

FEWEST_SECONDS: Final = 10.0
"""How long a run that fails tries to bring away what it has."""
PROBE_SECONDS: Final = 600.0
"""From what age on an object that was written to learn the time is a killed run's."""
_PLAN: Final = f"{PROGRESS}/{PLAN}"
_CLOCK: Final = f"{PROGRESS}/{CLOCK}"
_CLEARED: Final = f"{PROGRESS}/cleared.json"
"""Object that says that an earlier plan is being removed."""
_MADE: Final = ("part-", "shard-")
_MADE_BY: Final = {"train": ("model/", "adapter/")}
"""Beginnings of the names of what stages make, all of which a manifest names."""


class RemoteOutput:
    """The store's side of an output that this process writes."""

    def __init__(self, folder: Path, lease: Lease) -> None:
        """Have the lease; `begin` does the rest."""
        self.folder = folder
        self._lease = lease
        self.uploads = Uploads(folder, lease)
        """What the store has, and lacks."""
        self._is_settled = False
        """Whether nothing is left to bring away, or enough was tried."""

    @classmethod
    def begin(cls, folder: Path) -> Self | None:
        """Take an output and make the local folder what the store has; None for a local path.

        Raises:
            ConfigError: another run writes it, or the store is one that is only read.
            StorageError: the store does not answer, or refuses.
        """
        if not is_mirrored(folder):
            return None
        url = address_of(folder)
        if url.startswith("hf://"):
            raise ConfigError(
                f"{url}: hf:// is read, not written: every file would be a commit; write to "
                "s3://, gs:// or a local folder"
            )
        lease = Lease(url, f"{url}/{PROGRESS}")
        lease.take()
        try:
            output = cls(folder, lease)
            output._bring_up()
        except BaseException:
            lease.release()
            raise
        claim(folder)
        return output

    def names(self) -> set[str]:
        """Return the names of the files and folders that the store has in the output itself."""
        return {name.partition("/")[0] for name in self.uploads.objects}

    def has(self, file: Mapping[str, Any]) -> bool:
        """Return whether the store has a file of a manifest; by its size, where that is told."""
        one = self.uploads.objects.get(file["name"])
        return one is not None and one.size == file.get("bytes", one.size)

    def assure(self) -> None:
        """Make sure that no other run took over.

        Raises:
            ConfigError: another run has the lease now.
        """
        self.uploads.assure()

    def put_plan(self) -> None:
        """Make the plan that lies here the store's.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        self.uploads.write(_PLAN, (self.folder / _PLAN).read_bytes())
        self.uploads.remove([_CLEARED])

    def clear(self, names: Iterable[str], patterns: Iterable[str]) -> None:
        """Remove what an earlier plan left in the store, but never what was paid for.

        A mark stands all the while until there is a plan again: a rerun after a kill clears again.

        Args:
            names: what the earlier manifest names.
            patterns: of what stages make besides.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        self.uploads.forget()
        self.uploads.write(_CLEARED, b"{}")
        self.uploads.remove([_PLAN])
        self.uploads.remove([MANIFEST])
        patterns, named = [*patterns, f"{PROGRESS}/*"], {*names}
        made = [
            name
            for name in self.uploads.objects
            if (name in named or any(fnmatch(name, pattern) for pattern in patterns))
            and not is_appended(name)
            and name != _CLEARED
        ]
        self.uploads.remove(made)

    def add(self, key: str, files: Mapping[str, str]) -> None:
        """Let a unit of work follow into the store: its files, then its journal entry.

        Args:
            key: of the entry.
            files: SHA-256 by name.

        Raises:
            ConfigError: another run took over.
        """
        self.uploads.add(key, files)

    def finish(self, manifest: Manifest) -> None:
        """Bring what is missing into the store, then the manifest; then the journal goes.

        Args:
            manifest: as it lies here.

        Raises:
            StorageError: the store does not answer for too long, or refuses.
        """
        uploads = self.uploads
        uploads.stop()
        files = {file["name"]: file["sha256"] for file in manifest.files}
        content = (self.folder / MANIFEST).read_bytes()
        patience = patience_seconds()

        def send(files: Mapping[str, str]) -> None:
            patiently(
                lambda: uploads.send(files), patience=patience, progress=lambda: len(uploads.same)
            )

        try:
            uploads.persist(patience)
            if patiently(lambda: read_object(uploads.at(MANIFEST))) != content:
                uploads.remove([MANIFEST])
                send(files)
                beginnings = (*_MADE, *_MADE_BY.get(manifest.stage, ()))
                made = [name for name in uploads.objects if name.startswith(beginnings)]
                uploads.remove([name for name in made if name not in files])
                uploads.write(MANIFEST, content)
            lacking = {
                file["name"]: file["sha256"] for file in manifest.files if not self.has(file)
            }
            send(lacking)
            uploads.remove([name for name in uploads.objects if name.startswith(f"{PROGRESS}/")])
            self._is_settled = True
        except StorageError as error:
            self._is_settled = True
            raise StorageError(
                f"{error}; all is kept on this machine: give the same command again here, and it "
                "uploads the rest",
                is_final=error.is_final,
            ) from None

    def leave(self, seconds: float = math.inf) -> None:
        """Bring away what is done, begun within some seconds; what cannot be is said, and kept."""
        uploads = self.uploads
        if self._is_settled or self._lease.is_lost:
            return
        self._is_settled = True
        try:
            uploads.limit(seconds)
            uploads.stop()
            uploads.persist(min(FEWEST_SECONDS, patience_seconds()))
        except (StorageError, ConfigError) as error:
            uploads.say(f"{error}; what was done is kept on this machine: the same command goes on")

    def end(self) -> None:
        """Bring away what can be in some seconds, and let go of the output.

        After `finish` nothing is left to bring. The lease stays while a file is under way.
        """
        try:
            self.leave(FEWEST_SECONDS)
        finally:
            unclaim(self.folder)
            self.uploads.limit(0)
            self.uploads.when_idle(self._lease.release)

    def _bring_up(self) -> None:
        """Make the local folder what the store has, but for work that goes on from it."""
        uploads = self.uploads
        uploads.objects = patiently(lambda: listed(uploads.url))
        uploads.objects.pop(f"{PROGRESS}/{LEASE}", None)
        self._remove_probes()
        theirs = {name: self._content(name) for name in (MANIFEST, _PLAN)}
        mine = {name: _bytes(self.folder / name) for name in theirs}
        goes_on = theirs[_PLAN] is not None and theirs[_PLAN] == mine[_PLAN]
        if not (goes_on or (theirs[_PLAN] is None and theirs == mine)):
            _reset(self.folder)
            for name, content in theirs.items():
                if content is not None:
                    self._write(name, content)
        self._bring_appended()
        if theirs[_PLAN] is not None:
            self._bring_journal()
        elif _CLEARED in uploads.objects:
            (self.folder / PROGRESS).mkdir(exist_ok=True)  # and not begun again

    def _bring_journal(self) -> None:
        """Fetch the entries that are not here, and the files that they name."""
        uploads = self.uploads
        names = [
            name
            for name in uploads.objects
            if fnmatch(name, f"{PROGRESS}/*.json")
            and name.count("/") == 1
            and name not in (_PLAN, _CLEARED)
        ]
        found = zip(names, each_of(self._content, names), strict=True)
        theirs = {name: content for name, content in found if content is not None}
        for name, content in theirs.items():
            if not (self.folder / name).exists():
                self._write(name, content)
        for path in sorted((self.folder / PROGRESS).glob("*.json")):
            name, content = f"{PROGRESS}/{path.name}", path.read_bytes()
            if name != _PLAN and theirs.get(name) != content:
                uploads.units[name] = _files_of(content)
        wanted = {
            file: sha256
            for content in theirs.values()
            for file, sha256 in _files_of(content).items()
            if file in uploads.objects
        }

        def bring(file: str) -> None:
            path, sha256 = self.folder / file, wanted[file]
            parts_of(uploads.at(file))  # no way out of the folder
            if sha256_of(path) == sha256:
                if uploads.is_noted(file, sha256):
                    uploads.same[file] = sha256
                return
            fetch_object(uploads.at(file), path, uploads.objects[file])
            if sha256_of(path) == sha256:  # else it is made again
                uploads.note(file, sha256)

        shown = plain(f"fetch {uploads.url}", total=len(wanted), unit="files")
        for _ in each_of(bring, list(wanted)):
            shown.advance()

    def _bring_appended(self) -> None:
        """Fetch the files that grow; lines that are only here stay, under another name if need be.

        A file is written by one run; another machine's of the same number is another file. What
        the store does not have is uploaded again: it was paid for, whoever deleted it there.
        """
        uploads = self.uploads
        for name, one in uploads.objects.items():
            if not is_appended(name):
                continue
            path, theirs = self.folder / name, self.folder / f".{name}.theirs.tmp"
            fetch_object(uploads.at(name), theirs, one)
            if path.exists() and not _begins(path, theirs):
                if _begins(theirs, path):
                    theirs.unlink()
                else:
                    path.rename(_free_name(path, uploads.objects))
            if theirs.exists():
                theirs.replace(path)
            uploads.appended[name] = one.size

    def _remove_probes(self) -> None:
        """Remove what killed runs wrote to learn the time; a run that asks just now needs its own.

        The lease was written a moment ago, by the same clock.
        """
        uploads = self.uploads
        probes = [name for name in uploads.objects if name.startswith(_CLOCK)]
        if not probes:
            return
        now, *written = (
            patiently(partial(written_at, uploads.at(name)))
            for name in (f"{PROGRESS}/{LEASE}", *probes)
        )
        uploads.remove(
            [
                name
                for name, then in zip(probes, written, strict=True)
                if now is not None and then is not None and now - then > PROBE_SECONDS
            ]
        )

    def _content(self, name: str) -> bytes | None:
        return patiently(lambda: read_object(self.uploads.at(name)))

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(content)
        temporary.replace(path)


def bring_ledgers(folder: Path, place: Path) -> None:
    """Write the ledgers that the store has of a directory into a folder, to be read only.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    url = address_of(folder)
    for name, one in patiently(lambda: listed(url)).items():
        if fnmatch(name, LEDGERS) and "/" not in name:
            fetch_object(f"{url}/{name}", place / name, one)


def _reset(folder: Path) -> None:
    """Remove what is in a folder, but what was paid for."""
    for path in folder.iterdir():
        if path.name == PROGRESS:
            for entry in path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != "lock":
                    entry.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        elif not is_appended(path.name):
            path.unlink()


def _begins(path: Path, other: Path) -> bool:
    """Return whether a file's bytes are the first ones of another."""
    if path.stat().st_size > other.stat().st_size:
        return False
    with path.open("rb") as mine, other.open("rb") as theirs:
        while piece := mine.read(1 << 20):
            if theirs.read(len(piece)) != piece:
                return False
    return True


def _files_of(entry: bytes) -> dict[str, str]:
    """Return the files that a journal entry names, with their hashes; none of a damaged one."""
    try:
        files = orjson.loads(entry)[FILES]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


def _free_name(path: Path, taken: Iterable[str]) -> Path:
    """Return another name of the same kind that neither the folder nor the store has."""
    stem, _, rest = path.name.partition(".")
    names = (path.with_name(f"{stem}-{number}.{rest}") for number in range(2, 1 << 20))
    return next(each for each in names if not each.exists() and each.name not in set(taken))


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
