"""The append-only store of finished critic requests.

    DIR/ledger-00000.jsonl, ledger-00001.jsonl, ...   one a run, one line a finished request

A line is written and flushed when its request finishes, so that kill -9 loses nothing that had
come back, and the key (content_hash, critic_id, prompt_hash, part) is looked up before asking, so
that nothing is asked twice. A plain append works on the network file systems of clusters, where
SQLite's locks do not. In memory there is only where each key's line lies; a later line of a key
replaces an earlier one. A torn last line (the process died in the middle of it) is passed over.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, NamedTuple, Self

import orjson

from srft_prep.critic import CriticReply, CriticRequest, StepLabel
from srft_prep.types import LABELS

Key = tuple[str, str, str, str]
"""(content_hash, critic_id, prompt_hash, part)."""

_NAME: Final = re.compile(r"ledger-(\d+)\.jsonl")

USAGE: Final = (
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "seconds",
    "usd",
    "clipped_tokens",
)


class _Place(NamedTuple):
    """Where a line lies."""

    file: int
    offset: int
    length: int
    failed: bool


class Ledger:
    """All ledger files of a directory for reading, and a new one for this run's lines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_damaged = 0
        """Lines that could not be read, other than a file's torn last one."""
        self._places: dict[Key, _Place] = {}
        self._earlier: dict[Key, list[_Place]] = {}
        self._files: list[BinaryIO] = []
        self._writer: BinaryIO | None = None
        for path in ledger_files(folder):
            self._index(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Make the written lines durable and close all files."""
        if self._writer is not None:
            os.fsync(self._writer.fileno())
            self._writer.close()
        for file in self._files:
            file.close()

    def has(self, key: Key, *, failed: bool) -> bool:
        """Return whether a key was answered; a failure counts as an answer only with `failed`."""
        place = self._places.get(key)
        return place is not None and (failed or not place.failed)

    def get(self, key: Key) -> dict[str, Any] | None:
        """Return a key's newest line, or None."""
        place = self._places.get(key)
        return None if place is None else self._read(place)

    def spent(self, key: Key) -> dict[str, float]:
        """Return a key's tokens, seconds and cost in all its lines: what failed was paid too."""
        places = [*self._earlier.get(key, ()), *filter(None, [self._places.get(key)])]
        entries = [self._read(place) for place in places]
        names = (name for name in USAGE if name != "clipped_tokens")
        return {name: sum(entry[name] for entry in entries) for name in names}

    def append(self, key: Key, reply: CriticReply) -> None:
        """Write one finished request down."""
        line = orjson.dumps(_entry(key, reply)) + b"\n"
        if self._writer is None:
            self._open_writer()
        assert self._writer is not None
        offset = self._writer.tell()
        self._writer.write(line)
        self._writer.flush()
        self._add(key, offset, len(line), failed=reply.failure is not None)

    def _add(self, key: Key, offset: int, length: int, *, failed: bool) -> None:
        if key in self._places:
            self._earlier.setdefault(key, []).append(self._places[key])
        self._places[key] = _Place(len(self._files) - 1, offset, length, failed)

    def _read(self, place: "_Place") -> dict[str, Any]:
        line = os.pread(self._files[place.file].fileno(), place.length, place.offset)
        entry: dict[str, Any] = orjson.loads(line)
        return entry

    def _open_writer(self) -> None:
        matches = (_NAME.fullmatch(path.name) for path in ledger_files(self.folder))
        numbers = [int(match[1]) for match in matches if match]
        path = self.folder / f"ledger-{max(numbers, default=-1) + 1:05d}.jsonl"
        self._writer = path.open("xb")
        self._files.append(path.open("rb"))

    def _index(self, path: Path) -> None:
        file = path.open("rb")
        self._files.append(file)
        offset = 0
        for line in file:
            key_and_failure = _read_key(line)
            if key_and_failure is not None:
                key, failed = key_and_failure
                self._add(key, offset, len(line), failed=failed)
            elif line.endswith(b"\n"):
                self.num_damaged += 1
            offset += len(line)


def ledger_files(folder: Path) -> list[Path]:
    """Return a directory's ledger files, oldest first; those copied there under other names too."""
    return sorted(folder.glob("ledger-*.jsonl"))


def key_of(request: CriticRequest, *, critic_id: str, prompt_hash: str) -> Key:
    """Return the key of a request put to a critic."""
    return request.trajectory.content_hash, critic_id, prompt_hash, request.part


def labels_of(entry: dict[str, Any]) -> Iterator[StepLabel]:
    """Yield the labels of a ledger line."""
    for row in entry["labels"]:
        yield StepLabel(**row)


def _entry(key: Key, reply: CriticReply) -> dict[str, Any]:
    content_hash, critic_id, prompt_hash, part = key
    return {
        "content_hash": content_hash,
        "critic_id": critic_id,
        "prompt_hash": prompt_hash,
        "part": part,
        "trajectory_id": reply.request.trajectory.trajectory_id,
        "labels": [
            {
                name: value
                for name in StepLabel.__dataclass_fields__
                if (value := getattr(label, name)) is not None
            }
            for label in reply.labels
        ],
        **{name: getattr(reply, name) for name in USAGE},
        "failure": reply.failure,
    }


def _read_key(line: bytes) -> tuple[Key, bool] | None:
    """Return a line's key and whether it is a failure; None where it is no whole, sound entry."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = orjson.loads(line)
        key = tuple(entry[name] for name in ("content_hash", "critic_id", "prompt_hash", "part"))
        sound = (
            all(isinstance(value, str) for value in key)
            and all(isinstance(entry[name], int | float) for name in USAGE)
            and isinstance(entry["failure"], str | None)
            and all(_is_label(row) for row in entry["labels"])
        )
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return ((key[0], key[1], key[2], key[3]), entry["failure"] is not None) if sound else None


def _is_label(row: dict[str, Any]) -> bool:
    return (
        row["label"] in LABELS
        and type(row["step_index"]) is int
        and row.keys() <= StepLabel.__dataclass_fields__.keys()
    )
