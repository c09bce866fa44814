"""Segments + documents -> runs: the weighted tokens of every document, as they are stored.

Worked on some rows at a time: what a million steps take besides their runs is taken once.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from srft_prep.documents import Documents
from srft_prep.errors import ConfigError
from srft_prep.ragged import offsets_of
from srft_prep.token_weights import Segments

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK: Final = 1 << 20
"""Segments at a time, some 100 bytes each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Weighted tokens of documents, sorted and disjoint."""

    offsets: "NDArray[np.int64]"
    """Runs of document d: [offsets[d], offsets[d + 1])."""
    starts: "NDArray[np.int32]"
    """Relative to the document."""
    lengths: "NDArray[np.int32]"
    weights: "NDArray[np.float32]"
    """Each > 0."""

    @property
    def products(self) -> "NDArray[np.float64]":
        """Sum of the weights of each run's tokens, exact."""
        return np.multiply(self.lengths, self.weights, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Runs of some rows' documents."""

    documents: "NDArray[np.int64]"
    """Whose each run is."""
    starts: "NDArray[np.int32]"
    lengths: "NDArray[np.int32]"
    weights: "NDArray[np.float32]"


def weighted_runs(
    segments: Segments, documents: Documents, *, num_steps: int, chunk: int = CHUNK
) -> tuple[Runs, dict[str, int]]:
    """Return the weighted tokens of documents, and how much is lost since no document holds it.

    The latter are `lost_steps` and `lost_tokens`, of weight > 0. Neighbours of one weight become
    one run.

    Args:
        segments: of rows, in their order.
        documents: of rows, in their order.
        num_steps: of all rows.
        chunk: how many segments are worked on at a time, about; it changes no result.

    Raises:
        ConfigError: a weight is more than float32 holds.
    """
    owners = _Owners(documents, num_steps)
    lost: Counter[str] = Counter(lost_steps=0, lost_tokens=0)
    numbers = np.zeros(len(documents.rows), np.int64)
    starts, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    weights = [np.empty(0, np.float32)]
    for some in _whole_rows(segments.rows, chunk):
        piece = _runs_of(segments.select(some), owners, lost)
        if len(piece.documents):
            first, last = int(piece.documents[0]), int(piece.documents[-1])
            numbers[first : last + 1] += np.bincount(piece.documents - first)
        starts.append(piece.starts)
        lengths.append(piece.lengths)
        weights.append(piece.weights)
    runs = Runs(
        offsets=offsets_of(numbers),
        starts=np.concatenate(starts),
        lengths=np.concatenate(lengths),
        weights=np.concatenate(weights),
    )
    return runs, dict(lost)


def _whole_rows(rows: "NDArray[np.int32]", size: int) -> Iterator[slice]:
    """Yield the places of about `size` segments each, never a part of a row."""
    first = 0
    while first < len(rows):
        last = first + size
        if last < len(rows):
            last = int(np.searchsorted(rows, rows[last]))
            if last <= first:  # one row has more
                last = int(np.searchsorted(rows, rows[first], side="right"))
        yield slice(first, last)
        first = last


def _runs_of(segments: Segments, owners: "_Owners", lost: Counter[str]) -> _Piece:
    """Return the runs of some whole rows, and count what no document holds."""
    with np.errstate(over="ignore"):
        weights = segments.weights.astype(np.float32)
    if not np.isfinite(weights).all():
        raise ConfigError("the weights multiply to more than float32 holds; choose smaller ones")
    weighted = (weights > 0) & (segments.ends > segments.starts)
    segments, weights = segments.select(weighted), weights[weighted]
    found = owners.of(segments)
    kept = found >= 0
    lost["lost_steps"] += len(np.unique(segments.spans[~kept & (segments.spans >= 0)]))
    total = int((segments.ends - segments.starts).sum(dtype=np.int64))
    found, segments, weights = found[kept], segments.select(kept), weights[kept]
    # nothing predicts a document's first token, and it must not get weight from the one before
    documents = owners.documents
    starts = np.maximum(segments.starts - documents.starts[found], 1)
    ends = np.minimum(segments.ends, documents.ends[found]) - documents.starts[found]
    inside = starts < ends
    found, starts, ends, weights = (column[inside] for column in (found, starts, ends, weights))
    lost["lost_tokens"] += total - int((ends - starts).sum(dtype=np.int64))
    joins = np.zeros(len(starts), np.bool_)
    joins[1:] = (
        (found[1:] == found[:-1]) & (starts[1:] == ends[:-1]) & (weights[1:] == weights[:-1])
    )
    heads = np.flatnonzero(~joins)
    tails = np.append(heads[1:], len(starts)) - 1 if len(heads) else heads
    return _Piece(
        documents=found[heads],
        starts=starts[heads],
        lengths=(ends[tails] - starts[heads]).astype(np.int32),
        weights=weights[heads],
    )


class _Owners:
    """Which document trains a segment."""

    def __init__(self, documents: Documents, num_steps: int) -> None:
        self.documents = documents
        self._of_steps = documents.of_steps(num_steps + 1)  # the last, -1, is of a turn
        self._ends = (documents.rows << 32) | documents.ends

    def of(self, segments: Segments) -> "NDArray[np.int64]":
        """Return the document that trains each segment, -1 where none does.

        A turn that is no step belongs to the first document of its row that reaches its first
        token: so that it is trained once, as far as that document holds it.
        """
        owners = self._of_steps[segments.spans].astype(np.int64)
        turns = np.flatnonzero(segments.spans < 0)
        if len(turns) and len(self._ends):
            starts = (segments.rows[turns].astype(np.int64) << 32) | segments.starts[turns]
            found = np.searchsorted(self._ends, starts, side="right")
            inside = np.minimum(found, len(self._ends) - 1)
            reached = (found < len(self._ends)) & (
                self.documents.rows[inside] == segments.rows[turns]
            )
            owners[turns] = np.where(reached, inside, -1)
        return owners
