"""Sequence parallelism: the ranks of a group share one row, a stretch of its tokens each.

Everything but attention treats tokens alone, so a rank computes its stretch [a, b) as if it were a
row. For attention, tokens of all heads are exchanged for all tokens of some heads, and back
(DeepSpeed-Ulysses, arXiv:2309.14509); documents may cross from one stretch to the next. Positions
and targets were shifted before the split (`batches`), so that no target is lost at a cut.

Legend: T tokens, t tokens of a stretch, H heads, D head size, L loss-bearing positions.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from srft_prep.train.batches import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """One rank's part of a row."""

    input_ids: Tensor
    """int64 [t]"""
    position_ids: Tensor
    """int64 [t]"""
    lengths: tuple[int, ...]
    """The documents' lengths of the whole row, the padding's among them."""
    cu_seqlens: Tensor
    """int32, the whole row's."""
    positions: Tensor
    """int64, the loss-bearing positions in this stretch, counted from its start."""
    targets: Tensor
    """int64, theirs."""
    weights: Tensor
    """float32, theirs."""
    first: int = 0
    """Where this stretch starts in the row."""
    first_loss: int = 0
    """Where its loss-bearing positions start among all L."""


def split(batch: Batch, group: dist.ProcessGroup | None) -> Stretch:
    """Return this rank's stretch of a batch, all of it without a group.

    A row that does not divide by the group's size is padded with a document that no loss sees.
    """
    if group is None:
        return Stretch(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            positions=batch.positions,
            lengths=batch.lengths,
            cu_seqlens=batch.cu_seqlens,
            targets=batch.targets,
            weights=batch.weights,
        )
    size, rank = group.size(), group.rank()
    padding = -batch.num_tokens % size
    lengths, cu_seqlens = batch.lengths, batch.cu_seqlens
    ids, places = batch.input_ids, batch.position_ids
    if padding:
        lengths = (*lengths, padding)
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + padding])
        ids = F.pad(ids, (0, padding))
        places = torch.cat([places, torch.arange(padding, device=places.device)])
    tokens = len(ids) // size
    first = rank * tokens
    bounds = torch.tensor([first, first + tokens], device=batch.positions.device)
    begin, end = torch.searchsorted(batch.positions, bounds).tolist()
    return Stretch(
        input_ids=ids[first : first + tokens],
        position_ids=places[first : first + tokens],
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        positions=batch.positions[begin:end] - first,
        targets=batch.targets[begin:end],
        weights=batch.weights[begin:end],
        first=first,
        first_loss=begin,
    )


def whole(part: Tensor, first: int, total: int, group: dist.ProcessGroup | None) -> Tensor:
    """Return all ranks' parts as one, the first `total` rows of it, on every rank; no gradient."""
    if group is None:
        return part
    out = part.new_zeros(total, *part.shape[1:])
    kept = max(0, min(len(part), total - first))
    out[first : first + kept] = part[:kept].detach()
    dist.all_reduce(out, group=group)
    return out


def misfit(degree: int, *, query_heads: int, key_heads: int) -> str | None:
    """Return why heads cannot be shared out among ranks, or None.

    Each rank takes as many query heads as the others. Key heads may be fewer than the ranks: they
    are repeated.
    """
    what = None
    if query_heads % degree:
        what = f"{query_heads} query heads, expected a multiple of {degree}"
    elif key_heads % degree and degree % key_heads:
        what = f"{key_heads} key heads, expected a multiple or a divisor of {degree}"
    if what is None:
        return None
    return f"sequence parallelism over {degree} ranks: the model has {what}; choose another degree"


def to_heads(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return all tokens of this rank's heads, given this rank's tokens of all heads [1, H, t, D].

    Fewer (key) heads than ranks are repeated first, so that each rank gets the one that it needs.
    """
    size, heads = group.size(), part.shape[1]
    if heads < size:
        part = part.repeat_interleave(size // heads, dim=1)
        heads = size
    _, _, tokens, width = part.shape
    received = exchange(part[0].reshape(size, heads // size, tokens, width), group)
    # received[r] is rank r's stretch of tokens, of this rank's heads
    return received.transpose(0, 1).reshape(1, heads // size, size * tokens, width)


def to_tokens(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's tokens of all heads, given all tokens of its heads [1, T, H, D]."""
    size = group.size()
    _, tokens, heads, width = part.shape
    received = exchange(part[0].reshape(size, tokens // size, heads, width), group)
    # received[r] is rank r's heads, of this rank's stretch of tokens
    return received.transpose(0, 1).reshape(1, tokens // size, size * heads, width)


def exchange(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return what each rank of the group sent here, [size, ...] in and out; has a gradient."""
    ones = [1] * group.size()
    received = all_to_all_single_autograd(sent.contiguous(), ones, ones, group)
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(received)
    return waited
