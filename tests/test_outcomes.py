"""Outcomes are read from every kind of report, and joined to the runs that they speak of."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from srft_prep.errors import ConfigError
from srft_prep.outcomes import Outcomes, outcomes_in, read_outcomes, truth

ID = "django__django-11999"


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else orjson.dumps(value))
    return path


def find(outcomes: Outcomes, path: Path, instance: str = ID, trajectory: str = "t") -> set[bool]:
    return outcomes.find(instance_id=instance, trajectory_id=trajectory, path=path)


@pytest.mark.parametrize(
    ("value", "pairs"),
    [
        ({"resolved_ids": ["a"], "unresolved_ids": ["b"]}, [("a", True), ("b", False)]),
        ({"resolved": ["a"], "no_generation": ["c"]}, [("a", True), ("c", False)]),
        ({"ids_resolved": ["a"], "empty_patch_ids": ["c"]}, [("a", True), ("c", False)]),
        ({"resolved_ids": [], "error_ids": ["x"], "incomplete_ids": ["y"]}, []),
        ({"a": {"resolved": True}, "b": {"resolved": False}}, [("a", True), ("b", False)]),
        ({"a": {"resolved": True, "tests_status": {}}}, [("a", True)]),
        ({"resolved": True, "tests_status": {}}, [(ID, True)]),
        ({"instance_id": "a", "resolved": False}, [("a", False)]),
        ({"instance_id": "a", "resolved": "true", "model": "m"}, [("a", True)]),
        ({"traj_id": "t", "instance_id": "a", "resolved": 0}, [("t", False)]),
        ({"instance_id": "a", "resolved": None}, None),
        ({"instance_id": "a", "resolved": True, "messages": []}, None),
        ({"instance_id": "a", "resolved": True, "note": "a run of another format"}, None),
        ({"a": {"resolved": True}, "b": {"other": 1}}, None),
        ({"resolved": True}, None),
        ({}, None),
        ([], None),
        (None, None),
        (5, None),
    ],
)
def test_every_form_of_a_report_is_understood_and_nothing_else(
    value: Any, pairs: list[tuple[str, bool]] | None
) -> None:
    assert outcomes_in(value, path=Path("logs") / ID / "report.json") == pairs


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        *((word, True) for word in (True, 1, 1.0, "1", "true", "True", "YES")),
        *((word, False) for word in (False, 0, 0.0, "0", "false", "False", "no")),
        *((word, None) for word in (None, "", "maybe", 2, -1, [], {}, "unknown")),
    ],
)
def test_an_outcome_is_a_boolean_a_bit_or_a_word(value: Any, outcome: bool | None) -> None:
    assert truth(value) is outcome


def test_a_run_summary_speaks_only_of_the_runs_in_its_folder(tmp_path: Path) -> None:
    runs = [tmp_path / name / f"{ID}.traj.json" for name in ("first", "second", "third")]
    write(tmp_path / "model.first.json", {"resolved_ids": [ID]})
    write(tmp_path / "model.second.json", {"resolved_ids": [], "unresolved_ids": [ID]})
    outcomes = read_outcomes([str(tmp_path)], sources=runs)
    assert [find(outcomes, run) for run in runs] == [{True}, {False}, set()]


def test_a_run_summary_of_no_known_folder_speaks_of_all_runs(tmp_path: Path) -> None:
    run = tmp_path / "runs" / f"{ID}.traj"
    write(tmp_path / "model.2025-01-01.json", {"resolved_ids": [ID]})
    outcomes = read_outcomes([str(tmp_path)], sources=[run])
    assert find(outcomes, run) == {True}
    assert find(outcomes, run, instance="django__django-1") == set()


def test_the_nearest_report_wins(tmp_path: Path) -> None:
    runs = [tmp_path / name / "trajs" / ID / f"{ID}.traj.json" for name in ("a", "b", "c")]
    write(tmp_path / "a" / "logs" / ID / "report.json", {ID: {"resolved": True}})
    write(tmp_path / "b" / "logs" / ID / "report.json", {ID: {"resolved": False}})
    outcomes = read_outcomes([str(tmp_path)], sources=runs)
    assert [find(outcomes, run) for run in runs] == [{True}, {False}, {True, False}]


def test_a_report_without_an_id_speaks_of_the_instance_of_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "logs" / ID / "report.json", {"resolved": True, "patch_exists": True})
    run = tmp_path / "trajs" / f"{ID}.traj"
    assert find(read_outcomes([str(tmp_path)], sources=[run]), run) == {True}


def test_reports_that_disagree_are_both_returned(tmp_path: Path) -> None:
    path = write(
        tmp_path / "outcomes.jsonl",
        b'{"instance_id": "%(i)s", "resolved": true}\n{"instance_id": "%(i)s", "resolved": false}'
        % {b"i": ID.encode()},
    )
    outcomes = read_outcomes([str(path)], sources=[])
    assert find(outcomes, tmp_path / "x.traj") == {True, False}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("o.csv", b"instance_id,resolved\na,True\nb,0\nc,\n"),
        ("o.csv", b"\xef\xbb\xbfresolved,score,instance_id\r\nyes,0.1,a\r\nno,,b\r\nnan,,c\r\n"),
        ("o.jsonl", b'{"instance_id": "a", "resolved": true, "score": 1}\n\n'
         b'{"instance_id": "b", "resolved": 0}\n{"instance_id": "c", "resolved": null}\n'),
        ("o.json", b'[{"instance_id": "a", "resolved": 1},'
         b'{"instance_id": "b", "resolved": "no"}]'),
    ],
)  # fmt: skip
def test_a_table_of_outcomes_is_csv_or_json(name: str, data: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / name, data)
    outcomes = read_outcomes([str(path)], sources=[])
    found = [find(outcomes, tmp_path / "x.traj", instance=each) for each in "abc"]
    assert found == [{True}, {False}, set()]


def test_a_table_with_trajectory_ids_speaks_of_single_runs(tmp_path: Path) -> None:
    data = f"trajectory_id,instance_id,resolved\nrun-1,{ID},true\nrun-2,{ID},false\n"
    path = write(tmp_path / "o.csv", data.encode())
    outcomes = read_outcomes([str(path)], sources=[])
    found = [find(outcomes, tmp_path / "x", trajectory=f"run-{n}") for n in (1, 2, 3)]
    assert found == [{True}, {False}, set()]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("o.csv", b"instance_id,resolved\na,true\nb,maybe\n", "o.csv:3: resolved: expected true"),
        ("o.csv", b"instance_id,resolved\na,\xff\n", "o.csv:1: expected CSV in UTF-8"),
        ("o.jsonl", b'{"instance_id": "a", "resolved": true}\n{"insta', "o.jsonl:2: not JSON"),
        ("o.jsonl", b'{"instance_id": "a", "resolved": "solved"}', "o.jsonl:1: resolved: expected"),
        ("o.json", b"{", "o.json: not JSON"),
        ("o.json", b'{"a": 1}', "o.json: no outcomes found: expected a SWE-bench report.json"),
        ("o.csv", b"id,solved\na,true\n", "o.csv: no outcomes found"),
        ("o.csv", b"", "o.csv: no outcomes found"),
    ],
)
def test_a_named_file_that_cannot_be_read_to_its_end_stops_at_once(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(ConfigError) as error:
        read_outcomes([str(path)], sources=[])
    assert str(error.value).startswith(f"{tmp_path}/{message}")


def test_a_folder_without_outcomes_and_a_missing_one_stop_at_once(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "a.json", {"messages": []})
    with pytest.raises(ConfigError, match="no outcomes found"):
        read_outcomes([str(tmp_path / "runs")], sources=[])
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_outcomes([str(tmp_path / "gone")], sources=[])


def test_a_damaged_file_of_a_folder_is_counted_and_the_others_are_read(tmp_path: Path) -> None:
    write(tmp_path / "a" / "report.json", {"a": {"resolved": True}})
    write(tmp_path / "b" / "report.json", b'{"b": {"resolved":')
    write(tmp_path / "notes.csv", b"caf\xe9,1\n2,3\n")
    outcomes = read_outcomes([str(tmp_path)], sources=[])
    assert find(outcomes, tmp_path / "x", instance="a") == {True}
    assert outcomes.num_damaged_files == 2
