"""What the loop computes: equal losses however a step is cut up, and never a wrong number."""

import math
import signal
import threading
from pathlib import Path

import pytest

from srft_prep.errors import TrainError
from srft_prep.manifest import read_manifest
from srft_prep.train.loop import Interrupt, interruptible
from srft_prep.train.metrics import read_metrics
from srft_prep.train.settings import RunOptions, TrainConfig
from srft_prep.train.training import Job, train
from tests.stages import Examples

CONFIG = TrainConfig(
    batch_sequences=4, max_steps=4, learning_rate=1e-2, precision="float32", warmup_steps=1
)


def run(shards: Path, output: Path, config: TrainConfig = CONFIG, **options: object) -> list[float]:
    job = Job(
        shards=shards, output=output, model=None, config=config, options=RunOptions(**options)
    )
    train(job)
    return [line["loss"] for line in read_metrics(output) if line["kind"] == "step"]


def test_losses_do_not_depend_on_micro_batches_chunks_and_checkpointing(
    short_shards: Path, tmp_path: Path
) -> None:
    expected = run(short_shards, tmp_path / "plain")
    assert expected[-1] < expected[0] - 0.3
    for number, options in enumerate(
        (
            {"micro_batch_sequences": 4},
            {"micro_batch_sequences": 3, "loss_chunk": 64},
            {"activation_checkpointing": True},
        )
    ):
        found = run(short_shards, tmp_path / str(number), **options)
        assert found == pytest.approx(expected, rel=1e-4), options


def test_checkpoints_and_evaluations_change_no_bit(
    short_shards: Path, examples: Examples, tmp_path: Path
) -> None:
    expected = run(short_shards, tmp_path / "plain", checkpoint_every=0)
    job = Job(
        shards=short_shards,
        output=tmp_path / "busy",
        model=None,
        config=CONFIG,
        options=RunOptions(checkpoint_every=1, evaluate_every=2),
        held_out=examples.tokens,
        labels=examples.labels,
    )
    manifest = train(job)
    lines = read_metrics(job.output)
    assert [line["loss"] for line in lines if line["kind"] == "step"] == expected
    held_out = [line for line in lines if line["kind"] == "held_out"]
    assert [line["step"] for line in held_out] == [0, 2, 4]
    assert held_out[0]["nll/all"] == pytest.approx(math.log(3840), rel=0.05)
    names = [name for name in held_out[0] if name.startswith("nll/")]
    assert {"nll/all", "nll/good", "nll/unresolved", "nll/weighted"} <= set(names)
    for name in names:
        assert held_out[-1][name] < held_out[0][name], name
    counted = manifest.counts["held_out"]
    assert counted == {"step": 4} | {name: held_out[-1][name] for name in names}
    assert manifest.data["held_out"] == {
        "tokens": read_manifest(examples.tokens).as_input(),
        "labels": read_manifest(examples.labels).as_input(),
    }
    assert manifest.data["options"]["checkpoint_every"] == 1


def test_without_trim_the_losses_are_the_same(short_shards: Path, tmp_path: Path) -> None:
    expected = run(short_shards, tmp_path / "trimmed")
    whole = TrainConfig(
        batch_sequences=4,
        max_steps=4,
        learning_rate=1e-2,
        precision="float32",
        warmup_steps=1,
        trim=False,
    )
    assert run(short_shards, tmp_path / "whole", whole) == pytest.approx(expected, rel=1e-4)


def test_a_loss_that_is_no_number_stops_the_run_before_it_spoils_the_weights(
    short_shards: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        batch_sequences=2, max_steps=8, learning_rate=1e38, precision="float32", warmup_steps=1
    )
    with pytest.raises(TrainError, match=r"step [2-8]: the loss is .* lower --learning-rate"):
        run(short_shards, tmp_path / "run", config, checkpoint_every=1)
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert all(math.isfinite(line["loss"]) for line in read_metrics(tmp_path / "run"))


def test_signals_are_noted_and_a_second_ctrl_c_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    interrupt = Interrupt()
    with interruptible(interrupt):
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_signals_stay_as_they_are() -> None:
    seen: list[object] = []

    def look() -> None:
        with interruptible(Interrupt()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
