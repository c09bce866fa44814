"""All rows of a token directory as columns, without their ids: what `pack` decides by.

Memory: some 20 bytes a row, 20 a step, and the names of the trajectories.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from srft_prep.documents import Documents
from srft_prep.ragged import find, offsets_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

OUTCOME_CODES: Final[dict[bool | None, int]] = {None: 0, False: 1, True: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenColumns:
    """R token rows of N trajectories with S steps, in the order of the parts."""

    parts: tuple[Path, ...]
    part_offsets: "NDArray[np.int64]"
    """Rows of part i: [part_offsets[i], part_offsets[i + 1])."""
    names: tuple[str, ...]
    """Ids of the trajectories, [N]."""
    content_hashes: tuple[str, ...]
    """[N]"""
    trajectories: "NDArray[np.int32]"
    """Index of each row's trajectory, [R]."""
    outcomes: "NDArray[np.int8]"
    """`OUTCOME_CODES` of each row, [R]."""
    num_tokens: "NDArray[np.int32]"
    """[R]"""
    span_offsets: "NDArray[np.int64]"
    """Steps of row r: [span_offsets[r], span_offsets[r + 1])."""
    steps: "NDArray[np.int32]"
    """Number of each step, [S]."""
    starts: "NDArray[np.int32]"
    """First token of each step in its row, [S]."""
    ends: "NDArray[np.int32]"
    """Token behind each step in its row, [S]."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.trajectories)

    def span_rows(self) -> "NDArray[np.int32]":
        """Return the row of each step, [S]."""
        rows = np.arange(self.num_rows, dtype=np.int32)
        return np.repeat(rows, np.diff(self.span_offsets))


def read_columns(parts: Sequence[Path]) -> TokenColumns:
    """Return the columns of token parts."""
    index: dict[str, int] = {}
    hashes: list[str] = []
    columns: list[tuple[NDArray[np.int32], ...]] = []
    outcomes: list[NDArray[np.int8]] = []
    wanted = ["trajectory_id", "resolved", "content_hash", "step_spans", "num_tokens"]
    for part in parts:
        table = pq.read_table(part, columns=wanted, use_threads=False)
        codes = []
        for name, content_hash in zip(
            table["trajectory_id"].to_pylist(), table["content_hash"].to_pylist(), strict=True
        ):
            code = index.setdefault(name, len(index))
            if code == len(hashes):
                hashes.append(content_hash)
            codes.append(code)
        lengths, (steps, starts, ends) = struct_lists(table["step_spans"])
        found = [OUTCOME_CODES[resolved] for resolved in table["resolved"].to_pylist()]
        outcomes.append(np.array(found, np.int8))
        sizes = table["num_tokens"].to_numpy()
        columns.append((np.array(codes, np.int32), sizes, lengths, steps, starts, ends))
    empty = np.empty(0, np.int32)
    trajectories, num_tokens, lengths, steps, starts, ends = (
        np.concatenate([empty, *(column[i] for column in columns)]) for i in range(6)
    )
    return TokenColumns(
        parts=tuple(parts),
        part_offsets=offsets_of(np.array([len(column[0]) for column in columns], np.int64)),
        names=tuple(index),
        content_hashes=tuple(hashes),
        trajectories=trajectories,
        outcomes=np.concatenate([np.empty(0, np.int8), *outcomes]),
        num_tokens=num_tokens,
        span_offsets=offsets_of(lengths),
        steps=steps,
        starts=starts,
        ends=ends,
    )


def document_ids(
    columns: TokenColumns, documents: Documents, part: int
) -> "Iterator[tuple[int, NDArray[np.int32]]]":
    """Yield (document, its ids) for the documents of one part, in order, read by row group.

    The ids are a view of the row group's: keep a copy, not the view.
    """
    first, last = columns.part_offsets[part : part + 2].tolist()
    if not np.diff(np.searchsorted(documents.rows, (first, last))):
        return
    with pq.ParquetFile(columns.parts[part], page_checksum_verification=True) as source:
        for group in range(source.num_row_groups):
            rows = source.metadata.row_group(group).num_rows
            begin, end = np.searchsorted(documents.rows, (first, first + rows)).tolist()
            if begin < end:
                column = source.read_row_group(group, columns=["input_ids"], use_threads=False)
                lists = pa.concat_arrays(column["input_ids"].chunks)
                ids = lists.values.to_numpy()
                offsets = lists.offsets.to_numpy()[documents.rows[begin:end] - first]
                starts = (offsets + documents.starts[begin:end]).tolist()
                ends = (offsets + documents.ends[begin:end]).tolist()
                for document, start, stop in zip(range(begin, end), starts, ends, strict=True):
                    yield document, ids[start:stop]
            first += rows


def struct_lists(
    column: pa.ChunkedArray, words: Sequence[str] = ()
) -> "tuple[NDArray[np.int32], list[NDArray[np.int32]]]":
    """Return the lengths of lists of structs and the flat arrays of their fields.

    A string becomes its place in `words`, -1 where it is none of them.
    """
    lists = pa.concat_arrays(column.chunks or [pa.array([], column.type)])
    lengths = np.diff(lists.offsets.to_numpy()).astype(np.int32)
    fields = []
    for field in lists.flatten().flatten():
        if pa.types.is_string(field.type):
            field = pc.fill_null(pc.index_in(field, pa.array(words, pa.string())), -1)
        fields.append(field.to_numpy())
    return lengths, fields


class StepIndex:
    """Where the steps of trajectories stand among all steps of a token directory."""

    def __init__(self, columns: TokenColumns) -> None:
        self._columns = columns
        keys = _keys(columns.trajectories[columns.span_rows()], columns.steps)
        self._order = None if (np.diff(keys) > 0).all() else np.argsort(keys, kind="stable")
        self._keys = keys if self._order is None else keys[self._order]

    def find(
        self, trajectories: "NDArray[np.int32]", steps: "NDArray[np.int32]"
    ) -> "NDArray[np.int64]":
        """Return the place of each (trajectory, step) among all steps, -1 where there is none."""
        places = find(self._keys, _keys(trajectories, steps))
        if self._order is None or not len(self._order):
            return places
        return np.where(places < 0, -1, self._order[places])

    def no_such_step(self, what: str, trajectory: int, step: int) -> str:
        """Return what an error says of a label or weight for a step that is not there."""
        end = int(np.searchsorted(self._keys, (int(trajectory) + 1) << 32))
        last = int(self._keys[end - 1]) if end else -1
        steps = f"the steps 0 to {last & 0x7FFFFFFF}" if last >> 32 == trajectory else "no steps"
        return (
            f"{self._columns.names[trajectory]}: a {what} for step {step}, but the trajectory has "
            f"{steps}; were these {what}s made for other trajectories?"
        )


def _keys(trajectories: "NDArray[np.int32]", steps: "NDArray[np.int32]") -> "NDArray[np.int64]":
    return (trajectories.astype(np.int64) << 32) | steps
