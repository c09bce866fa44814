"""Stage directories: written part by part, resumable, finished by their manifest.

    DIR/part-00000.parquet ...   what the stage makes
    DIR/manifest.json            written last: a directory without it is unfinished
    DIR/.progress/               the journal of an unfinished run; gone when the run ends

A directory's *plan* is its stage, its configuration and the hashes of its inputs. A rerun of the
same plan continues after the last part in the journal, a rerun of a finished plan does nothing,
another plan is refused unless it may overwrite, and another stage always. Every file appears by
rename after fsync, so that kill -9 leaves either no file or a whole one. One process at a time may
write: it holds a lock on the directory, which the kernel drops when the process dies.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final, NoReturn, Self

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep import __version__
from srft_prep.errors import ConfigError
from srft_prep.manifest import MANIFEST, PROGRESS, Manifest, describe_file, read_manifest
from srft_prep.schemas import (
    HELD_OUT_FILE,
    LABELS_FILE,
    REJECTED_FILE,
    REQUESTS_FILE,
    SCHEMA_VERSION,
)

PLAN: Final = "plan.json"
LEDGERS: Final = "ledger-*.jsonl"
"""What critics answered: paid for, so that no stage and no `overwrite` ever removes it."""
BATCHES: Final = "batches-*.jsonl*"
"""The jobs that providers were given, paid for too."""


class StageWriter:
    """The one writer of a stage directory; use as a context manager."""

    def __init__(self, path: Path, *, stage: str, plan: dict[str, Any]) -> None:
        self.path = path
        self.stage = stage
        self.plan: dict[str, Any] = orjson.loads(orjson.dumps(plan))
        """As it will be read again: a tuple becomes a list."""
        self.finished: Manifest | None = None
        """Set where this very plan was finished before: there is nothing to do."""
        self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

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

        With `accumulates` (labels) earlier results of any plan stay and are added to.

        Raises:
            ConfigError: the path is no directory, holds other files, is being written by another
                process, or holds another stage, or another plan and `overwrite` is not set.
        """
        plan = {
            "schema_version": SCHEMA_VERSION,
            "package_version": __version__,
            "stage": stage,
            "config": config,
            "inputs": inputs,
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be made a directory: {error.strerror}") from None
        writer = cls(path, stage=stage, plan=plan)
        try:
            writer._lock_now()
            if accumulates:
                writer._reopen()
            else:
                writer._take_over(overwrite=overwrite)
        except BaseException:
            os.close(writer._lock)
            raise
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._lock)

    @property
    def progress(self) -> Path:
        """The directory of the unfinished run's journal."""
        return self.path / PROGRESS

    def entry(self, key: str) -> dict[str, Any] | None:
        """Return what `record` wrote for a key in this plan, or None."""
        entry: dict[str, Any] | None = _read_json(self.progress / f"{key}.json")
        return entry

    def record(self, key: str, entry: dict[str, Any]) -> None:
        """Note durably that a unit of work is done; its files must be in place before."""
        write_bytes(self.progress / f"{key}.json", orjson.dumps(entry))

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
            "files": [{**describe_file(self.path / name), "name": name} for name in names],
            **(extra or {}),
        }
        write_bytes(self.path / MANIFEST, orjson.dumps(data, option=orjson.OPT_INDENT_2) + b"\n")
        shutil.rmtree(self.progress, ignore_errors=True)
        return Manifest(path=self.path, stage=self.stage, data=data, run=run or {})

    def _lock_now(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.path}: another srft-prep run is writing here; wait for it, or choose "
                "another -o"
            ) from None

    def _reopen(self) -> None:
        if self._refuse_other_stage() is None:
            tables = (LABELS_FILE, REQUESTS_FILE)
            self._refuse_foreign_files(allowed=(PROGRESS, ".*.tmp", LEDGERS, BATCHES, *tables))
        self.progress.mkdir(exist_ok=True)
        write_bytes(self.progress / PLAN, orjson.dumps(self.plan))
        self._sweep()

    def _take_over(self, *, overwrite: bool) -> None:
        plan_file = self.progress / PLAN
        unfinished = self._refuse_other_stage()
        if (self.path / MANIFEST).exists():
            manifest = read_manifest(self.path)
            same = all(
                portable(manifest.data.get(key)) == portable(self.plan[key])
                for key in ("schema_version", "stage", "config", "inputs")
            )
            if same and all((self.path / file["name"]).exists() for file in manifest.files):
                shutil.rmtree(self.progress, ignore_errors=True)
                self.finished = manifest
                return
            if not (same or overwrite):
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
        self.progress.mkdir(exist_ok=True)
        if not plan_file.exists():
            write_bytes(plan_file, orjson.dumps(self.plan))
        self._sweep()

    def _refuse_other_stage(self) -> dict[str, Any] | None:
        """Return the manifest's or the journal's plan; None where there is neither."""
        found: dict[str, Any] | None = None
        if (self.path / MANIFEST).exists():
            found = read_manifest(self.path).data
        elif isinstance(plan := _read_json(self.progress / PLAN), dict) and "stage" in plan:
            found = plan
        stage = found["stage"] if found else None
        paid = (*self.path.glob(LEDGERS), *self.path.glob(BATCHES))
        if stage is None and self.stage != "label" and paid:
            stage = "label"
        if stage not in (None, self.stage):
            raise ConfigError(
                f"{self.path}: expected a directory of {self.stage}, this is one of {stage}; "
                "choose another -o"
            )
        return found

    def _refuse_plan(self, what: str) -> NoReturn:
        raise ConfigError(
            f"{self.path}: holds {what} {self.stage} with other settings or inputs; choose "
            "another -o, or say --overwrite"
        )

    def _refuse_foreign_files(self, *, allowed: tuple[str, ...]) -> None:
        others = sorted(
            entry.name
            for entry in self.path.iterdir()
            if not any(fnmatch(entry.name, pattern) for pattern in allowed)
        )
        if others:
            raise ConfigError(
                f"{self.path}: is not empty and no srft-prep directory (it holds {others[0]}); "
                "choose another -o"
            )

    def _sweep(self) -> None:
        """Remove what a killed process left half-written."""
        for leftover in [*self.path.glob(".*.tmp"), *self.progress.glob(".*.tmp")]:
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def _clear(self, names: list[str]) -> None:
        """Drop an earlier plan's files, but never what a critic was paid for.

        The journal stands all the while, without a plan: a rerun after a kill clears again. The
        manifest goes before the files that it names, so that a kill leaves no lie.
        """
        self.progress.mkdir(exist_ok=True)
        (self.progress / PLAN).unlink(missing_ok=True)
        (self.path / MANIFEST).unlink(missing_ok=True)
        made = {self.path / name for name in names}
        for pattern in ("part-*.parquet", "shard-*.parquet", REJECTED_FILE, HELD_OUT_FILE):
            made.update(self.path.glob(pattern))
        for file in made:
            if not fnmatch(file.name, LEDGERS):
                file.unlink(missing_ok=True)
        for entry in self.progress.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _read_json(path: Path) -> Any:
    """Return a journal file's value; None where it is missing or damaged: the work is redone."""
    try:
        return orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None


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


def portable(value: Any) -> Any:
    """Return a manifest value without its inputs' paths: moving a directory changes nothing."""
    if isinstance(value, list):
        return [portable(item) for item in value]
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items() if key != "path"}
    return value
