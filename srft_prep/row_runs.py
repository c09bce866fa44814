"""The rows of a table, trajectory by trajectory: what a merge reads and writes.

Rows stay Arrow's: none becomes a Python object. Memory holds a batch of rows, not a table.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.errors import ShardError, in_one_line

BATCH_ROWS: Final = 1024


class RowRuns:
    """A table's rows from the first to the last, taken a trajectory's at a time."""

    def __init__(self, path: Path, schema: pa.Schema, *, batch_rows: int = BATCH_ROWS) -> None:
        """Open a table that has a column `trajectory_id`.

        Raises:
            ShardError: it cannot be read, or has other columns than the schema.
        """
        self.path = path
        self._schema = schema
        self._batches = _batches(path, schema, batch_rows)
        self._batch = pa.RecordBatch.from_pylist([], schema=schema)
        self._ids: Sequence[str] = ()
        self._next = 0

    def next_id(self) -> str | None:
        """Return the trajectory of the next row; None behind the last."""
        while self._next == len(self._ids):
            batch = next(self._batches, None)
            if batch is None:
                return None
            self._batch, self._next = batch, 0
            self._ids = batch["trajectory_id"].to_pylist()
        return self._ids[self._next]

    def take(self, trajectory_id: str) -> list[pa.RecordBatch]:
        """Return the next rows as far as they are a trajectory's; none where they are another's."""
        taken = []
        while self.next_id() == trajectory_id:
            end = self._next
            while end < len(self._ids) and self._ids[end] == trajectory_id:
                end += 1
            taken.append(self._batch.slice(self._next, end - self._next))
            self._next = end
        return taken


def _batches(path: Path, schema: pa.Schema, batch_rows: int) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(schema):
                raise ShardError(
                    f"{path}: expected the columns {', '.join(schema.names)} of this version, got "
                    f"{', '.join(file.schema_arrow.names)}; make it again"
                )
            for batch in file.iter_batches(batch_size=batch_rows):
                yield batch.cast(schema)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path}: cannot be read: {in_one_line(error, limit=300)}") from None


def table_of(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """Return rows as one table without seams, which is written as it would be if made at once."""
    return pa.Table.from_batches(batches, schema=schema).combine_chunks()
