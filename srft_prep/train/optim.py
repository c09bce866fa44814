"""AdamW, its learning rate as a pure function of the step, and clipping by the global norm.

Nothing here has a state of its own but AdamW: a run that goes on at step s computes the same
learning rate and the same update as one that was never interrupted.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from srft_prep.errors import ConfigError
from srft_prep.train.settings import TrainConfig

WARMUP_SHARE = 0.05
"""Of all steps, where no number is given."""


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Return AdamW over the trainable parameters, fused; vectors are not decayed.

    Raises:
        ConfigError: nothing is trainable.
    """
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    if not trainable:
        raise ConfigError("the model has no trainable parameter")
    matrices = [weight for weight in trainable if weight.ndim >= 2]
    vectors = [weight for weight in trainable if weight.ndim < 2]
    groups: list[dict[str, Any]] = []
    if matrices:
        groups.append({"params": matrices})
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step: int, *, num_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of a step, counted from 0.

    A linear rise over the warm-up's steps, the first of them above 0, the last at the peak; then
    constant, or half a cosine that reaches `min_learning_rate` x peak at the last step.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = max(1, round(WARMUP_SHARE * num_steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup + 1) / max(num_steps - warmup, 1)
    share = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    floor = config.min_learning_rate
    return config.learning_rate * (floor + (1 - floor) * share)


def set_learning_rate(optimizer: AdamW, rate: float) -> None:
    """Let the next update use a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to a global norm, that of all ranks' shards together; return the norm.

    Squares are summed in float64: in float32 the norm of five million values is off by 1e-4, and
    by something else on every number of ranks.

    Args:
        parameters: sharded ones and whole ones may be mixed; those without a gradient are passed
            over.
        max_norm: the largest norm that stays as it is; 0 leaves all as they are.
    """
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    if not gradients:
        return 0.0
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    shards = [gradient.to_local() for gradient in sharded]
    squares = _sum_of_squares(shards)
    if sharded:
        dist.all_reduce(squares, group=sharded[0].device_mesh.get_group())
    norm = (squares + _sum_of_squares(whole)).sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        torch._foreach_mul_([*shards, *whole], scale)
    return float(norm)


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return a float64 scalar, on the tensors' device if there are any."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()
