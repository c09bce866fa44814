"""Weights of steps -> weights of their tokens: parts of a step, and other tools' conventions.

A *segment* is a token range of one weight. By default a step is one segment; where parts are
weighted it is one a part, and where its characters are (`character_weights`), one a run of tokens.
Weights multiply, in float64: step x part x characters.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.errors import ConfigError, ShardError
from srft_prep.factors import Factors
from srft_prep.ragged import find
from srft_prep.token_columns import TokenColumns, struct_lists
from srft_prep.weights import PARTS

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """G token ranges in the order of their rows and of their places in them."""

    rows: "NDArray[np.int32]"
    """[G]"""
    spans: "NDArray[np.int64]"
    """Place of each one's step among all steps, -1 for a turn that is no step, [G]."""
    starts: "NDArray[np.int32]"
    ends: "NDArray[np.int32]"
    """Half-open ranges of the row's tokens, [G]."""
    weights: "NDArray[np.float64]"
    """[G]"""

    def select(self, chosen: "NDArray[np.bool_] | slice") -> "Segments":
        """Return some of the segments; of a slice, views."""
        return Segments(
            rows=self.rows[chosen],
            spans=self.spans[chosen],
            starts=self.starts[chosen],
            ends=self.ends[chosen],
            weights=self.weights[chosen],
        )

    def replaced(self, new: "Segments", spans: "NDArray[np.bool_]") -> "Segments":
        """Return these, but for those of the chosen steps, [S], in whose place others come."""
        return joined([self.select(~spans[self.spans]), new])


def joined(segments: Sequence[Segments]) -> Segments:
    """Return the segments of all, in order."""
    names = ("rows", "spans", "starts", "ends", "weights")
    columns = {name: np.concatenate([getattr(each, name) for each in segments]) for name in names}
    order = np.argsort((columns["rows"].astype(np.int64) << 32) | columns["starts"], kind="stable")
    return Segments(**{name: column[order] for name, column in columns.items()})


def whole_steps(columns: TokenColumns, weights: "NDArray[np.float64]") -> Segments:
    """Return one segment a step."""
    return Segments(
        rows=columns.span_rows(),
        spans=np.arange(len(columns.steps)),
        starts=columns.starts,
        ends=columns.ends,
        weights=weights,
    )


def by_part(
    segments: Segments,
    columns: TokenColumns,
    part_weights: Mapping[str, float],
    factors: Sequence[Factors],
) -> Segments:
    """Return segments in which each part of a step has its weight.

    Args:
        segments: one a step.
        columns: the token rows.
        part_weights: weight of each part of every step; those that are not named have 1.
        factors: weights of parts of some steps.

    Raises:
        ShardError: the parts of a step do not cover it.
    """
    everywhere = np.array([part_weights.get(part, 1.0) for part in PARTS])
    parts = [each.of_parts() for each in factors]
    if (everywhere == 1).all() and not any(len(each.spans) for each in parts):
        return segments
    table = np.ones((len(columns.steps), len(PARTS)))
    for each in parts:
        np.multiply.at(table, (each.spans, each.targets.astype(np.int64)), each.weights)
    table *= everywhere
    chosen = (table != 1).any(axis=1)
    pieces = [
        _parts_of(columns, number, segments.weights, table, chosen)
        for number in parts_with(columns, chosen)
    ]
    made = segments.replaced(joined(pieces), chosen) if pieces else segments
    covered = np.zeros(len(columns.steps), np.int64)
    np.add.at(covered, made.spans, made.ends - made.starts)
    if len(bad := np.flatnonzero(covered != columns.ends - columns.starts)):
        row = int(np.searchsorted(columns.span_offsets, bad[0], side="right")) - 1
        raise ShardError(
            f"{columns.names[columns.trajectories[row]]}: step {columns.steps[bad[0]]}: its parts "
            "(part_spans) do not cover it; run tokenize again"
        )
    return made


def _parts_of(
    columns: TokenColumns,
    number: int,
    weights: "NDArray[np.float64]",
    table: "NDArray[np.float64]",
    chosen: "NDArray[np.bool_]",
) -> Segments:
    rows, spans, (parts, starts, ends) = spans_of_part(columns, number, "part_spans", PARTS)
    if len(parts) and parts.min() < 0:
        raise ShardError(
            f"{columns.parts[number]}: a part that is none of {', '.join(PARTS)}; run tokenize "
            "again"
        )
    pieces = Segments(
        rows=rows,
        spans=spans,
        starts=starts,
        ends=ends,
        weights=weights[spans] * table[spans, parts],
    )
    return pieces.select(chosen[spans])


def by_convention(
    convention: str, columns: TokenColumns, weights: "NDArray[np.float64]"
) -> Segments:
    """Return the token ranges that another tool would train.

    A turn that is a step has its step's weight, any other has 1: that is what those tools do.

    Raises:
        ConfigError: the tokens hold none.
    """
    pieces = []
    weights = np.append(weights, 1.0)  # of a turn that is no step, at -1
    for number in range(len(columns.parts)):
        rows, spans, (names, starts, ends) = spans_of_part(
            columns, number, "convention_spans", (convention,)
        )
        found = Segments(rows=rows, spans=spans, starts=starts, ends=ends, weights=weights[spans])
        pieces.append(found.select(names == 0))
    if not any(len(each.rows) for each in pieces):
        hint = (
            "it needs a chat template with {% generation %} marks when they are made (tokenize "
            "--chat-template)"
            if convention == "trl"
            else "tokenize --axolotl notes them"
        )
        raise ConfigError(f"--convention {convention}: the tokens hold no spans of it; {hint}")
    return joined(pieces)


def spans_of_part(
    columns: TokenColumns, number: int, name: str, words: Sequence[str]
) -> "tuple[NDArray[np.int32], NDArray[np.int64], list[NDArray[np.int32]]]":
    """Return row, step and the other fields of every span in a column of one token part.

    Steps become their places among all steps; one of -1 stays. Strings become places in `words`.
    """
    path = columns.parts[number]
    first, last = (int(row) for row in columns.part_offsets[number : number + 2])
    lengths, fields = struct_lists(read_column(path, name), words)
    rows = np.repeat(np.arange(first, last, dtype=np.int32), lengths)
    steps = fields.pop(0 if name != "convention_spans" else 1)
    offsets = columns.span_offsets[first : last + 1]
    owners = np.repeat(np.arange(first, last), np.diff(offsets))
    keys = (owners << 32) | columns.steps[offsets[0] : offsets[-1]]
    places = find(keys, (rows.astype(np.int64) << 32) | np.maximum(steps, 0))
    if ((places < 0) & (steps >= 0)).any():
        raise ShardError(f"{path}: {name} of a step that is not there; run tokenize again")
    return rows, np.where(steps < 0, -1, places + offsets[0]), fields


def parts_with(columns: TokenColumns, chosen: "NDArray[np.bool_]") -> Iterator[int]:
    """Yield the numbers of the parts that hold a chosen step, [S]."""
    for number in range(len(columns.parts)):
        first, last = columns.part_offsets[number : number + 2]
        if chosen[columns.span_offsets[first] : columns.span_offsets[last]].any():
            yield number


def read_column(path: Path, name: str) -> pa.ChunkedArray:
    """Return a column of a token part.

    Raises:
        ShardError: the part was made by a version that did not write it.
    """
    with pq.ParquetFile(path) as file:
        if name not in file.schema_arrow.names:
            raise ShardError(f"{path}: has no column {name}; run tokenize again")
        return file.read(columns=[name], use_threads=False)[name]
