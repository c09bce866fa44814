"""What people watch: a progress line, `metrics.jsonl`, TensorBoard.

`metrics.jsonl` has a line an optimiser step (`kind: step`) and one an evaluation (`held_out`).
Numbers are those of all ranks together, but for memory, which is the first rank's. A run that goes
on from a checkpoint first drops the lines behind it, so that each step stands there once; losses
keep all their digits.

MFU counts the operations that the model needs (`critic.flops`): a forward pass and twice that for
the backward pass (once, where the weights are frozen), attention by the documents' own lengths,
the output head on loss-bearing tokens only. What activation checkpointing computes again is no part
of it.
"""

import os
import resource
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import orjson
import torch

from srft_prep.critic.flops import ModelShape, NoShape, mfu
from srft_prep.critic.hardware import peak_flops
from srft_prep.progress import Progress
from srft_prep.storage import atomic_path

METRICS: Final = "metrics.jsonl"
TENSORBOARD: Final = "tensorboard"
SMOOTHED_STEPS: Final = 20
"""The progress line's rates are those of the last steps, this many at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimiser step, over all ranks."""

    step: int
    """Steps done, this one included."""
    epoch: float
    """Passes over the data done, this step included."""
    loss: float
    """sum(w * nll) / sum(w)."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    sum_weights: float
    """The loss's denominator."""
    num_sequences: int
    """Packed sequences in it."""
    num_tokens: int
    """Tokens computed."""
    num_loss_tokens: int
    """Tokens with weight > 0 among them."""
    num_trimmed: int
    """Tokens that were read and not computed, since no loss sees them."""
    flops: float
    """Operations that the model needed for it; 0 where they are not known."""
    seconds: float
    """Wall time, the wait for data included; evaluations and checkpoints are not."""


class Recorder:
    """Writes and shows the metrics of a run; only the first rank has one. A context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        num_steps: int,
        peak: float | None,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Go on with the metrics of a run after `first_step` steps.

        Args:
            folder: the run's directory.
            first_step: steps that the checkpoint had done.
            num_steps: steps of the whole run.
            peak: floating-point operations a second of all devices together; None: not known.
            device: this rank's.
            progress: what shows the line.
        """
        self.num_steps, self.peak = num_steps, peak
        self.device, self.progress = device, progress
        self._recent: deque[StepMetrics] = deque(maxlen=SMOOTHED_STEPS)
        _drop_behind(folder / METRICS, first_step)
        self._lines = (folder / METRICS).open("ab")
        self._board = _open_board(folder / TENSORBOARD, first_step, progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        try:
            self._lines.close()
        finally:
            if self._board is not None:
                self._board.close()

    def record(self, metrics: StepMetrics) -> None:
        """Write and show one step."""
        self._recent.append(metrics)
        rates = self._rates([metrics])
        self._write("step", asdict(metrics) | rates, metrics.step)
        self.progress.advance(1, self._note(metrics))

    def record_held_out(self, step: int, values: Mapping[str, float]) -> None:
        """Write and show one evaluation after `step` steps."""
        self._write("held_out", {"step": step, **values}, step)
        words = (
            f"{name.removeprefix('nll/')} {value:.3f}"
            for name, value in values.items()
            if name.startswith("nll/")
        )
        self.progress.say(f"held-out NLL after step {step}: {', '.join(words)}")

    def _write(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        self._lines.write(orjson.dumps({"kind": kind, **values}) + b"\n")
        self._lines.flush()
        if self._board is not None:
            self._board.write(
                {
                    f"{kind}/{name}": float(value)
                    for name, value in values.items()
                    if value is not None and name != "step"
                },
                step,
            )

    def _rates(self, steps: Iterable[StepMetrics]) -> dict[str, float | int | None]:
        """Return rates over some steps, and the most memory that this rank has had."""
        steps = list(steps)
        seconds = sum(step.seconds for step in steps)
        flops = sum(step.flops for step in steps)
        return {
            "tokens_per_second": sum(step.num_tokens for step in steps) / seconds,
            "loss_tokens_per_second": sum(step.num_loss_tokens for step in steps) / seconds,
            "mfu": mfu(flops, seconds, self.peak) if self.peak and flops else None,
            "peak_memory_bytes": peak_memory(self.device),
        }

    def _note(self, metrics: StepMetrics) -> str:
        rates = self._rates(self._recent)
        words = [
            f"step {metrics.step}/{self.num_steps}",
            f"loss {metrics.loss:.4f}",
            f"{_short(rates['tokens_per_second'])} tok/s",
            f"{_short(rates['loss_tokens_per_second'])} in the loss",
        ]
        if rates["mfu"] is not None:
            words.append(f"MFU {rates['mfu']:.1%}")
        words.append(f"{(rates['peak_memory_bytes'] or 0) / 2**30:.1f} GiB")
        if left := self.num_steps - metrics.step:
            seconds = sum(step.seconds for step in self._recent) / len(self._recent)
            words.append(f"{_duration(left * seconds)} left")
        return ", ".join(words)


def train_flops(
    shape: ModelShape | NoShape,
    lengths: Iterable[int],
    num_loss_tokens: int,
    *,
    frozen: bool = False,
) -> float:
    """Return the operations of a forward and backward pass over documents; 0 for no shape.

    Args:
        shape: the model.
        lengths: of the documents, in tokens.
        num_loss_tokens: positions that go through the output head.
        frozen: whether the model's own weights get no gradient (LoRA).
    """
    if isinstance(shape, NoShape):
        return 0.0
    trunk = sum(shape.flops(prompt_tokens=length) for length in lengths)
    head = 2 * shape.hidden_size * shape.vocab_size * num_loss_tokens
    return float((2 if frozen else 3) * (trunk + head))


def device_peak(device: torch.device) -> float | None:
    """Return a device's dense bf16 operations a second; None where they are not known."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has had on a device; on a CPU, of all memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`; a torn last line is left out."""
    path = folder / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [orjson.loads(line) for line in lines if line.endswith(b"\n")]


def _drop_behind(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again, and all of a run that begins."""
    kept = [line for line in read_metrics(path.parent) if step and line["step"] <= step]
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.writelines(orjson.dumps(line) + b"\n" for line in kept)


class _Board:
    """TensorBoard's file of a run's values.

    TensorBoard's own writer has a thread, which prints a traceback of its own where the disk is
    full; here whoever writes gets the error.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Begin a file; values of earlier ones behind `first_step` are shown no more."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        # files are read in the order of their names
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._add(step=first_step + 1, file_version="brain.Event:2")
        self._add(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of a step; they are out of this process when this returns."""
        shown = [self._summary.Value(tag=name, simple_value=values[name]) for name in values]
        self._add(step=step, summary=self._summary(value=shown))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, **values: Any) -> None:
        event = self._event(wall_time=time.time(), **values)
        self._records.write(event.SerializeToString())


def _open_board(folder: Path, first_step: int, progress: Progress) -> _Board | None:
    """Return TensorBoard's file, or None where it is not installed, which is said."""
    try:
        return _Board(folder, first_step=first_step)
    except ImportError:
        progress.say("no TensorBoard logs: pip install 'srft-prep[train]'")
        return None


def _duration(seconds: float) -> str:
    """Return a time in the two largest of its units: 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _short(number: float | int | None) -> str:
    number = number or 0
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
