"""What a finished stage directory says about itself, and how to believe it."""

from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self

import orjson
import pyarrow.parquet as pq

from srft_prep import __version__
from srft_prep.errors import ShardError
from srft_prep.hashes import hash_of, sha256_of
from srft_prep.object_mirror import (
    address_of,
    fetch,
    fetched,
    lies_in_store,
    manifest_of,
    names_below,
)
from srft_prep.schemas import LABELS_FILE, SCHEMA_VERSION

MANIFEST: Final = "manifest.json"
PROGRESS: Final = ".progress"
PLAN: Final = "plan.json"
"""File of the journal: what an unfinished run is about."""
FILES: Final = "files_sha256"
"""Key of a journal entry: the files of its unit of work, as they were written."""
LEDGERS: Final = "ledger-*.jsonl"
"""What critics answered: paid for, so that no stage and no `overwrite` ever removes it."""
BATCHES: Final = "batches-*.jsonl*"
"""The jobs that providers were given, paid for too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a finished stage says about itself."""

    path: Path
    """The stage directory."""
    stage: str
    """`ingest`, `label`, `tokenize`, `pack`, `export` or `train`."""
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
        """The stage's Parquet parts or shards, in order; fetched, if they lie in a store.

        Raises:
            ShardError: in the store one is missing or was changed.
        """
        if lies_in_store(self.path):
            self._refuse(fetched(self.path, self._inputs()))
        return [
            self.path / file["name"]
            for file in self.files
            if file["name"].startswith(("part-", "shard-"))
        ]

    def is_of(self, plan: dict[str, Any]) -> bool:
        """Return whether this is what a plan made, wherever its inputs lay."""
        return all(
            portable(self.data.get(key)) == portable(plan[key])
            for key in ("schema_version", "stage", "config", "inputs")
        )

    def checked(self) -> Self:
        """Return this manifest, its files being found to hold the bytes that were written.

        Every stage calls it on its inputs: Parquet readers take half of all flipped bytes for good
        data. Costs one pass of SHA-256 (0.8 GB/s on a 2.9 GHz core without SHA instructions).

        Raises:
            ShardError: a file is missing or was changed; but for ledgers, which are no input.
        """
        self._refuse(self.problems())
        return self

    def problems(self, *, ledgers: bool = False, anew: bool = False) -> dict[str, str]:
        """Return what is wrong with the files, by name.

        Args:
            ledgers: whether ledgers are looked at, too, which are no input of a stage.
            anew: whether files of a store are fetched although they are here.
        """
        files = self.files if ledgers else self._inputs()
        if lies_in_store(self.path):
            return fetch(self.path, files, anew=anew)
        return {
            file["name"]: "changed since it was written" if path.exists() else "missing"
            for file in files
            if sha256_of(path := self.path / file["name"]) != file["sha256"]
        }

    def _inputs(self) -> list[dict[str, Any]]:
        return [file for file in self.files if not fnmatch(file["name"], LEDGERS)]

    def _refuse(self, problems: dict[str, str]) -> None:
        for name, what in problems.items():
            where = address_of(self.path)
            raise ShardError(
                f"{where}/{name}: {what}; restore it, or delete {where} and run {self.stage} again"
            )

    def as_input(self) -> dict[str, Any]:
        """Return how a later stage names this one: by content, not by where it lies.

        Labels are `labels.parquet` alone: the other files tell how a run was cut up and timed.
        """
        names = [
            [file["name"], file["sha256"]]
            for file in self.files
            if self.stage != "label" or file["name"] == LABELS_FILE
        ]
        return {"path": address_of(self.path), "stage": self.stage, "sha256": hash_of(names)}


def plan_of(stage: str, config: dict[str, Any], inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a run is about, as it will be read again: a tuple becomes a list."""
    plan = {
        "schema_version": SCHEMA_VERSION,
        "package_version": __version__,
        "stage": stage,
        "config": config,
        "inputs": inputs,
    }
    read: dict[str, Any] = orjson.loads(orjson.dumps(plan))
    return read


def portable(value: Any) -> Any:
    """Return a manifest value without its inputs' paths: moving a directory changes nothing."""
    if isinstance(value, list):
        return [portable(item) for item in value]
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items() if key != "path"}
    return value


def read_json(path: Path) -> Any:
    """Return a journal file's value; None where it is missing or damaged: the work is redone."""
    try:
        return orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None


def read_manifest(path: Path, *, stage: str | None = None) -> Manifest:
    """Return the manifest of a finished stage directory.

    Raises:
        ShardError: no stage directory, an unfinished one, another stage than asked for, or one
            written by a newer version.
    """
    where = address_of(path)
    file = f"{where}/{MANIFEST}"
    content = manifest_bytes(path)
    if content is None:
        if PROGRESS in names_in(path):
            raise ShardError(
                f"{where}: unfinished: the run that writes it was interrupted; give its command "
                "again to continue"
            )
        wanted = f"srft-prep {stage} output" if stage else "srft-prep output"
        raise ShardError(f"{where}: expected {wanted}, but there is no {MANIFEST}")
    try:
        data = orjson.loads(content)
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
        raise ShardError(f"{where}: expected the output of {stage}, this is one of {data['stage']}")
    return Manifest(path=path, stage=data["stage"], data=data)


def manifest_bytes(path: Path) -> bytes | None:
    """Return the manifest of a directory as it lies there; None where there is none.

    In a store it is the store's that counts, unless this process writes the directory.
    """
    if lies_in_store(path):
        return manifest_of(path)
    try:
        return (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def names_in(path: Path) -> set[str]:
    """Return the names of the files and folders in a directory, or in the store where it lies."""
    if lies_in_store(path):
        return {name.partition("/")[0] for name in names_below(path)}
    return {entry.name for entry in path.iterdir()} if path.is_dir() else set()


_TYPES: Final = {"config": dict, "inputs": list, "counts": dict, "files": list}
_KEYS: Final[dict[Any, tuple[str, ...]]] = {
    "ingest": ("counts.trajectories", "counts.rejected"),
    "label": ("counts.failures",),
    "tokenize": ("tokenizer.source", "tokenizer.tokenizer_hash", "tokenizer.template_hash"),
    "pack": ("seq_len", "recipe", "tokenizer", "tokenizer_hash", "template_hash"),
    "export": ("target", "lost_weights"),
    "train": ("counts.steps",),
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
        if not _is_below(file["name"]):
            return f"files: {file['name'][:80]!r} is no place in the directory"
    return None


def _is_below(name: str) -> bool:
    """Return whether a name leads to a file of the directory: overwriting deletes what it names."""
    path = PurePosixPath(name)
    return bool(path.parts) and "\0" not in name and not {"..", "/", "//"} & {*path.parts}


def describe_file(path: Path, *, sha256: str | None = None) -> dict[str, Any]:
    """Return a file's `name`, `bytes`, `sha256` and, for Parquet, `rows`.

    Args:
        path: the file.
        sha256: its hash, where it is known.
    """
    digest = sha256 or sha256_of(path)
    described = {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
    if path.suffix == ".parquet":
        described["rows"] = pq.read_metadata(path).num_rows
    return described
