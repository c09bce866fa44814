"""A disk that is full or cannot be written to: told in a line, nothing half-written is taken."""

import random
import shutil
from pathlib import Path

import pytest

from srft_prep.errors import ShardError
from srft_prep.manifest import MANIFEST
from srft_prep.verification import verify
from tests.faults.commands import finish, started
from tests.faults.disks import read_only, resize, small_disk
from tests.faults.runs import STAGES, STATUS, Runs, assert_same, assert_same_training

ROOM = 1 << 30


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def assert_told(said: str, words: str) -> None:
    """Look for one line with the reason, and where it is known with the file."""
    (line,) = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert words in line
    assert said.rstrip().endswith(line)
    assert "Traceback" not in said


@pytest.mark.parametrize("stage", ["ingest", "label", "pack", "export"])
def test_a_full_disk_is_told_and_with_room_the_same_command_ends_as_if_nothing_had_been(
    stage: str, runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    needed = size_of(runs.expected(stage))
    with small_disk(tmp_path / "disk", max(4096, int(rng.uniform(0.05, 0.8) * needed))) as disk:
        output = disk / "out"
        words = runs.command(stage, output, workers=1)
        with started(words, tmp_path / "log") as run:
            assert run.wait() == 2, run.said
            assert_told(run.said, "No space left on device")
        assert not (output / MANIFEST).exists()
        with pytest.raises(ShardError):
            verify(output)
        resize(disk, ROOM)
        finish(words, tmp_path / "log", status=STATUS.get(stage, 0))
        assert_same(output, runs.expected(stage))
        assert verify(output).problems == ()


@pytest.mark.parametrize("stage", ["ingest", "label", "pack"])
def test_a_limit_on_the_size_of_files_is_told_and_without_it_the_same_command_ends(
    stage: str, runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    output = tmp_path / "out"
    largest = max(path.stat().st_size for path in runs.expected(stage).iterdir())
    limit = int(rng.uniform(0.1, 0.9) * largest)
    words = runs.command(stage, output)
    with started(words, tmp_path / "log", most_file_bytes=limit) as run:
        assert run.wait() == 2, run.said
        assert_told(run.said, "File too large")
    assert not (output / MANIFEST).exists()
    finish(words, tmp_path / "log", status=STATUS.get(stage, 0))
    assert_same(output, runs.expected(stage))


def test_a_worker_that_finds_the_disk_full_ends_the_run_in_words(
    runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    needed = size_of(runs.expected("tokenize"))
    with small_disk(tmp_path / "disk", int(rng.uniform(0.1, 0.8) * needed)) as disk:
        words = runs.command("tokenize", disk / "out", workers=2)
        with started(words, tmp_path / "log") as run:
            assert run.wait() == 2, run.said
            assert_told(run.said, "No space left on device")
        resize(disk, ROOM)
        finish(runs.command("tokenize", disk / "out", workers=1), tmp_path / "log")
        assert_same(disk / "out", runs.expected("tokenize"))


def test_training_on_a_full_disk_fails_and_goes_on_with_room_to_the_same_weights(
    runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    needed = size_of(runs.expected("train"))
    with small_disk(tmp_path / "disk", int(rng.uniform(0.1, 0.8) * needed)) as disk:
        words = runs.command("train", disk / "out")
        with started(words, tmp_path / "log") as run:
            assert run.wait() == 2, run.said
            assert run.said.splitlines()[-1].startswith("Error: "), run.said
        assert not (disk / "out" / MANIFEST).exists()
        resize(disk, ROOM)
        finish(words, tmp_path / "log")
        assert_same_training(disk / "out", runs.expected("train"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_cannot_be_written_to_is_told_and_what_is_finished_there_stays_of_use(
    stage: str, runs: Runs, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    words = runs.command(stage, disk / "out", workers=1)
    disk.mkdir()
    with read_only(disk), started(words, tmp_path / "log") as run:
        assert run.wait() == 2, run.said
        assert_told(run.said, "Read-only file system")
    assert list(disk.iterdir()) == []
    shutil.copytree(runs.expected(stage), disk / "out")
    with read_only(disk):
        finish(("verify", disk / "out"), tmp_path / "log")
        finish(words, tmp_path / "log", status=STATUS.get(stage, 0))
    assert_same(disk / "out", runs.expected(stage))
