"""Files that were cut short or lost a bit: found, named, and never read as good data."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from srft_prep.errors import ShardError
from srft_prep.manifest import MANIFEST, read_manifest
from srft_prep.verification import verify
from tests.faults.commands import finish, kill_when, started
from tests.faults.runs import STAGES, STATUS, Runs, assert_same, ledger_keys, more_progress
from tests.stages import Run, srft_prep
from tests.train.small_shards import write_shards

FLIPS = 6
"""Of every stage's files in turn, and of each at least one."""


def damage(path: Path, rng: random.Random) -> None:
    """Cut a file, flip a bit of it, or put zeros over a page, as disks do."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    kind = rng.randrange(3)
    if kind == 0:
        del data[place:]
    elif kind == 1:
        data[place] ^= 1 << rng.randrange(8)
    else:
        end = min(len(data), place + 4096)
        zeros = bytes(end - place)
        data[place:end] = zeros if data[place:end] != zeros else b"\xff" * len(zeros)
    path.write_bytes(data)


@pytest.mark.parametrize("stage", [*STAGES, "merge", "train"])
def test_damage_anywhere_is_found_and_named(
    stage: str, runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    folder = shutil.copytree(runs.expected(stage), tmp_path / "out")
    files = [folder / each["name"] for each in read_manifest(folder).data["files"]]
    files = [path for path in files if path.stat().st_size]
    for number in range(max(FLIPS, len(files))):
        path = files[number % len(files)]
        whole = path.read_bytes()
        damage(path, rng)
        problems = verify(folder).problems
        assert any(problem.startswith(f"{path}: ") for problem in problems), problems
        path.write_bytes(whole)
    assert verify(folder).problems == ()


@pytest.mark.parametrize("stage", STAGES)
def test_every_file_of_a_stage_stands_in_its_manifest(stage: str, runs: Runs) -> None:
    folder = runs.expected(stage)
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    assert there == {each["name"] for each in read_manifest(folder).data["files"]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_manifest_is_never_believed(
    stage: str, runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    folder = shutil.copytree(runs.expected(stage), tmp_path / "out")
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    for _ in range(FLIPS):
        manifest.write_bytes(whole[: rng.randrange(len(whole) - 1)])
        with pytest.raises(ShardError, match=r"damaged"):
            read_manifest(folder)


def read_by(stage: str, runs: Runs, folder: Path, output: Path) -> Run:
    """Run the stage that reads a stage's output, from a copy of it."""
    words = {
        "ingest": ("tokenize", folder, "--tokenizer", "example"),
        "label": ("pack", runs.expected("tokenize"), "--labels", folder),
        "tokenize": ("pack", folder, "--labels", runs.expected("label")),
        "pack": ("export", folder, "--to", "megatron"),
    }[stage]
    return srft_prep(*words, "-o", output)


@pytest.mark.parametrize("stage", ["ingest", "label", "tokenize", "pack"])
def test_the_next_stage_refuses_what_was_damaged(
    stage: str, runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    folder = shutil.copytree(runs.expected(stage), tmp_path / "in")
    files = [path for path in folder.iterdir() if not path.name.startswith(("manifest", "ledger"))]
    for path in files:
        whole = path.read_bytes()
        if not whole:
            continue
        damage(path, rng)
        run = read_by(stage, runs, folder, tmp_path / "out")
        assert run.status == 2, path
        assert run.stderr.startswith(f"Error: {path}: changed since it was written")
        assert not (tmp_path / "out").exists()
        path.write_bytes(whole)


def test_training_refuses_damaged_shards_and_lists_of_what_is_held_out(
    tmp_path: Path, rng: random.Random
) -> None:
    shards = write_shards(tmp_path, hold_out=0.2).path
    for path in (shards / "shard-00000.parquet", shards / "held_out.jsonl"):
        whole = path.read_bytes()
        damage(path, rng)
        words = ("train", shards, "--tiny", "--max-steps", 1, "-o", tmp_path / "out")
        with started(words, tmp_path / "log") as run:
            assert run.wait() == 2, path
            assert str(path) in run.said
        assert not (tmp_path / "out").exists()
        path.write_bytes(whole)


@pytest.mark.parametrize("stage", ["ingest", "tokenize", "export"])
def test_a_part_of_an_unfinished_run_that_was_damaged_is_made_again(
    stage: str, runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    words = runs.command(stage, output)
    kill_when(words, log, more_progress(output))
    part = min(output.glob("part-*.parquet"))
    damage(part, rng)
    finish(words, log, status=STATUS.get(stage, 0))
    assert_same(output, runs.expected(stage))


def test_damaged_lines_of_a_ledger_are_counted_and_asked_again(
    runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    folder = shutil.copytree(runs.expected("label"), tmp_path / "out")
    (ledger,) = folder.glob("ledger-*.jsonl")
    data = bytearray(ledger.read_bytes())
    for _ in range(5):  # a byte that can stand in no JSON text
        data[rng.randrange(len(data) - 1)] = 0xFF
    ledger.write_bytes(data)
    with started(runs.command("label", folder), tmp_path / "log") as run:
        assert run.wait() == 0, run.said
    assert_same(folder, runs.expected("label"))
    lines = [
        line for path in folder.glob("ledger-*.jsonl") for line in path.read_bytes().split(b"\n")
    ]
    sound = Counter(key for key in _sound_keys(lines))
    assert set(sound.values()) == {1}
    assert set(sound) == set(ledger_keys(runs.expected("label")))
    assert pq.read_table(folder / "labels.parquet").equals(
        pq.read_table(runs.expected("label") / "labels.parquet")
    )


def _sound_keys(lines: list[bytes]) -> list[tuple[str, ...]]:
    import orjson

    names = ("content_hash", "critic_id", "prompt_hash", "part")
    found = []
    for line in lines:
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        found.append(tuple(entry[name] for name in names))
    return found
