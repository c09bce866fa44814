"""Gold labels: what people said of steps, one JSON line a label, only ever appended to.

    {"trajectory_id": "run-7", "step_index": 3, "label": "harmful", "annotator": "ada", ...}

Only the first three keys are needed. A later line of the same annotator for the same step replaces
an earlier one, and a label of null takes it back, so that a file is never rewritten and holds its
own history. A line is on the disk before `append` returns. A torn last line (the process died in
the middle of it) is passed over. Where annotators labelled a step differently, nobody knows which
of them is right: the step is left out and counted, unless a label of it adjudicates. Lines that
name no annotator are one annotator's within a file, and another's in the next file.
"""

import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import orjson

from srft_prep.errors import ConfigError, LabelError
from srft_prep.storage import flush
from srft_prep.types import LABELS, Label

StepKey = tuple[str, int]
"""(trajectory_id, step_index)."""

UNNAMED: Final = ""
"""The annotator of lines that name none."""

_OPTIONAL: Final = {
    "annotator": str,
    "content_hash": str,
    "adjudicates": bool,
    "blind": bool,
    "undoes": bool,
}

_MAX_STEPS: Final = 1 << 31
"""`step_index` is an int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldLabel:
    """One annotator's label of one step; a line of the file."""

    trajectory_id: str
    step_index: int
    label: Label | None
    """None takes an earlier label back."""
    annotator: str = UNNAMED
    content_hash: str | None = None
    """Of the trajectory that the annotator saw, where the line says so."""
    adjudicates: bool = False
    """Whether the label settles a disagreement between others."""
    blind: bool | None = None
    """Whether the annotator had seen no other label of the step; None where nobody knows."""
    undoes: bool = False
    """Whether the line takes the annotator's last one back, restoring what was before."""

    @property
    def key(self) -> StepKey:
        """The step that the label is of."""
        return self.trajectory_id, self.step_index


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """The labels of gold files."""

    labels: Mapping[StepKey, Label]
    """One label a step, in the order of the files: what `critic-eval` measures against."""
    by_annotator: Mapping[str, Mapping[StepKey, Label]]
    """Every annotator's own labels, by name.

    `UNNAMED` is among them where lines of a file name none; `(unnamed in FILE)` where lines of
    several files do.
    """
    content_hashes: Mapping[StepKey, str] = field(default_factory=dict)
    """Of the trajectory that was labelled, for the labels that say so."""
    disagreements: frozenset[StepKey] = frozenset()
    """Steps that annotators labelled differently and nobody adjudicated: not in `labels`."""
    in_view: frozenset[StepKey] = frozenset()
    """Of `labels`, those that were given with others' labels in view (`blind` is false)."""
    num_not_blind: int = 0
    """Labels left out since others' were in view, where only blind ones were asked for."""


def read_gold(
    paths: Iterable[Path], *, annotator: str | None = None, blind_only: bool = False
) -> Gold:
    """Return the labels of files, an annotator's later line winning over an earlier one.

    Args:
        paths: JSONL files, in order.
        annotator: take only this annotator's labels; the others stay in `by_annotator`.
        blind_only: leave out labels that were given with others' labels in view.

    Raises:
        ConfigError: a file is not there, or nobody of that name labelled anything.
        LabelError: a line is no gold label.
    """
    given = list(paths)
    newest: dict[tuple[str, str, StepKey], GoldLabel] = {}
    for path in given:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ConfigError(f"{path}: expected a gold file, but it is not there") from None
        for _, row in numbered_labels(path, content):
            # who wrote a line without a name is known by the file alone
            file = str(path) if row.annotator == UNNAMED else ""
            newest[row.annotator, file, row.key] = row
    if len({file for _, file, _ in newest if file}) > 1:
        rows = [
            replace(row, annotator=f"(unnamed in {file})") if file else row
            for (_, file, _), row in newest.items()
        ]
    else:
        rows = list(newest.values())
    found = gold_of(rows, annotator=annotator, blind_only=blind_only)
    if annotator is not None and annotator not in found.by_annotator:
        there = ", ".join(name or "(unnamed)" for name in sorted(found.by_annotator)) or "nobody"
        files = ", ".join(map(str, given))
        raise ConfigError(f"{files}: expected labels by {annotator!r}, there are some by {there}")
    return found


def gold_of(
    rows: Iterable[GoldLabel], *, annotator: str | None = None, blind_only: bool = False
) -> Gold:
    """Return what annotators' newest lines say together, or those of one annotator."""
    by_annotator: dict[str, dict[StepKey, Label]] = {}
    by_step: dict[StepKey, list[GoldLabel]] = {}
    num_not_blind = 0
    for row in rows:
        if row.label is not None:
            by_annotator.setdefault(row.annotator, {})[row.key] = row.label
            if annotator not in (None, row.annotator):
                continue
            if blind_only and row.blind is False:
                num_not_blind += 1
            else:
                by_step.setdefault(row.key, []).append(row)
    labels: dict[StepKey, Label] = {}
    hashes: dict[StepKey, str] = {}
    disagreements = set()
    in_view = set()
    for key, said in by_step.items():
        deciding = [row for row in said if row.adjudicates] or said
        label = deciding[0].label
        if label is None or any(row.label != label for row in deciding):
            disagreements.add(key)
            continue
        labels[key] = label
        if any(row.blind is False for row in deciding):
            in_view.add(key)
        if known := next((row.content_hash for row in deciding if row.content_hash), None):
            hashes[key] = known
    return Gold(
        labels=labels,
        by_annotator=by_annotator,
        content_hashes=hashes,
        disagreements=frozenset(disagreements),
        in_view=frozenset(in_view),
        num_not_blind=num_not_blind,
    )


def numbered_labels(
    path: Path, content: bytes, *, first: int = 1
) -> Iterator[tuple[int, GoldLabel]]:
    """Yield the labels of a gold file's content with the numbers of their lines.

    A torn last line is passed over.

    Raises:
        LabelError: a line is no gold label.
    """
    *lines, last = content.split(b"\n")
    if last.strip() and _is_json(last):
        lines.append(last)
    for number, line in enumerate(lines, first):
        if line.strip():
            yield number, _read_line(f"{path}:{number}", line)


class GoldFile:
    """A gold file that is read and appended to, by several processes at once if need be.

    Appends take turns by a lock on the file, which the kernel drops when a process dies. `refresh`
    returns what was appended since, by whomever; it reads all of a file that changed (3 ms a
    megabyte, which is 5,000 labels), since an editor may have changed what was read before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_resets = 0
        """How often the file was read from its start: what earlier refreshes gave is void."""
        self._offset = 0
        self._lines = 0
        self._digest = _digest(b"")
        """Of what was read, [0, offset)."""
        self._seen: tuple[int, ...] | None = None
        """Inode, size and time of the file that was read to its end."""

    def refresh(self) -> list[GoldLabel]:
        """Read what was appended since the last time, and return those lines.

        After somebody replaced, cut or edited what was read before, all of the file.

        Raises:
            LabelError: a line is no gold label.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                seen = (status.st_ino, status.st_size, status.st_mtime_ns)
                if seen == self._seen:
                    return []
                content = file.read()
        except FileNotFoundError:
            content, seen = b"", None
        if _digest(content[: self._offset]) != self._digest:
            self._offset = self._lines = 0
            self._digest = _digest(b"")
            self.num_resets += 1
        # a line that is still being written counts when it is whole
        tail = content.rfind(b"\n", self._offset) + 1 or self._offset
        end = len(content) if _is_json(content[tail:]) else tail
        new = content[self._offset : end]
        rows = [row for _, row in numbered_labels(self.path, new, first=self._lines + 1)]
        self._offset = end
        self._lines += new.count(b"\n")
        self._digest = _digest(content[:end])
        self._seen = seen
        return rows

    def append(self, row: GoldLabel) -> None:
        """Write one line; it is on the disk when this returns.

        Raises:
            OSError: the line could not be written; nothing of it is left in the file.
        """
        line = orjson.dumps(_entry(row)) + b"\n"
        is_new = not self.path.exists()
        descriptor = _locked(self.path)
        try:
            end = _mend_tail(descriptor)
            try:
                written = 0
                while written < len(line):
                    written += os.write(descriptor, line[written:])
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            flush(self.path.parent)


def _locked(path: Path) -> int:
    """Return a file opened to append to, and locked: the one that has the name now.

    While another process had the lock, an editor may have put a new file in the place of this one.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    while True:
        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()


def _mend_tail(descriptor: int) -> int:
    """Let a file end with a whole line, and return its size.

    What a dead process left of a line is cut off, since nobody was told that it was saved; a whole
    last line without its newline (a file written by hand) gets one.
    """
    size = os.fstat(descriptor).st_size
    tail, start = b"", size
    while start and b"\n" not in tail:
        step = min(1 << 16, start)
        start -= step
        tail = os.pread(descriptor, step, start) + tail
    last = tail[tail.rfind(b"\n") + 1 :]
    if not last:
        return size
    if _is_json(last):
        os.write(descriptor, b"\n")
        return size + 1
    os.ftruncate(descriptor, size - len(last))
    return size - len(last)


def _entry(row: GoldLabel) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "trajectory_id": row.trajectory_id,
        "step_index": row.step_index,
        "label": row.label,
    }
    if row.annotator:
        entry["annotator"] = row.annotator
    if row.content_hash:
        entry["content_hash"] = row.content_hash
    if row.adjudicates:
        entry["adjudicates"] = True
    if row.blind is not None:
        entry["blind"] = row.blind
    if row.undoes:
        entry["undoes"] = True
    return entry | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _read_line(where: str, line: bytes) -> GoldLabel:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise LabelError(
            f"{where}: expected one JSON object, got no JSON ({error}); delete the line"
        ) from None
    if not isinstance(entry, dict):
        raise LabelError(f"{where}: expected a JSON object, got {type(entry).__name__}")
    for name, sound, expected in (
        ("trajectory_id", _is_text, "a string"),
        ("step_index", _is_index, "a whole number from 0"),
        ("label", _is_label, f"{', '.join(LABELS)} or null"),
    ):
        if name not in entry:
            raise LabelError(f"{where}: expected {name}, there is none")
        if not sound(entry[name]):
            raise LabelError(f"{where}: {name}: expected {expected}, got {_short(entry[name])}")
    for name, kind in _OPTIONAL.items():
        if not isinstance(entry.get(name), kind | None):
            raise LabelError(
                f"{where}: {name}: expected {kind.__name__}, got {_short(entry[name])}"
            )
    return GoldLabel(
        trajectory_id=entry["trajectory_id"],
        step_index=entry["step_index"],
        label=entry["label"],
        annotator=entry.get("annotator") or UNNAMED,
        content_hash=entry.get("content_hash"),
        adjudicates=bool(entry.get("adjudicates")),
        blind=entry.get("blind"),
        undoes=bool(entry.get("undoes")),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_STEPS


def _is_label(value: Any) -> bool:
    return value is None or value in LABELS


def _short(value: Any) -> str:
    return ascii(value)[:60]
