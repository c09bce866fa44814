"""AdamW's groups, the learning rate as a function of the step, clipping."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from srft_prep.errors import ConfigError
from srft_prep.train.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from srft_prep.train.settings import TrainConfig

PEAK = 3e-4


@given(
    num_steps=st.integers(1, 200),
    warmup=st.none() | st.integers(0, 50),
    floor=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "constant"]),
)
def test_the_learning_rate_rises_to_its_peak_and_never_leaves_its_bounds(
    num_steps: int, warmup: int | None, floor: float, schedule: str
) -> None:
    config = TrainConfig(
        learning_rate=PEAK, warmup_steps=warmup, min_learning_rate=floor, schedule=schedule
    )
    rates = [learning_rate(step, num_steps=num_steps, config=config) for step in range(num_steps)]
    warm = max(1, round(0.05 * num_steps)) if warmup is None else warmup
    rising, rest = rates[:warm], rates[warm:]
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in rising)
    assert rising == sorted(rising)
    if 0 < warm <= num_steps:
        assert rates[warm - 1] == pytest.approx(PEAK)
    assert rest == sorted(rest, reverse=True)
    assert all(rate >= floor * PEAK * (1 - 1e-12) for rate in rest)
    if rest:
        end = PEAK if schedule == "constant" else floor * PEAK
        assert rest[-1] == pytest.approx(end)


def test_half_way_down_the_cosine_is_the_mean_of_peak_and_floor() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=0, min_learning_rate=0.2)
    assert learning_rate(4, num_steps=10, config=config) == pytest.approx(0.6)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    config = TrainConfig(weight_decay=0.5, learning_rate=0.1)
    optimizer = make_optimizer(model, config)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        expected = before[name] * (0.95 if weight.ndim >= 2 else 1.0)
        torch.testing.assert_close(weight.detach(), expected)


def test_a_step_is_adamw_by_the_book() -> None:
    model = nn.Linear(3, 2, bias=False)
    config = TrainConfig(learning_rate=1.0, weight_decay=0.1, beta1=0.8, beta2=0.9, epsilon=1e-6)
    optimizer = make_optimizer(model, config)
    weight = model.weight.detach().clone().double()
    mean = square = torch.zeros_like(weight)
    for step in range(1, 4):
        gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        model.weight.grad = gradient.clone()
        rate = 0.01 * step
        set_learning_rate(optimizer, rate)
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient.double()
        square = 0.9 * square + 0.1 * gradient.double() ** 2
        step_size = mean / (1 - 0.8**step) / ((square / (1 - 0.9**step)).sqrt() + 1e-6)
        weight = weight * (1 - rate * 0.1) - rate * step_size
    torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        make_optimizer(model, TrainConfig())


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_clipping_scales_all_gradients_by_the_global_norm(max_norm: float) -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    frozen = nn.Parameter(torch.ones(3))  # has no gradient
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape)
    before = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    norm = clip_gradients([*model.parameters(), frozen], max_norm)
    assert norm == pytest.approx(math.sqrt(sum(float((g.double() ** 2).sum()) for g in before)))
    scale = min(1.0, max_norm / norm) if max_norm else 1.0
    for weight, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(weight.grad, gradient * scale, rtol=1e-4, atol=1e-6)


def test_without_gradients_the_norm_is_zero() -> None:
    assert clip_gradients(nn.Linear(2, 2).parameters(), 1.0) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "--learning-rate: expected > 0, got 0.0"),
        ({"learning_rate": math.nan}, "--learning-rate: expected > 0, got nan"),
        ({"epochs": 0}, "--epochs: expected at least 1, got 0"),
        ({"beta2": 1.0}, r"--beta2: expected \[0, 1\), got 1.0"),
        ({"min_learning_rate": 1.5}, "--min-learning-rate: expected a share of the peak"),
        ({"max_steps": -1}, "--max-steps: expected at least 0, got -1"),
    ],
)
def test_settings_that_cannot_train_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)
