"""The append-only store of finished critic requests.

    DIR/ledger-00000.jsonl, ledger-00001.jsonl, ...   one a run, one line a finished request

A line is written and flushed when its request finishes, so that kill -9 loses nothing that had
come back, and the key (content_hash, critic_id, prompt_hash, part) is looked up before asking, so
that nothing is asked twice. A plain append works on the network file systems of clusters, where
SQLite's locks do not. In memory there is only where each key's line lies; a later line of a key
replaces an earlier one. A torn last line (the process died in the middle of it) is passed over.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import orjson

from srft_prep.critic import CriticReply, CriticRequest, StepLabel
from srft_prep.errors import LabelError
from srft_prep.types import LABELS

Key = tuple[str, str, str, str]
"""(content_hash, critic_id, prompt_hash, part)."""

USAGE: Final = (
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "seconds",
    "usd",
    "clipped_tokens",
)


class Ledger:
    """All ledger files of a directory for reading, and a new one for this run's lines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_damaged = 0
        """Lines that could not be read, other than a file's torn last one."""
        self._places: dict[Key, tuple[int, int, int, bool]] = {}
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
        return place is not None and (failed or not place[3])

    def get(self, key: Key) -> dict[str, Any] | None:
        """Return a key's newest line, or None."""
        place = self._places.get(key)
        if place is None:
            return None
        number, offset, length, _ = place
        line = os.pread(self._files[number].fileno(), length, offset)
        entry: dict[str, Any] = orjson.loads(line)
        return entry

    def append(self, key: Key, reply: CriticReply) -> None:
        """Write one finished request down."""
        line = orjson.dumps(_entry(key, reply)) + b"\n"
        if self._writer is None:
            self._open_writer()
        assert self._writer is not None
        offset = self._writer.tell()
        self._writer.write(line)
        self._writer.flush()
        self._places[key] = (len(self._files) - 1, offset, len(line), reply.failure is not None)

    def _open_writer(self) -> None:
        numbers = [int(path.stem.rpartition("-")[2]) for path in ledger_files(self.folder)]
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
                self._places[key] = (len(self._files) - 1, offset, len(line), failed)
            elif line.endswith(b"\n"):
                self.num_damaged += 1
            offset += len(line)


def ledger_files(folder: Path) -> list[Path]:
    """Return a directory's ledger files, oldest first."""
    return sorted(folder.glob("ledger-[0-9]*.jsonl"))


def key_of(request: CriticRequest, *, critic_id: str, prompt_hash: str) -> Key:
    """Return the key of a request put to a critic."""
    return request.trajectory.content_hash, critic_id, prompt_hash, request.part


def labels_of(entry: dict[str, Any]) -> Iterator[StepLabel]:
    """Yield the labels of a ledger line.

    Raises:
        LabelError: the line holds something that is no label.
    """
    for row in entry["labels"]:
        if row.get("label") not in LABELS or not isinstance(row.get("step_index"), int):
            raise LabelError(
                f"ledger entry of {entry.get('trajectory_id')}: expected step_index and label "
                f"({', '.join(LABELS)}), got {row}"
            )
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
    if not line.endswith(b"\n"):
        return None
    try:
        entry = orjson.loads(line)
        key = tuple(entry[name] for name in ("content_hash", "critic_id", "prompt_hash", "part"))
        if not all(isinstance(value, str) for value in key) or not isinstance(
            entry["labels"], list
        ):
            return None
        return (key[0], key[1], key[2], key[3]), entry["failure"] is not None
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
