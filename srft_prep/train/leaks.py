"""Start-up self-test on the model in training: does a document see another one, or the future?

Packed training goes wrong silently: a cache, a mask or an embedding that depends on the row lets
one document change another's loss, and nothing but quality tells. So before the first step, on the
model as it will train (sharded, compiled, checkpointed, with adapters), every rank runs:

1. **Leaks.** Documents of different lengths; one token in the midst of each is changed in
   turn. Hidden states of all tokens before it and of the other documents must stay as they were,
   bit for bit (mixtures of experts regroup tokens, so they may move by rounding); that of the next
   token must not.
2. **Alone.** Each document alone gives what it gives in the row.
3. **Head.** The loss's own reading of the output layer (bias, scale, cap) gives the NLL of the
   model's own logits.

The cost is nine forward passes of under a hundred tokens; on a GPU eleven of four thousand.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from srft_prep.errors import TrainError
from srft_prep.train.attention import LONG_TOKENS
from srft_prep.train.batches import Batch
from srft_prep.train.model import WeightedModel, causal_lm

LENGTHS: Final = (19, 34, 11)
"""Tokens of the documents, long enough to differ and short enough to cost nothing."""
ROUNDING: Final = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 6e-2}
"""How far equal mathematics in another order may move a value, relative to the largest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeakReport:
    """What the self-test measured, each relative to the largest hidden state or NLL."""

    leak: float
    """Largest change outside what a changed token may reach."""
    response: float
    """Smallest change, over documents, of the next token's hidden state."""
    packing: float
    """Largest difference between a document in the row and alone."""
    head: float
    """Largest difference between the loss's NLL and the model's own."""


def check_leaks(model: WeightedModel, *, device: torch.device | str = "cpu") -> LeakReport:
    """Return what the self-test measured on a model; every rank calls it.

    Args:
        model: The model as it will train; parameters, mode and random state stay as they are.
        device: Where it computes.

    Raises:
        TrainError: a document reaches another one or its own past, a document in a row is not what
            it is alone, or the loss reads the output layer differently from the model.
    """
    config = causal_lm(model.model).config.get_text_config()
    lengths = _lengths(config, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (sum(lengths),), generator=generator)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            report = _measure(model, ids, lengths, torch.device(device))
    finally:
        model.train(training)
    rounding = _rounding(model, device)
    _judge(report, config.model_type, exact=not has_experts(config), rounding=rounding)
    return report


def _lengths(config: PreTrainedConfig, device: torch.device) -> tuple[int, ...]:
    """Return the documents' lengths; on a GPU one is so long that it takes another kernel."""
    longest = getattr(config, "max_position_embeddings", None) or LONG_TOKENS + 1
    if device.type != "cuda" or longest <= LONG_TOKENS:
        return LENGTHS
    return (*LENGTHS, LONG_TOKENS + 1)


def _measure(
    model: WeightedModel, ids: Tensor, lengths: tuple[int, ...], device: torch.device
) -> LeakReport:
    """Run the forward passes and return the differences."""
    vocabulary = causal_lm(model.model).config.get_text_config().vocab_size
    row = _row(ids, lengths, device)
    hidden = _float(model(row, "hidden"))
    size = hidden.abs().max().item()
    leak, responses, first = 0.0, [], 0
    for length in lengths:  # rows of one shape first: another may make compiled code compile anew
        changed, end = first + length // 2, first + length
        other = ids.clone()
        other[changed] = (other[changed] + 1) % vocabulary
        moved = (_float(model(_row(other, lengths, device), "hidden")) - hidden).abs().amax(dim=1)
        responses.append(moved[changed + 1].item())
        moved[changed:end] = 0
        leak = max(leak, moved.max().item())
        first = end
    packing, first = 0.0, 0
    for length in lengths:
        end = first + length
        alone = _float(model(_row(ids[first:end], (length,), device), "hidden"))
        packing = max(packing, (alone - hidden[first:end]).abs().max().item())
        first = end
    own = F.cross_entropy(
        _float(model(row, "logits"))[row.positions], row.targets, reduction="none"
    )
    head = (_float(model(row, "token_nll")) - own).abs().max().item()
    return LeakReport(
        leak=leak / size,
        response=min(responses) / size,
        packing=packing / size,
        head=head / own.abs().max().item(),
    )


def has_experts(config: PreTrainedConfig) -> bool:
    """Return whether a configuration counts experts, under whichever of the many names."""
    return any(
        "expert" in name and isinstance(value, int) and value > 1
        for name, value in config.to_dict().items()
    )


def _judge(report: LeakReport, name: str, *, exact: bool, rounding: float) -> None:
    """Raise for a measurement that exact training cannot give."""
    fault = None
    if not report.leak <= (0.0 if exact else rounding):
        fault = (
            f"a changed token moves tokens before it or of other documents by {report.leak:.2g}, "
            "expected 0: its attention or a layer of another kind does not keep documents apart"
        )
    elif not report.response > 0:
        fault = (
            "a changed token does not move the next one's hidden state: attention sees too little"
        )
    elif not report.packing <= rounding:
        fault = (
            f"a document differs by {report.packing:.2g} from the same document alone, expected at "
            f"most {rounding:.0g}: something depends on where it lies"
        )
    elif not report.head <= rounding:
        fault = (
            f"the loss differs by {report.head:.2g} from that of the model's own logits, expected "
            f"at most {rounding:.0g}: the model does something to its logits that the loss does not"
        )
    if fault:
        raise TrainError(
            f"self-test on the {name} model: {fault}. Training it on packed documents would be "
            "wrong; choose another model"
        )


def _row(ids: Tensor, lengths: tuple[int, ...], device: torch.device) -> Batch:
    """Return documents as a batch in which every token but a document's first is a target."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    positions = torch.cat([torch.arange(start, end - 1) for start, end in pairwise(bounds)])
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        lengths=lengths,
        positions=positions,
        targets=ids[positions + 1],
        weights=torch.ones(len(positions)),
    ).to(device)


def _float(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _rounding(model: WeightedModel, device: torch.device | str) -> float:
    """Return the tolerance for the precision in which the model computes."""
    row = _row(torch.zeros(2, dtype=torch.int64), (2,), torch.device(device))
    with torch.no_grad():
        return ROUNDING[model(row, "hidden").dtype]
