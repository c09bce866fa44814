"""Trajectories as rows of Parquet parts, written whole and read as a stream."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa

from srft_prep.schemas import TRAJECTORIES
from srft_prep.types import Message, Trajectory

BATCH_ROWS: Final = 32
"""Trajectories in memory at a time, when streaming."""


def trajectories_table(trajectories: Iterable[Trajectory]) -> pa.Table:
    """Return trajectories as rows of the `TRAJECTORIES` schema."""
    rows = [
        {
            "trajectory_id": trajectory.trajectory_id,
            "instance_id": trajectory.instance_id,
            "format": trajectory.format,
            "resolved": trajectory.resolved,
            "model": trajectory.model,
            "exit_status": trajectory.exit_status,
            "patch": trajectory.patch,
            "tools": trajectory.tools,
            "messages": [message._asdict() for message in trajectory.messages],
            "num_steps": trajectory.num_steps,
            "content_hash": trajectory.content_hash,
        }
        for trajectory in trajectories
    ]
    return pa.Table.from_pylist(rows, schema=TRAJECTORIES)


def read_trajectories(
    parts: Sequence[Path], *, where: pl.Expr | None = None
) -> Iterator[Trajectory]:
    """Yield the trajectories of parts in order, streamed in batches.

    Those that `where` does not hold for are never made objects, which takes most of the time.
    """
    for part in parts:
        rows_of_part = pl.scan_parquet(part)
        if where is not None:
            rows_of_part = rows_of_part.filter(where)
        for frame in rows_of_part.collect_batches(chunk_size=BATCH_ROWS, maintain_order=True):
            messages = _messages(frame)
            ends = accumulate(frame["messages"].list.len(), initial=0)
            rows = frame.drop("messages").iter_rows(named=True)
            for row, (start, end) in zip(rows, pairwise(ends), strict=True):
                trajectory = _trajectory(row, messages[start:end])
                # known, and a tenth of the time of tokenize to find again; verify does
                trajectory.__dict__["content_hash"] = row["content_hash"]
                yield trajectory


def named(ids: Iterable[str]) -> pl.Expr:
    """Return the condition of `read_trajectories` that holds for the trajectories of these ids."""
    return pl.col("trajectory_id").is_in(list(ids))


def trajectory_of(row: dict[str, Any]) -> Trajectory:
    """Return the trajectory of one row of a `TRAJECTORIES` table."""
    return _trajectory(row, [Message(**message) for message in row["messages"]])


def _messages(frame: pl.DataFrame) -> list[Message]:
    """Return the messages of all rows of a table, column by column: half the time of row by row."""
    flat = frame["messages"].explode(empty_as_null=False).struct.unnest()
    columns = (flat[name].to_list() for name in Message._fields)
    return list(map(Message._make, zip(*columns, strict=True)))


def _trajectory(row: dict[str, Any], messages: Sequence[Message]) -> Trajectory:
    return Trajectory(
        trajectory_id=row["trajectory_id"],
        instance_id=row["instance_id"],
        format=row["format"],
        resolved=row["resolved"],
        model=row["model"],
        exit_status=row["exit_status"],
        patch=row["patch"],
        tools=row["tools"],
        messages=tuple(messages),
    )
