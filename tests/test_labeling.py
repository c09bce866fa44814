import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from srft_prep.config import LabelConfig, Only
from srft_prep.critic import CriticReply, CriticRequest, StepLabel
from srft_prep.errors import BackendError, ConfigError, ShardError
from srft_prep.labeling import count_trajectories, label
from srft_prep.ledger import ledger_files
from srft_prep.ledger_labels import wanted
from srft_prep.manifest import Manifest
from srft_prep.schemas import LABELS, REQUESTS
from srft_prep.statistics import collect
from srft_prep.trajectories import read_trajectories
from srft_prep.types import Trajectory
from srft_prep.verification import verify
from tests.faults.disks import read_only
from tests.stages import (
    ListedCritic,
    listed_label,
    run_critic,
    srft_prep,
    trajectory,
    write_trajectories,
)

RUNS = (
    trajectory("solved", resolved=True, num_steps=5),
    trajectory("failed", resolved=False, num_steps=8),
    trajectory("unknown", resolved=None, num_steps=4),
    trajectory("silent", resolved=False, num_steps=0),
)
LABELLED = ["solved", "failed", "unknown"]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return write_trajectories(tmp_path / "runs", RUNS)


def rows(folder: Path, name: str = "labels") -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return table


def labels_in(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows(folder):
        assert row["step_index"] == len(found.setdefault(row["trajectory_id"], []))
        found[row["trajectory_id"]].append(row["label"])
    return found


def counted(manifest: Manifest) -> dict[str, int]:
    """Return what a run did, without the tokens and seconds that it took."""
    return {name: count for name, count in manifest.run.items() if name != "usage"}


def listed(*names: str) -> dict[str, list[str]]:
    steps = {run.trajectory_id: run.num_steps for run in RUNS}
    return {name: [listed_label(step).label for step in range(steps[name])] for name in names}


@dataclass
class OddCritic(ListedCritic):
    """A critic whose replies are changed on the way out."""

    change: Callable[[list[CriticReply]], Iterable[CriticReply]] = iter

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        yield from self.change(list(super().label(requests)))


def test_every_step_gets_its_label_in_the_order_of_trajectories_and_steps(
    runs: Path, tmp_path: Path
) -> None:
    manifest = run_critic(runs, tmp_path / "labels", ListedCritic())
    assert list(labels_in(tmp_path / "labels").items()) == list(listed(*LABELLED).items())
    counts = Counter(label for labels in listed(*LABELLED).values() for label in labels)
    assert {name: manifest.counts[name] for name in counts} == counts
    assert (manifest.counts["trajectories"], manifest.counts["steps"]) == (3, 17)
    assert manifest.counts["failures"] == 0
    assert verify(tmp_path / "labels").problems == ()


def test_the_tables_have_the_columns_of_the_contract(runs: Path, tmp_path: Path) -> None:
    run_critic(runs, tmp_path / "labels", ListedCritic())
    assert pq.read_schema(tmp_path / "labels" / "labels.parquet").equals(LABELS)
    assert pq.read_schema(tmp_path / "labels" / "requests.parquet").equals(REQUESTS)
    row = rows(tmp_path / "labels")[3]
    assert row == {
        "trajectory_id": "solved",
        "content_hash": RUNS[0].content_hash,
        "step_index": 3,
        "label": "harmful",
        "p_good": None,
        "p_unnecessary": None,
        "p_harmful": None,
        "rationale": "every-seventh: by the list",
        "critic_id": "listed@1",
        "prompt_hash": "none",
    }
    assert rows(tmp_path / "labels", "requests")[0] == {
        "trajectory_id": "solved",
        "part": "all",
        "prompt_tokens": 100,
        "cached_tokens": 0,
        "completion_tokens": 10,
        "seconds": 0.0,
        "usd": 0.25,
        "clipped_tokens": 0,
        "failure": None,
        "critic_id": "listed@1",
        "prompt_hash": "none",
    }


@pytest.mark.parametrize(
    ("only", "expected"),
    [("unresolved", ["failed", "unknown"]), ("resolved", ["solved"]), ("all", LABELLED)],
)
def test_only_chooses_by_outcome_and_takes_unknown_for_unresolved(
    runs: Path, tmp_path: Path, only: Only, expected: list[str]
) -> None:
    critic = ListedCritic()
    run_critic(runs, tmp_path / "labels", critic, only=only)
    assert critic.asked == expected
    assert list(labels_in(tmp_path / "labels")) == expected
    assert [run.trajectory_id for run in RUNS[:3] if wanted(run.resolved, only)] == expected


def test_a_failed_request_is_a_row_with_its_reason_and_its_cost(runs: Path, tmp_path: Path) -> None:
    critic = ListedCritic(failing={"failed"})
    manifest = run_critic(runs, tmp_path / "labels", critic)
    assert labels_in(tmp_path / "labels") == listed("solved", "unknown")
    failures = {row["trajectory_id"]: row for row in rows(tmp_path / "labels", "requests")}
    assert failures["failed"]["failure"] == "the reply is no list"
    assert failures["failed"]["usd"] == 0.25
    assert failures["solved"]["failure"] is None
    assert manifest.counts["failures"] == 1
    assert verify(tmp_path / "labels").problems == ()


def test_a_rerun_asks_nothing_and_writes_the_same_tables(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    run_critic(runs, folder, ListedCritic(failing={"failed"}))
    before = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    again = ListedCritic()
    manifest = run_critic(runs, folder, again)
    assert again.asked == []
    assert counted(manifest) == {"reused": 3}
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == before
    assert len(ledger_files(folder)) == 1


def test_retry_failed_asks_only_what_failed(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    run_critic(runs, folder, ListedCritic(failing={"failed", "unknown"}))
    again = ListedCritic(failing={"unknown"})
    manifest = run_critic(runs, folder, again, retry_failed=True)
    assert again.asked == ["failed", "unknown"]
    assert labels_in(folder) == listed("solved", "failed")
    assert manifest.counts["failures"] == 1


def test_what_an_earlier_failure_cost_stays_on_the_bill(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    run_critic(runs, folder, ListedCritic(failing={"failed"}))
    run_critic(runs, folder, ListedCritic(), retry_failed=True)
    bill = {row["trajectory_id"]: row for row in rows(folder, "requests")}
    assert {name: row["usd"] for name, row in bill.items()} == {
        "solved": 0.25,
        "failed": 0.5,
        "unknown": 0.25,
    }
    assert bill["failed"]["prompt_tokens"] == 200
    assert bill["failed"]["failure"] is None


def overwriting(runs: Path, folder: Path, critic: ListedCritic) -> None:
    """Label with `overwrite`; the tables of another critic are refused without it."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"holds labels of listed@.* the ledger keeps both"):
        run_critic(runs, folder, critic)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    config = LabelConfig(
        critic="listed", critic_id=critic.critic_id, prompt_hash=critic.prompt_hash, only="all"
    )
    label(runs, folder, critic, config, overwrite=True)


def test_another_critic_rewrites_the_tables_only_with_overwrite_and_keeps_the_ledger(
    runs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "labels"
    run_critic(runs, folder, ListedCritic())
    old = ledger_files(folder)[0].read_bytes()
    other = ListedCritic(critic_id="listed@2", failing={"solved"})
    overwriting(runs, folder, other)
    assert other.asked == LABELLED
    assert ledger_files(folder)[0].read_bytes() == old
    assert {row["critic_id"] for row in rows(folder)} == {"listed@2"}
    first_again = ListedCritic()
    overwriting(runs, folder, first_again)
    assert first_again.asked == []
    assert labels_in(folder) == listed(*LABELLED)
    other_prompt = ListedCritic(prompt_hash="changed")
    overwriting(runs, folder, other_prompt)
    assert other_prompt.asked == LABELLED


def test_only_restricts_what_is_asked_and_not_what_the_tables_hold(
    runs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "labels"
    run_critic(runs, folder, ListedCritic(failing={"solved"}))
    run_critic(runs, folder, ListedCritic(), only="resolved", retry_failed=True)
    tables = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    for only in ("unresolved", "resolved"):
        critic = ListedCritic()
        manifest = run_critic(runs, folder, critic, only=only)
        assert critic.asked == []
        assert labels_in(folder) == listed(*LABELLED)
        assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == tables
        assert manifest.counts["trajectories"] == 3


def test_no_reply_is_a_failure_only_of_what_was_asked(runs: Path, tmp_path: Path) -> None:
    silent = OddCritic(change=lambda replies: [])
    run_critic(runs, tmp_path / "labels", silent, only="resolved")
    found = rows(tmp_path / "labels", "requests")
    assert [row["trajectory_id"] for row in found] == ["solved"]


def test_the_manifest_of_a_resumed_run_is_that_of_an_uninterrupted_one(
    runs: Path, tmp_path: Path
) -> None:
    def break_after_one(replies: list[CriticReply]) -> Iterator[CriticReply]:
        yield replies[0]
        raise BackendError("the engine is gone")

    whole = run_critic(runs, tmp_path / "whole", ListedCritic(failing={"failed"}))
    with pytest.raises(BackendError):
        run_critic(runs, tmp_path / "cut", OddCritic(change=break_after_one))
    cut = run_critic(runs, tmp_path / "cut", ListedCritic(failing={"failed"}))
    assert (counted(whole), counted(cut)) == ({"asked": 3}, {"asked": 2, "reused": 1})
    assert whole.as_input()["sha256"] == cut.as_input()["sha256"]
    data = [dict(manifest.data) for manifest in (whole, cut)]
    for each in data:
        each["files"] = [file for file in each["files"] if not file["name"].startswith("ledger-")]
    assert data[0] == data[1]


def test_a_run_with_nothing_to_ask_reads_no_message(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "labels"
    run_critic(runs, folder, ListedCritic())
    read: list[Path] = []

    def watched(parts: Iterable[Path], **settings: Any) -> Iterator[Trajectory]:
        read.extend(parts)
        return read_trajectories(list(parts), **settings)

    monkeypatch.setattr("srft_prep.asking.read_trajectories", watched)
    run_critic(runs, folder, ListedCritic())
    assert read == []
    late = write_trajectories(tmp_path / "more", [*RUNS, trajectory("late")])
    run_critic(late, folder, ListedCritic())
    assert read == [late / "part-00000.parquet"]


def test_a_total_is_counted_without_hashing_the_source(runs: Path) -> None:
    manifest = orjson.loads((runs / "manifest.json").read_bytes())
    manifest["files"][0]["sha256"] = "00"
    (runs / "manifest.json").write_bytes(orjson.dumps(manifest))
    config = LabelConfig(critic="listed", critic_id="a", prompt_hash="b", only="unresolved")
    assert count_trajectories(runs, config) == 2
    (runs / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ShardError, match=r"part-00000.parquet: changed since it was written"):
        count_trajectories(runs, config)
    (runs / "part-00000.parquet").unlink()
    with pytest.raises(ShardError, match=r"part-00000.parquet: missing"):
        count_trajectories(runs, config)


@pytest.mark.parametrize(
    "change",
    [lambda labels: labels[1:], lambda labels: [labels[0], *labels[:-1]], lambda labels: []],
    ids=["a step missing", "a step doubled", "none"],
)
def test_a_ledger_line_that_does_not_fit_its_trajectory_is_asked_again(
    change: Any, runs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "labels"
    run_critic(runs, folder, ListedCritic())
    [path] = ledger_files(folder)
    entries = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    entries[1]["labels"] = change(entries[1]["labels"])
    path.write_bytes(b"".join(orjson.dumps(entry) + b"\n" for entry in entries))
    again = ListedCritic()
    manifest = run_critic(runs, folder, again)
    assert again.asked == ["failed"]
    assert counted(manifest) == {"asked": 1, "reused": 2, "damaged_ledger_lines": 1}
    assert labels_in(folder) == listed(*LABELLED)


def test_the_first_failures_are_in_the_manifest(tmp_path: Path) -> None:
    names = [f"run-{number}" for number in range(5)]
    runs = write_trajectories(tmp_path / "runs", [trajectory(name) for name in names])
    manifest = run_critic(runs, tmp_path / "labels", ListedCritic(failing=set(names)))
    assert manifest.counts["failures"] == 5
    expected = [f"{name}: the reply is no list" for name in names[:3]]
    assert manifest.data["first_failures"] == expected


def test_more_trajectories_are_added_to_a_directory(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    run_critic(runs, folder, ListedCritic())
    late = trajectory("late", num_steps=1)
    more = write_trajectories(tmp_path / "more", [*RUNS, late])
    critic = ListedCritic()
    run_critic(more, folder, critic)
    assert critic.asked == ["late"]
    assert labels_in(folder) == {**listed(*LABELLED), "late": ["good"]}


def test_copies_are_asked_once_paid_once_and_labelled_each(tmp_path: Path) -> None:
    copies = [trajectory(name, num_steps=4, text="the same") for name in ("one", "two")]
    assert copies[0].content_hash == copies[1].content_hash
    runs = write_trajectories(tmp_path / "runs", copies)
    critic = ListedCritic()
    manifest = run_critic(runs, tmp_path / "labels", critic)
    assert critic.asked == ["one"]
    assert counted(manifest) == {"asked": 1, "reused": 1}
    found = labels_in(tmp_path / "labels")
    assert found["one"] == found["two"] == [listed_label(step).label for step in range(4)]
    assert [row["usd"] for row in rows(tmp_path / "labels", "requests")] == [0.25, 0]
    assert collect(runs, labels=tmp_path / "labels")["all"]["usd"] == 0.25


def test_copies_are_asked_once_by_a_critic_that_reads_ahead(tmp_path: Path) -> None:
    runs = [trajectory(name, text="the same") for name in ("one", "two")]
    critic = OddCritic(change=iter)
    run_critic(write_trajectories(tmp_path / "runs", runs), tmp_path / "labels", critic)
    assert critic.asked == ["one"]


def test_replies_may_come_in_any_order(runs: Path, tmp_path: Path) -> None:
    def shuffled(replies: list[CriticReply]) -> Iterable[CriticReply]:
        mixed = [replace(each, labels=each.labels[::-1]) for each in replies]
        return random.Random(3).sample(mixed, len(mixed))

    run_critic(runs, tmp_path / "plain", ListedCritic())
    run_critic(runs, tmp_path / "mixed", OddCritic(change=shuffled))
    for name in ("labels", "requests"):
        assert rows(tmp_path / "plain", name) == rows(tmp_path / "mixed", name)


def relabelled(
    change: Callable[[tuple[StepLabel, ...]], tuple[StepLabel, ...]],
) -> Callable[[list[CriticReply]], Iterable[CriticReply]]:
    """Change the labels of `failed` only."""

    def apply(replies: list[CriticReply]) -> Iterator[CriticReply]:
        for reply in replies:
            odd = reply.request.trajectory.trajectory_id == "failed"
            yield replace(reply, labels=change(reply.labels)) if odd else reply

    return apply


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda labels: labels[:-1], "one label for each of 8 steps, got [0, 1, 2, 3, 4, 5, 6]"),
        (lambda labels: (), "one label for each of 8 steps, got []"),
        (lambda labels: (*labels, replace(labels[0], step_index=8)), "6, 7, 8]"),
        (lambda labels: (*labels, labels[2]), "6, 7, 2]"),
        (lambda labels: (labels[1], *labels[1:]), "[1, 1, 2"),
        (lambda labels: (replace(labels[0], label="great"), *labels[1:]), "got great"),
    ],
    ids=["too few", "none", "one of no step", "two for one step", "a wrong step", "no label"],
)
def test_labels_that_are_not_those_asked_for_are_a_recorded_failure(
    runs: Path, tmp_path: Path, change: Any, reason: str
) -> None:
    folder = tmp_path / "labels"
    manifest = run_critic(runs, folder, OddCritic(change=relabelled(change)))
    assert manifest.counts["failures"] == 1
    assert labels_in(folder) == listed("solved", "unknown")
    failure = rows(folder, "requests")[1]
    assert failure["trajectory_id"] == "failed"
    assert reason in failure["failure"]
    assert failure["usd"] == 0.25


def test_labels_beside_a_failure_are_not_taken(runs: Path, tmp_path: Path) -> None:
    def fail(replies: list[CriticReply]) -> Iterable[CriticReply]:
        return [replace(reply, failure="cut short") for reply in replies]

    run_critic(runs, tmp_path / "labels", OddCritic(change=fail))
    assert rows(tmp_path / "labels") == []


def test_a_request_without_a_reply_is_a_failure_that_the_next_run_asks_again(
    runs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "labels"
    manifest = run_critic(runs, folder, OddCritic(change=lambda replies: replies[:1]))
    assert manifest.counts["failures"] == 2
    assert [row["failure"] for row in rows(folder, "requests")] == [
        None,
        "unasked: 8 of 8 steps: the critic gave no reply",
        "unasked: 4 of 4 steps: the critic gave no reply",
    ]
    again = ListedCritic()
    assert run_critic(runs, folder, again).counts["failures"] == 0
    assert again.asked == ["failed", "unknown"]


def test_what_came_back_before_a_backend_broke_is_not_asked_again(
    runs: Path, tmp_path: Path
) -> None:
    def break_after_one(replies: list[CriticReply]) -> Iterator[CriticReply]:
        yield replies[0]
        raise BackendError("the engine is gone")

    folder = tmp_path / "labels"
    with pytest.raises(BackendError, match="gone"):
        run_critic(runs, folder, OddCritic(change=break_after_one))
    assert not (folder / "manifest.json").exists()
    with pytest.raises(ShardError, match="unfinished"):
        verify(folder)
    again = ListedCritic()
    run_critic(runs, folder, again)
    assert again.asked == ["failed", "unknown"]
    assert labels_in(folder) == listed(*LABELLED)


def test_a_damaged_ledger_line_is_counted_and_asked_again(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    run_critic(runs, folder, ListedCritic())
    [path] = ledger_files(folder)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b'"good"', b'"g00d"') + lines[2])
    again = ListedCritic()
    manifest = run_critic(runs, folder, again)
    assert again.asked == ["failed"]
    assert manifest.run["damaged_ledger_lines"] == 1
    assert labels_in(folder) == listed(*LABELLED)


def test_ledgers_of_several_runs_in_one_directory_leave_nothing_to_ask(
    runs: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    for only in ("resolved", "unresolved"):
        run_critic(runs, tmp_path / only, ListedCritic(), only=only)
        [ledger] = ledger_files(tmp_path / only)
        (merged / f"ledger-{only}.jsonl").write_bytes(ledger.read_bytes())
    critic = ListedCritic()
    run_critic(runs, merged, critic)
    assert critic.asked == []
    assert labels_in(merged) == listed(*LABELLED)


def test_a_directory_of_something_else_is_not_written_to(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        run_critic(runs, folder, ListedCritic())
    with pytest.raises(ConfigError, match="a directory of label, this is one of ingest"):
        run_critic(runs, runs, ListedCritic())


def scripted_file(path: Path, names: list[str]) -> Path:
    lines = [
        {"trajectory_id": run.trajectory_id, "step_index": step, "label": listed_label(step).label}
        for run in RUNS
        if run.trajectory_id in names
        for step in range(run.num_steps)
    ]
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return path


def test_labels_that_cannot_be_written_to_are_of_use_where_nothing_is_to_be_done(
    runs: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    output = disk / "labels"
    first = run_critic(runs, output, ListedCritic())
    more = write_trajectories(tmp_path / "more", (*RUNS, trajectory("late", num_steps=3)))
    with read_only(disk):
        critic = ListedCritic()
        again = run_critic(runs, output, critic)
        assert critic.asked == []
        assert again.data == first.data
        assert again.run["reused"] == 3
        assert again.run["usage"] == dict.fromkeys(first.run["usage"], 0)
        for source, settings in ((more, {}), (runs, {"only": "resolved"})):
            other = ListedCritic()
            with pytest.raises(ConfigError, match=r"labels: .*written to .*Read-only file system"):
                run_critic(source, output, other, **settings)
            assert other.asked == []


def test_what_failed_is_not_asked_again_where_the_answer_could_not_be_kept(
    runs: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    output = disk / "labels"
    run_critic(runs, output, ListedCritic(failing={"failed"}))
    with read_only(disk):
        critic = ListedCritic()
        with pytest.raises(ConfigError, match="written to, and there is something to ask"):
            run_critic(runs, output, critic, retry_failed=True)
        assert critic.asked == []
        assert run_critic(runs, output, critic).counts["failures"] == 1


def test_the_command_exits_with_1_where_requests_failed(runs: Path, tmp_path: Path) -> None:
    script = scripted_file(tmp_path / "labels.jsonl", ["solved", "unknown"])
    options = ("--critic", "scripted", "--model", script, "--only", "all", "--json")
    run = srft_prep("label", runs, "-o", tmp_path / "labels", *options)
    assert run.status == 1
    document = orjson.loads(run.stdout.splitlines()[-1])
    assert (document["failures"], document["asked"]) == (1, 3)
    assert "failed: failed: labels.jsonl has no line of this trajectory" in run.stderr
    table = tmp_path / "labels" / "requests.parquet"
    assert run.stderr.endswith(f"all failures: {table}; --retry-failed asks again\n")
    assert labels_in(tmp_path / "labels") == listed("solved", "unknown")


def test_the_command_exits_with_0_where_all_have_labels(runs: Path, tmp_path: Path) -> None:
    script = scripted_file(tmp_path / "labels.jsonl", LABELLED)
    options = ("--critic", "scripted", "--model", script, "--only", "all")
    run = srft_prep("label", runs, "-o", tmp_path / "labels", *options)
    assert (run.status, run.stderr) == (0, "")
    assert labels_in(tmp_path / "labels") == listed(*LABELLED)


def test_the_command_replaces_another_critics_tables_only_with_overwrite(
    runs: Path, tmp_path: Path
) -> None:
    words = ("label", runs, "-o", tmp_path / "labels", "--only", "all")
    assert srft_prep(*words).status == 0
    script = scripted_file(tmp_path / "labels.jsonl", LABELLED)
    other = (*words, "--critic", "scripted", "--model", script)
    refused = srft_prep(*other)
    assert refused.status == 2
    assert "holds labels of rules@" in refused.stderr
    assert "say --overwrite to write the tables of scripted@" in refused.stderr
    assert srft_prep(*other, "--overwrite").status == 0
    assert labels_in(tmp_path / "labels") == listed(*LABELLED)
    assert len(ledger_files(tmp_path / "labels")) == 2
