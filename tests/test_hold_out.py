"""`pack --hold-out`: whole tasks stay out of the shards, chosen by their ids alone."""

from pathlib import Path

import orjson
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.config import PackConfig
from srft_prep.errors import ConfigError, ShardError
from srft_prep.hold_out import is_held_out, read_held_out
from srft_prep.manifest import describe_file
from srft_prep.shards import pack
from srft_prep.types import Trajectory
from srft_prep.verification import verify
from srft_prep.weights import DEFAULT_WEIGHTS
from tests.stages import label_row, srft_prep, token_row, trajectory, write_labels, write_tokens

OUTCOMES = (True, False, None)


def attempts() -> list[Trajectory]:
    """Three attempts at each of 20 tasks, with different outcomes, and five without a task."""
    runs = [
        trajectory(f"attempt-{number}/task-{task}", resolved=OUTCOMES[number])
        for number in range(3)
        for task in range(20)
    ]
    runs += [trajectory(f"alone-{number}") for number in range(5)]
    return [
        Trajectory(
            trajectory_id=run.trajectory_id,
            instance_id=run.trajectory_id.partition("/")[2],
            format=run.format,
            messages=run.messages,
            resolved=run.resolved,
        )
        for run in runs
    ]


ATTEMPTS = attempts()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    rows = [token_row(run) for run in ATTEMPTS]
    return write_tokens(tmp_path / "tokens", rows[:30], rows[30:])


def config(**values: object) -> PackConfig:
    settings = {"recipe": "naive", "weights": dict(DEFAULT_WEIGHTS), "seq_len": 128}
    return PackConfig(**settings | values)


def packed_in(folder: Path) -> set[str]:
    parts = sorted(folder.glob("shard-*.parquet"))
    return {
        name
        for part in parts
        for names in pq.read_table(part)["trajectory_ids"].to_pylist()
        for name in names
    }


def test_all_attempts_at_a_task_are_packed_or_held_out_together(
    tokens: Path, tmp_path: Path
) -> None:
    manifest = pack(tokens, tmp_path / "shards", config(hold_out=0.3))
    held_out = read_held_out(manifest.path)
    out, packed = {each.trajectory_id for each in held_out}, packed_in(manifest.path)
    assert out | packed == {run.trajectory_id for run in ATTEMPTS}
    assert not out & packed
    assert out
    tasks = {
        where: {run.instance_id for run in ATTEMPTS if run.trajectory_id in names} - {""}
        for where, names in (("out", out), ("packed", packed))
    }
    assert tasks["out"]
    assert not tasks["out"] & tasks["packed"]
    known = {run.trajectory_id: run for run in ATTEMPTS}
    for each in held_out:
        run = known[each.trajectory_id]
        assert (each.instance_id, each.resolved) == (run.instance_id, run.resolved)
    alone = {name for name in out if name.startswith("alone")}
    assert manifest.counts["held_out"] == len(out)
    assert manifest.counts["held_out_tasks"] == len(tasks["out"]) + len(alone)
    assert verify(manifest.path).problems == ()


def test_the_held_out_set_depends_on_no_recipe_seed_or_length(tokens: Path, tmp_path: Path) -> None:
    labels = write_labels(
        tmp_path / "labels",
        [label_row(run, step, "good") for run in ATTEMPTS for step in range(run.num_steps)],
    )
    lists = [
        pack(tokens, tmp_path / f"shards-{number}", config(hold_out=0.3, **values), labels=given)
        .path.joinpath("held_out.jsonl")
        .read_bytes()
        for number, (values, given) in enumerate(
            [
                ({}, None),
                ({"recipe": "rft"}, None),
                ({"recipe": "srft"}, labels),
                ({"shuffle_seed": 7, "seq_len": 64}, None),
            ]
        )
    ]
    assert len(set(lists)) == 1


@given(st.text(max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_what_a_smaller_one_does(
    instance: str, one: float, other: float
) -> None:
    assert is_held_out(instance, min(one, other)) <= is_held_out(instance, max(one, other))
    assert not is_held_out(instance, 0)


def test_the_fraction_is_that_of_the_tasks() -> None:
    """Of 20,000 tasks: within 5 standard deviations."""
    for fraction in (0.01, 0.1, 0.5):
        found = sum(is_held_out(f"owner__repo-{number}", fraction) for number in range(20_000))
        allowed = 5 * (20_000 * fraction * (1 - fraction)) ** 0.5
        assert abs(found - 20_000 * fraction) < allowed


def test_without_it_the_shards_are_those_of_before_and_there_is_no_list(
    tokens: Path, tmp_path: Path
) -> None:
    manifest = pack(tokens, tmp_path / "shards", config())
    assert packed_in(manifest.path) == {run.trajectory_id for run in ATTEMPTS}
    assert [file["name"] for file in manifest.files] == ["shard-00000.parquet"]
    with pytest.raises(ShardError, match="nothing was held out; run pack with --hold-out"):
        read_held_out(manifest.path)


def test_tokens_that_do_not_note_their_tasks_are_refused_only_where_it_matters(
    tokens: Path, tmp_path: Path
) -> None:
    """Tokens of an older version."""
    manifest = orjson.loads((tokens / "manifest.json").read_bytes())
    for file in manifest["files"]:
        path = tokens / file["name"]
        pq.write_table(pq.read_table(path).drop_columns(["instance_id"]), path)
        file.update(describe_file(path))
    (tokens / "manifest.json").write_bytes(orjson.dumps(manifest))
    pack(tokens, tmp_path / "whole", config())
    with pytest.raises(ShardError, match=r"part-00000\.parquet: no column instance_id: .*tokenize"):
        pack(tokens, tmp_path / "shards", config(hold_out=0.3))


def test_holding_out_everything_is_an_error(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"leaves no trajectory to pack .*65 held_out"):
        pack(tokens, tmp_path / "shards", config(hold_out=0.999999))


def test_another_plan_leaves_no_list_behind(tokens: Path, tmp_path: Path) -> None:
    pack(tokens, tmp_path / "shards", config(hold_out=0.3))
    manifest = pack(tokens, tmp_path / "shards", config(), overwrite=True)
    assert not (manifest.path / "held_out.jsonl").exists()


def test_what_a_killed_run_left_is_cleared_by_another_plan(tokens: Path, tmp_path: Path) -> None:
    """Killed behind the list and before the manifest."""
    folder = pack(tokens, tmp_path / "shards", config(hold_out=0.3)).path
    (folder / ".progress").mkdir()
    (folder / ".progress" / "plan.json").write_bytes(orjson.dumps({"stage": "pack"}))
    (folder / "manifest.json").unlink()
    pack(tokens, folder, config(), overwrite=True)
    assert not (folder / "held_out.jsonl").exists()


def test_verify_finds_a_list_that_does_not_fit_the_shards(tokens: Path, tmp_path: Path) -> None:
    folder = pack(tokens, tmp_path / "shards", config(hold_out=0.3)).path
    path = folder / "held_out.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    name = min(packed_in(folder)).encode()
    packed = b'{"trajectory_id":"' + name + b'","instance_id":"","resolved":null}\n'
    for text, problem in (
        (b"".join(lines[1:]), f"expected {len(lines)} held-out trajectories, got {len(lines) - 1}"),
        (b"".join([packed, *lines[1:]]), f"{name.decode()} is packed nevertheless"),
        (b"no JSON\n", "held_out.jsonl:1: expected trajectory_id"),
    ):
        path.write_bytes(text)
        manifest = orjson.loads((folder / "manifest.json").read_bytes())
        manifest["files"][-1] = describe_file(path)
        (folder / "manifest.json").write_bytes(orjson.dumps(manifest))
        assert problem in "\n".join(verify(folder).problems)


def test_the_command_holds_out(tokens: Path, tmp_path: Path) -> None:
    run = srft_prep(
        *("pack", tokens, "--recipe", "naive", "--hold-out", 0.3, "-o", tmp_path / "shards"),
        "--json",
    )
    assert run.status == 0
    assert orjson.loads(run.stdout.splitlines()[-1])["held_out"] == len(
        read_held_out(tmp_path / "shards")
    )
    assert srft_prep("pack", tokens, "--hold-out", 1, "-o", tmp_path / "x").status == 2
