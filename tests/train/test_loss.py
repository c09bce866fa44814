"""The weighted loss equals its formula, and never holds what it need not."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srft_prep.train.loss import Head, token_nll, weighted_nll

TOKENS, HIDDEN, VOCABULARY = 40, 16, 101
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 3.0},
    "all": {"bias": True, "scale": 0.25, "softcap": 3.0},
}


def inputs(
    *, dtype: torch.dtype = torch.float64, bias: bool = False, **settings: float
) -> tuple[Tensor, Head, tuple[Tensor, Tensor, Tensor]]:
    """Return hidden states, a head, and the (positions, targets, weights) of 11 tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    positions = torch.randperm(TOKENS, generator=generator)[:11].sort().values
    targets = torch.randint(VOCABULARY, (11,), generator=generator)
    weights = torch.rand(11, generator=generator) + 0.1
    head = Head(
        weight=draw(VOCABULARY, HIDDEN).requires_grad_(),
        bias=draw(VOCABULARY).requires_grad_() if bias else None,
        **settings,
    )
    return draw(TOKENS, HIDDEN).requires_grad_(), head, (positions, targets, weights)


def formula(hidden: Tensor, head: Head, positions: Tensor, targets: Tensor) -> Tensor:
    """Return each target's NLL, from all logits."""
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return -logits.log_softmax(dim=-1)[positions, targets]


def leaves(hidden: Tensor, head: Head) -> list[Tensor]:
    return [hidden, head.weight, *([] if head.bias is None else [head.bias])]


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("name", list(HEADS))
def test_loss_and_gradients_are_the_formulas_for_any_chunk(name: str, chunk: int) -> None:
    hidden, head, (positions, targets, weights) = inputs(**HEADS[name])
    expected = (formula(hidden, head, positions, targets) * weights).sum()
    loss = weighted_nll(hidden, head, positions, targets, weights, chunk=chunk)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    # a factor other than one, as the division by the sum of weights is
    found = torch.autograd.grad(loss / 7, leaves(hidden, head))
    wanted = torch.autograd.grad(expected / 7, leaves(hidden, head))
    for grad, value in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, value, rtol=1e-10, atol=1e-13)
    nll = token_nll(hidden, head, positions, targets, chunk=chunk)
    torch.testing.assert_close(nll, formula(hidden, head, positions, targets).float())


def test_without_loss_bearing_tokens_the_loss_is_a_zero_with_gradients_of_zero() -> None:
    hidden, head, _ = inputs(bias=True)
    nothing = torch.empty(0, dtype=torch.int64)
    loss = weighted_nll(hidden, head, nothing, nothing, torch.empty(0))
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, leaves(hidden, head)):
        assert torch.equal(grad, torch.zeros_like(grad))
    assert token_nll(hidden, head, nothing, nothing).shape == (0,)


def test_a_frozen_head_leaves_the_hidden_states_gradient_as_it_was() -> None:
    hidden, head, rest = inputs()
    expected = torch.autograd.grad(weighted_nll(hidden, head, *rest), hidden)[0]
    frozen = Head(weight=head.weight.detach())
    found = torch.autograd.grad(weighted_nll(hidden, frozen, *rest), hidden)[0]
    assert torch.equal(found, expected)


def test_logits_far_apart_give_a_finite_loss_and_gradients() -> None:
    hidden, head, rest = inputs(dtype=torch.float32)
    loss = weighted_nll(hidden * 1e4, head, *rest)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, leaves(hidden, head)))


def test_in_bfloat16_the_softmax_and_the_heads_gradient_are_as_in_float32() -> None:
    """Only what a bfloat16 product rounds may differ: a gradient summed in bfloat16 would not."""
    hidden, head, (positions, targets, weights) = inputs(dtype=torch.bfloat16)
    wide = Head(weight=head.weight.detach().float().requires_grad_())
    states = hidden.detach().float().requires_grad_()
    loss = weighted_nll(hidden, head, positions, targets, weights, chunk=1)
    expected = weighted_nll(states, wide, positions, targets, weights, chunk=1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    found = torch.autograd.grad(loss, [hidden, head.weight])
    wanted = torch.autograd.grad(expected, [states, wide.weight])
    for grad, value in zip(found, wanted, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.float() - value).norm() < 1e-2 * value.norm()


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in (made,) if isinstance(value, Tensor)]
        self.size = max(self.size, *sizes, 0)
        return made


def test_no_more_than_a_chunk_of_logits_is_ever_made() -> None:
    """Beside gradients, which have the size of what they are for."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 2, generator=generator, requires_grad=True)
    head = Head(weight=torch.randn(500, 2, generator=generator, requires_grad=True))
    positions, targets = torch.arange(200), torch.randint(500, (200,), generator=generator)
    with LargestTensor() as largest:
        weighted_nll(hidden, head, positions, targets, torch.ones(200), chunk=5).backward()
        token_nll(hidden, head, positions, targets, chunk=5)
    assert largest.size == 5 * 500


def test_a_second_backward_pass_through_the_same_loss_is_an_error() -> None:
    """Its gradients are used up by the first: they must not come out scaled twice."""
    hidden, head, rest = inputs()
    loss = weighted_nll(hidden, head, *rest)
    (loss / 3).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss / 3).backward()
