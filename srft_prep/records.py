"""Raw files -> raw records, streamed: JSON, JSONL, Parquet, plain or gzip or zstd.

A file's kind is read off its bytes, not its name. A record that cannot be parsed comes out as a
record with an `error`, and the file goes on behind it; nothing here raises for bad data. Records
are counted, so that an interrupted ingest can go on at the n-th record of a file.
"""

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import orjson

from srft_prep.errors import ConfigError
from srft_prep.readers import Origin, describe, recognised

MAX_RECORD_BYTES: Final = 512 << 20
"""Largest record that is read, decompressed; a larger one is rejected (a bomb, or no record)."""

SUFFIXES: Final = (".json", ".jsonl", ".ndjson", ".traj", ".parquet")
"""Endings of the files that are taken from a folder, also with `.gz` or `.zst` behind them."""

PARQUET_BATCH_ROWS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One raw record, or the place where one should have been."""

    origin: Origin
    value: Any = None
    error: str | None = None
    """Why there is no value."""


def discover(sources: Sequence[str]) -> list[Path]:
    """Return the files named by paths, folders and globs, each once, in a stable order.

    A folder without any file of a known ending stays in the list as itself: `records` rejects it.

    Raises:
        ConfigError: a path does not exist, or a glob matches nothing.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.exists():
            matches = [path]
        elif has_magic(source):
            matches = [Path(match) for match in sorted(glob(source, recursive=True))]
        else:
            matches = []
        if not matches:
            raise ConfigError(f"{source}: no such file or folder")
        for match in matches:
            found.update(dict.fromkeys(_files_in(match) if match.is_dir() else [match]))
    return list(found)


def _files_in(folder: Path) -> list[Path]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name.removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES)
        and path.is_file()
    ]
    return files or [folder]


def records(path: Path, *, start: int = 0) -> Iterator[Record]:
    """Yield the records of one file from the `start`-th on; unreadable ones carry an `error`."""
    origin = Origin(path=path)
    if path.is_dir():
        endings = ", ".join(SUFFIXES)
        yield from _bad(origin, f"no file with runs in this folder (looked for {endings})", start)
        return
    try:
        with path.open("rb") as raw:
            magic = raw.read(4)
            raw.seek(0)
            if not magic:
                yield from _bad(origin, "empty file", start)
            elif magic == b"PAR1":
                yield from _parquet_rows(path, start=start)
            else:
                yield from _json_records(path, _decompressed(raw, magic), start=start)
    except OSError as error:
        yield from _bad(origin, f"cannot be read: {error.strerror or error}", 0)


def _bad(origin: Origin, reason: str, start: int) -> Iterator[Record]:
    if start == 0:
        yield Record(origin=origin, error=reason)


def _decompressed(raw: BinaryIO, magic: bytes) -> BinaryIO:
    if magic[:2] == b"\x1f\x8b":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if magic == b"\x28\xb5\x2f\xfd":
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return cast(BinaryIO, io.BufferedReader(reader, buffer_size=1 << 20))
    return raw


def _json_records(path: Path, stream: BinaryIO, *, start: int) -> Iterator[Record]:
    """Yield from a stream that is JSONL or one JSON document.

    The first line decides: if it is a whole JSON object, or the name says so, the file is JSONL.
    """
    from zstandard import ZstdError

    number = 0
    try:
        first = stream.readline(MAX_RECORD_BYTES + 1)
        if _is_object(first) or path.name.removesuffix(".gz").removesuffix(".zst").endswith(
            ("jsonl", "ndjson")
        ):
            for number, line in enumerate(_lines(first, stream), start=1):
                if number > start:
                    yield from _line_record(Origin(path=path, line=number), line)
        else:
            text = first + stream.read(MAX_RECORD_BYTES + 1 - len(first))
            yield from _document(path, text, start=start)
    except (EOFError, gzip.BadGzipFile, zlib.error, ZstdError) as error:
        origin = Origin(path=path, line=number + 1 if number else None)
        yield Record(origin=origin, error=f"compressed data broken off or damaged: {error}")


def _is_object(line: bytes) -> bool:
    if not line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
        return False
    try:
        value = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
        return isinstance(value, dict) and bool(value)
    except orjson.JSONDecodeError:
        return False


def _lines(first: bytes, stream: BinaryIO) -> Iterator[bytes]:
    line = first.removeprefix(b"\xef\xbb\xbf")
    while line:
        yield line
        while len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
            line = stream.readline(MAX_RECORD_BYTES + 1)
        line = stream.readline(MAX_RECORD_BYTES + 1)


def _line_record(origin: Origin, line: bytes) -> Iterator[Record]:
    if line.isspace():
        return
    if len(line) > MAX_RECORD_BYTES:
        yield Record(origin=origin, error=f"line longer than {MAX_RECORD_BYTES >> 20} MiB")
        return
    try:
        yield Record(origin=origin, value=orjson.loads(line))
    except orjson.JSONDecodeError as error:
        yield Record(origin=origin, error=f"not JSON: {error}")


def _document(path: Path, text: bytes, *, start: int) -> Iterator[Record]:
    """Yield one record for a document that is a run, one an element for a list of runs."""
    origin = Origin(path=path)
    if len(text) > MAX_RECORD_BYTES:
        yield from _bad(origin, f"document larger than {MAX_RECORD_BYTES >> 20} MiB", start)
        return
    try:
        value = orjson.loads(text.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        lines = text.splitlines(keepends=True)
        if any(map(_is_object, lines[1:])):  # JSONL under another name, its first line broken
            for number, line in enumerate(lines[start:], start=start + 1):
                yield from _line_record(Origin(path=path, line=number), line)
        else:
            yield from _bad(origin, f"not JSON: {error}", start)
        return
    if not isinstance(value, list) or recognised(value):
        if start == 0:
            yield Record(origin=origin, value=value)
    elif not value:
        yield from _bad(origin, f"no trajectory: {describe(value)}", start)
    else:
        for number, element in enumerate(value, start=1):
            if number > start:
                yield Record(origin=Origin(path=path, line=number), value=element)


def _parquet_rows(path: Path, *, start: int) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                if number + batch.num_rows <= start:
                    number += batch.num_rows
                    continue
                for row in batch.to_pylist():
                    number += 1
                    if number > start:
                        yield Record(origin=Origin(path=path, line=number), value=row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        origin = Origin(path=path, line=number + 1 if number else None)
        yield Record(origin=origin, error=f"damaged Parquet file: {reason}")
