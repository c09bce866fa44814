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
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final, NoReturn, Self

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep import __version__
from srft_prep.errors import ConfigError, ShardError
from srft_prep.schemas import SCHEMA_VERSION

MANIFEST: Final = "manifest.json"
PROGRESS: Final = ".progress"
PLAN: Final = "plan.json"
LEDGERS: Final = "ledger-*.jsonl"
"""What critics answered: paid for, so that no stage and no `overwrite` ever removes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a finished stage says about itself."""

    path: Path
    """The stage directory."""
    stage: str
    """`ingest`, `label`, `tokenize` or `pack`."""
    data: dict[str, Any]
    """The whole document."""
    run: dict[str, Any] = field(default_factory=dict)
    """Counts of the run that just wrote it, not of what it holds: they are in no file."""

    @property
    def counts(self) -> dict[str, Any]:
        """The stage's counts."""
        counts: dict[str, Any] = self.data["counts"]
        return counts

    @property
    def files(self) -> list[dict[str, Any]]:
        """`name`, `bytes`, `sha256` and, for tables, `rows` of every file, in order."""
        files: list[dict[str, Any]] = self.data["files"]
        return files

    @property
    def parts(self) -> list[Path]:
        """The stage's Parquet parts or shards, in order."""
        return [
            self.path / file["name"]
            for file in self.files
            if file["name"].startswith(("part-", "shard-"))
        ]

    def checked(self) -> Self:
        """Return this manifest, its tables being found to hold the bytes that were written.

        Every stage calls it on its inputs: Parquet readers take half of all flipped bytes for good
        data. Costs one pass of SHA-256 (0.8 GB/s on a 2.9 GHz core without SHA instructions).

        Raises:
            ShardError: a table is missing or was changed.
        """
        for file in self.files:
            path = self.path / file["name"]
            if path.suffix != ".jsonl" and _sha256(path) != file["sha256"]:
                what = "changed since it was written" if path.exists() else "missing"
                raise ShardError(
                    f"{path}: {what}; restore it, or delete {self.path} and run {self.stage} again"
                )
        return self

    def as_input(self) -> dict[str, Any]:
        """Return how a later stage names this one: by content, not by where it lies.

        Labels are `labels.parquet` alone: the other files tell how a run was cut up and timed.
        """
        names = [
            [file["name"], file["sha256"]]
            for file in self.files
            if self.stage != "label" or file["name"] == "labels.parquet"
        ]
        return {"path": str(self.path), "stage": self.stage, "sha256": hash_of(names)}


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
            "files": [describe_file(self.path / name) for name in names],
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
            tables = ("labels.parquet", "requests.parquet")
            self._refuse_foreign_files(allowed=(PROGRESS, ".*.tmp", LEDGERS, *tables))
        self.progress.mkdir(exist_ok=True)
        write_bytes(self.progress / PLAN, orjson.dumps(self.plan))
        self._sweep()

    def _take_over(self, *, overwrite: bool) -> None:
        plan_file = self.progress / PLAN
        unfinished = self._refuse_other_stage()
        if (self.path / MANIFEST).exists():
            manifest = read_manifest(self.path)
            same = all(
                _portable(manifest.data.get(key)) == _portable(self.plan[key])
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
        elif _portable(unfinished) != _portable(self.plan):
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
        if stage is None and self.stage != "label" and any(self.path.glob(LEDGERS)):
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
        for pattern in ("part-*.parquet", "shard-*.parquet", "rejected.jsonl"):
            made.update(self.path.glob(pattern))
        for file in made:
            if not fnmatch(file.name, LEDGERS):
                file.unlink(missing_ok=True)
        for entry in self.progress.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def read_manifest(path: Path, *, stage: str | None = None) -> Manifest:
    """Return the manifest of a finished stage directory.

    Raises:
        ShardError: no stage directory, an unfinished one, another stage than asked for, or one
            written by a newer version.
    """
    file = path / MANIFEST
    try:
        data = orjson.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if (path / PROGRESS).is_dir():
            raise ShardError(
                f"{path}: unfinished: the run that writes it was interrupted; give its command "
                "again to continue"
            ) from None
        wanted = f"srft-prep {stage} output" if stage else "srft-prep output"
        raise ShardError(f"{path}: expected {wanted}, but there is no {MANIFEST}") from None
    except orjson.JSONDecodeError as error:
        raise ShardError(f"{file}: damaged, not JSON: {error}") from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise ShardError(f"{file}: damaged: expected an object with schema_version")
    if data["schema_version"] != SCHEMA_VERSION:
        raise ShardError(
            f"{file}: schema version {data['schema_version']}, this program reads "
            f"{SCHEMA_VERSION}; use the srft-prep version {data.get('package_version')}"
        )
    if problem := _problem_of(data):
        raise ShardError(f"{file}: damaged: {problem}")
    if stage and data["stage"] != stage:
        raise ShardError(f"{path}: expected the output of {stage}, this is one of {data['stage']}")
    return Manifest(path=path, stage=data["stage"], data=data)


_TYPES: Final = {"config": dict, "inputs": list, "counts": dict, "files": list}
_KEYS: Final[dict[Any, tuple[str, ...]]] = {
    "ingest": ("counts.trajectories", "counts.rejected"),
    "label": ("counts.failures",),
    "tokenize": ("tokenizer.source", "tokenizer.tokenizer_hash", "tokenizer.template_hash"),
    "pack": ("seq_len", "recipe", "tokenizer", "tokenizer_hash", "template_hash"),
}
"""What later stages read of a manifest, by stage."""


def _problem_of(data: dict[str, Any]) -> str | None:
    """Return why an object is no manifest, or None."""
    if str(data.get("stage")) not in _KEYS:
        return f"stage: expected one of {', '.join(_KEYS)}, got {str(data.get('stage'))[:40]}"
    for key, kind in _TYPES.items():
        if not isinstance(data.get(key), kind):
            return f"{key}: expected {kind.__name__}, got {type(data.get(key)).__name__}"
    for path in _KEYS[data["stage"]]:
        parent, _, key = path.rpartition(".")
        if key not in (data.get(parent, ()) if parent else data):
            return f"{path} is missing"
    for file in data["files"]:
        if not isinstance(file, dict) or not all(
            isinstance(file.get(key), str) for key in ("name", "sha256")
        ):
            return "files: expected objects with a name and its sha256"
    return None


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
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically and durably."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


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


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's `name`, `bytes`, `sha256` and, for Parquet, `rows`."""
    described = {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}
    if path.suffix == ".parquet":
        described["rows"] = pq.read_metadata(path).num_rows
    return described


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(value: Any) -> str:
    """Return the SHA-256, in hex, of a value's canonical JSON."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _portable(value: Any) -> Any:
    """Return a manifest value without its inputs' paths: moving a directory changes nothing."""
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items() if key != "path"}
    return value
