"""Rows of a raw Parquet file, one by one; what is damaged, or too large to be true, is an error.

A few bytes of Parquet can decode to any amount of memory: zeros compress away, a dictionary holds
one long text that a million rows name, and what the metadata say of sizes may be a lie. So decoding
runs with a limit on the memory that this process may add, which the kernel holds, and fails for
those rows alone. Cost: nothing that can be measured beside decoding.
"""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

MAX_DECODED_BYTES: Final = 2 << 30
"""Memory that decoding a batch of rows may add, page and copies included."""
BATCH_ROWS: Final = 32
BATCH_BYTES: Final = 128 << 20
"""Rows of a batch are fewer where the file says that they are large."""

_BROKEN: Final = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)

_CLASS: Final = re.compile(r"\b\w+Exception: ")
"""What Arrow's messages say for C++ programmers alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row, or the place where some should have been."""

    number: int
    """0-based row of the file."""
    value: dict[str, Any] | None = None
    error: str | None = None
    """Why there is no value."""
    is_whole_file: bool = False
    """Whether the error is the file's, not a row's."""


def parquet_rows(path: Path, *, start: int, max_bytes: int, max_values: int) -> Iterator[Row]:
    """Yield the rows of a file; a row group that cannot be decoded is one row with an error.

    Args:
        path: the file.
        start: rows before this one may be left out.
        max_bytes: a row that takes more is an error.
        max_values: so is one of more values.
    """
    first = row = 0
    try:
        with _memory_bounded():
            file = pq.ParquetFile(
                path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
            )
    except _BROKEN as error:
        yield Row(number=0, error=_damaged(error), is_whole_file=True)
        return
    with file:
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            end = first + about.num_rows
            row = first
            try:
                for batch in _batches(file, group, about) if end > start else ():
                    for index in range(batch.num_rows):
                        yield _row(row, batch.slice(index, 1), max_bytes, max_values)
                        row += 1
            except _BROKEN as error:
                lost = f"; rows {row + 1} to {end} are lost"
                yield Row(number=row, error=_damaged(error) + lost)
            first = end


def _batches(file: pq.ParquetFile, group: int, about: Any) -> Iterator[pa.RecordBatch]:
    row_bytes = about.total_byte_size // max(about.num_rows, 1)
    num_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(row_bytes, 1)))
    with _memory_bounded():
        batches = file.iter_batches(num_rows, row_groups=[group], use_threads=False)
    while True:
        with _memory_bounded():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _row(number: int, batch: pa.RecordBatch, max_bytes: int, max_values: int) -> Row:
    try:
        if batch.get_total_buffer_size() > max_bytes and _size(batch) > max_bytes:
            return Row(number=number, error=f"row larger than {max_bytes >> 20} MiB")
        if sum(map(_num_values, batch.columns)) > max_values:
            return Row(number=number, error=f"row of more than {max_values:,} values")
        with _memory_bounded():
            (values,) = batch.to_pylist()
        value = {key: _without_nulls(item) for key, item in values.items()}
    except RecursionError:
        return Row(number=number, error="row cannot be read: nested too deeply")
    except (ValueError, OverflowError, MemoryError) as error:
        return Row(number=number, error=f"row cannot be read: {error}")
    return Row(number=number, value=value)


def _size(batch: pa.RecordBatch) -> int:
    """Return the bytes of a row: its own, not those of the batch that it is a slice of."""
    size: int = batch.nbytes
    return size


def _num_values(array: pa.Array) -> int:
    """Return how many values an array holds, those inside of others included."""
    kind = array.type
    if pa.types.is_struct(kind):
        return len(array) + sum(map(_num_values, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        inner = array if not pa.types.is_map(kind) else array.cast(_entries(kind))
        return len(array) + _num_values(inner.flatten())
    return len(array)


def _entries(kind: pa.MapType) -> pa.DataType:
    fields = [pa.field("key", kind.key_type, nullable=False), pa.field("value", kind.item_type)]
    return pa.list_(pa.struct(fields))


def _without_nulls(value: Any) -> Any:
    """Return a Parquet value without the null fields of its structs.

    All structs of a column have the same fields, so a null says that a row has no such field:
    arguments of a call that were a dict come with those of all other calls, null.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _damaged(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"decodes to more than {MAX_DECODED_BYTES >> 30} GiB at once"
    text = (str(error).splitlines() or [type(error).__name__])[0]
    text = "".join(each if each.isprintable() else "?" for each in _CLASS.sub("", text))
    return f"damaged Parquet file: {text:.200}"


@contextmanager
def _memory_bounded() -> Iterator[None]:
    """Let this process add so much memory in the block, or raise MemoryError there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
    limit = now + MAX_DECODED_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
