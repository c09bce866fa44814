"""Raw runs become trajectories: which are taken, what joins them, in bounded memory."""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.config import IngestConfig, parse_sample
from srft_prep.errors import ConfigError
from srft_prep.exclusion import read_exclusions
from srft_prep.ingest import ingest
from srft_prep.manifest import Manifest

WORDS = ("resolved", "unresolved", "unknown")
RUNS = Path(__file__).resolve().parents[1] / "srft_prep" / "examples" / "runs"


def run(number: int, *, instance: str = "a__b-1", **others: Any) -> dict[str, Any]:
    """Return a raw run that differs from those of other numbers."""
    return {
        "traj_id": f"run-{number}",
        "instance_id": instance,
        "messages": [
            {"role": "system", "content": "You are an agent."},
            {"role": "user", "content": f"Ticket {number}"},
            {"role": "assistant", "content": "ls"},
        ],
        **others,
    }


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    return path


def take(source: Path, output: Path, *, outcomes: Iterable[Path] = (), **settings: Any) -> Manifest:
    return ingest(
        [str(source)],
        output,
        IngestConfig(**settings),
        outcomes=[str(each) for each in outcomes],
        overwrite=True,
    )


def rows_of(manifest: Manifest) -> list[dict[str, Any]]:
    return [row for part in manifest.parts for row in pq.read_table(part).to_pylist()]


def ids_of(manifest: Manifest) -> list[str]:
    return [row["trajectory_id"] for row in rows_of(manifest)]


def rejected_of(manifest: Manifest) -> list[dict[str, Any]]:
    lines = (manifest.path / "rejected.jsonl").read_bytes().splitlines()
    return [orjson.loads(line) for line in lines]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Runs of two outcomes and none, spread over three files."""
    outcomes = [True, False, False, None]
    rows = [run(n, resolved=outcomes[n % 4], instance=f"a__b-{n % 10}") for n in range(120)]
    for number, name in enumerate(("b.jsonl", "a.jsonl", "c/d.jsonl")):
        write_lines(tmp_path / "runs" / name, rows[number::3])
    return tmp_path / "runs"


def test_a_sample_has_exactly_the_numbers_asked_for(mixed: Path, tmp_path: Path) -> None:
    sample = {"resolved": 7, "unresolved": 20, "unknown": 1}
    manifest = take(mixed, tmp_path / "out", sample=sample)
    assert Counter(row["resolved"] for row in rows_of(manifest)) == {True: 7, False: 20, None: 1}
    assert manifest.counts["outcomes"] == sample
    assert manifest.counts["not_sampled_resolved"] == 23
    assert manifest.counts["missing_for_sample_resolved"] == 0


def test_an_outcome_that_is_not_named_is_not_sampled(mixed: Path, tmp_path: Path) -> None:
    manifest = take(mixed, tmp_path / "out", sample={"resolved": 5})
    assert manifest.counts["outcomes"] == {"resolved": 5}


@given(
    st.dictionaries(st.sampled_from(WORDS), st.integers(0, 6), min_size=1),
    st.integers(-3, 3),
    st.permutations(range(12)),
)
@settings(max_examples=20, deadline=None)
def test_a_sample_depends_on_the_seed_and_not_on_the_order_of_files(
    sample: dict[str, int], seed: int, order: list[int]
) -> None:
    rows = [run(n, resolved=(True, False, None)[n % 3]) for n in range(12)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_lines(folder / "sorted.jsonl", rows)
        for number, index in enumerate(order):
            write_lines(folder / "shuffled" / f"{number:02d}.jsonl", [rows[index]])
        first = take(folder / "sorted.jsonl", folder / "1", sample=sample, seed=seed)
        second = take(folder / "shuffled", folder / "2", sample=sample, seed=seed)
        assert sorted(ids_of(first)) == sorted(ids_of(second))
    for word in WORDS:
        wanted = sample.get(word, 0)
        assert first.counts["outcomes"].get(word, 0) == min(wanted, 4)
        assert first.counts[f"missing_for_sample_{word}"] == max(wanted - 4, 0)


def test_another_seed_draws_another_sample(mixed: Path, tmp_path: Path) -> None:
    samples = [
        ids_of(take(mixed, tmp_path / "out", sample={"unresolved": 20}, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]


def test_a_smaller_sample_is_a_part_of_a_larger_one(mixed: Path, tmp_path: Path) -> None:
    small, large = (
        set(ids_of(take(mixed, tmp_path / "out", sample={"unresolved": number})))
        for number in (10, 30)
    )
    assert small < large


def test_what_a_sample_lacks_is_counted(mixed: Path, tmp_path: Path) -> None:
    counts = take(mixed, tmp_path / "out", sample={"resolved": 100, "unresolved": 10}).counts
    assert counts["missing_for_sample_resolved"] == 70
    assert counts["missing_for_sample_unresolved"] == 0
    assert counts["outcomes"] == {"resolved": 30, "unresolved": 10}
    write_lines(tmp_path / "none.jsonl", [{"no": "run"}])
    counts = take(tmp_path / "none.jsonl", tmp_path / "empty", sample={"resolved": 3}).counts
    assert counts["missing_for_sample_resolved"] == 3
    assert counts["trajectories"] == 0


@pytest.mark.parametrize("text", ["resolved=5,unresolved=7", " unresolved=7 , resolved=5"])
def test_a_sample_is_words_and_numbers(text: str) -> None:
    assert parse_sample(text) == {"resolved": 5, "unresolved": 7}


@pytest.mark.parametrize("text", ["", "5", "resolved", "resolved=-1", "resolved=x", "good=1"])
def test_a_sample_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--sample: expected resolved=N,unresolved=N"):
        parse_sample(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolved=5,resolved=7", "expected one number for resolved, got two"),
        (f"resolved={2**63}", f"resolved: expected at most {2**63 - 1}, got {2**63}"),
        ("resolved=" + "9" * 5000, "resolved: expected at most"),
    ],
)
def test_a_sample_of_two_numbers_or_too_large_a_one_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_sample(text)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("limit", [1, 39, 40, 41, 119, 120, 500])
def test_a_limit_takes_the_first_runs(limit: int, mixed: Path, tmp_path: Path) -> None:
    everything = ids_of(take(mixed, tmp_path / "all"))
    manifest = take(mixed, tmp_path / "out", limit=limit)
    assert ids_of(manifest) == everything[:limit]
    assert manifest.counts["trajectories"] == min(limit, 120)


def test_a_limit_of_a_sample_cuts_the_sample(mixed: Path, tmp_path: Path) -> None:
    sampled = ids_of(take(mixed, tmp_path / "all", sample={"unresolved": 30}))
    assert ids_of(take(mixed, tmp_path / "out", sample={"unresolved": 30}, limit=8)) == sampled[:8]


def test_at_most_so_many_runs_of_an_instance_are_taken(mixed: Path, tmp_path: Path) -> None:
    manifest = take(mixed, tmp_path / "out", max_per_instance=5)
    assert set(Counter(row["instance_id"] for row in rows_of(manifest)).values()) == {5}
    assert manifest.counts["over_max_per_instance"] == 70
    nameless = write_lines(tmp_path / "n.jsonl", [run(n, instance="") for n in range(4)])
    assert take(nameless, tmp_path / "n", max_per_instance=1).counts["trajectories"] == 4


def test_copies_under_other_names_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [run(0), run(1), {**run(0), "traj_id": "copy"}, {**run(0), "resolved": True}]
    source = write_lines(tmp_path / "runs.jsonl", rows)
    manifest = take(source, tmp_path / "out")
    assert ids_of(manifest) == ["run-0", "run-1"]
    assert manifest.counts["duplicates"] == 2


def test_a_copy_that_knows_the_outcome_tells_it(tmp_path: Path) -> None:
    rows = [run(0), run(1), run(1, resolved=False), run(0, resolved=True), run(0, resolved=False)]
    manifest = take(write_lines(tmp_path / "runs.jsonl", rows), tmp_path / "out")
    assert [row["resolved"] for row in rows_of(manifest)] == [True, False]
    assert manifest.counts["duplicates"] == 3
    assert manifest.counts["duplicates_with_other_outcome"] == 1
    assert "duplicates_with_outcome" not in manifest.counts


def test_a_copy_that_comes_after_its_part_is_written_is_counted(tmp_path: Path) -> None:
    rows = [*(run(n) for n in range(300)), run(0, resolved=True), run(299, resolved=True)]
    manifest = take(write_lines(tmp_path / "runs.jsonl", rows), tmp_path / "out")
    assert manifest.counts["outcomes"] == {"resolved": 1, "unknown": 299}
    assert manifest.counts["duplicates_with_outcome"] == 1


def test_outcomes_are_counted_of_the_runs_that_are_taken(tmp_path: Path) -> None:
    rows = [
        run(0, instance="a__b-0"),
        run(0, instance="a__b-0"),
        run(1, instance="a__b-1"),
        run(1, instance="a__b-1"),
        run(2, instance="a__b-2", resolved=True),
        run(2, instance="a__b-2", resolved=True),
        run(3, instance="x__y-3"),
        run(4, instance="x__y-4", resolved=True),
        run(5, instance="a__b-2"),
    ]
    for number, row in enumerate(rows):
        row["traj_id"] = f"id-{number}"
    table = tmp_path / "outcomes.csv"
    table.write_text(
        "instance_id,resolved\na__b-0,1\na__b-1,1\na__b-1,0\na__b-2,0\nx__y-3,1\nx__y-4,0\n"
    )
    source = write_lines(tmp_path / "runs.jsonl", rows)
    counts = take(source, tmp_path / "out", outcomes=[table], exclude=("x__y",)).counts
    assert counts["excluded"] == 2
    assert counts["duplicates"] == 3
    assert counts["outcomes_joined"] == 2
    assert counts["outcomes_ambiguous"] == 1
    assert counts["outcome_conflicts"] == 1


@pytest.mark.parametrize("where", ["patch", "tools", "reasoning_content"])
def test_a_part_is_full_of_any_text(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srft_prep.ingest.PART_BYTES", 10_000)
    rows = [run(n) for n in range(6)]
    for row in rows:
        if where == "reasoning_content":
            row["messages"][-1][where] = "x" * 5_000
        else:
            row[where] = [{"name": "x" * 5_000}] if where == "tools" else "x" * 5_000
    manifest = take(write_lines(tmp_path / "runs.jsonl", rows), tmp_path / "out")
    assert len(manifest.parts) == 3


def test_copies_that_are_kept_get_ids_of_their_own(tmp_path: Path) -> None:
    rows = [run(0), run(0), {**run(1), "traj_id": "run-0~2"}, run(0), run(0)]
    source = write_lines(tmp_path / "runs.jsonl", rows)
    manifest = take(source, tmp_path / "out", keep_duplicates=True)
    assert ids_of(manifest) == ["run-0", "run-0~2", "run-0~2~2", "run-0~3", "run-0~4"]
    assert manifest.counts["duplicates"] == 0


def test_many_copies_of_one_id_take_no_longer_each(tmp_path: Path) -> None:
    rows = [{**run(n), "traj_id": "same"} for n in range(3000)]
    manifest = take(write_lines(tmp_path / "runs.jsonl", rows), tmp_path / "out")
    assert ids_of(manifest) == ["same", *(f"same~{n}" for n in range(2, 3001))]


def test_a_system_prompt_is_replaced_or_put_in_front(tmp_path: Path) -> None:
    bare = run(1)
    bare["messages"] = bare["messages"][1:]
    source = write_lines(tmp_path / "runs.jsonl", [run(0), bare])
    prompts = [
        [(m["role"], m["kind"], m["content"]) for m in row["messages"]]
        for row in rows_of(take(source, tmp_path / "out", system_prompt="Be brief."))
    ]
    for number, messages in enumerate(prompts):
        assert messages == [
            ("system", "prompt", "Be brief."),
            ("user", "prompt", f"Ticket {number}"),
            ("assistant", "action", "ls"),
        ]


def test_a_new_system_prompt_is_a_new_content(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "runs.jsonl", [run(0)])
    (before,), (after,) = (
        rows_of(take(source, tmp_path / "out", system_prompt=prompt)) for prompt in (None, "Be.")
    )
    assert before["content_hash"] != after["content_hash"]
    assert before["trajectory_id"] == after["trajectory_id"]


def test_excluded_instances_and_repositories_stay_out_and_are_counted(tmp_path: Path) -> None:
    instances = ["pallets__flask-12", "pallets__flask-cors-12", "a__b-1", "a__b-1_2", "a__b-11", ""]
    rows = [run(n, instance=instance) for n, instance in enumerate(instances)]
    source = write_lines(tmp_path / "runs.jsonl", rows)
    (tmp_path / "exclude.txt").write_text("pallets/flask\nA__B-1\n")
    exclude = read_exclusions(tmp_path / "exclude.txt")
    manifest = take(source, tmp_path / "out", exclude=exclude)
    assert [row["instance_id"] for row in rows_of(manifest)] == [
        "pallets__flask-cors-12",
        "a__b-11",
        "",
    ]
    assert manifest.counts["excluded"] == 3
    assert manifest.counts["exclusions_without_run"] == 0
    assert manifest.counts["not_checked_for_exclusion"] == 1


def test_a_run_is_excluded_by_its_own_id_where_it_names_no_instance(tmp_path: Path) -> None:
    names = ["django__django-11999.3fa9", "run/flask__x-1", "flask__x-2.a", "run-17"]
    rows = [{**run(n, instance=""), "traj_id": name} for n, name in enumerate(names)]
    source = write_lines(tmp_path / "runs.jsonl", rows)
    exclude = ("django__django-11999", "flask__x-1", "gone__gone-1", "z__z")
    manifest = take(source, tmp_path / "out", exclude=exclude)
    assert ids_of(manifest) == names[2:]
    assert manifest.counts["excluded"] == 2
    assert manifest.counts["not_checked_for_exclusion"] == 1
    assert manifest.counts["exclusions_without_run"] == 2
    assert "not_checked_for_exclusion" not in take(source, tmp_path / "all").counts


def test_reports_are_joined_and_the_runs_own_word_wins(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_lines(
        runs / "first" / "runs.jsonl",
        [
            run(0, instance="a__b-0"),
            run(1, instance="a__b-1"),
            run(2, instance="a__b-2", resolved=True),
            run(3, instance="a__b-3", resolved=False),
            run(4, instance="a__b-4"),
            run(5, instance="a__b-5"),
        ],
    )
    summary = {"resolved_ids": ["a__b-0"], "unresolved_ids": ["a__b-1", "a__b-2", "a__b-3"]}
    write_lines(runs / "model.first.json", [summary])
    table = tmp_path / "more.csv"
    table.write_text("instance_id,resolved\na__b-4,true\na__b-4,false\n")
    manifest = take(runs, tmp_path / "out", outcomes=[runs, table])
    resolved = [row["resolved"] for row in rows_of(manifest)]
    assert resolved == [True, False, True, False, None, None]
    assert manifest.counts["outcomes_joined"] == 2
    assert manifest.counts["outcome_conflicts"] == 1
    assert manifest.counts["outcomes_ambiguous"] == 1
    assert manifest.counts["outcome_records"] == 1
    assert manifest.counts["outcomes"] == {"resolved": 2, "unknown": 2, "unresolved": 2}


def test_a_damaged_report_in_a_folder_is_counted(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "runs.jsonl", [run(0)])
    write_lines(tmp_path / "logs" / "a__b-1" / "report.json", [{"a__b-1": {"resolved": True}}])
    (tmp_path / "logs" / "broken.json").write_text("{")
    manifest = take(source, tmp_path / "out", outcomes=[tmp_path / "logs"])
    assert manifest.counts["outcome_files_damaged"] == 1
    assert manifest.counts["outcomes"] == {"resolved": 1}


def test_outcomes_that_are_not_there_stop_before_anything_is_written(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "runs.jsonl", [run(0)])
    with pytest.raises(ConfigError, match="no outcomes found"):
        take(source, tmp_path / "out", outcomes=[source])
    assert not (tmp_path / "out").exists()


def test_a_named_format_takes_no_other(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "runs.jsonl", [run(0), {"history": [{"role": "user"}]}])
    manifest = take(source, tmp_path / "out", format="swe-smith")
    assert manifest.counts["trajectories"] + manifest.counts["rejected"] == 2
    (line,) = rejected_of(manifest)
    assert line["line"] == 2
    assert "not a swe-smith record" in line["reason"]


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    source = shared_data / "trajectories"
    return take(source, tmp_path_factory.mktemp("real") / "out", outcomes=[source])


def test_every_real_run_of_the_index_is_taken(real: Manifest, shared_data: Path) -> None:
    assert real.counts["trajectories"] == 175
    lines = rejected_of(real)
    index = shared_data / "trajectories" / "INDEX.jsonl"
    other = [line for line in lines if line["file"] != str(index)]
    assert {Path(line["file"]).name for line in other} == {"example_model_output.json"}


def test_real_outcomes_agree_with_the_index(real: Manifest, shared_data: Path) -> None:
    known = [row for row in rows_of(real) if row["resolved"] is not None]
    assert len(known) >= 105
    by_file: dict[str, list[dict[str, Any]]] = {}
    for line in (shared_data / "trajectories" / "INDEX.jsonl").read_bytes().splitlines():
        entry = orjson.loads(line)
        by_file.setdefault(str(entry["instance_id"]), []).append(entry)
    checked = 0
    for row in known:
        run_folder = row["trajectory_id"].split("/")[0]
        said = {
            entry["resolved"]
            for entry in by_file.get(row["instance_id"], ())
            if entry["n_traj"] == 1 and f"/{run_folder}/" in f"/{entry['path']}"
        } - {None}
        if said:
            assert said == {row["resolved"]}, row["trajectory_id"]
            checked += 1
    assert checked >= 90


def test_real_reports_settle_what_the_index_says_they_do(real: Manifest, shared_data: Path) -> None:
    lines = (shared_data / "trajectories" / "INDEX.jsonl").read_bytes().splitlines()
    entries = [orjson.loads(line) for line in lines]
    expected = sum(entry["n_traj"] for entry in entries if entry["resolved"] is not None)
    known = sum(row["resolved"] is not None for row in rows_of(real))
    assert known >= expected


def test_the_same_inputs_give_the_same_bytes(mixed: Path, tmp_path: Path) -> None:
    for settings_ in ({}, {"sample": {"unresolved": 20}}):
        first = take(mixed, tmp_path / "1", **settings_)
        second = take(mixed, tmp_path / "2", **settings_)
        assert [part.read_bytes() for part in first.parts] == [
            part.read_bytes() for part in second.parts
        ]
        assert replace(second, path=first.path) == first


def test_moving_the_inputs_is_no_reason_to_work_again(mixed: Path, tmp_path: Path) -> None:
    config = IngestConfig()
    first = ingest([str(mixed)], tmp_path / "out", config)
    moved = mixed.rename(tmp_path / "moved")
    again = ingest([str(moved)], tmp_path / "out", config)
    assert again == first
    assert again.data["inputs"][0]["path"] == [str(mixed)]


def test_renaming_a_file_inside_the_inputs_is_for_ids_and_outcomes_may_hang_on_it(
    mixed: Path, tmp_path: Path
) -> None:
    ingest([str(mixed)], tmp_path / "out", IngestConfig())
    (mixed / "c").rename(mixed / "e")
    with pytest.raises(ConfigError, match="other settings or inputs"):
        ingest([str(mixed)], tmp_path / "out", IngestConfig())


def test_another_table_of_outcomes_in_a_folder_is_another_input(
    mixed: Path, tmp_path: Path
) -> None:
    table = tmp_path / "logs" / "outcomes.csv"
    table.parent.mkdir()
    table.write_text("instance_id,resolved\na__b-3,true\n")
    words = ([str(mixed)], tmp_path / "out", IngestConfig())
    ingest(*words, outcomes=[str(table.parent)])
    table.write_text("instance_id,resolved\na__b-3,false\n")
    with pytest.raises(ConfigError, match="other settings or inputs"):
        ingest(*words, outcomes=[str(table.parent)])


def test_an_output_inside_the_inputs_is_not_read_as_input(mixed: Path) -> None:
    first = ingest([str(mixed)], mixed / "out", IngestConfig())
    assert ingest([str(mixed)], mixed / "out", IngestConfig()) == first
    assert first.counts["trajectories"] == 120
    with pytest.raises(ConfigError, match="out: is the output of ingest; give the raw runs"):
        ingest([str(mixed / "out")], mixed / "out", IngestConfig())


def test_what_an_earlier_ingest_wrote_is_not_taken_for_runs(mixed: Path, tmp_path: Path) -> None:
    first = ingest([str(mixed)], mixed / "out" / "first", IngestConfig())
    second = ingest([str(mixed)], mixed / "out" / "second", IngestConfig())
    assert replace(second, path=first.path) == first
    with pytest.raises(ConfigError, match="first: is the output of ingest; give the raw runs"):
        ingest([str(first.path)], tmp_path / "third", IngestConfig())
    assert not (tmp_path / "third").exists()


def test_calls_with_arguments_as_a_struct_have_only_their_own(tmp_path: Path) -> None:
    rows = []
    for number, arguments in enumerate(({"command": "ls"}, {"path": "a", "view_range": [1, 2]})):
        row = run(number)
        call = {"id": "1", "type": "function", "function": {"name": "x", "arguments": arguments}}
        row["messages"][-1] |= {"content": "", "tool_calls": [call]}
        rows.append(row)
    (tmp_path / "runs").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "runs" / "runs.parquet")
    taken = rows_of(take(tmp_path / "runs", tmp_path / "out"))
    calls = [orjson.loads(row["messages"][-1]["tool_calls"])[0]["function"] for row in taken]
    said = [call["arguments"] for call in calls]
    assert [orjson.loads(each) if isinstance(each, str) else each for each in said] == [
        {"command": "ls"},
        {"path": "a", "view_range": [1, 2]},
    ]


def test_a_file_that_cannot_be_read_is_rejected_and_the_others_are_taken(tmp_path: Path) -> None:
    write_lines(tmp_path / "runs" / "a.jsonl", [run(0)])
    (tmp_path / "runs" / "b.jsonl").symlink_to("/proc/self/mem")  # reading fails, for root too
    manifest = take(tmp_path / "runs", tmp_path / "out")
    assert ids_of(manifest) == ["run-0"]
    (line,) = rejected_of(manifest)
    assert Path(line["file"]).name == "b.jsonl"
    assert line["reason"].startswith("cannot be read: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_or_folder_without_permission_is_rejected(tmp_path: Path) -> None:
    write_lines(tmp_path / "runs" / "a.jsonl", [run(0)])
    write_lines(tmp_path / "runs" / "b.jsonl", [run(1)]).chmod(0)
    closed = write_lines(tmp_path / "runs" / "c" / "c.jsonl", [run(2)]).parent
    closed.chmod(0)
    try:
        for sources in ([tmp_path / "runs"], [tmp_path / "runs" / "a.jsonl", closed / "c.jsonl"]):
            manifest = ingest(
                [str(each) for each in sources], tmp_path / "out", IngestConfig(), overwrite=True
            )
            assert ids_of(manifest) == ["run-0"]
            reasons = {line["reason"] for line in rejected_of(manifest)}
            assert reasons == {"cannot be read: Permission denied"}
            assert manifest.counts["rejected"] == 3 - len(sources)
    finally:
        closed.chmod(0o700)


def test_an_interrupted_run_keeps_its_finished_parts_and_rejections(tmp_path: Path) -> None:
    lines = [orjson.dumps(run(n)) for n in range(600)]
    for number in range(0, 600, 50):
        lines[number] += b'\n\n{"no": "run"}\n \n{'
    source = tmp_path / "runs.jsonl"
    source.write_bytes(b"\n".join(lines))
    whole = ingest([str(source)], tmp_path / "whole", IngestConfig(exclude=("x__y",)))

    class Stop:
        left = 400

        def advance(self, count: int = 1, note: str = "") -> None:
            self.left -= count
            if self.left < 0:
                raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        ingest([str(source)], out, IngestConfig(exclude=("x__y",)), progress=Stop())
    first = (out / "part-00000.parquet").stat().st_mtime_ns
    resumed = ingest([str(source)], out, IngestConfig(exclude=("x__y",)))
    assert (out / "part-00000.parquet").stat().st_mtime_ns == first
    assert replace(resumed, path=whole.path) == whole
    assert rejected_of(resumed) == rejected_of(whole)
    assert whole.counts["rejected"] == 24


def hints_of(*words: object) -> tuple[int, str]:
    """Return exit status and stderr of the ingest command."""
    command = [sys.executable, "-m", "srft_prep", "ingest", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_the_command_tells_what_its_exclusions_met(tmp_path: Path) -> None:
    rows = [run(0), run(1), run(2, instance="")]
    source = write_lines(tmp_path / "runs.jsonl", rows)
    (tmp_path / "exclude.txt").write_text("a/b\nx/y\nz__z-3\n")
    words = (source, "-o", tmp_path / "out", "--exclude", tmp_path / "exclude.txt")
    for _ in range(2):  # a finished run says the same again
        status, stderr = hints_of(*words)
        assert status == 0
        assert "--exclude: 1 of 3 names matched a run; 2 runs excluded\n" in stderr
        assert "warning: --exclude: 1 runs name no instance and were not checked\n" in stderr


def test_the_command_tells_what_its_outcomes_and_sample_lack(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    source = write_lines(runs / "runs.jsonl", [run(0, resolved=True), run(1, instance="c__d-1")])
    write_lines(runs / "logs" / "a__b-1" / "report.json", [{"a__b-1": {"resolved": False}}])
    other = write_lines(tmp_path / "other.json", [{"x__y-1": {"resolved": False}}])
    _, stderr = hints_of(runs, "-o", tmp_path / "1", "--sample", "resolved=5,unknown=1")
    assert "1 outcome reports lie among the sources; --outcomes PATH joins them\n" in stderr
    assert "--sample: only 1 resolved, 5 were asked for\n" in stderr
    assert "unknown, " not in stderr
    _, stderr = hints_of(runs, "-o", tmp_path / "2", "--outcomes", runs)
    assert "1 runs have an outcome of their own that a report contradicts" in stderr
    assert "lie among" not in stderr
    assert "no outcome matched" not in stderr
    _, stderr = hints_of(source, "-o", tmp_path / "3", "--outcomes", other)
    assert "--outcomes: no outcome matched a run" in stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**63)], "--seed"),
        (["--limit", str(2**31)], "--limit"),
        (["--max-per-instance", str(2**31)], "--max-per-instance"),
        (["--system-prompt", "/dev/null"], "/dev/null: expected a system prompt, the file is"),
        (["--sample", ""], "--sample: expected resolved=N"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(
    words: list[str], message: str, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "runs.jsonl", [run(0)])
    status, stderr = hints_of(source, "-o", tmp_path / "out", *words)
    assert status == 2
    assert message in stderr
    assert not (tmp_path / "out").exists()


def test_a_wrong_sample_is_refused_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "runs.jsonl", [run(0)])
    code = (
        "import sys; from srft_prep.cli import main\n"
        f"sys.argv = ['x', 'ingest', {str(source)!r}, '-o', 'o', '--sample', 'good=1']\n"
        "try: main()\n"
        "except SystemExit as error: print(error.code, 'polars' in sys.modules)\n"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "2 False\n"


MEASURE = """
import resource, subprocess, sys
status = subprocess.run([sys.executable, "-m", "srft_prep", "ingest", *sys.argv[1:]]).returncode
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_mib(source: Path, output: Path) -> float:
    """Return the peak resident memory of an ingest in MiB."""
    words = [sys.executable, "-c", MEASURE, str(source), "-o", str(output)]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    status, kibibytes = printed.splitlines()[-1].split()
    assert status == "0"
    return int(kibibytes) / 1024


@pytest.mark.slow
def test_memory_is_bounded_by_the_batch_and_not_by_the_data(tmp_path: Path) -> None:
    template = orjson.loads(next(RUNS.rglob("*.traj.json")).read_bytes())["messages"]
    source = tmp_path / "runs.jsonl"
    peaks = []
    with source.open("wb") as file:
        written = 0
        for megabytes in (150, 300):
            while file.tell() < megabytes << 20:
                messages = [{"role": "user", "content": f"Ticket {written}"}, *template[1:] * 12]
                row = {"traj_id": f"run-{written}", "instance_id": "a__b-1", "messages": messages}
                file.write(orjson.dumps(row) + b"\n")
                written += 1
            file.flush()
            peaks.append(peak_mib(source, tmp_path / f"out-{megabytes}"))
    assert peaks[1] < 700
    assert peaks[1] < peaks[0] * 1.15
