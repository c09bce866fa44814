"""The loop over optimiser steps: exact whatever the split, and the same after every restart.

    a step's packed sequences (loader) -> forward and backward, micro-batch by micro-batch
        -> clip -> AdamW -> metrics -> now and then an evaluation and a checkpoint

The loss is sum(w * nll) / sum(w) over everything in the step. The loader knows the denominator in
advance, so each micro-batch's backward pass is divided by it, and ranks add their gradients up.

All that a step depends on is the state after the step before it (weights, AdamW's moments) and its
number (data, learning rate, seed of dropout). So a run that was killed goes on to compute, bit for
bit, what it would have computed.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Final

import torch
import torch.distributed as dist
from torch.optim import AdamW

from srft_prep.critic.flops import ModelShape, NoShape
from srft_prep.errors import TrainError
from srft_prep.train.checkpoints import Checkpoints
from srft_prep.train.loader import Loader, StepBatches
from srft_prep.train.metrics import Recorder, StepMetrics, train_flops
from srft_prep.train.model import WeightedModel
from srft_prep.train.optim import clip_gradients, learning_rate, set_learning_rate
from srft_prep.train.parallel import World
from srft_prep.train.settings import RunOptions, TrainConfig

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass(kw_only=True, slots=True)
class Interrupt:
    """Whether this process was asked to stop: by Ctrl-C, or by a cluster that wants its node."""

    asked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """A model with all that takes it a step further."""

    model: WeightedModel
    optimizer: AdamW
    config: TrainConfig
    world: World
    num_steps: int
    """Of the whole run: the schedule's length."""
    shape: ModelShape | NoShape
    """For counting operations."""
    interrupt: Interrupt = field(default_factory=Interrupt)

    def step(self, batches: StepBatches) -> tuple[StepMetrics, bool]:
        """Do one optimiser step; return its metrics, `seconds` 0, and whether a rank should stop.

        Raises:
            TrainError: the loss or the gradient is no number; nothing was updated.
        """
        config, device = self.config, self.world.device
        torch.manual_seed(_seed(config.seed, batches.step, self.world.rank))
        total, flops = torch.zeros((), dtype=torch.float64, device=device), 0.0
        for batch in batches.micro_batches:
            loss = self.model(batch.to(device, non_blocking=True))
            (loss / batches.sum_weights).backward()
            total += loss.detach()
            flops += train_flops(
                self.shape, batch.lengths, batch.num_loss_tokens, frozen=config.lora_rank > 0
            )
        flops /= self.world.sequence_parallel
        loss_sum, flops, asked = _sums(total.item(), flops, self.interrupt.asked, world=self.world)
        norm = clip_gradients(self.model.parameters(), config.max_grad_norm)
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            raise TrainError(
                f"step {batches.step + 1}: the loss is {loss_sum / batches.sum_weights} and the "
                f"gradient's norm {norm}: expected numbers; look at the steps before in "
                "metrics.jsonl, lower --learning-rate, and go on with --resume"
            )
        rate = learning_rate(batches.step, num_steps=self.num_steps, config=config)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        metrics = StepMetrics(
            step=batches.step + 1,
            epoch=batches.epoch,
            loss=loss_sum / batches.sum_weights,
            grad_norm=norm,
            learning_rate=rate,
            sum_weights=batches.sum_weights,
            num_sequences=batches.num_sequences,
            num_tokens=batches.num_tokens,
            num_loss_tokens=batches.num_loss_tokens,
            num_trimmed=batches.num_trimmed,
            flops=flops,
            seconds=0.0,
        )
        return metrics, asked > 0


def run_steps(
    trainer: Trainer,
    loader: Loader,
    checkpoints: Checkpoints,
    options: RunOptions,
    *,
    recorder: Recorder | None,
    evaluate: Callable[[], Mapping[str, float]] | None,
) -> bool:
    """Do the loader's steps; return whether the run came to its end, or was asked to stop.

    The last step, and one after which the run stops, has a checkpoint. All ranks call it together.

    Args:
        trainer: what takes steps.
        loader: the steps that are left.
        checkpoints: where the state goes.
        options: how often.
        recorder: what shows and writes metrics; of the first rank only.
        evaluate: what looks at held-out trajectories; None for nothing.
    """
    first, last = loader.first_step, trainer.num_steps
    if evaluate and first == 0:
        _evaluate(evaluate, recorder, 0)
    started = time.perf_counter()
    for batches in loader:
        metrics, stop = trainer.step(batches)
        if recorder:
            recorder.record(replace(metrics, seconds=time.perf_counter() - started))
        done = metrics.step
        if evaluate and _is_due(done, options.evaluate_every, last):
            _evaluate(evaluate, recorder, done)
        if stop or _is_due(done, options.checkpoint_every, last):
            checkpoints.save(done, trainer.model, trainer.optimizer)
        if stop and done < last:
            return False
        started = time.perf_counter()
    return True


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _evaluate(
    evaluate: Callable[[], Mapping[str, float]], recorder: Recorder | None, step: int
) -> None:
    values = evaluate()
    if recorder:
        recorder.record_held_out(step, values)


def _sums(*values: float, world: World) -> list[float]:
    """Return each value's sum over all ranks, in float64."""
    sums = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(sums)
    return [float(value) for value in sums.tolist()]


def _seed(seed: int, step: int, rank: int) -> int:
    """Return a seed of what is random in a step: nothing of it needs to be in a checkpoint."""
    return hash((seed, step, rank)) & (2**63 - 1)


@contextmanager
def interruptible(interrupt: Interrupt) -> Iterator[None]:
    """Note Ctrl-C and SIGTERM, for the step under way to end; a second Ctrl-C ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupt.asked = True

    before = [signal.signal(number, note) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
