"""One micro-batch as the model sees it, and the one place where the shift is done.

A batch is a single row: packed sequences laid end to end, each document with positions that restart
at 0. Attention follows the documents' lengths, so that nothing depends on how they were packed.

**The shift.** A weighted token at index k is predicted from the hidden state at k - 1. `assemble`
turns runs of weight into (positions, targets, weights), and nothing else shifts anything: the head
looks at `positions` only, which is all of a document's loss.

**The trim.** Tokens behind a document's last weighted token are seen by no loss, nor are documents
without weight: they are dropped here, the loss and its gradient stay what they were.

Legend: T tokens, D documents, L loss-bearing positions, R runs of weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import torch
from torch import Tensor

from srft_prep.errors import ShardError
from srft_prep.ragged import offsets_of, ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILLER_TOKENS: Final = 2
"""Tokens of a batch without loss: enough to run every layer, next to nothing to compute."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedSequence:
    """A packed sequence as it is stored: unshifted, untrimmed, on the host."""

    ids: "NDArray[np.int32]"
    """Token ids [T]."""
    lengths: "NDArray[np.int32]"
    """Tokens of each document [D]."""
    run_starts: "NDArray[np.int32]"
    """First token of each run of equal weight [R], ascending."""
    run_lengths: "NDArray[np.int32]"
    """Tokens of each run [R]; runs do not overlap."""
    run_weights: "NDArray[np.float32]"
    """Weight > 0 of each of a run's tokens [R]."""
    source: str = "packed sequence"
    """Where it was read, for errors: file and row."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """One micro-batch: packed sequences laid end to end, as a single row."""

    input_ids: Tensor
    """int64 [T]"""
    position_ids: Tensor
    """int64 [T], from 0 in each document."""
    cu_seqlens: Tensor
    """int32 [D + 1]: document d is [cu_seqlens[d], cu_seqlens[d + 1])."""
    lengths: tuple[int, ...]
    """The D documents' lengths, on the host: reading them waits for no device."""
    positions: Tensor
    """int64 [L], ascending: the token whose hidden state predicts the target."""
    targets: Tensor
    """int64 [L]: `input_ids[positions + 1]`."""
    weights: Tensor
    """float32 [L], each > 0."""
    num_trimmed: int = 0
    """Tokens of the packed sequences that the trim left out."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.numel()

    @property
    def num_loss_tokens(self) -> int:
        """L."""
        return self.positions.numel()

    @property
    def sum_weights(self) -> float:
        """Sum of the weights, in float64."""
        return float(self.weights.sum(dtype=torch.float64))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Return this batch on a device; from pinned memory, `non_blocking` does not wait."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return this batch in page-locked memory, which a GPU copies from on its own."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            cu_seqlens=move(self.cu_seqlens),
            positions=move(self.positions),
            targets=move(self.targets),
            weights=move(self.weights),
        )


def assemble(sequences: Sequence[PackedSequence], *, trim: bool = True) -> Batch:
    """Return packed sequences as one batch, shifted and, unless told otherwise, trimmed.

    Without a weighted token among them it is a filler (`filler`): a rank that has nothing to do
    still takes part in every collective.

    Raises:
        ShardError: weights or lengths do not fit the tokens, or a document's first token carries
            weight, which nothing predicts.
    """
    layouts = [_lay_out(sequence, trim=trim) for sequence in sequences]
    stored = sum(len(sequence.ids) for sequence in sequences)
    documents = [
        sequence.ids[start : start + length]
        for sequence, layout in zip(sequences, layouts, strict=True)
        for start, length in zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True)
    ]
    if not documents:
        return filler(num_trimmed=stored)
    ids = np.concatenate(documents, dtype=np.int64)
    lengths = [len(document) for document in documents]
    count = _count(1 << max(lengths).bit_length())
    firsts = offsets_of(np.array([layout.lengths.sum() for layout in layouts]))[:-1]
    starts = [layout.run_starts + first for layout, first in zip(layouts, firsts, strict=True)]
    run_lengths = np.concatenate([sequence.run_lengths for sequence in sequences])
    run_weights = np.concatenate([sequence.run_weights for sequence in sequences])
    positions = ranges(np.concatenate(starts) - 1, run_lengths)
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(np.concatenate([count[:length] for length in lengths])),
        cu_seqlens=torch.from_numpy(offsets_of(np.array(lengths)).astype(np.int32)),
        lengths=tuple(lengths),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(ids[1:][positions]),
        weights=torch.from_numpy(np.repeat(run_weights, run_lengths)),
        num_trimmed=stored - len(ids),
    )


@lru_cache(maxsize=1)
def _count(size: int) -> "NDArray[np.int64]":
    """Return 0..size-1; making it anew for each batch costs a seventh of `assemble`."""
    return np.arange(size)


def filler(*, num_trimmed: int = 0) -> Batch:
    """Return a batch that carries no loss: a rank with nothing to do computes it."""
    return Batch(
        input_ids=torch.zeros(FILLER_TOKENS, dtype=torch.int64),
        position_ids=torch.arange(FILLER_TOKENS),
        cu_seqlens=torch.tensor([0, FILLER_TOKENS], dtype=torch.int32),
        lengths=(FILLER_TOKENS,),
        positions=torch.empty(0, dtype=torch.int64),
        targets=torch.empty(0, dtype=torch.int64),
        weights=torch.empty(0, dtype=torch.float32),
        num_trimmed=num_trimmed,
    )


def kept_lengths(
    bounds: "NDArray[np.int64]", starts: "NDArray[np.int64]", ends: "NDArray[np.int64]"
) -> "NDArray[np.int64]":
    """Return the tokens of each document up to its last weighted one, 0 without one, [D].

    Args:
        bounds: offsets of the documents [D + 1].
        starts: first token of each run of weight [R], ascending.
        ends: token behind each run [R].
    """
    owners = np.searchsorted(bounds, starts, side="right") - 1
    lengths = np.zeros(len(bounds) - 1, np.int64)
    lengths[owners] = ends - bounds[owners]  # of a document's runs the last one counts
    return lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """What of a packed sequence is kept: the first tokens of some of its documents."""

    starts: "NDArray[np.int64]"
    """Where each kept document starts in the stored sequence."""
    lengths: "NDArray[np.int64]"
    """Tokens that are kept of it, > 0."""
    run_starts: "NDArray[np.int64]"
    """First token of each run among what is kept, [R]."""


def _lay_out(sequence: PackedSequence, *, trim: bool) -> _Layout:
    starts = sequence.run_starts.astype(np.int64)
    ends = starts + sequence.run_lengths
    bounds = offsets_of(sequence.lengths)
    _check(sequence, starts, ends, bounds)
    lengths = kept_lengths(bounds, starts, ends) if trim else np.diff(bounds)
    owners = np.searchsorted(bounds, starts, side="right") - 1
    moved = offsets_of(lengths)[owners] - bounds[owners]
    kept = lengths > 0
    return _Layout(starts=bounds[:-1][kept], lengths=lengths[kept], run_starts=starts + moved)


def _check(
    sequence: PackedSequence,
    starts: "NDArray[np.int64]",
    ends: "NDArray[np.int64]",
    bounds: "NDArray[np.int64]",
) -> None:
    """Raise for lengths and runs that do not describe the tokens."""
    total = len(sequence.ids)
    if bounds[-1] != total or (sequence.lengths <= 0).any():
        raise ShardError(
            f"{sequence.source}: seq_lengths add up to {bounds[-1]}, expected its {total} tokens "
            "in documents of at least one; run pack again"
        )
    weights = sequence.run_weights
    sound = (sequence.run_lengths > 0).all() and ((weights > 0) & (weights < np.inf)).all()
    inside = not len(starts) or (starts[0] >= 0 and ends[-1] <= total)
    if not (sound and inside and (starts[1:] >= ends[:-1]).all()):
        raise ShardError(
            f"{sequence.source}: loss_weights: expected ascending runs of finite weight > 0 "
            f"within {total} tokens; run pack again"
        )
    firsts = np.searchsorted(bounds, starts, side="left")
    if (weighted := bounds[firsts] < ends).any():
        raise ShardError(
            f"{sequence.source}: token {bounds[firsts[weighted.argmax()]]} is the first of its "
            "document and carries weight, but no token predicts it; run pack again"
        )
