"""Segments + documents -> runs: the weighted tokens of every document, as they are stored."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from srft_prep.documents import Documents
from srft_prep.errors import ConfigError
from srft_prep.ragged import offsets_of
from srft_prep.token_weights import Segments

if TYPE_CHECKING:
    from numpy.typing import NDArray


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


def weighted_runs(
    segments: Segments, documents: Documents, *, num_steps: int
) -> tuple[Runs, dict[str, int]]:
    """Return the weighted tokens of documents, and how much is lost since no document holds it.

    The latter are `lost_steps` and `lost_tokens`, of weight > 0. Neighbours of one weight become
    one run.

    Raises:
        ConfigError: a weight is more than float32 holds.
    """
    with np.errstate(over="ignore"):
        weights = segments.weights.astype(np.float32)
    if not np.isfinite(weights).all():
        raise ConfigError("the weights multiply to more than float32 holds; choose smaller ones")
    weighted = (weights > 0) & (segments.ends > segments.starts)
    segments, weights = segments.select(weighted), weights[weighted]
    owners = _owners(segments, documents, num_steps)
    kept = owners >= 0
    lost_steps = len(np.unique(segments.spans[~kept & (segments.spans >= 0)]))
    total = int((segments.ends - segments.starts).sum(dtype=np.int64))
    owners, segments, weights = owners[kept], segments.select(kept), weights[kept]
    # nothing predicts a document's first token, and it must not get weight from the one before
    starts = np.maximum(segments.starts - documents.starts[owners], 1)
    ends = np.minimum(segments.ends, documents.ends[owners]) - documents.starts[owners]
    inside = starts < ends
    owners, starts, ends, weights = (column[inside] for column in (owners, starts, ends, weights))
    lost_tokens = total - int((ends - starts).sum(dtype=np.int64))
    joins = np.zeros(len(starts), np.bool_)
    joins[1:] = (
        (owners[1:] == owners[:-1]) & (starts[1:] == ends[:-1]) & (weights[1:] == weights[:-1])
    )
    heads = np.flatnonzero(~joins)
    tails = np.append(heads[1:], len(starts)) - 1 if len(heads) else heads
    lengths = ends[tails] - starts[heads]
    numbers = np.bincount(owners[heads], minlength=len(documents.rows))
    runs = Runs(
        offsets=offsets_of(numbers),
        starts=starts[heads],
        lengths=lengths.astype(np.int32),
        weights=weights[heads],
    )
    return runs, {"lost_steps": lost_steps, "lost_tokens": lost_tokens}


def _owners(segments: Segments, documents: Documents, num_steps: int) -> "NDArray[np.int64]":
    """Return the document that trains each segment, -1 where none does.

    A turn that is no step belongs to the first document of its row that reaches its first token:
    so that it is trained once, as far as that document holds it.
    """
    owners = np.append(documents.of_steps(num_steps), -1)[segments.spans]
    turns = np.flatnonzero(segments.spans < 0)
    if len(turns) and len(documents.rows):
        ends = (documents.rows << 32) | documents.ends
        starts = (segments.rows[turns].astype(np.int64) << 32) | segments.starts[turns]
        found = np.searchsorted(ends, starts, side="right")
        inside = np.minimum(found, len(ends) - 1)
        reached = (found < len(ends)) & (documents.rows[inside] == segments.rows[turns])
        owners[turns] = np.where(reached, inside, -1)
    return owners
