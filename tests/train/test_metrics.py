"""Metrics: lines that survive restarts, counted operations, the progress line."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from srft_prep.critic.flops import ModelShape, NoShape, shape_of
from srft_prep.train.batches import Batch
from srft_prep.train.metrics import (
    METRICS,
    Recorder,
    StepMetrics,
    device_peak,
    peak_memory,
    read_metrics,
    train_flops,
)
from srft_prep.train.model import causal_lm, tiny_model
from tests.faults.disks import small_disk

CPU = torch.device("cpu")
STEP = StepMetrics(
    step=1,
    epoch=0.25,
    loss=1 / 3,
    grad_norm=0.1,
    learning_rate=1e-5,
    sum_weights=100.0,
    num_sequences=4,
    num_tokens=12_000,
    num_loss_tokens=2_000,
    num_trimmed=100,
    flops=4e12,
    seconds=2.0,
)


class Heard:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.said: list[str] = []

    def advance(self, count: int = 1, note: str = "") -> None:
        self.notes.append(note)

    def say(self, text: str) -> None:
        self.said.append(text)


def recorder(folder: Path, *, first_step: int = 0, peak: float | None = None) -> Recorder:
    heard = Heard()
    return Recorder(
        folder, first_step=first_step, num_steps=10, peak=peak, device=CPU, progress=heard
    )


def test_losses_keep_all_their_digits(tmp_path: Path) -> None:
    with recorder(tmp_path) as made:
        made.record(STEP)
    (line,) = read_metrics(tmp_path)
    assert line["loss"] == 1 / 3
    assert line["tokens_per_second"] == 6_000
    assert line["loss_tokens_per_second"] == 1_000
    assert line["mfu"] is None


def test_mfu_is_the_share_of_all_devices_peak(tmp_path: Path) -> None:
    with recorder(tmp_path, peak=8e12) as made:
        made.record(STEP)
    (line,) = read_metrics(tmp_path)
    assert line["mfu"] == 0.25


def test_a_run_that_goes_on_drops_the_lines_behind_its_checkpoint(tmp_path: Path) -> None:
    with recorder(tmp_path) as made:
        for step in (1, 2, 3):
            made.record(replace(STEP, step=step))
        made.record_held_out(3, {"nll": 1.0})
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'{"kind":"step","st')
    with recorder(tmp_path, first_step=2) as made:
        made.record(replace(STEP, step=3, loss=7.0))
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1 / 3), (2, 1 / 3), (3, 7.0)]
    assert (tmp_path / METRICS).read_bytes().endswith(b"\n")


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path: Path) -> None:
    with recorder(tmp_path) as made:
        for step in (1, 2, 3):
            made.record(replace(STEP, step=step, loss=float(step)))
    with recorder(tmp_path, first_step=2) as made:
        made.record(replace(STEP, step=3, loss=7.0))
        made.record_held_out(3, {"nll": 1.0, "nll/good": 0.5})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {event.step: event.value for event in board.Scalars("step/loss")}
    assert losses == {1: 1.0, 2: 2.0, 3: 7.0}
    assert board.Scalars("held_out/nll/good")[0].value == 0.5


def test_the_progress_line_tells_what_people_watch(tmp_path: Path) -> None:
    heard = Heard()
    with Recorder(
        tmp_path, first_step=0, num_steps=1802, peak=8e12, device=CPU, progress=heard
    ) as made:
        made.record(STEP)
        made.record(replace(STEP, step=2, seconds=4.0))
        made.record_held_out(2, {"nll/all": 2.0, "nll/unresolved/harmful": 1.5})
    assert heard.notes[0].startswith(
        "step 1/1802, loss 0.3333, 6k tok/s, 1k in the loss, MFU 25.0%, "
    )
    assert heard.notes[0].endswith(" GiB, 1 h 0 min left")
    assert heard.said == ["held-out NLL after step 2: all 2.000, unresolved/harmful 1.500"]
    assert "4k tok/s" in heard.notes[1]
    assert heard.notes[1].endswith("1 h 30 min left")


def one_document(length: int, num_loss: int) -> Batch:
    ids = torch.arange(length)
    positions = torch.arange(length - 1 - num_loss, length - 1)
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(length),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        lengths=(length,),
        positions=positions,
        targets=ids[positions + 1],
        weights=torch.ones(num_loss),
    )


def test_the_operations_of_matrices_are_those_that_torch_counts() -> None:
    model = tiny_model(640, hidden_size=32, num_layers=3)
    batch = one_document(60, 20)
    with FlopCounterMode(display=False) as counter:
        model(batch).backward()
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(count for op, count in counted.items() if "attention" not in str(op))
    shape = shape_of(causal_lm(model.model).config.to_dict())
    assert isinstance(shape, ModelShape)
    pairs = 60 * 61 // 2
    attention = 3 * 4 * shape.num_heads * shape.head_dim * pairs * shape.num_layers
    unseen = (
        2 * 32 * 640 * 20
    )  # the head's gradient adds up in place, which the counter passes over
    assert train_flops(shape, [60], 20) - attention == matrices + unseen


def test_attention_counts_by_document_and_frozen_weights_save_a_third() -> None:
    config = causal_lm(tiny_model(640).model).config.to_dict()
    shape = shape_of(config)
    packed, apart = train_flops(shape, [100], 10), train_flops(shape, [50, 50], 10)
    assert packed > apart
    assert train_flops(shape, [100], 10, frozen=True) == pytest.approx(packed * 2 / 3)
    assert train_flops(NoShape(reason="none"), [100], 10) == 0


def test_a_cpu_has_no_peak_and_much_memory() -> None:
    assert device_peak(CPU) is None
    assert peak_memory(CPU) > 2**20


def test_a_folder_without_metrics_has_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / METRICS).write_bytes(orjson.dumps({"step": 1}))
    assert read_metrics(tmp_path) == []


FILL_THE_DISK = """
import sys
from dataclasses import replace
from pathlib import Path
from tests.train.test_metrics import STEP, recorder

try:
    with recorder(Path(sys.argv[1])) as made:
        for step in range(1, 100_000):
            made.record(replace(STEP, step=step))
except OSError as error:
    print(error.strerror)
"""


def test_a_full_disk_is_one_error_and_no_traceback_of_a_thread(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 16) as disk:
        words = [sys.executable, "-c", FILL_THE_DISK, disk]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "No space left on device\n"
    assert done.stderr == ""
