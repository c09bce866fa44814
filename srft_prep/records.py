"""Raw files -> raw records, streamed: JSON, JSONL, Parquet, plain or gzip or zstd.

A file's kind is read off its bytes, not its name. A record that cannot be parsed comes out as a
record with an `error`, and the file goes on behind it; nothing here raises for bad data. Every
record knows its position, so that an interrupted ingest can go on at any of them. Memory is bounded
by the limits of a record, whatever a file holds and expands to.
"""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import orjson

from srft_prep.decompression import DamageError, decompressed
from srft_prep.errors import ConfigError
from srft_prep.manifest import MANIFEST, PROGRESS
from srft_prep.object_inputs import bring_raw
from srft_prep.object_storage import is_url
from srft_prep.readers import Origin, describe, recognised

MAX_RECORD_BYTES: Final = 256 << 20
"""Largest record that is read, decompressed; a larger one is rejected (a bomb, or no record)."""
MAX_RECORD_VALUES: Final = 1 << 24
"""Most JSON values in a record: `[[],[],...` is 24 times as large in memory as in the file."""

SUFFIXES: Final = (".json", ".jsonl", ".ndjson", ".traj", ".parquet")
"""Endings of the files that are taken from a folder, also with `.gz` or `.zst` behind them."""

_STAGES: Final = ("ingest", "label", "tokenize", "pack")
_PIECE_KEYS: Final = frozenset({"role", "from", "action", "observation"})
"""Keys of messages and events, which no run has at its top."""

_SKIPPED_BYTES: Final = 1 << 20
"""Bytes of an over-long line that are passed over at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One raw record, or the place where one should have been."""

    origin: Origin
    position: int = 0
    """0-based place in the file: `records(path, start=position)` begins with this record."""
    value: Any = None
    error: str | None = None
    """Why there is no value."""


def discover(sources: Sequence[str]) -> list[Path]:
    """Return the files named by paths, folders and globs, each once, in a stable order.

    Those of a store (s3://, gs://, hf://) are fetched; the files are then their places here.

    A folder without any file of a known ending stays in the list as itself, and so does what looks
    like a file and cannot be read (a broken link, a pipe): `records` rejects it. What srft-prep
    itself wrote, finished or not, is left out: it would be taken for runs of another format.

    Raises:
        ConfigError: a path does not exist, a glob matches nothing, or a source is or lies in
            srft-prep's own output.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if is_url(source):
            matches = bring_raw(source, SUFFIXES, stage_of)
        elif _is_there(path):
            matches = [path]
        elif has_magic(source):
            matches = [Path(match) for match in sorted(glob(source, recursive=True))]
        else:
            matches = []
        if not matches:
            raise ConfigError(f"{source}: no such file or folder")
        folders = {match: match if _is_folder(match) else match.parent for match in matches}
        stages = {folder: stage_of(folder) for folder in set(folders.values())}
        raw = [match for match in matches if stages[folders[match]] is None]
        if not raw:
            stage = stages[folders[matches[0]]]
            raise ConfigError(f"{source}: is the output of {stage}; give the raw runs")
        for match in raw:
            found.update(dict.fromkeys(_files_in(match) if _is_folder(match) else [match]))
    return list(found)


def _is_there(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except PermissionError:
        return True  # `records` rejects it with the reason


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:
        return False


def _files_in(folder: Path) -> list[Path]:
    files: list[Path] = []

    def keep(error: OSError) -> None:
        files.append(Path(error.filename))

    for place, folders, names in os.walk(folder, onerror=keep):
        here = Path(place)
        folders[:] = [name for name in folders if name[0] != "." and stage_of(here / name) is None]
        files += [
            here / name
            for name in names
            if name[0] != "." and name.removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES)
        ]
    return sorted(files) or [folder]


def stage_of(folder: Path) -> str | None:
    """Return the stage that wrote a folder, or is writing it; None for any other folder."""
    for name in (MANIFEST, f"{PROGRESS}/plan.json"):
        try:
            data = orjson.loads((folder / name).read_bytes())
        except (OSError, orjson.JSONDecodeError):
            continue
        if isinstance(data, dict) and "schema_version" in data and data.get("stage") in _STAGES:
            return str(data["stage"])
    return None


def records(path: Path, *, start: int = 0) -> Iterator[Record]:
    """Yield the records of one file from position `start` on; unreadable ones carry an `error`."""
    for record in _records(path, Origin(path=Path(printable(path))), start):
        if record.position >= start:
            yield record


def printable(path: str | Path) -> str:
    r"""Return a path as text that can be written as UTF-8: other bytes of it become `\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _records(path: Path, origin: Origin, start: int) -> Iterator[Record]:
    """Yield all records of a file; those before `start` may be left out."""
    try:
        if path.is_dir():
            next(path.iterdir(), None)  # raises where the folder cannot be read
            endings = ", ".join(SUFFIXES)
            reason = f"no file with runs in this folder (looked for {endings})"
            yield Record(origin=origin, error=reason)
            return
        if path.exists() and not path.is_file():
            yield Record(origin=origin, error="a pipe, socket or device; give a regular file")
            return
        with path.open("rb") as raw:
            magic = raw.read(4)
            raw.seek(0)
            if not magic:
                yield Record(origin=origin, error="empty file")
            elif magic == b"PAR1":
                yield from _parquet_rows(path, origin, start)
            else:
                yield from _json_records(decompressed(raw, magic), origin, start)
    except OSError as error:
        yield Record(origin=origin, error=f"cannot be read: {error.strerror or error}")


def _json_records(stream: BinaryIO, origin: Origin, start: int) -> Iterator[Record]:
    """Yield from a stream that is JSONL or one JSON document.

    It is JSONL if its name says so, or if its first line is a whole JSON object and not all of it.
    """
    number = 0
    name = origin.path.name.removesuffix(".gz").removesuffix(".zst")
    try:
        first = stream.readline(MAX_RECORD_BYTES + 1)
        if name.endswith(("jsonl", "ndjson")) or (_is_object(first) and not _at_end(stream)):
            blank = True
            for number, line in enumerate(_lines(first, stream), start=1):
                if not line.isspace():
                    blank = False
                    if number > start:
                        yield _line_record(origin.path, number, line)
            if blank:
                yield Record(origin=origin, error="nothing but blank lines")
        else:
            text = first + stream.read(MAX_RECORD_BYTES + 1 - len(first))
            yield from _document(text, origin, start)
    except DamageError as error:
        place = Origin(path=origin.path, line=number + 1 if number else None)
        yield Record(origin=place, position=number, error=str(error))


def _is_object(line: bytes) -> bool:
    if not line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") or _is_too_full(line):
        return False
    try:
        value = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
        return isinstance(value, dict) and bool(value)
    except orjson.JSONDecodeError:
        return False


def _at_end(stream: BinaryIO) -> bool:
    try:
        return not cast(io.BufferedReader, stream).peek(64).strip()
    except DamageError:
        return False  # reading on meets the damage again


def _lines(first: bytes, stream: BinaryIO) -> Iterator[bytes]:
    line = first.removeprefix(b"\xef\xbb\xbf")
    while line:
        yield line
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(_SKIPPED_BYTES)
        line = stream.readline(MAX_RECORD_BYTES + 1)


def _line_record(path: Path, number: int, line: bytes) -> Record:
    origin = Origin(path=path, line=number)
    if len(line) > MAX_RECORD_BYTES:
        reason = f"line longer than {MAX_RECORD_BYTES >> 20} MiB"
        return Record(origin=origin, position=number - 1, error=reason)
    if _is_too_full(line):
        return Record(origin=origin, position=number - 1, error=_TOO_FULL)
    try:
        return Record(origin=origin, position=number - 1, value=orjson.loads(line))
    except orjson.JSONDecodeError as error:
        reason = f"not JSON: {_syntax(error)} at column {error.colno}"
        return Record(origin=origin, position=number - 1, error=reason)


_TOO_FULL: Final = f"a record of more than {MAX_RECORD_VALUES:,} JSON values"


def _is_too_full(text: bytes) -> bool:
    """Return whether a JSON text may hold more values than a record can."""
    if len(text) <= MAX_RECORD_VALUES:
        return False
    return sum(text.count(mark) for mark in (b",", b"[", b"{")) > MAX_RECORD_VALUES


def _syntax(error: orjson.JSONDecodeError) -> str:
    """Return what orjson found, in words that speak of the file."""
    if "UTF-8" in error.msg:
        return "bytes that are no UTF-8 text"
    if "surrogate" in error.msg:
        return f"half of a surrogate pair ({error.msg})"
    return error.msg


def _document(text: bytes, origin: Origin, start: int) -> Iterator[Record]:
    """Yield one record for a document that is a run, one an element for a list of runs."""
    if len(text) > MAX_RECORD_BYTES:
        reason = f"document larger than {MAX_RECORD_BYTES >> 20} MiB"
        yield Record(origin=origin, error=reason)
        return
    if _is_too_full(text):
        yield Record(origin=origin, error=_TOO_FULL)
        return
    try:
        value = orjson.loads(text.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        lines = enumerate(io.BytesIO(text), start=1)
        if any(number > 1 and _is_object(line) for number, line in lines):
            # JSONL under another name, its first line broken
            for number, line in enumerate(io.BytesIO(text), start=1):
                if number > start and not line.isspace():
                    yield _line_record(origin.path, number, line)
        else:
            kind = "neither Parquet nor JSON" if origin.path.suffix == ".parquet" else "not JSON"
            where = f"line {error.lineno}, column {error.colno}"
            yield Record(origin=origin, error=f"{kind}: {_syntax(error)} at {where}")
        return
    if not isinstance(value, list) or recognised(value) or _is_one_run(value):
        yield Record(origin=origin, value=value)
    elif not value:
        yield Record(origin=origin, error=f"no trajectory: {describe(value)}")
    else:
        for number, element in enumerate(value, start=1):
            place = Origin(path=origin.path, line=number)
            yield Record(origin=place, position=number - 1, value=element)


def _is_one_run(elements: list[Any]) -> bool:
    """Return whether a list that no format knows is a broken run, rather than a list of runs."""
    pieces = sum(isinstance(each, dict) and not _PIECE_KEYS.isdisjoint(each) for each in elements)
    return 2 * pieces > len(elements)


def _parquet_rows(path: Path, origin: Origin, start: int) -> Iterator[Record]:
    from srft_prep.parquet_rows import parquet_rows

    limits = {"max_bytes": MAX_RECORD_BYTES, "max_values": MAX_RECORD_VALUES}
    for row in parquet_rows(path, start=start, **limits):
        place = origin if row.is_whole_file else Origin(path=origin.path, line=row.number + 1)
        yield Record(origin=place, position=row.number, value=row.value, error=row.error)
