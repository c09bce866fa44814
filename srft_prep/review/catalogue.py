"""What a trajectory directory holds, as columns in memory, and one trajectory at a time from disk.

Columns of 10,000 trajectories take a megabyte or two; messages are read when somebody opens them, a
row group at a time, with the page checksums that the writers left: a damaged part is an error when
it is met, not a wait of minutes at the start.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.config import OUTCOMES
from srft_prep.errors import ShardError
from srft_prep.gold import StepKey
from srft_prep.manifest import read_manifest
from srft_prep.trajectories import trajectory_of
from srft_prep.types import Trajectory

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMNS: Final = (
    "trajectory_id",
    "instance_id",
    "format",
    "model",
    "resolved",
    "num_steps",
    "content_hash",
)
KEPT: Final = 8
"""Trajectories kept in memory after they were read: going back and forth reads nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A row group of a part."""

    path: Path
    number: int
    first_row: int
    """Number of its first trajectory among all."""


class Catalogue:
    """The R trajectories of a directory, numbered from 0 in the order of its parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = read_manifest(folder, stage="ingest")
        self.name = folder.resolve().name
        tables, self._groups = [], []
        num_rows = 0
        for path in source.parts:
            with _opened(path) as part:
                tables.append(_read(part, path, columns=list(COLUMNS)))
                for number in range(part.metadata.num_row_groups):
                    group = _Group(path=path, number=number, first_row=num_rows)
                    self._groups.append(group)
                    num_rows += part.metadata.row_group(number).num_rows
        frame = pl.DataFrame(schema=dict.fromkeys(COLUMNS, pl.Null))
        if tables:
            frame = pl.DataFrame(pa.concat_tables(tables))
        words = pl.col("resolved").replace_strict(OUTCOMES, return_dtype=pl.String)
        self.frame = frame.with_columns(
            outcome=words if frame.height else pl.lit(None, pl.String),
            sought=pl.concat_str(
                pl.col("trajectory_id").cast(pl.String).str.to_lowercase(),
                pl.lit("\n"),
                pl.col("instance_id").cast(pl.String).str.to_lowercase(),
            ),
        )
        """A row a trajectory: `COLUMNS`, `outcome` in words, `sought`: what a search looks in."""
        self.rows: dict[str, int] = dict(zip(frame["trajectory_id"], range(num_rows), strict=True))
        steps = frame["num_steps"].to_numpy() if num_rows else np.zeros(0, np.int32)
        self.offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(steps, dtype=np.int64)])
        """Trajectory r has the steps [offsets[r], offsets[r + 1]) of all, [R + 1]."""
        self._kept: OrderedDict[int, Trajectory] = OrderedDict()

    @property
    def num_trajectories(self) -> int:
        """R."""
        return self.frame.height

    @property
    def num_steps(self) -> int:
        """Steps of all trajectories."""
        return int(self.offsets[-1])

    def step_of(self, key: StepKey) -> int | None:
        """Return a step's place among all steps; None where there is no such step."""
        row = self.rows.get(key[0])
        if row is None or not 0 <= key[1] < self.offsets[row + 1] - self.offsets[row]:
            return None
        return int(self.offsets[row]) + key[1]

    def read(self, row: int) -> Trajectory:
        """Return a trajectory.

        Raises:
            ShardError: the part was damaged or changed since it was written.
        """
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        starts = [group.first_row for group in self._groups]
        group = self._groups[int(np.searchsorted(starts, row, side="right")) - 1]
        with _opened(group.path) as part:
            table = _read(part, group.path, group=group.number)
        found = trajectory_of(table.slice(row - group.first_row, 1).to_pylist()[0])
        if found.trajectory_id != self.frame["trajectory_id"][row]:
            raise ShardError(f"{group.path}: changed since this server started; start it again")
        self._kept[row] = found
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise ShardError(f"{path}: missing; restore it, or run ingest again") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise ShardError(f"{path}: damaged: {error}; restore it, or run ingest again") from None


def _read(
    part: pq.ParquetFile, path: Path, *, columns: list[str] | None = None, group: int | None = None
) -> pa.Table:
    try:
        return part.read(columns) if group is None else part.read_row_group(group)
    except (OSError, pa.ArrowInvalid) as error:
        raise ShardError(f"{path}: damaged: {error}; restore it, or run ingest again") from None
