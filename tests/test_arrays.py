"""Array jobs: N processes, in any order, killed and run again, merge to what one run writes."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest

from srft_prep.array_jobs import shard_of
from srft_prep.config import IngestConfig
from srft_prep.examples.record import RUNS_DIR
from srft_prep.ingest import ingest
from srft_prep.storage import StageWriter, write_table
from srft_prep.trajectories import read_trajectories, trajectories_table, trajectory_of
from tests.gates import kill_when
from tests.stages import srft_prep

NUM_SHARDS = 8
KILLED = (2, 5)
COPIES = 3
"""Of every example run, under other names and with a task of their own."""


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example runs many times over, in three parts; some contents are in several parts."""
    folder = tmp_path_factory.mktemp("array")
    runs = ingest([str(RUNS_DIR)], folder / "runs", IngestConfig(), outcomes=[str(RUNS_DIR)])
    table = trajectories_table(read_trajectories(runs.parts))
    copies = [row for _ in range(COPIES) for row in table.to_pylist()]
    for number, row in enumerate(copies):
        row["trajectory_id"] += f"#{number}"
        if number % 5:
            row["messages"][0]["content"] += f" (ticket {number})"
    output = folder / "trajectories"
    with StageWriter.open(output, stage="ingest", config={}, inputs=[]) as writer:
        names = [f"part-{number:05d}.parquet" for number in range(3)]
        third = len(copies) // 3
        for number, name in enumerate(names):
            part = copies[number * third : (number + 1) * third if number < 2 else None]
            table = trajectories_table([trajectory_of(row) for row in part])
            write_table(table, output / name, row_group_rows=16)
        counts = {"trajectories": len(copies), "rejected": 0}
        writer.finish(counts=counts, names=names, command=[])
    return output


def tokenize(source: Path, output: Path, *options: object) -> list[str]:
    tokenizer = ("--tokenizer", "example", "--tokenizer-engine", "tokenizers", "--workers", 1)
    return list(map(str, ["tokenize", source, "-o", output, *tokenizer, *options]))


def label(source: Path, output: Path, *options: object) -> list[str]:
    return list(map(str, ["label", source, "-o", output, "--only", "all", *options]))


def kill_in_the_midst(words: list[str], output: Path) -> None:
    """Kill a job with SIGKILL when something of its work is on disk and not all."""

    def has_begun() -> bool:
        return any(entry.name.startswith(("part-", "ledger-")) for entry in output.glob("*"))

    kill_when(has_begun, output.with_name(f"{output.name}.gate"), *words)
    assert has_begun()
    assert not (output / "manifest.json").exists()


def run_array(command: Callable[..., list[str]], source: Path, folder: Path) -> list[Path]:
    """Run eight jobs in any order, two of them killed and run again; return their directories."""
    outputs = [folder / f"shard-{index:05d}-of-{NUM_SHARDS:05d}" for index in range(NUM_SHARDS)]
    jobs = [
        command(source, output, "--shard-index", index, "--num-shards", NUM_SHARDS)
        for index, output in enumerate(outputs)
    ]
    for index in KILLED:
        kill_in_the_midst(jobs[index], outputs[index])
    order = list(range(NUM_SHARDS))
    random.Random(7).shuffle(order)
    for index in order:
        run = srft_prep(*jobs[index])
        assert run.status == 0, run.stderr
    random.Random(3).shuffle(outputs)
    return outputs


def assert_same(merged: Path, alone: Path, *, but: tuple[str, ...] = ()) -> None:
    """Compare two directories byte by byte, and their manifests but for what tells of the runs."""
    names = {path.name for path in alone.iterdir()}
    assert {path.name for path in merged.iterdir()} == names
    for name in names - {"manifest.json", *but}:
        assert (merged / name).read_bytes() == (alone / name).read_bytes(), name
    assert settled(merged, but) == settled(alone, but)


def settled(folder: Path, but: tuple[str, ...]) -> dict[str, Any]:
    data: dict[str, Any] = orjson.loads((folder / "manifest.json").read_bytes())
    del data["command"]
    data["files"] = [file for file in data["files"] if file["name"] not in but]
    during = data.get("certificate", {}).get("during_run", {})
    for key in ("strings", "tokens"):  # what was compared, a text a batch: batches are others
        during.pop(key, None)
    return data


def test_eight_tokenize_jobs_two_of_them_killed_merge_to_the_bytes_of_one_run(
    trajectories: Path, tmp_path: Path
) -> None:
    one, merged = tmp_path / "one", tmp_path / "merged"
    assert srft_prep(*tokenize(trajectories, one)).status == 0
    outputs = run_array(tokenize, trajectories, tmp_path)
    run = srft_prep("merge", *outputs, "-o", merged)
    assert run.status == 0, run.stderr
    assert_same(merged, one)
    assert srft_prep("verify", merged).status == 0
    again = srft_prep(*tokenize(trajectories, merged))
    assert again.status == 0, "for a run without shards there is nothing left to do"


def test_shares_cover_everything_and_are_about_equal(trajectories: Path) -> None:
    hashes = [each.content_hash for each in read_trajectories(sorted(trajectories.glob("part-*")))]
    hashes += [f"{number:032x}" for number in range(10_000)]
    sizes = Counter(shard_of(each, 8) for each in hashes)
    assert set(sizes) == set(range(8))
    assert max(sizes.values()) < 1.1 * min(sizes.values())


def test_the_share_of_a_content_never_changes() -> None:
    # these values are in directories on disks: a change would give trajectories to no job
    found = [shard_of(f"{number:032x}", 8) for number in range(12)]
    assert found == [1, 3, 0, 7, 6, 4, 7, 2, 4, 6, 7, 2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--shard-index", 3), "give both or neither"),
        (("--num-shards", 3), "give both or neither"),
        (("--shard-index", 8, "--num-shards", 8), "expected 0 to 7 (--num-shards 8), got 8"),
    ],
)
def test_options_of_an_array_that_do_not_go_together_are_refused(
    options: tuple[object, ...], says: str, trajectories: Path, tmp_path: Path
) -> None:
    run = srft_prep(*tokenize(trajectories, tmp_path / "out", *options))
    assert run.status == 2
    assert says in run.stderr
    assert not (tmp_path / "out").exists()


def test_another_job_is_refused_in_a_finished_directory(trajectories: Path, tmp_path: Path) -> None:
    first = ("--shard-index", 0, "--num-shards", 8)
    assert srft_prep(*tokenize(trajectories, tmp_path / "out", *first)).status == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run = srft_prep(*tokenize(trajectories, tmp_path / "out", "--shard-index", 1, *first[2:]))
    assert run.status == 2
    assert "other settings" in run.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def scripted(labels: Path, script: Path) -> tuple[object, ...]:
    """Write the labels of a directory as a script, but for a few trajectories; return options."""
    rows = pl.read_parquet(labels / "labels.parquet").rename({"rationale": "reason"})
    names = rows["trajectory_id"].unique(maintain_order=True).to_list()
    rows.filter(~pl.col("trajectory_id").is_in(names[5::20])).write_ndjson(script)
    return "--critic", "scripted", "--model", script


def test_eight_label_jobs_two_of_them_killed_merge_to_the_bytes_of_one_run(
    trajectories: Path, tmp_path: Path
) -> None:
    one, merged = tmp_path / "one", tmp_path / "merged"
    assert srft_prep(*label(trajectories, one)).status == 0
    outputs = run_array(label, trajectories, tmp_path)
    run = srft_prep("merge", *outputs, "-o", merged)
    assert run.status == 0, run.stderr
    assert_same(merged, one, but=("requests.parquet", "ledger-00000.jsonl"))
    told = [pl.read_parquet(each / "requests.parquet").drop("seconds") for each in (merged, one)]
    assert told[0].equals(told[1])
    assert srft_prep("verify", merged).status == 0
    again = srft_prep(*label(trajectories, merged, "--json"))
    assert "asked" not in orjson.loads(again.stdout.splitlines()[-1]), "nothing is asked twice"
    assert_same(merged, one, but=("requests.parquet", "ledger-00000.jsonl"))


def test_failures_and_unlabelled_trajectories_of_array_jobs_merge_to_the_bytes_of_one_run(
    trajectories: Path, tmp_path: Path
) -> None:
    assert srft_prep(*label(trajectories, tmp_path / "rules")).status == 0
    critic = (*scripted(tmp_path / "rules", tmp_path / "script.jsonl"), "--only", "unresolved")
    one, merged = tmp_path / "one", tmp_path / "merged"
    assert srft_prep(*label(trajectories, one, *critic)).status == 1
    outputs = []
    for index in range(3):
        outputs.append(tmp_path / str(index))
        words = label(trajectories, outputs[-1], *critic, "--shard-index", index, "--num-shards", 3)
        assert srft_prep(*words).status in (0, 1)
    assert srft_prep("merge", *outputs, "-o", merged).status == 1
    assert_same(merged, one, but=("ledger-00000.jsonl",))
    lines = [
        sorted((each / "ledger-00000.jsonl").read_bytes().splitlines()) for each in (merged, one)
    ]
    assert lines[0] == lines[1]
    assert len(orjson.loads((merged / "manifest.json").read_bytes())["first_failures"]) == 3


def test_the_jobs_of_a_cascade_merge_to_the_bytes_and_the_report_of_one_run(
    trajectories: Path, tmp_path: Path
) -> None:
    assert srft_prep(*label(trajectories, tmp_path / "rules")).status == 0
    script = tmp_path / "script.jsonl"
    scripted(tmp_path / "rules", script)
    critics = ("--cascade", f"rules,scripted:{script}", "--audit", "0.3")
    one, merged = tmp_path / "one", tmp_path / "merged"
    assert srft_prep(*label(trajectories, one, *critics)).status in (0, 1)
    outputs = [tmp_path / str(index) for index in range(3)]
    for index, output in enumerate(outputs):
        array = ("--shard-index", index, "--num-shards", 3)
        assert srft_prep(*label(trajectories, output, *critics, *array)).status in (0, 1)
    assert srft_prep("merge", *outputs, "-o", merged).status in (0, 1)
    assert (merged / "labels.parquet").read_bytes() == (one / "labels.parquet").read_bytes()
    reports = [orjson.loads((each / "manifest.json").read_bytes()) for each in (merged, one)]
    assert reports[0]["config"] == reports[1]["config"]
    assert reports[0]["counts"] == reports[1]["counts"]
    for report in reports:
        for stage in report["cascade"]["stages"]:
            del stage["seconds"]
    stages = [report["cascade"]["stages"] for report in reports]
    assert stages[0] == stages[1]
    assert srft_prep("verify", merged).status == 0
