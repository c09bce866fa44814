from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest

from srft_prep.errors import LabelError, ShardError
from srft_prep.statistics import collect, table
from tests.conftest import Golden
from tests.stages import (
    Examples,
    ListedCritic,
    labels_by,
    make_examples,
    run_critic,
    srft_prep,
    token_row,
    trajectory,
    write_labels,
    write_tokens,
    write_trajectories,
)

OUTCOMES: dict[str, Callable[[Any], bool]] = {
    "resolved": lambda resolved: resolved is True,
    "unresolved": lambda resolved: resolved is False,
    "unknown": lambda resolved: resolved is None,
    "all": lambda resolved: True,
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return make_examples(tmp_path_factory.mktemp("examples"))


def test_the_numbers_are_those_of_the_files_counted_again(examples: Examples) -> None:
    numbers = collect(examples.trajectories, labels=examples.labels, tokens=examples.tokens)
    runs = pl.read_parquet(examples.trajectories / "part-*.parquet").to_dicts()
    labels = pl.read_parquet(examples.labels / "labels.parquet").to_dicts()
    requests = pl.read_parquet(examples.labels / "requests.parquet").to_dicts()
    lengths = pl.read_parquet(examples.tokens / "part-*.parquet").to_dicts()
    assert numbers.keys() == OUTCOMES.keys()
    for outcome, belongs in OUTCOMES.items():
        names = {run["trajectory_id"] for run in runs if belongs(run["resolved"])}
        steps = [
            sum(message["kind"] == "action" for message in run["messages"])
            for run in runs
            if run["trajectory_id"] in names
        ]
        found = [row["label"] for row in labels if row["trajectory_id"] in names]
        asked = [row for row in requests if row["trajectory_id"] in names]
        tokens = [len(row["input_ids"]) for row in lengths if row["trajectory_id"] in names]
        expected = {
            "trajectories": len(names),
            "steps": sum(steps),
            "median_steps": pl.Series(steps, dtype=pl.Int64).median(),
            "labelled_steps": len(found),
            "labels": {name: found.count(name) for name in ("good", "unnecessary", "harmful")},
            "requests": len(asked),
            "failed_requests": sum(row["failure"] is not None for row in asked),
            "critic_tokens": 110 * len(asked),
            "usd": 0.25 * len(asked),
            "tokens": sum(tokens),
            "median_tokens": pl.Series(tokens, dtype=pl.Int64).median(),
            "max_tokens": max(tokens, default=None),
        }
        assert {name: numbers[outcome][name] for name in expected} == expected
        shares = {
            name: numbers[outcome][f"{name}_share"]
            for name in ("productive", "good", "unnecessary", "harmful")
        }
        if not found:
            assert set(shares.values()) == {None}
            continue
        assert shares["productive"] + shares["harmful"] == pytest.approx(1)
        assert shares["good"] + shares["unnecessary"] == pytest.approx(shares["productive"])
        assert shares["harmful"] == pytest.approx(found.count("harmful") / len(found))


def test_the_table_of_the_examples_reads_like_table_1(examples: Examples, golden: Golden) -> None:
    numbers = collect(examples.trajectories, labels=examples.labels, tokens=examples.tokens)
    golden.check("stats.txt", table(numbers) + "\n")


def test_without_labels_and_tokens_their_lines_are_absent(examples: Examples) -> None:
    text = table(collect(examples.trajectories))
    assert [line[:33].strip() for line in text.splitlines()] == [
        "",
        "trajectories",
        "steps",
        "steps in a trajectory, median",
    ]


def test_the_command_prints_the_table_and_with_json_the_numbers(examples: Examples) -> None:
    run = srft_prep("stats", examples.trajectories, "--labels", examples.labels, "--json")
    assert run.status == 0
    *lines, document = run.stdout.splitlines()
    numbers = collect(examples.trajectories, labels=examples.labels)
    assert "\n".join(lines) == table(numbers)
    assert orjson.loads(document) == orjson.loads(orjson.dumps(numbers))


RUNS = (
    trajectory("solved", resolved=True),
    trajectory("failed", resolved=False),
    trajectory("unknown", resolved=None),
)


def test_shares_are_of_the_labelled_steps_only(tmp_path: Path) -> None:
    runs = write_trajectories(tmp_path / "runs", RUNS)
    rows = labels_by(RUNS, {"failed": ("good", "unnecessary", "harmful")})
    numbers = collect(runs, labels=write_labels(tmp_path / "labels", rows))
    assert numbers["all"]["steps"] == 9
    assert numbers["all"]["labelled_steps"] == 3
    assert numbers["all"]["harmful_share"] == numbers["unresolved"]["harmful_share"] == 1 / 3
    assert numbers["resolved"]["harmful_share"] is None
    assert numbers["unknown"]["trajectories"] == 1


def test_labels_of_an_earlier_version_are_not_counted(tmp_path: Path) -> None:
    runs = write_trajectories(tmp_path / "runs", RUNS)
    rows = labels_by(RUNS, {"solved": ("good",) * 3, "failed": ("harmful",) * 3})
    for row in rows[3:]:
        row["content_hash"] = "0" * 32
    numbers = collect(runs, labels=write_labels(tmp_path / "labels", rows))
    assert numbers["all"]["labels"] == {"good": 3, "unnecessary": 0, "harmful": 0}


def test_labels_or_tokens_of_other_trajectories_are_an_error(tmp_path: Path) -> None:
    runs = write_trajectories(tmp_path / "runs", RUNS)
    other = trajectory("other")
    labels = write_labels(tmp_path / "labels", labels_by([other], {"other": ("good",) * 3}))
    with pytest.raises(LabelError, match="none of its labels belongs to these trajectories"):
        collect(runs, labels=labels)
    tokens = write_tokens(tmp_path / "tokens", [token_row(other)])
    with pytest.raises(ShardError, match="none of its tokens belongs to these trajectories"):
        collect(runs, tokens=tokens)


def test_failed_requests_are_counted_with_their_cost(tmp_path: Path) -> None:
    runs = write_trajectories(tmp_path / "runs", RUNS)
    run_critic(runs, tmp_path / "labels", ListedCritic(failing={"failed"}))
    numbers = collect(runs, labels=tmp_path / "labels")
    assert numbers["unresolved"]["failed_requests"] == 1
    assert numbers["unresolved"]["labelled_steps"] == 0
    assert numbers["all"]["usd"] == 0.75


def test_no_trajectories_make_a_table_of_zeros(tmp_path: Path) -> None:
    runs = write_trajectories(tmp_path / "runs", [])
    tokens = write_tokens(tmp_path / "tokens")
    labels = write_labels(tmp_path / "labels", [])
    numbers = collect(runs, labels=labels, tokens=tokens)
    assert numbers["all"]["trajectories"] == numbers["all"]["tokens"] == 0
    assert "0" in table(numbers)
