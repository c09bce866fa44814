"""critic-eval as a user runs it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from srft_prep.calibration import read_calibration
from tests.evaluate.critic_sets import Planted, write_gold
from tests.stages import label_row, srft_prep, write_labels, write_trajectories

FAST = ("--samples", 200)


def test_labels_and_gold_alone_are_enough(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=6)
    found = srft_prep("critic-eval", "--labels", study.labels, "--gold", study.gold_file)
    assert found.status == 0, found.stderr
    for word in ("hand@1", "flag all", "flag nothing", "flag last", "no critic", "precision"):
        assert word in found.stdout
    assert "the trajectories were not found" in found.stdout


def test_the_report_reads_as_agreed(tmp_path: Path, golden) -> None:
    study = Planted(tmp_path, tasks=10, skill=2.5, unnecessary=True)
    rows = [
        label_row(owner, step, "good" if step % 3 else "harmful")
        for owner in study.trajectories
        for step in range(owner.num_steps)
    ]
    thirds = write_labels(tmp_path / "thirds", rows)
    found = srft_prep(
        *("critic-eval", "--labels", f"hand@1={study.labels}", "--gold", study.gold_file),
        *("--trajectories", study.root / "trajectories", "--labels", f"every third={thirds}"),
        *("--disagreements", tmp_path / "dis.jsonl"),
        *("--calibrate", "-o", tmp_path / "cal.json"),
        *FAST,
    )
    assert found.status == 0, found.stderr
    golden.check("critic-eval.txt", found.stdout.replace(str(tmp_path), "DIR"))
    lines = (tmp_path / "dis.jsonl").read_bytes().splitlines()
    assert f"{len(lines)} disagreements written" in found.stdout
    first = orjson.loads(lines[0])
    assert first["labels"].keys() == {"hand@1", "every third"}
    assert first["gold"] == study.gold[first["trajectory_id"], first["step_index"]]


def test_the_last_line_of_json_has_every_number(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=6)
    found = srft_prep(*study.words, *FAST, "--calibrate", "-o", tmp_path / "c.json", "--json")
    document = orjson.loads(found.stdout.splitlines()[-1])
    row = document["evaluation"]["rows"][0]
    assert row["name"] == "hand@1"
    assert set(row["harmful"]) == {
        *("precision", "recall", "f1", "accuracy", "kappa", "average_precision")
    }
    assert row["harmful"]["f1"].keys() == {"value", "low", "high"}
    assert sum(map(sum, row["confusion"])) == 48
    assert document["calibration"]["chosen"] in found.stdout
    assert read_calibration(tmp_path / "c.json").fitted_on.steps == 48


def test_only_one_annotators_labels_count_where_one_is_named(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=6)
    mine = write_gold(tmp_path / "mine.jsonl", study.gold, annotator="ada")
    other = dict.fromkeys(list(study.gold)[:10], "harmful")
    theirs = write_gold(tmp_path / "theirs.jsonl", other, annotator="bob")
    words = ("critic-eval", "--labels", study.labels, "--gold", mine, "--gold", theirs, *FAST)
    both = srft_prep(*words)
    differ = sum(study.gold[key] != "harmful" for key in other)
    assert f"left out: {differ} steps that annotators label differently" in both.stdout
    alone = srft_prep(*words, "--annotator", "ada")
    assert "48 gold steps of 6 trajectories" in alone.stdout
    nobody = srft_prep(*words, "--annotator", "eve")
    assert nobody.status == 2
    assert "expected labels by 'eve'" in nobody.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--calibrate"], "--calibrate and -o FILE go together"),
        (["-o", "c.json"], "--calibrate and -o FILE go together"),
        (["--labels", "nowhere"], "nowhere does not exist"),
        (["--labels", "a=nowhere"], "nowhere does not exist"),
        (["--labels", "=nowhere"], "expected NAME=PATH"),
        (["--gold", "nowhere"], "does not exist"),
        (["--samples", "3"], "is not in the range"),
    ],
)
def test_wrong_words_are_explained(tmp_path: Path, words: list[str], expected: str) -> None:
    study = Planted(tmp_path, tasks=2)
    found = srft_prep(*study.words, *words)
    assert found.status == 2
    assert expected in found.stderr


def test_a_folder_that_is_no_labels_is_refused(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=2)
    words = ("--labels", study.root / "trajectories", "--gold", study.gold_file)
    found = srft_prep("critic-eval", *words)
    assert found.status == 2
    assert "expected the output of label, this is one of ingest" in found.stderr


def test_gold_of_one_task_is_judged_without_the_no_critic_row(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=2)
    one = write_gold(tmp_path / "one.jsonl", {("run-00", 0): "harmful", ("run-00", 1): "good"})
    words = ("critic-eval", "--labels", study.labels, "--gold", one, *FAST)
    found = srft_prep(*words)
    assert found.status == 0, found.stderr
    assert "flag all" in found.stdout
    assert "note: no critic: needs gold labels of two tasks, got 1" in found.stdout
    assert "Is it worth asking" not in found.stdout
    refused = srft_prep(*words, "--calibrate", "-o", tmp_path / "cal.json")
    assert refused.status == 2
    assert "5 or more gold steps that are harmful" in refused.stderr
    half = {key: label for key, label in study.gold.items() if key[0] == "run-00"}
    half |= {("run-00", step): "harmful" for step in range(3)}
    half |= {("run-00", step): "good" for step in range(3, 8)}
    refused = srft_prep(
        *("critic-eval", "--labels", study.labels, *FAST),
        *("--gold", write_gold(tmp_path / "half.jsonl", half)),
        *("--calibrate", "-o", tmp_path / "cal.json"),
    )
    assert refused.status == 2
    assert "got 3 and 5; label more" in refused.stderr


def test_labels_given_with_others_in_view_are_told_and_left_out_if_so_wished(
    tmp_path: Path,
) -> None:
    study = Planted(tmp_path, tasks=2)
    blind = {key: label for key, label in study.gold.items() if key[1] < 5}
    seen = {key: label for key, label in study.gold.items() if key[1] >= 5}
    one = write_gold(tmp_path / "one.jsonl", blind, annotator="ada", blind=True)
    two = write_gold(tmp_path / "two.jsonl", seen, annotator="ada", blind=False)
    words = ("critic-eval", "--labels", study.labels, "--gold", one, "--gold", two, *FAST)
    found = srft_prep(*words)
    assert "note: 6 of 16 gold labels were given with others' labels in view" in found.stdout
    found = srft_prep(*words, "--blind-only")
    assert "10 gold steps of 2 trajectories" in found.stdout
    assert "left out: 6 gold labels that were given with others' labels in view" in found.stdout


def test_no_input_and_no_file_of_others_is_overwritten(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=2)
    before = study.gold_file.read_bytes()
    for words in (
        ("--calibrate", "-o", study.gold_file),
        ("--disagreements", study.gold_file),
        ("--disagreements", tmp_path / "dis", "--calibrate", "-o", tmp_path / "dis"),
    ):
        found = srft_prep(*study.words, *FAST, *words)
        assert found.status == 2
        assert "which this command reads or writes; choose another path" in found.stderr
    assert study.gold_file.read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    found = srft_prep(*study.words, *FAST, "--disagreements", tmp_path / "notes.txt")
    assert found.status == 2
    assert "choose another, or delete it" in found.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"
    words = (*study.words, *FAST, "--disagreements", tmp_path / "dis.jsonl")
    assert srft_prep(*words).status == 0
    again = srft_prep(*words)
    assert again.status == 0
    assert f"written to {tmp_path / 'dis.jsonl'} (in place of an earlier one)" in again.stdout


def test_without_scikit_learn_the_line_that_installs_it_is_said(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=3)
    (tmp_path / "empty" / "sklearn").mkdir(parents=True)
    (tmp_path / "empty" / "sklearn" / "__init__.py").write_text("raise ImportError('absent')\n")
    run = subprocess.run(
        [sys.executable, "-m", "srft_prep", *map(str, study.words), "--samples", "200"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(tmp_path / "empty")},
    )
    assert run.returncode == 2
    assert "pip install 'srft-prep[eval]'" in run.stderr


def two_people(root: Path) -> tuple[Planted, Path]:
    """A study, and one file in which ada labels as gold has it and bob labels all good."""
    study = Planted(root, tasks=6)
    by_ada = write_gold(root / "ada.jsonl", study.gold, annotator="ada", reason="so it was")
    by_bob = write_gold(root / "bob.jsonl", dict.fromkeys(study.gold, "good"), annotator="bob")
    both = root / "both.jsonl"
    both.write_bytes(by_ada.read_bytes() + by_bob.read_bytes())
    return study, both


def test_one_annotators_labels_are_held_against_anothers(tmp_path: Path) -> None:
    _, both = two_people(tmp_path)
    words = ("critic-eval", "--gold", both, "--annotator", "bob", *FAST, "--json")
    found = srft_prep(*words, "--labels", f"ada={both}")
    assert found.status == 0, found.stderr
    row = orjson.loads(found.stdout.splitlines()[-1])["evaluation"]["rows"][0]
    assert row["name"] == "ada"
    assert sum(row["confusion"][0]) == 48, "bob calls all good"
    assert sum(map(sum, row["confusion"][1:])) == 0


def test_annotators_of_one_file_are_held_against_each_other_and_a_third(tmp_path: Path) -> None:
    study, both = two_people(tmp_path)
    words = ("critic-eval", "--gold", study.gold_file, *FAST, "--json")
    found = srft_prep(*words, "--labels", f"ada={both}", "--labels", f"bob={both}")
    assert found.status == 0, found.stderr
    document = orjson.loads(found.stdout.splitlines()[-1])
    (pair,) = document["agreements"]
    assert (pair["first"], pair["second"], pair["steps"]) == ("ada", "bob", 48)
    again = srft_prep(*words, "--labels", f"ada={both}", "--labels", f"ada={both}")
    assert again.status == 2
    assert "is given twice" in again.stderr


def test_whose_labels_of_several_must_be_said_and_not_be_their_own_gold(tmp_path: Path) -> None:
    _, both = two_people(tmp_path)
    words = ("critic-eval", "--gold", both, *FAST, "--labels")
    unsaid = srft_prep(*words, both, "--annotator", "bob")
    assert unsaid.status == 2
    assert "labels by ada, bob; say whose: --labels ada=" in unsaid.stderr
    for more in ((), ("--annotator", "ada")):
        own = srft_prep(*words, f"ada={both}", *more)
        assert own.status == 2
        assert "ada's labels are among the gold" in own.stderr
        assert "--annotator" in own.stderr


def test_a_file_is_not_held_against_itself(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=6)
    same = srft_prep("critic-eval", "--labels", study.gold_file, "--gold", study.gold_file, *FAST)
    assert same.status == 2
    assert "these labels are among the gold" in same.stderr


def test_one_persons_file_needs_no_name(tmp_path: Path) -> None:
    study, _ = two_people(tmp_path)
    words = ("critic-eval", "--gold", study.gold_file, *FAST, "--labels", tmp_path / "ada.jsonl")
    found = srft_prep(*words)
    assert found.status == 0, found.stderr
    assert "\nada " in found.stdout


@pytest.mark.parametrize(
    ("tasks", "words", "drawn", "count"),
    [
        (("a", "a", "b", "b", "c", "c"), (), "task", "3 tasks"),
        (("a", "a", "b", "b", "c", "c"), ("--cluster", "trajectory"), "trajectory", "6 traj"),
        (("",) * 6, (), "trajectory", "6 trajectories"),
        (("a", "a", "b", "b", "", ""), (), "task, or trajectory whose task is unknown", "4 tasks"),
        (("a",) * 6, (), "trajectory", "6 trajectories"),
    ],
)
def test_the_report_says_what_intervals_are_drawn_by(
    tmp_path: Path, tasks: tuple[str, ...], words: tuple[str, ...], drawn: str, count: str
) -> None:
    study = Planted(tmp_path, tasks=6)
    told = [
        replace(owner, instance_id=task)
        for owner, task in zip(study.trajectories, tasks, strict=True)
    ]
    write_trajectories(tmp_path / "trajectories", told)
    found = srft_prep(*study.words, *FAST, *words, "--json")
    assert found.status == 0, found.stderr
    assert f"a value and its 95% interval, drawn by {drawn}\n" in found.stdout
    assert f"note: {count}" in found.stdout
    document = orjson.loads(found.stdout.splitlines()[-1])
    assert document["evaluation"]["drawn_by"] == drawn
    one = "speak of that task alone"
    assert (one in found.stdout) == (len(set(tasks)) == 1 and tasks[0] == "a")
