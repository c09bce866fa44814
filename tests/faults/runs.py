"""Raw runs, the commands of all stages on them, and what these make when nothing goes wrong.

They are made once for all processes that share the tests, and by `make test-faults` once for all
rounds; whoever finds them there checks every file by its hash.
"""

import fcntl
import gzip
import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import srft_prep
from srft_prep.hashes import sha256_of
from srft_prep.manifest import (
    read_manifest,
)
from srft_prep.schemas import TOKENS
from srft_prep.storage import StageWriter, write_table
from tests.faults.bombs import make_bombs
from tests.faults.commands import finish
from tests.stages import short_runs
from tests.train import runs as train

NUM_RUNS = 1300
"""More than five parts of 256."""

STAGES = ("ingest", "label", "tokenize", "pack", "export")

STATUS = {"ingest": 1, "sample": 1}
"""Of the stages whose exit status is not 0: some of the raw records are broken."""

NUM_JOBS = 2
"""Of the array whose labels are merged."""

SAMPLE = ("--sample", "resolved=200,unresolved=300")

TRAINING = ("--tiny", "--max-steps", 6, "--batch-sequences", 2, "--checkpoint-every", 2)

NOTE = "made.json"
"""Holds how long each stage took, and the hash of every file."""

Words = tuple[str | int | Path, ...]


@dataclass(frozen=True)
class Runs:
    """The folder of raw runs, and beside it a folder with the output of each stage."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each stage took."""

    @property
    def raw(self) -> Path:
        return self.folder / "raw"

    def expected(self, stage: str) -> Path:
        return self.folder / stage

    def command(self, stage: str, output: Path, *, workers: int = 1) -> Words:
        """Return the command that makes a stage's output from the expected outputs before it."""
        trajectories = self.folder / "ingest"
        return {
            "ingest": ("ingest", self.raw, "-o", output),
            "label": ("label", trajectories, "-o", output),
            "tokenize": (
                *("tokenize", trajectories, "-o", output),
                *("--tokenizer", "example", "--workers", str(workers)),
            ),
            "pack": ("pack", self.folder / "wide", "--labels", self.folder / "label", "-o", output),
            "export": ("export", self.folder / "pack", "--to", "trl", "-o", output),
            "sample": ("ingest", self.raw, *SAMPLE, "-o", output),
            "merge": ("merge", *map(self.job, range(NUM_JOBS)), "-o", output),
            "train": ("train", self.short_shards, *TRAINING, "-o", output),
        }[stage]

    @property
    def bombs(self) -> Path:
        """Small files that expand to 10 GiB."""
        return self.folder / "bombs"

    def trained(self, *, ranks: int) -> Path:
        """Return what training makes; with other ranks sums have another order."""
        return self.expected("train") if ranks == 1 else self.folder / f"train-{ranks}"

    def job(self, number: int) -> Path:
        """Return the directory of a job of an array that labels."""
        return self.folder / f"job-{number}"

    @property
    def short_shards(self) -> Path:
        """Shards of short packed sequences, some tasks held out: a step takes milliseconds."""
        return self.folder / "short"


def shared_runs(folder: Path) -> Runs:
    """Return the runs of this version of everything, made below a folder where they are not there.

    Those of other versions stay: another session may be reading them.
    """
    folder = folder / source_hash(folder)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / NOTE
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not note.exists():
            shutil.rmtree(folder / "runs", ignore_errors=True)
            (folder / "runs").mkdir()
            seconds = make_runs(folder / "runs").seconds
            files = hashes_of(folder / "runs")
            note.write_bytes(orjson.dumps({"seconds": seconds, "files": files}))
    found = orjson.loads(note.read_bytes())
    assert found["files"] == hashes_of(folder / "runs"), f"{folder}: changed, remove it"
    return Runs(folder / "runs", found["seconds"])


def source_hash(folder: Path) -> str:
    """Return a hash of all that runs in a folder depend on; rejected records tell its path."""
    package = Path(srft_prep.__file__).parent
    digest = hashlib.sha256(str(folder).encode())
    own = [Path(__file__).with_name(name) for name in ("bombs.py", "commands.py", "runs.py")]
    for path in [*own, *sorted(package.rglob("*"))]:
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the hash of every file of the runs; logs tell of times."""
    return {
        str(path.relative_to(folder)): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".log"
    }


def make_runs(folder: Path) -> Runs:
    """Write raw runs and take them through all stages."""
    runs = Runs(folder)
    write_raw(runs.raw)
    make_bombs(runs.bombs)
    for stage in STAGES:
        make_expected(runs, stage)
        if stage == "tokenize":
            widen(runs.expected("tokenize"), folder / "wide")
    for number in range(NUM_JOBS):
        words = (*runs.command("label", runs.job(number)), "--shard-index", number)
        finish((*words, "--num-shards", NUM_JOBS), folder / "job.log")
    settings = ("--seq-len", 1024, "--overlong", "windows", "--hold-out", 0.2)
    words = ("pack", runs.expected("tokenize"), "--labels", runs.expected("label"), *settings)
    finish((*words, "-o", runs.short_shards), folder / "short.log")
    for stage in ("sample", "merge", "train"):
        make_expected(runs, stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        train.finish(runs.trained(ranks=2), ("train", runs.short_shards, *TRAINING), ranks=2)
    assert len(read_manifest(runs.expected("tokenize")).parts) > 5
    assert len(read_manifest(runs.expected("pack")).parts) > 1
    return runs


def make_expected(runs: Runs, stage: str) -> None:
    words = runs.command(stage, runs.expected(stage))
    log = runs.folder / f"{stage}.log"
    runs.seconds[stage] = finish(words, log, status=STATUS.get(stage, 0))


def write_raw(folder: Path) -> None:
    """Write many short runs: JSONL, gzip and Parquet, with blank and broken lines."""
    folder.mkdir()
    rows = short_runs(NUM_RUNS, messages=8)
    third = NUM_RUNS // 3
    lines = [orjson.dumps(row) for row in rows[:third]]
    for number in range(0, third, 7):
        lines[number] += (b"\n", b"\n{}", b"\n\n{", b"\n" + lines[0])[number % 4]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress(b"\n\n".join(map(orjson.dumps, rows[third : 2 * third])), 1)
    )
    columns = [
        {**row, "messages": orjson.dumps(row["messages"]).decode()} for row in rows[2 * third :]
    ]
    pq.write_table(pa.Table.from_pylist(columns), folder / "c.parquet", row_group_size=100)


def widen(tokens: Path, output: Path) -> None:
    """Write a token directory whose rows go on after the last step: enough for several shards."""
    source = read_manifest(tokens)
    inputs = [source.as_input()]
    with StageWriter.open(output, stage="tokenize", config={}, inputs=inputs) as writer:
        for part in source.parts:
            table = pq.read_table(part)
            ids = [np.resize(row.values.to_numpy(), 14_000) for row in table["input_ids"]]
            lengths = pa.array([len(row) for row in ids], pa.int32())
            table = table.set_column(3, TOKENS.field(3), pa.array(ids, TOKENS.field(3).type))
            table = table.set_column(5, TOKENS.field(5), lengths)
            write_table(table, output / part.name, row_group_rows=16)
        writer.finish(
            counts=source.counts,
            names=[part.name for part in source.parts],
            command=[],
            extra={"tokenizer": source.data["tokenizer"]},
        )


def more_progress(output: Path) -> Callable[[], bool]:
    """Return what tells whether a stage has durably done more than now."""
    before = progress_of(output)
    return lambda: bool(progress_of(output) - before)


def progress_of(output: Path) -> set[tuple[str, int]]:
    """Return what a stage has durably done: journal entries, shards, 32 KiB of a ledger."""
    done = set()
    journal = [path for path in output.glob(".progress/*.json") if path.name != "plan.json"]
    for path in [*journal, *output.glob("shard-*.parquet")]:
        with suppress(FileNotFoundError):  # a journal goes when its run ends
            done.add((path.name, path.stat().st_mtime_ns))
    for path in output.glob("ledger-*.jsonl"):
        done |= {(path.name, n) for n in range(path.stat().st_size >> 15)}
    return done


def assert_same(found: Path, expected: Path) -> None:
    """Compare two directories byte for byte, but for times and for how a run was cut up."""
    assert names_in(found) == names_in(expected)
    for name in names_in(expected):
        if name == "manifest.json":
            assert portable(found / name) == portable(expected / name)
        elif name == "requests.parquet":
            tables = [pq.read_table(path / name).drop(["seconds"]) for path in (found, expected)]
            assert tables[0].equals(tables[1])
        else:
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def assert_same_training(found: Path, expected: Path) -> None:
    """Compare the losses of all steps and the weights of two trained models, bit for bit."""
    assert train.losses_of(found) == train.losses_of(expected)
    model = Path("model") / "model.safetensors"
    assert (found / model).read_bytes() == (expected / model).read_bytes()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("ledger-")}


def portable(manifest: Path) -> dict[str, Any]:
    """Return a manifest without paths, and without what tells of how a run was cut up."""
    data = orjson.loads(manifest.read_bytes())
    data["inputs"] = [{k: v for k, v in each.items() if k != "path"} for each in data["inputs"]]
    data["files"] = [
        each
        for each in data["files"]
        if not each["name"].startswith("ledger-") and each["name"] != "requests.parquet"
    ]
    data["counts"] = {k: v for k, v in data["counts"].items() if k not in ("asked", "reused")}
    return {key: value for key, value in data.items() if key != "command"}


def ledger_keys(folder: Path) -> list[tuple[str, ...]]:
    """Return the keys of all whole lines of a directory's ledgers."""
    names = ("content_hash", "critic_id", "prompt_hash", "part")
    return [
        tuple(entry[name] for name in names)
        for path in sorted(folder.glob("ledger-*.jsonl"))
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
        for entry in [orjson.loads(line)]
    ]
