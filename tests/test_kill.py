"""Stages that are killed, interrupted or run twice at once: the result is the uninterrupted one."""

import gzip
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srft_prep.manifest import read_manifest
from srft_prep.schemas import TOKENS
from srft_prep.storage import StageWriter, write_table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds orphans in /proc"),
]

RUNS = Path(__file__).resolve().parents[1] / "srft_prep" / "examples" / "runs"
NUM_RUNS = 1300
"""More than five parts of 256."""


@dataclass(frozen=True)
class Started:
    """A command that runs in its own process group."""

    process: subprocess.Popen[str]
    mark: str
    """Is in the environment of the process and of all that it starts."""

    def orphans(self) -> list[int]:
        """Return the ids of living processes that this command started."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in environ.read_bytes():
                    found.append(int(environ.parent.name))
            except (OSError, ProcessLookupError):
                continue
        return [pid for pid in found if pid != self.process.pid]


@contextmanager
def started(words: tuple[str | Path, ...]) -> Iterator[Started]:
    mark = f"SRFT_TEST_MARK={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        [sys.executable, "-m", "srft_prep", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, name: value},
        start_new_session=True,
    )
    try:
        yield Started(process, mark)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(words: tuple[str | Path, ...], *, status: int = 0) -> float:
    """Run a command to its end and return the seconds that it took."""
    begin = time.monotonic()
    with started(words) as run:
        out, err = run.process.communicate(timeout=120)
        assert run.process.returncode == status, err
        assert "Traceback" not in err, err
        del out
    return time.monotonic() - begin


def kill_when(words: tuple[str | Path, ...], ready: Callable[[], bool]) -> bool:
    """Start a command, kill -9 it once `ready`, and return whether it still ran then."""
    with started(words) as run:
        while run.process.poll() is None and not ready():
            time.sleep(0.002)
        alive = run.process.poll() is None
        run.process.kill()
        run.process.wait()
        wait_for_orphans(run)
    return alive


def wait_for_orphans(run: Started) -> None:
    """Wait for what a dead process started to die too; a loaded machine may need a while."""
    deadline = time.monotonic() + 20
    while run.orphans() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not run.orphans(), "processes outlived the one that was killed"


def after(seconds: float) -> Callable[[], bool]:
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() >= deadline


def more_progress(output: Path) -> Callable[[], bool]:
    before = progress_of(output)
    return lambda: bool(progress_of(output) - before)


def progress_of(output: Path) -> set[tuple[str, int]]:
    """Return what a stage has durably done: journal entries, shards, hundreds of ledger lines."""
    done = set()
    for path in [*output.glob(".progress/*-?????.json"), *output.glob("shard-*.parquet")]:
        with suppress(FileNotFoundError):  # a journal goes when its run ends
            done.add((path.name, path.stat().st_mtime_ns))
    for path in output.glob("ledger-*.jsonl"):
        done |= {(path.name, n) for n in range(path.read_bytes().count(b"\n") // 100)}
    return done


def check_kills(
    words: tuple[str | Path, ...],
    output: Path,
    expected: Path,
    seconds: float,
    *,
    status: int = 0,
    rounds: int = 2,
) -> None:
    """Kill a command, once in the midst of its work and twice at random, let it end, compare."""
    rng = random.Random(str(words[0]))
    killed = 0
    for _ in range(rounds):
        shutil.rmtree(output, ignore_errors=True)
        killed += kill_when(words, more_progress(output))
        for share in sorted(rng.uniform(0.05, 0.8) for _ in range(2)):
            killed += kill_when(words, after(share * seconds))
        finish(words, status=status)
        assert_same(output, expected)
    assert killed >= rounds, "the command was faster than all kills"


def assert_same(found: Path, expected: Path) -> None:
    assert names_in(found) == names_in(expected)
    for name in names_in(expected):
        if name == "manifest.json":
            assert portable(found / name) == portable(expected / name)
        elif name == "requests.parquet":
            tables = [pq.read_table(path / name).drop(["seconds"]) for path in (found, expected)]
            assert tables[0].equals(tables[1])
        else:
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name


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


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of many short runs: JSONL, gzip and Parquet, with blank and broken lines."""
    folder = tmp_path_factory.mktemp("raw")
    runs = [orjson.loads(path.read_bytes()) for path in sorted(RUNS.rglob("*.traj.json"))]
    rows = []
    for number in range(NUM_RUNS):
        run = runs[number % len(runs)]
        first, second, *rest = run["messages"][:8]
        second = {**second, "content": f"Ticket {number}\n{second['content'][-400:]}"}
        rows.append(
            {
                "traj_id": f"run-{number:05d}",
                "instance_id": run["instance_id"],
                "resolved": number % 3 == 0,
                "messages": [first, second, *rest],
            }
        )
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
    return folder


@pytest.fixture(scope="module")
def expected(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of ingest, label and tokenize, not interrupted; `seconds.json` beside them."""
    folder = tmp_path_factory.mktemp("expected")
    seconds = {
        "ingest": finish(("ingest", raw, "-o", folder / "ingest"), status=1),
        "label": finish(("label", folder / "ingest", "-o", folder / "label")),
        "tokenize": finish(tokenize(folder / "ingest", folder / "tokenize", workers=1)),
    }
    assert len(list((folder / "tokenize").glob("part-*.parquet"))) > 5
    widen(folder / "tokenize", folder / "wide")
    seconds["pack"] = finish(pack(folder, folder / "pack"))
    assert len(list((folder / "pack").glob("shard-*.parquet"))) > 1
    (folder / "seconds.json").write_bytes(orjson.dumps(seconds))
    return folder


def tokenize(source: Path, output: Path, *, workers: int) -> tuple[str | Path, ...]:
    return (
        *("tokenize", source, "-o", output),
        *("--tokenizer", "example", "--workers", str(workers)),
    )


def pack(folder: Path, output: Path) -> tuple[str | Path, ...]:
    return ("pack", folder / "wide", "--labels", folder / "label", "-o", output)


def command_of(
    stage: str, raw: Path, expected: Path, output: Path, *, workers: int
) -> tuple[str | Path, ...]:
    """Return the command that makes a stage's output from the expected outputs before it."""
    return {
        "ingest": ("ingest", raw, "-o", output),
        "label": ("label", expected / "ingest", "-o", output),
        "tokenize": tokenize(expected / "ingest", output, workers=workers),
        "pack": pack(expected, output),
    }[stage]


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


def seconds_of(expected: Path, stage: str) -> float:
    seconds: float = orjson.loads((expected / "seconds.json").read_bytes())[stage]
    return seconds


def test_a_killed_ingest_continues_to_the_same_bytes(
    raw: Path, expected: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = ("ingest", raw, "-o", output)
    check_kills(words, output, expected / "ingest", seconds_of(expected, "ingest"), status=1)


def test_a_killed_sample_continues_to_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    words = ("ingest", raw, "--sample", "resolved=200,unresolved=300", "-o")
    seconds = finish((*words, tmp_path / "expected"), status=1)
    output = tmp_path / "out"
    check_kills((*words, output), output, tmp_path / "expected", seconds, status=1)


def test_a_killed_label_asks_nothing_twice_and_gives_the_same_labels(
    expected: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = ("label", expected / "ingest", "-o", output)
    check_kills(words, output, expected / "label", seconds_of(expected, "label"))
    asked = Counter(ledger_keys(output))
    assert set(asked.values()) == {1}
    assert set(asked) == set(ledger_keys(expected / "label"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_tokenize_leaves_no_process_and_continues_to_the_same_bytes(
    workers: int, expected: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = tokenize(expected / "ingest", output, workers=workers)
    seconds = seconds_of(expected, "tokenize")
    check_kills(words, output, expected / "tokenize", seconds, rounds=1)


def test_a_killed_pack_gives_the_same_shards(expected: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    check_kills(pack(expected, output), output, expected / "pack", seconds_of(expected, "pack"))


def ledger_keys(folder: Path) -> list[tuple[str, ...]]:
    names = ("content_hash", "critic_id", "prompt_hash", "part")
    return [
        tuple(entry[name] for name in names)
        for path in sorted(folder.glob("ledger-*.jsonl"))
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
        for entry in [orjson.loads(line)]
    ]


def test_a_torn_last_line_of_a_ledger_is_asked_again_and_only_that(
    expected: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(expected / "label", output)
    (ledger,) = output.glob("ledger-*.jsonl")
    ledger.write_bytes(ledger.read_bytes()[:-40])
    finish(("label", expected / "ingest", "-o", output))
    assert_same(output, expected / "label")
    assert set(Counter(ledger_keys(output)).values()) == {1}


HELD = """
import os, signal, threading, time
from srft_prep.part_pool import _interrupts_held

threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
try:
    with _interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        print("finished", end=" ")
    print("lost")
except KeyboardInterrupt:
    print("then interrupted")
"""


def test_ctrl_c_waits_although_another_thread_may_take_the_signal() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("finished then interrupted\n", 0), done.stderr


def test_ctrl_c_while_workers_start_shows_no_traceback(expected: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with started(tokenize(expected / "ingest", output, workers=2)) as run:
        while run.process.poll() is None and not run.orphans():
            time.sleep(0.002)
        time.sleep(0.5)
        os.killpg(run.process.pid, signal.SIGINT)
        _, err = run.process.communicate(timeout=60)
        assert run.process.returncode == 130, err
        assert err == "\ninterrupted; the same command continues\n"
        wait_for_orphans(run)


@pytest.mark.parametrize("stage", ["ingest", "label", "tokenize", "pack"])
def test_ctrl_c_exits_with_130_and_a_rerun_continues(
    stage: str, raw: Path, expected: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = command_of(stage, raw, expected, output, workers=2)
    with started(words) as run:
        while run.process.poll() is None and not progress_of(output):
            time.sleep(0.002)
        os.killpg(run.process.pid, signal.SIGINT)
        _, err = run.process.communicate(timeout=30)
        assert run.process.returncode == 130, err
        assert "interrupted; the same command continues" in err
        assert "Traceback" not in err, err
        wait_for_orphans(run)
    finish(words, status=int(stage == "ingest"))
    assert_same(output, expected / stage)


@pytest.mark.parametrize("stage", ["ingest", "label", "tokenize", "pack"])
def test_of_two_runs_into_one_directory_the_second_is_refused(
    stage: str, raw: Path, expected: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = command_of(stage, raw, expected, output, workers=1)
    with started(words) as first:
        while first.process.poll() is None and not (output / ".progress").is_dir():
            time.sleep(0.002)
        os.kill(first.process.pid, signal.SIGSTOP)
        with started(words) as second:
            _, err = second.process.communicate(timeout=60)
        os.kill(first.process.pid, signal.SIGCONT)
        assert second.process.returncode == 2
        assert err == (
            f"Error: {output}: another srft-prep run is writing here; wait for it, or choose "
            "another -o\n"
        )
        _, err = first.process.communicate(timeout=60)
        assert first.process.returncode == int(stage == "ingest"), err
    assert_same(output, expected / stage)
