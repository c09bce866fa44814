import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest

from srft_prep.errors import LabelError, ShardError
from srft_prep.statistics import NUM_PLACES, STEP_EDGES, TOKEN_EDGES, bin_names, collect
from srft_prep.statistics_report import group_table, more_tables, table, table_1
from srft_prep.types import Trajectory
from tests.conftest import Golden
from tests.page_reader import read_page
from tests.stages import (
    Examples,
    ListedCritic,
    label_row,
    labels_by,
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


def test_the_numbers_are_those_of_the_files_counted_again(examples: Examples) -> None:
    numbers = collect(examples.trajectories, labels=examples.labels, tokens=examples.tokens)
    runs = pl.read_parquet(examples.trajectories / "part-*.parquet").to_dicts()
    labels = pl.read_parquet(examples.labels / "labels.parquet").to_dicts()
    requests = pl.read_parquet(examples.labels / "requests.parquet").to_dicts()
    lengths = pl.read_parquet(examples.tokens / "part-*.parquet").to_dicts()
    assert list(numbers) == [*OUTCOMES, "format", "model", "labels_left_out"]
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
    elsewhere = trajectory("elsewhere")
    rows.append(label_row(elsewhere, 0, "good"))
    labels = write_labels(tmp_path / "labels", rows)
    numbers = collect(runs, labels=labels)
    assert numbers["all"]["labels"] == {"good": 3, "unnecessary": 0, "harmful": 0}
    assert numbers["labels_left_out"] == {"stale": 3, "elsewhere": 1}
    run = srft_prep("stats", runs, "--labels", labels, "--html", tmp_path / "page.html")
    page = read_page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    for text in (run.stdout, page):
        assert "left out: 3 labels of other versions of these trajectories" in text
        assert "left out: 1 labels of other trajectories" in text


@pytest.mark.parametrize("label", ["evil", "\x1b[31m"])
def test_a_label_that_is_none_is_refused(tmp_path: Path, label: str) -> None:
    runs = write_trajectories(tmp_path / "runs", RUNS)
    rows = [*labels_by(RUNS, {"solved": ("good",) * 3}), label_row(RUNS[1], 0, label)]
    labels = write_labels(tmp_path / "labels", rows)
    with pytest.raises(
        LabelError, match="expected labels good, unnecessary, harmful, got"
    ) as error:
        collect(runs, labels=labels)
    assert "\x1b" not in str(error.value)


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


def test_the_same_numbers_stand_by_format_and_by_model(tmp_path: Path) -> None:
    owners = ("a", "a", "b", None)
    runs = [
        replace(trajectory(f"run {i}", resolved=i % 2 == 0, num_steps=i + 1), model=model)
        for i, model in enumerate(owners)
    ]
    folder = write_trajectories(tmp_path / "runs", runs)
    given = {run.trajectory_id: ("harmful",) * run.num_steps for run in runs[1:]}
    labels = write_labels(tmp_path / "labels", labels_by(runs, given))
    numbers = collect(folder, labels=labels)
    assert list(numbers["format"]) == ["messages"]
    assert numbers["format"]["messages"] == {name: numbers[name] for name in OUTCOMES}
    assert list(numbers["model"]) == ["a", "(not recorded)", "b"]
    for name, expected in (("a", runs[:2]), ("b", runs[2:3]), ("(not recorded)", runs[3:])):
        folder = write_trajectories(tmp_path / f"runs {name}", expected)
        alone = collect(
            folder,
            labels=write_labels(tmp_path / f"labels {name}", labels_by(expected, given)),
        )
        assert numbers["model"][name] == {outcome: alone[outcome] for outcome in OUTCOMES}


def middles(runs: Iterable[Trajectory]) -> Counter[int]:
    """Return how many steps have their middle in each tenth of their trajectory."""
    return Counter(
        int((step + 0.5) / run.num_steps * 10) for run in runs for step in range(run.num_steps)
    )


def test_labels_are_counted_by_place_and_by_number_of_steps(tmp_path: Path) -> None:
    runs = [trajectory(f"run {n}", num_steps=n, resolved=n % 2 == 0) for n in (1, 3, 10, 11, 41)]
    folder = write_trajectories(tmp_path / "runs", runs)
    rows = [
        label_row(run, step, "harmful" if step == 0 else "good")
        for run in runs
        for step in range(run.num_steps)
    ]
    numbers = collect(folder, labels=write_labels(tmp_path / "labels", rows))
    places = numbers["all"]["by_place"]
    assert [sum(labels.values()) for labels in places] == [middles(runs)[n] for n in range(10)]
    # the first of 1, 3, 10, 11 and 41 steps
    assert [labels["harmful"] for labels in places] == [3, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    sizes = dict(zip(bin_names(STEP_EDGES), numbers["all"]["by_steps"], strict=True))
    assert {name: each["trajectories"] for name, each in sizes.items() if each["trajectories"]} == {
        "0-10": 3,
        "11-20": 1,
        "41-60": 1,
    }
    assert sizes["0-10"]["labels"] == {"good": 11, "unnecessary": 0, "harmful": 3}
    assert sizes["41-60"]["labels"] == {"good": 40, "unnecessary": 0, "harmful": 1}
    of_one = [numbers[name]["by_place"] for name in ("resolved", "unresolved", "unknown")]
    for place in range(NUM_PLACES):
        assert sum((Counter(each[place]) for each in of_one), Counter()) == +Counter(places[place])


def test_a_label_behind_the_last_step_counts_at_the_end(tmp_path: Path) -> None:
    run = trajectory("run", num_steps=2)
    folder = write_trajectories(tmp_path / "runs", [run])
    labels = write_labels(tmp_path / "labels", [label_row(run, 7, "harmful")])
    assert collect(folder, labels=labels)["all"]["by_place"][-1]["harmful"] == 1


def test_lengths_and_the_share_above_the_papers_are_counted(tmp_path: Path) -> None:
    runs = [trajectory(f"run {n}") for n in range(4)]
    folder = write_trajectories(tmp_path / "runs", runs)
    rows = [
        token_row(run, gap=gap) for run, gap in zip(runs, (4, 10_916, 10_917, 100_000), strict=True)
    ]
    # three gaps, three steps of 6 tokens and one more
    assert [len(row.input_ids) for row in rows] == [31, 32_767, 32_770, 300_019]
    numbers = collect(folder, tokens=write_tokens(tmp_path / "tokens", rows))["all"]
    assert (numbers["overlong"], numbers["overlong_share"]) == (2, 0.5)
    found = dict(zip(bin_names(TOKEN_EDGES), numbers["by_tokens"], strict=True))
    assert {name: count for name, count in found.items() if count} == {
        "0-1,024": 1,
        "16,385-32,768": 1,
        "32,769-65,536": 1,
        "> 262,144": 1,
    }


def test_what_a_trajectory_cost_is_summed_over_its_requests(tmp_path: Path) -> None:
    runs = write_trajectories(tmp_path / "runs", RUNS)
    run_critic(runs, tmp_path / "labels", ListedCritic())
    costs = collect(runs, labels=tmp_path / "labels")["all"]["per_trajectory"]
    assert costs["usd"] == {"mean": 0.25, "median": 0.25, "p90": 0.25, "max": 0.25}
    assert costs["tokens"]["max"] == 110


@pytest.mark.parametrize("by", ["format", "model"])
def test_by_puts_a_row_for_each_and_full_adds_the_other_tables(
    examples: Examples, golden: Golden, by: str
) -> None:
    command = ("stats", examples.trajectories, "--labels", examples.labels)
    run = srft_prep(*command, "--tokens", examples.tokens, "--by", by, "--full")
    assert (run.status, run.stderr) == (0, "")
    golden.check(f"stats-by-{by}.txt", run.stdout)


HOSTILE = "</svg><script>alert(1)</script>$x^{$\x1b[2J\u202e&\"'"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("hostile")
    runs = [replace(run, model=HOSTILE, format=HOSTILE) for run in RUNS]
    trajectories = write_trajectories(folder / "runs", runs)
    labels = labels_by(runs, {"failed": ("good", "unnecessary", "harmful")})
    tokens = write_tokens(folder / "tokens", [token_row(run) for run in runs])
    return [
        *("stats", trajectories, "--labels", write_labels(folder / "labels", labels)),
        *("--tokens", tokens),
    ]


def test_a_models_name_commands_neither_a_terminal_nor_a_page(
    hostile: list[object], tmp_path: Path
) -> None:
    file = tmp_path / "made" / "page.html"
    run = srft_prep(*hostile, "--by", "model", "--html", file)
    assert (run.status, run.stderr) == (0, "")
    shown = "</svg><script>alert(1)</script>$x^{$\\x1b[2J\\u202e&\"'"
    assert shown in run.stdout
    page = read_page(file.read_text(encoding="utf-8"))
    assert page.problems() == []
    assert page.text.count(shown) == 2


def test_the_page_has_every_table_and_a_plot_with_words_for_each_of_three(
    examples: Examples, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    command = ("stats", examples.trajectories, "--labels", examples.labels)
    run = srft_prep(*command, "--tokens", examples.tokens, "--html", file)
    assert run.stdout == srft_prep(*command, "--tokens", examples.tokens).stdout
    text = file.read_text(encoding="utf-8")
    page = read_page(text)
    assert page.problems() == []
    numbers = collect(examples.trajectories, labels=examples.labels, tokens=examples.tokens)
    tables = [table_1(numbers), group_table(numbers, "format"), group_table(numbers, "model")]
    for each in (*tables, *more_tables(numbers)):
        assert all("".join(row) in page.text for row in (each.head, *each.rows))
    pictures = [found for tag, found in page.elements if tag == "svg"]
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(pictures) == 3
    for picture in pictures:
        assert picture["role"] == "img"
        assert set((picture["aria-labelledby"] or "").split()) <= set(ids)
    assert len(ids) == len(set(ids))
    assert "<script" not in text
    # every colour of a plot is the page's, so that it can be read in light and dark
    assert "#" not in "".join(found.get("style") or "" for _, found in page.elements).replace(
        "url(#", ""
    )
    assert srft_prep(*command, "--tokens", examples.tokens, "--html", file).status == 0
    assert file.read_text(encoding="utf-8") == text


def test_a_data_set_without_labels_or_without_anything_makes_a_page(
    examples: Examples, tmp_path: Path
) -> None:
    empty = write_trajectories(tmp_path / "runs", [])
    for folder in (examples.trajectories, empty):
        run = srft_prep("stats", folder, "--html", tmp_path / "page.html")
        assert (run.status, run.stderr) == (0, "")
        assert "trajectories" in read_page((tmp_path / "page.html").read_text()).text
        (tmp_path / "page.html").unlink()


def test_without_matplotlib_a_page_is_refused_with_what_to_install(
    examples: Examples, tmp_path: Path
) -> None:
    program = "import sys; sys.modules['matplotlib'] = None; from srft_prep.cli import main; main()"
    command = ("stats", str(examples.trajectories), "--html", str(tmp_path / "page.html"))
    run = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert "--html: plots need matplotlib" in run.stderr
    assert "pip install 'srft-prep[plots]'" in run.stderr
    assert not (tmp_path / "page.html").exists()
