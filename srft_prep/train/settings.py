"""The settings of training: what decides the weights (`TrainConfig`), and how a machine gets there.

`TrainConfig` is the plan of a run: it goes into the manifest, and a run directory goes on only with
the same one (unless told to `--resume` with another). `RunOptions` may change with every restart:
they move sums by rounding at most, as another number of ranks does.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from srft_prep.errors import ConfigError

Schedule = Literal["cosine", "constant"]
Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What decides the weights that come out."""

    epochs: int = 1
    """Passes over the shards."""
    max_steps: int | None = None
    """Optimiser steps, at most; the schedule ends there."""
    batch_sequences: int = 32
    """Packed sequences of an optimiser step, over all ranks."""
    learning_rate: float = 1e-5
    """The peak, > 0."""
    schedule: Schedule = "cosine"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; None for 5% of all, at least one."""
    min_learning_rate: float = 0.1
    """Where the cosine ends, as a share of the peak, in [0, 1]."""
    weight_decay: float = 0.0
    """AdamW's, on matrices only: norms and biases have none."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW's decay of the mean of their squares."""
    epsilon: float = 1e-8
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Global norm that gradients are clipped to; 0 for none."""
    precision: Precision = "bfloat16"
    """Of the forward and backward pass; weights and AdamW's state are float32."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains all weights."""
    lora_alpha: int = 32
    """Scale of the adapters: alpha / rank."""
    trim: bool = True
    """Leave out tokens that no loss sees: it changes no gradient."""
    seed: int = 0
    """Of the order of the data, of dropout, and of what is drawn anew."""

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        _require_at_least(self, epochs=1, batch_sequences=1, lora_rank=0, seed=0, max_grad_norm=0)
        _require_at_least(self, weight_decay=0, min_learning_rate=0)
        for name in ("learning_rate", "epsilon", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_option(name)}: expected > 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{_option(name)}: expected [0, 1), got {getattr(self, name)}")
        if self.min_learning_rate > 1:
            raise ConfigError(
                "--min-learning-rate: expected a share of the peak in [0, 1], got "
                f"{self.min_learning_rate}"
            )
        for name in ("max_steps", "warmup_steps"):
            if (number := getattr(self, name)) is not None and number < 0:
                raise ConfigError(f"{_option(name)}: expected at least 0, got {number}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a machine gets there: may change with every restart."""

    micro_batch_sequences: int = 1
    """Packed sequences that one rank computes at once."""
    activation_checkpointing: bool = False
    """Compute each layer's forward pass again in the backward pass, to keep only its input."""
    compile: bool = False
    """Compile the layers."""
    deterministic: bool = False
    """Let a GPU add in a fixed order only, so that a step done again gives the same bits."""
    sequence_parallel: int = 1
    """Ranks that share each sequence."""
    loss_chunk: int | None = None
    """Loss-bearing tokens that go through the output head at once; None for the default."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; 0 for one at the end only."""
    keep_checkpoints: int = 2
    """Checkpoints that stay, the newest ones, at least 1."""
    evaluate_every: int = 100
    """Steps between two evaluations of held-out trajectories; 0 for the start and the end only."""
    evaluate_trajectories: int | None = None
    """Held-out trajectories that are looked at, at most; None for all."""
    prefetch: int = 2
    """Steps that the loader is ahead, at least 1."""

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        _require_at_least(
            self, micro_batch_sequences=1, sequence_parallel=1, keep_checkpoints=1, prefetch=1
        )
        _require_at_least(self, checkpoint_every=0, evaluate_every=0)


def changes(before: dict[str, Any], config: TrainConfig) -> list[str]:
    """Return how a run's settings differ from those it was begun with: one line each."""
    names = [field.name for field in fields(config)]
    return [
        f"{name}: {before.get(name)} before, {getattr(config, name)} now"
        for name in names
        if before.get(name) != getattr(config, name)
    ]


def _require_at_least(settings: Any, **bounds: float) -> None:
    for name, least in bounds.items():
        if not getattr(settings, name) >= least:
            raise ConfigError(
                f"{_option(name)}: expected at least {least}, got {getattr(settings, name)}"
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
