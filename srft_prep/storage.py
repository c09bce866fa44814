"""Stage directories: written part by part, resumable, finished by their manifest.

    DIR/part-00000.parquet ...   what the stage makes
    DIR/manifest.json            written last: a directory without it is unfinished
    DIR/.progress/               the journal of an unfinished run; gone when the run ends

A directory's *plan* is its stage, its configuration and the hashes of its inputs. A rerun of the
same plan continues after the last part in the journal, a rerun of a finished plan does nothing,
another plan is refused unless it may overwrite, and another stage always. Every file appears by
rename after fsync, so that kill -9 leaves either no file or a whole one. The journal remembers what
was written by its SHA-256: a part that was damaged since is made again. One process at a time may
write: it holds a lock on the directory, and one on a file of the journal, since the other hosts of
a network file system see no lock of a directory. The kernel drops both when the process dies.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final, NoReturn, Self

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep import __version__
from srft_prep.directory_lock import LOCK, DirectoryLock, is_writable
from srft_prep.errors import ConfigError
from srft_prep.hashes import sha256_of
from srft_prep.manifest import (
    BATCHES,
    FILES,
    LEDGERS,
    MANIFEST,
    PLAN,
    PROGRESS,
    Manifest,
    describe_file,
    plan_of,
    portable,
    read_json,
    read_manifest,
)
from srft_prep.object_mirror import address_of
from srft_prep.object_outputs import RemoteOutput
from srft_prep.schemas import (
    HELD_OUT_FILE,
    LABELS_FILE,
    REJECTED_FILE,
    REQUESTS_FILE,
    SCHEMA_VERSION,
)

_MADE: Final = ("part-*.parquet", "shard-*.parquet", REJECTED_FILE, HELD_OUT_FILE)
"""What stages make besides what their manifests name."""


class StageWriter:
    """The one writer of a stage directory; use as a context manager."""

    def __init__(self, path: Path, *, stage: str) -> None:
        """Lock a directory, and bring a mirror up to what the store has; what it holds stays.

        Raises:
            ConfigError: the path is no directory, or is being written by another process.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be made a directory: {error.strerror}") from None
        self.path, self.stage = path, stage
        self.plan: dict[str, Any] = {}
        self.finished: Manifest | None = None
        """Set where this very plan was finished before: there is nothing to do."""
        self.remote: RemoteOutput | None = None
        """The store's side, where the directory is the mirror of one there."""
        self._sha256: dict[str, str | None] = {}
        """Of files that this very run has read or written."""
        self._lock = DirectoryLock(path, self.progress)
        try:
            self.remote = RemoteOutput.begin(path)
        except BaseException:
            self._unlock()
            raise

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        stage: str,
        config: dict[str, Any],
        inputs: list[dict[str, Any]],
        overwrite: bool = False,
        accumulates: bool = False,
    ) -> Self:
        """Lock a directory for one stage and bring it to a state that the stage can go on from.

        Raises:
            ConfigError: it cannot be locked or taken.
        """
        writer = cls(path, stage=stage)
        try:
            writer.take(config=config, inputs=inputs, overwrite=overwrite, accumulates=accumulates)
            if writer.remote and writer.finished:
                writer.remote.finish(writer.finished)
                writer.drop_journal()
            elif writer.remote:
                writer.remote.put_plan()
                writer.remote.uploads.start()
        except BaseException:
            writer._unlock()
            raise
        return writer

    def take(
        self,
        *,
        config: dict[str, Any],
        inputs: list[dict[str, Any]],
        overwrite: bool = False,
        accumulates: bool = False,
    ) -> None:
        """Make the directory that of a plan; nothing is written to a store, only cleared there.

        With `accumulates` (labels) earlier results of any plan stay and are added to; only where
        nothing can be written is a finished one of this very plan taken as it is.

        Raises:
            ConfigError: the directory holds other files, cannot be written to, or holds another
                stage, or another plan and `overwrite` is not set.
        """
        self.plan, self.finished = plan_of(self.stage, config, inputs), None
        if accumulates:
            self._reopen()
        else:
            self._take_over(overwrite=overwrite)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._unlock()

    @property
    def progress(self) -> Path:
        """The directory of the unfinished run's journal."""
        return self.path / PROGRESS

    def entry(self, key: str) -> dict[str, Any] | None:
        """Return what `record` wrote for a key in this plan; None if its files changed since."""
        entry = read_json(self.progress / f"{key}.json")
        if not isinstance(entry, dict):
            return None
        files: dict[str, str] = entry.pop(FILES, {})
        return entry if all(self._hash(name) == files[name] for name in files) else None

    def record(self, key: str, entry: dict[str, Any], *, files: Sequence[Path] = ()) -> None:
        """Note durably that a unit of work is done; its files must be in place before."""
        names = [str(file.relative_to(self.path)) for file in files]
        for name in names:
            self._sha256.pop(name, None)
        hashes = {name: self._hash(name) for name in names}
        described = {**entry, FILES: hashes}
        write_bytes(self.progress / f"{key}.json", orjson.dumps(described))
        if self.remote:
            self.remote.add(key, {name: str(sha256) for name, sha256 in hashes.items()})

    def assure(self) -> None:
        """Make sure that no other machine took a directory in a store over; call it often.

        Raises:
            ConfigError: one did; what this run makes from now on would be lost.
        """
        if self.remote:
            self.remote.assure()

    def finish(
        self,
        *,
        counts: dict[str, Any],
        names: list[str],
        command: list[str],
        extra: dict[str, Any] | None = None,
        run: dict[str, Any] | None = None,
    ) -> Manifest:
        """Write the manifest over the named files and drop the journal; `run` is not written."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "stage": self.stage,
            "package_version": __version__,
            "command": command,
            "config": self.plan["config"],
            "inputs": self.plan["inputs"],
            "counts": counts,
            "files": [
                {**describe_file(self.path / name, sha256=self._sha256.get(name)), "name": name}
                for name in names
            ],
            **(extra or {}),
        }
        write_bytes(self.path / MANIFEST, orjson.dumps(data, option=orjson.OPT_INDENT_2) + b"\n")
        manifest = Manifest(path=self.path, stage=self.stage, data=data, run=run or {})
        if self.remote:
            self.remote.finish(manifest)
        self.drop_journal()
        return manifest

    def drop_journal(self) -> None:
        """Remove what is kept of an unfinished run."""
        self._lock.unlock_journal()
        shutil.rmtree(self.progress, ignore_errors=True)

    def _hash(self, name: str) -> str | None:
        if name not in self._sha256:
            self._sha256[name] = sha256_of(self.path / name)
        return self._sha256[name]

    def _unlock(self) -> None:
        try:
            if self.remote:
                self.remote.end()
        finally:
            self._lock.release()

    def _reopen(self) -> None:
        found = self._refuse_other_stage()
        if not is_writable(self.path) and (held := self._finished_as_planned()):
            self.finished = held
            return
        if found is None:
            tables = (LABELS_FILE, REQUESTS_FILE)
            self._refuse_foreign_files(allowed=(PROGRESS, ".*.tmp", LEDGERS, BATCHES, *tables))
        self._lock.make_journal()
        write_bytes(self.progress / PLAN, orjson.dumps(self.plan))
        self._sweep()

    def _take_over(self, *, overwrite: bool) -> None:
        plan_file = self.progress / PLAN
        unfinished = self._refuse_other_stage()
        if (self.path / MANIFEST).exists():
            manifest = read_manifest(self.path)
            is_planned = manifest.is_of(self.plan)
            if is_planned and self._is_whole(manifest):
                if self.remote is None:  # else it tells whose this is until all is there
                    self.drop_journal()
                self.finished = manifest
                return
            if not (is_planned or overwrite):
                self._refuse_plan("a finished")
            self._clear([file["name"] for file in manifest.files])
        elif not self.progress.exists():
            self._refuse_foreign_files(allowed=(".*.tmp",))
        elif unfinished is None:
            self._clear([])
        elif portable(unfinished) != portable(self.plan):
            if not overwrite:
                self._refuse_plan("an unfinished")
            self._clear([])
        self._lock.make_journal()
        if not plan_file.exists():
            write_bytes(plan_file, orjson.dumps(self.plan))
        self._sweep()

    def _finished_as_planned(self) -> Manifest | None:
        """Return the manifest of a finished run of this very plan whose files are all there."""
        if not (self.path / MANIFEST).exists():
            return None
        manifest = read_manifest(self.path)
        return manifest if manifest.is_of(self.plan) and self._is_whole(manifest) else None

    def _is_whole(self, manifest: Manifest) -> bool:
        return all(self._is_there(file) for file in manifest.files)

    def _is_there(self, file: dict[str, Any]) -> bool:
        """Return whether a file is here or, of a mirror, in the store or here to go there."""
        name: str = file["name"]
        if self.remote is None:
            return (self.path / name).exists()
        return self.remote.has(file) or bool(sha256_of(self.path / name) == file["sha256"])

    def _refuse_other_stage(self) -> dict[str, Any] | None:
        """Return the manifest's or the journal's plan; None where there is neither."""
        found: dict[str, Any] | None = None
        if (self.path / MANIFEST).exists():
            found = read_manifest(self.path).data
        elif isinstance(plan := read_json(self.progress / PLAN), dict) and "stage" in plan:
            found = plan
        stage = found["stage"] if found else None
        paid = (*self.path.glob(LEDGERS), *self.path.glob(BATCHES))
        if stage is None and self.stage != "label" and paid:
            stage = "label"
        if stage not in (None, self.stage):
            raise ConfigError(
                f"{address_of(self.path)}: expected a directory of {self.stage}, this is one of "
                f"{stage}; choose another -o"
            )
        return found

    def _refuse_plan(self, what: str) -> NoReturn:
        raise ConfigError(
            f"{address_of(self.path)}: holds {what} {self.stage} with other settings or inputs; "
            "choose another -o, or say --overwrite"
        )

    def _refuse_foreign_files(self, *, allowed: tuple[str, ...]) -> None:
        names = {entry.name for entry in self.path.iterdir()}
        names |= self.remote.names() if self.remote else set()
        others = sorted(name for name in names if not any(fnmatch(name, each) for each in allowed))
        if others:
            raise ConfigError(
                f"{address_of(self.path)}: is not empty and no srft-prep directory (it holds "
                f"{others[0]}); choose another -o"
            )

    def _sweep(self) -> None:
        """Remove what a killed process left half-written."""
        for leftover in [*self.path.glob(".*.tmp"), *self.progress.glob(".*.tmp")]:
            _remove(leftover)

    def _clear(self, names: list[str]) -> None:
        """Drop an earlier plan's files, but never what a critic was paid for.

        The journal stands all the while, without a plan: a rerun after a kill clears again. The
        manifest goes before the files that it names, so that a kill leaves no lie.
        """
        if self.remote:
            self.remote.clear(names, _MADE)
        self._lock.make_journal()
        (self.progress / PLAN).unlink(missing_ok=True)
        (self.path / MANIFEST).unlink(missing_ok=True)
        made = {self.path / name for name in names}
        for pattern in _MADE:
            made.update(self.path.glob(pattern))
        for file in made:
            if not fnmatch(file.name, LEDGERS):
                file.unlink(missing_ok=True)
        for entry in self.progress.iterdir():
            if entry.name != LOCK:
                _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` that becomes `path`, durably, if the block succeeds."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Make what was written to a file, or renamed in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically and durably."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_rejected(folder: Path, rejected: Iterable[Mapping[str, Any]]) -> None:
    """Write `rejected.jsonl`: one line for each record that a stage did not take."""
    with atomic_path(folder / REJECTED_FILE) as temporary, temporary.open("wb") as file:
        file.writelines(orjson.dumps(line) + b"\n" for line in rejected)


def write_table(table: pa.Table, path: Path, *, row_group_rows: int) -> None:
    """Write a table as zstd Parquet with page checksums, atomically and reproducibly."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, row_group_size=row_group_rows, **PARQUET_OPTIONS)


PARQUET_OPTIONS: Final[dict[str, Any]] = {
    "compression": "zstd",
    "compression_level": 3,
    "write_page_checksum": True,
    "use_dictionary": False,
    "store_schema": False,
}
"""How every Parquet file is written; without dictionaries, which pay nothing on these columns."""
