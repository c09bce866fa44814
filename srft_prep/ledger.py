"""The append-only store of finished critic requests.

    DIR/ledger-00000.jsonl, ledger-00001.jsonl, ...   one or more a run; a line a finished request

A line is written and flushed when its request finishes, so that kill -9 loses nothing that had
come back, and the key (content_hash, critic_id, prompt_hash, part) is looked up before asking, so
that nothing is asked twice. A plain append works on the network file systems of clusters, where
SQLite's locks do not. In memory there is only where each key's line lies; a later line of a key
replaces an earlier one. A torn last line (the process died in the middle of it) is passed over.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, NamedTuple, Self

import orjson

from srft_prep.critic import CriticReply, CriticRequest, StepLabel
from srft_prep.types import LABELS

Key = tuple[str, str, str, str]
"""(content_hash, critic_id, prompt_hash, part)."""
Subject = tuple[str, str, str]
"""(content_hash, critic_id, prompt_hash): what the parts of one trajectory's requests share."""

_NAME: Final = re.compile(r"ledger-(\d+)\.jsonl")

_MAX_STEPS: Final = 1 << 31
"""`step_index` is an int32."""

ROLL_BYTES: Final = 16 << 20
"""Size from which on a run goes on in another file: in a store, a file that grew is sent whole."""

_OPEN_FILES: Final = 16
"""Files that are open for reading at a time: a large ledger has more than a process may open."""

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
    failure: str | None
    steps: range | None
    """The steps labelled, in any order; None where a step between them is not."""


class Ledger:
    """All ledger files of a directory for reading, and a new one for this run's lines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_damaged = 0
        """Lines that could not be read or used, other than a file's torn last one."""
        self._places: dict[Key, _Place] = {}
        self._parts: dict[Subject, list[str]] = {}
        self._earlier: dict[Key, list[_Place]] = {}
        self._files: list[Path] = []
        self._open: dict[Path, BinaryIO] = {}
        """Open for reading; the one that was needed last is the last."""
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
        while self._open:
            self._open.popitem()[1].close()

    def has(self, key: Key, *, failed: bool) -> bool:
        """Return whether a key was answered; a failure counts as an answer only with `failed`."""
        place = self._places.get(key)
        return place is not None and (failed or place.failure is None)

    def failure(self, key: Key) -> str | None:
        """Return why a key's newest line is a failure; None where it is none, or there is none."""
        place = self._places.get(key)
        return None if place is None else place.failure

    def parts(self, subject: Subject) -> Sequence[str]:
        """Return the parts that have a line for a trajectory, a critic and a question."""
        return [part for part in self._parts.get(subject, ()) if (*subject, part) in self._places]

    def drop_unless_complete(self, key: Key, *, steps: range) -> None:
        """Take a key's line for damaged, but paid, if its labels are not one for each step."""
        place = self._places.get(key)
        if place is not None and place.failure is None and place.steps != steps:
            self._earlier.setdefault(key, []).append(self._places.pop(key))
            self.num_damaged += 1

    def spent_usd(self, critic_id: str, prompt_hash: str) -> float:
        """Return what a critic has cost with a question, in all runs."""
        keys = {*self._places, *self._earlier}
        of_critic = (key for key in keys if key[1:3] == (critic_id, prompt_hash))
        return sum(self.spent(key)["usd"] for key in of_critic)

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
        entry = _entry(key, reply)
        line = orjson.dumps(entry) + b"\n"
        if self._writer is None or self._writer.tell() >= ROLL_BYTES:
            self._open_writer()
        assert self._writer is not None
        offset = self._writer.tell()
        self._writer.write(line)
        self._writer.flush()
        self._add(key, offset, len(line), entry)

    def _add(self, key: Key, offset: int, length: int, entry: dict[str, Any]) -> None:
        if key in self._places:
            self._earlier.setdefault(key, []).append(self._places[key])
        elif key[3] not in (known := self._parts.setdefault(key[:3], [])):
            known.append(key[3])
        labelled = sorted(row["step_index"] for row in entry["labels"])
        steps = range(labelled[0], labelled[0] + len(labelled)) if labelled else range(0)
        self._places[key] = _Place(
            len(self._files) - 1,
            offset,
            length,
            entry["failure"],
            steps if labelled == list(steps) else None,
        )

    def _read(self, place: "_Place") -> dict[str, Any]:
        file = self._opened(self._files[place.file])
        line = os.pread(file.fileno(), place.length, place.offset)
        entry: dict[str, Any] = orjson.loads(line)
        return entry

    def _opened(self, path: Path) -> BinaryIO:
        file = self._open.pop(path, None)
        if file is None:
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            file = path.open("rb")
        self._open[path] = file
        return file

    def _open_writer(self) -> None:
        matches = (_NAME.fullmatch(path.name) for path in ledger_files(self.folder))
        numbers = [int(match[1]) for match in matches if match]
        path = self.folder / f"ledger-{max(numbers, default=-1) + 1:05d}.jsonl"
        before, self._writer = self._writer, path.open("xb")  # where that fails, `before` goes on
        self._files.append(path)
        if before is not None:
            with before:
                os.fsync(before.fileno())

    def _index(self, path: Path) -> None:
        self._files.append(path)
        offset = 0
        with path.open("rb") as file:
            for line in file:
                entry = _read_entry(line)
                if entry is not None:
                    self._add(_key_in(entry), offset, len(line), entry)
                elif line.endswith(b"\n"):
                    self.num_damaged += 1
                offset += len(line)


def ledger_files(folder: Path) -> list[Path]:
    """Return a directory's ledger files, oldest first; those copied there under other names too."""
    return sorted(folder.glob("ledger-*.jsonl"))


def key_of(request: CriticRequest, *, critic_id: str, prompt_hash: str) -> Key:
    """Return the key of a request put to a critic."""
    return request.content_hash, critic_id, prompt_hash, request.part


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
        "trajectory_id": reply.request.trajectory_id,
        "labels": [
            {
                name: value
                for name in StepLabel.__dataclass_fields__
                if (value := getattr(label, name)) is not None
            }
            for label in reply.labels
        ],
        **{name: getattr(reply, name) for name in USAGE if name != "clipped_tokens"},
        "clipped_tokens": reply.request.clipped_tokens,
        "failure": reply.failure,
    }


def _read_entry(line: bytes) -> dict[str, Any] | None:
    """Return a line's entry; None where it is no whole, sound one."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry: dict[str, Any] = orjson.loads(line)
        sound = (
            all(isinstance(value, str) for value in _key_in(entry))
            and all(isinstance(entry[name], int | float) for name in USAGE)
            and isinstance(entry["failure"], str | None)
            and isinstance(entry["labels"], list)
            and all(_is_label(row) for row in entry["labels"])
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None
    return entry if sound else None


def _key_in(entry: dict[str, Any]) -> Key:
    return entry["content_hash"], entry["critic_id"], entry["prompt_hash"], entry["part"]


def _is_label(row: dict[str, Any]) -> bool:
    """Return whether a row can stand in `labels.parquet`."""
    return (
        row["label"] in LABELS
        and type(row["step_index"]) is int
        and 0 <= row["step_index"] < _MAX_STEPS
        and all(_is_probability(row.get(f"p_{name}")) for name in LABELS)
        and isinstance(row.get("rationale"), str | None)
        and row.keys() <= StepLabel.__dataclass_fields__.keys()
    )


def _is_probability(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)
