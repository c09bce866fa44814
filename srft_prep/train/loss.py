"""The weighted loss of the few tokens that carry weight, without ever holding all their logits.

    loss = sum over loss-bearing positions of  w * -log softmax(head(hidden))[target]

The division by the sum of weights of the whole optimiser step is the loop's: a rank or a
micro-batch alone does not know it.

Only the L loss-bearing positions meet the head, `chunk` at a time. The gradients of a chunk follow
from its logits, so they are computed there and then, in the forward pass (as Liger and cut
cross-entropy do): no logits are kept and none are computed twice. What remains until the backward
pass is the gradient of the head and of L hidden states, which the backward pass needs anyway; and
the head's backward pass is the first that runs. One chunk's logits, float32, are all of the peak.

Legend: T tokens, L loss-bearing positions, C positions of a chunk, H hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_POSITIONS: Final = 256
"""Positions whose logits are held at a time: 156 MB of float32 at a vocabulary of 152k."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What turns hidden states into logits: softcap(scale * (hidden @ weight.T + bias))."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    scale: float = 1.0
    """Factor of the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Cap c of the logits, after the scale: c * tanh(logit / c) (Gemma's)."""


def weighted_nll(
    hidden_TH: Tensor,
    head: Head,
    positions: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    chunk: int = CHUNK_POSITIONS,
) -> Tensor:
    """Return the weighted sum of the targets' negative log-likelihoods, a float32 scalar.

    The softmax is float32 (float64 for float64 hidden states). Without positions it is a zero whose
    gradients are zeros, so that a rank without loss takes part in everything.

    Args:
        hidden_TH: Hidden states after the final norm.
        head: The output layer.
        positions: int64 [L], the tokens whose hidden states predict.
        targets: int64 [L], what they predict.
        weights: float32 [L].
        chunk: Positions at a time.
    """
    loss: Tensor = _WeightedNLL.apply(  # type: ignore[no-untyped-call]
        hidden_TH[positions], head.weight, head.bias, targets, weights, head, chunk
    )
    return loss


@torch.no_grad()
def token_nll(
    hidden_TH: Tensor,
    head: Head,
    positions: Tensor,
    targets: Tensor,
    *,
    chunk: int = CHUNK_POSITIONS,
) -> Tensor:
    """Return each target's negative log-likelihood, float32 [L], without gradients."""
    chunks = zip(torch.split(positions, chunk), torch.split(targets, chunk), strict=True)
    values = [_nll(_logits(hidden_TH[rows], head), aims)[0] for rows, aims in chunks]
    return torch.cat(values).float() if values else hidden_TH.new_zeros(0, dtype=torch.float32)


class _WeightedNLL(torch.autograd.Function):
    """Weighted NLL whose forward pass already computes the gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        head: Head,
        chunk: int,
    ) -> Tensor:
        wide = torch.promote_types(hidden_LH.dtype, torch.float32)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_LH = torch.empty_like(hidden_LH) if for_hidden else None
        grad_VH = torch.zeros_like(weight_VH, dtype=wide) if for_weight else None
        grad_V = torch.zeros_like(bias_V, dtype=wide) if for_bias and bias_V is not None else None
        total = hidden_LH.new_zeros((), dtype=torch.float64)
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            hidden_CH = hidden_LH[rows]
            logits_CV = _logits(hidden_CH, head)
            slopes_CV = _cap_slopes(logits_CV, head)
            nll_C, probabilities_CV = _nll(logits_CV, targets[rows])
            total += (nll_C.double() * weights[rows]).sum()
            if not any(ctx.needs_input_grad):
                continue
            grad_CV = _grad_logits(probabilities_CV, targets[rows], weights[rows], slopes_CV, head)
            if grad_V is not None:
                grad_V += grad_CV.sum(dim=0)
            grad_CV = grad_CV.to(hidden_LH.dtype)
            if grad_LH is not None:
                torch.mm(grad_CV, weight_VH, out=grad_LH[rows])
            if grad_VH is not None:
                _add_product(grad_VH, grad_CV, hidden_CH)
        ctx.save_for_backward(grad_LH, grad_VH, grad_V)
        ctx.dtypes = hidden_LH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if value is None else value.mul_(grad.to(value.dtype)).to(dtype)
            for value, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None, None)


def _logits(hidden_CH: Tensor, head: Head) -> Tensor:
    """Return logits [C, V], at least float32, in memory that the caller may overwrite."""
    logits = hidden_CH @ head.weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.bias is not None:
        logits += head.bias
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _nll(logits_CV: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the targets' NLL [C] and all probabilities [C, V], these in the logits' memory."""
    logits_CV -= logits_CV.amax(dim=1, keepdim=True)
    aimed = logits_CV.gather(1, targets[:, None])[:, 0]
    sums = logits_CV.exp_().sum(dim=1)
    logits_CV /= sums[:, None]
    return sums.log() - aimed, logits_CV


def _cap_slopes(logits_CV: Tensor, head: Head) -> Tensor | None:
    """Return the derivative of the cap at each logit; None without a cap."""
    if head.softcap is None:
        return None
    return 1 - (logits_CV / head.softcap).square_()


def _grad_logits(
    probabilities_CV: Tensor,
    targets: Tensor,
    weights: Tensor,
    slopes_CV: Tensor | None,
    head: Head,
) -> Tensor:
    """Return the gradient of the head's linear output [C, V], in the probabilities' memory."""
    grad = probabilities_CV
    grad.scatter_add_(1, targets[:, None], grad.new_full((len(targets), 1), -1.0))
    grad *= weights[:, None] * head.scale
    return grad if slopes_CV is None else grad.mul_(slopes_CV)


def _add_product(grad_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """Add grad.T @ hidden to the head's gradient, which is wider where training is bfloat16."""
    if grad_VH.dtype == grad_CV.dtype:
        grad_VH.addmm_(grad_CV.T, hidden_CH)
    else:
        grad_VH += grad_CV.T @ hidden_CH
