"""Rows of token parts: as objects, and as Arrow tables built column by column.

A table is built from flat arrays of numbers, without a Python object for any token.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from srft_prep.schemas import CONVENTION_SPAN, FIELD_SPAN, PART_SPAN, SPAN, TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROW_GROUP_ROWS: Final = 16
ROW_GROUP_TOKENS: Final = 1 << 20
"""A row group of a part holds as many rows or about as many tokens, whichever comes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One row of a token part; the columns are told in `schemas.TOKENS`."""

    trajectory_id: str
    resolved: bool | None
    content_hash: str
    input_ids: "NDArray[np.int32]"
    """Token ids, [T]."""
    step_spans: tuple[tuple[int, int, int], ...]
    """(step, start, end) of every step, half-open token ranges, in order."""
    part_spans: tuple[tuple[int, str, int, int], ...] = ()
    """(step, part, start, end), half-open token ranges, in order."""
    field_spans: tuple[tuple[int, str, int, int, int], ...] = ()
    """(step, field, start, end, skipped), characters of the step's text."""
    convention_spans: tuple[tuple[str, int, int, int], ...] = ()
    """(convention, step, start, end), half-open token ranges."""
    step_chars: "NDArray[np.int16]" = field(default_factory=lambda: np.empty(0, np.int16))
    """How many characters each token of the steps begins, step after step."""
    instance_id: str = ""
    """The task, by which `pack --hold-out` chooses; empty where the source names none."""


def row_groups(rows: Iterable[TokenRow]) -> Iterator[list[TokenRow]]:
    """Yield rows in the groups that a part is written in."""
    group: list[TokenRow] = []
    num_tokens = 0
    for row in rows:
        group.append(row)
        num_tokens += len(row.input_ids)
        if is_full(len(group), num_tokens):
            yield group
            group, num_tokens = [], 0
    if group:
        yield group


def is_full(num_rows: int, num_tokens: int) -> bool:
    """Return whether a row group of so much takes no more."""
    return num_rows >= ROW_GROUP_ROWS or num_tokens >= ROW_GROUP_TOKENS


def token_table(rows: Sequence[TokenRow]) -> pa.Table:
    """Return rows as a table of the `TOKENS` schema."""
    ids = [row.input_ids for row in rows]
    columns = [
        pa.array([row.trajectory_id for row in rows], pa.string()),
        pa.array([row.resolved for row in rows], pa.bool_()),
        pa.array([row.content_hash for row in rows], pa.string()),
        _lists(ids, pa.array(np.concatenate([np.empty(0, np.int32), *ids]))),
        _structs([row.step_spans for row in rows], SPAN),
        pa.array(np.array([len(each) for each in ids], np.int32)),
        _structs([row.part_spans for row in rows], PART_SPAN),
        _structs([row.field_spans for row in rows], FIELD_SPAN),
        _structs([row.convention_spans for row in rows], CONVENTION_SPAN),
        _lists(
            [row.step_chars for row in rows],
            pa.array(np.concatenate([np.empty(0, np.int16), *(row.step_chars for row in rows)])),
        ),
        pa.array([row.instance_id for row in rows], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=TOKENS)


def _structs(lists: Sequence[Sequence[tuple[int | str, ...]]], kind: pa.StructType) -> pa.Array:
    """Return a list column of structs from the tuples of their fields' values."""
    flat = [values for each in lists for values in each]
    columns = zip(*flat, strict=True) if flat else [()] * kind.num_fields
    arrays = [pa.array(column, each.type) for column, each in zip(columns, kind, strict=True)]
    return _lists(lists, pa.StructArray.from_arrays(arrays, fields=list(kind)))


def _lists(lists: "Sequence[Sequence[object] | NDArray[np.generic]]", values: pa.Array) -> pa.Array:
    ends = np.cumsum([0, *(len(each) for each in lists)], dtype=np.int32)
    kind = pa.list_(pa.field("element", values.type))
    return pa.ListArray.from_arrays(pa.array(ends), values).cast(kind)
