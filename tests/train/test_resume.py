"""A killed run goes on to the losses of one that was never interrupted, bit for bit."""

import random
import shutil
import signal
from pathlib import Path

import orjson
import pytest

from srft_prep.train.metrics import read_metrics
from tests.gates import MANIFEST
from tests.tiny_models import EXAMPLE_TOKENIZER, make_tiny_model
from tests.train.runs import finish, losses_of, started

STEPS = 12
SETTINGS = ("--tiny", "--max-steps", STEPS, "--batch-sequences", 2, "--checkpoint-every", 3)


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def expected(ranks: int, short_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted."""
    output = tmp_path_factory.mktemp("expected") / f"run{ranks}"
    finish(output, ("train", short_shards, *SETTINGS), ranks=ranks)
    assert list(losses_of(output)) == list(range(1, STEPS + 1))
    return output


def weights_of(output: Path) -> bytes:
    return (output / "model" / "model.safetensors").read_bytes()


def test_kill_9_at_any_step_changes_no_bit_of_losses_and_weights(
    ranks: int, expected: Path, short_shards: Path, tmp_path: Path
) -> None:
    output, words = tmp_path / "run", ("train", short_shards, *SETTINGS)
    rng = random.Random(ranks)
    for step in sorted(rng.sample(range(1, STEPS), 3)):
        with started(output, words, ranks=ranks, holds=MANIFEST) as run:
            run.wait_until(run.has_done(step))
            assert run.ranks[0].is_alive(), run.said
            run.send(signal.SIGKILL)
            run.wait()
    finish(output, words, ranks=ranks)
    assert losses_of(output) == losses_of(expected)
    assert weights_of(output) == weights_of(expected)
    manifest = orjson.loads((output / "manifest.json").read_bytes())
    assert manifest["counts"] == orjson.loads((expected / "manifest.json").read_bytes())["counts"]


def test_kill_9_of_one_rank_ends_the_others_too(short_shards: Path, tmp_path: Path) -> None:
    output, words = tmp_path / "run", ("train", short_shards, *SETTINGS)
    with started(output, words, ranks=2, pauses_after=2) as run:
        run.wait_until_held()
        run.ranks[1].kill()
        run.let_go()
        statuses = run.wait()
        assert None not in statuses
        assert 0 not in statuses


def run_log(output: Path) -> str:
    return (output.parent / f"{output.name}.rank0.log").read_text()


def test_a_checkpoint_cut_short_is_said_and_the_one_before_it_used(
    ranks: int, expected: Path, short_shards: Path, tmp_path: Path
) -> None:
    output, words = tmp_path / "run", ("train", short_shards, *SETTINGS)
    with started(output, words, ranks=ranks, holds=checkpoint(output, STEPS).name) as run:
        run.wait_until(lambda: checkpoint(output, 9).exists())
        run.send(signal.SIGKILL)
    newest = max((output / "checkpoints").glob("step-*"))
    assert newest == checkpoint(output, 9), run.said
    largest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    finish(output, words, ranks=ranks)
    assert f"{largest.name} is cut short" in run_log(output)
    assert newest.with_name(f"{newest.name}.damaged").is_dir()
    assert losses_of(output) == losses_of(expected)


def checkpoint(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:08d}"


def test_another_number_of_ranks_goes_on_with_equal_losses(
    short_shards: Path, expected: Path, ranks: int, tmp_path: Path
) -> None:
    output, words = tmp_path / "run", ("train", short_shards, *SETTINGS)
    with started(output, words, ranks=3 - ranks, holds=MANIFEST) as run:
        run.wait_until(lambda: checkpoint(output, 6).exists())
        run.send(signal.SIGKILL)
    assert checkpoint(output, 6).is_dir(), run.said
    finish(output, words, ranks=ranks)
    found, wanted = losses_of(output), losses_of(expected)
    assert found.keys() == wanted.keys()
    for step in wanted:
        assert found[step] == pytest.approx(wanted[step], rel=2e-4), step


def test_a_signal_ends_the_step_and_writes_a_checkpoint(
    ranks: int, expected: Path, short_shards: Path, tmp_path: Path
) -> None:
    settings = (*SETTINGS[:-1], 0)  # no checkpoint but the last
    output, words = tmp_path / "run", ("train", short_shards, *settings)
    with started(output, words, ranks=ranks, pauses_after=4) as run:
        run.wait_until_held()
        run.send(signal.SIGTERM)
        run.let_go()
        statuses = run.wait()
        assert statuses[0] == 130, run.said
        assert "interrupted; the same command continues" in run.said
        assert "Traceback" not in run.said
    steps = [line["step"] for line in read_metrics(output)]
    assert 4 <= steps[-1] < STEPS
    assert checkpoint(output, steps[-1]).is_dir()
    finish(output, words, ranks=ranks)
    assert f"goes on after step {steps[-1]}" in run_log(output)
    assert losses_of(output) == losses_of(expected)


def test_of_two_runs_into_one_directory_the_second_is_refused(
    short_shards: Path, tmp_path: Path
) -> None:
    output, words = tmp_path / "run", ("train", short_shards, *SETTINGS)
    with started(output, words, holds=MANIFEST) as first:
        first.wait_until(first.has_done(1))
        first.send(signal.SIGSTOP)
        with started(output, words) as second:
            assert second.wait() == [2]
        assert "another srft-prep run is writing here" in second.said
        first.send(signal.SIGCONT)
        first.let_go()
        assert first.wait() == [0], first.said


def test_a_run_killed_before_its_export_only_exports(
    ranks: int, expected: Path, short_shards: Path, tmp_path: Path
) -> None:
    output, words = tmp_path / "run", ("train", short_shards, *SETTINGS)
    with started(output, words, ranks=ranks, holds=MANIFEST) as run:
        run.wait_until(lambda: checkpoint(output, STEPS).exists())
        run.send(signal.SIGKILL)
    shutil.rmtree(output / "model", ignore_errors=True)
    finish(output, words, ranks=ranks)
    assert weights_of(output) == weights_of(expected)


def test_what_the_first_rank_alone_finds_wrong_ends_all_ranks_with_one_message(
    short_shards: Path, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "model", tokenizer=EXAMPLE_TOKENIZER)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with started(tmp_path / "run", ("train", short_shards, "--model", model), ranks=2) as run:
        assert run.wait() == [2, 2], run.said
        assert run.said.count("expected a causal language model") == 1
    assert not (tmp_path / "run").exists()
