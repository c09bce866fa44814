import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srft_prep.config import PackConfig
from srft_prep.manifest import describe_file
from srft_prep.schemas import LABELS, REQUESTS, SHARDS, TOKENS, TRAJECTORIES
from srft_prep.shards import pack
from srft_prep.storage import PARQUET_OPTIONS, write_table
from srft_prep.types import Message, Trajectory
from srft_prep.verification import MAX_PROBLEMS, verify
from srft_prep.weights import DEFAULT_WEIGHTS
from tests.stages import (
    ListedCritic,
    make_examples,
    run_critic,
    srft_prep,
    write_trajectories,
)

Rows = list[dict[str, Any]]

SCHEMAS = {
    "trajectories": TRAJECTORIES,
    "labels": LABELS,
    "requests": REQUESTS,
    "tokens": TOKENS,
    "shards": SHARDS,
}
FILES = {
    "trajectories": "part-00000.parquet",
    "labels": "labels.parquet",
    "requests": "requests.parquet",
    "tokens": "part-00000.parquet",
    "shards": "shard-00000.parquet",
}
STAGES = ("trajectories", "labels", "tokens", "shards")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    examples = make_examples(root)
    weights = {"good": 1.0, "unnecessary": 0.3, "harmful": 0.0}
    config = PackConfig(recipe="srft", weights=weights, seq_len=4096)
    pack(examples.tokens, root / "shards", config, labels=examples.labels)
    return root


@pytest.fixture
def stages(sound: Path, tmp_path: Path) -> Path:
    """A copy of sound stage directories, to be damaged."""
    shutil.copytree(sound, tmp_path / "stages")
    return tmp_path / "stages"


def problems(folder: Path) -> str:
    return "\n".join(verify(folder).problems)


def folder_of(stages: Path, table: str) -> Path:
    return stages / ("labels" if table == "requests" else table)


def rewrite(stages: Path, table: str, change: Callable[[Rows], Any]) -> str:
    """Change the rows of a table, write it anew with a manifest over it, and verify."""
    folder, name = folder_of(stages, table), FILES[table]
    rows: Rows = pq.read_table(folder / name).to_pylist()
    said = pq.read_metadata(folder / name).metadata or {}
    change(rows)
    changed = pa.Table.from_pylist(rows, schema=SCHEMAS[table])
    with pq.ParquetWriter(folder / name, SCHEMAS[table], **PARQUET_OPTIONS) as writer:
        writer.write_table(changed, row_group_size=4)
        writer.add_key_value_metadata(said)
    bless(folder)
    return problems(folder)


def bless(folder: Path, **values: Any) -> None:
    """Write the manifest anew over the files as they are."""
    path = folder / "manifest.json"
    manifest = orjson.loads(path.read_bytes())
    manifest["files"] = [describe_file(folder / file["name"]) for file in manifest["files"]]
    path.write_bytes(orjson.dumps(manifest | values))


@pytest.mark.parametrize("stage", STAGES)
def test_a_sound_directory_has_no_problems(sound: Path, stage: str) -> None:
    report = verify(sound / stage)
    assert report.problems == ()
    manifest = orjson.loads((sound / stage / "manifest.json").read_bytes())
    assert report.num_files == len(manifest["files"])
    assert report.num_rows == sum(file.get("rows", 0) for file in manifest["files"])
    run = srft_prep("verify", sound / stage)
    assert (run.status, run.stderr) == (0, "")
    assert run.stdout.startswith(f"ok: {manifest['stage']}, ")


@pytest.mark.parametrize("stage", STAGES)
def test_unchanged_rows_under_a_new_manifest_are_sound(stages: Path, stage: str) -> None:
    assert rewrite(stages, stage, lambda rows: None) == ""


def damaged_files(stages: Path) -> list[Path]:
    return [
        path
        for stage in STAGES
        for path in sorted((stages / stage).iterdir())
        if path.name != "manifest.json" and path.stat().st_size
    ]


def test_a_flipped_byte_is_found_in_every_file(stages: Path) -> None:
    files = damaged_files(stages)
    assert {path.suffix for path in files} == {".parquet", ".jsonl"}
    for path in files:
        whole = path.read_bytes()
        for place in (0, len(whole) // 3, len(whole) // 2, len(whole) - 1):
            flipped = bytearray(whole)
            flipped[place] ^= 0x10
            path.write_bytes(flipped)
            assert f"{path}: its bytes are not those that were written" in problems(path.parent)
        path.write_bytes(whole)
        assert problems(path.parent) == ""


def test_a_cut_file_is_found(stages: Path) -> None:
    for path in damaged_files(stages):
        whole = path.read_bytes()
        for length in (0, 3, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            found = problems(path.parent)
            assert f"{path}: expected {len(whole)} bytes, got {length}" in found
        path.write_bytes(whole)


def test_a_missing_file_is_found(stages: Path) -> None:
    for path in damaged_files(stages):
        path.unlink()
        assert f"{path}: missing" in problems(path.parent)


@pytest.mark.parametrize("stage", ["trajectories", "tokens", "shards"])
def test_a_part_that_the_manifest_does_not_name_is_found(stages: Path, stage: str) -> None:
    name = FILES[stage]
    stranger = stages / stage / name.replace("00000", "00001")
    shutil.copy(stages / stage / name, stranger)
    assert problems(stages / stage) == f"{stranger}: the manifest does not name this file"


def test_a_flip_that_readers_take_for_good_data_is_found_by_the_page_checksums(
    stages: Path,
) -> None:
    path = stages / "shards" / FILES["shards"]
    whole, rows = path.read_bytes(), pq.read_table(path)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    end = chunk.data_page_offset + chunk.total_compressed_size
    num_silent = 0
    for place in range(end - 400, end, 20):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        try:
            num_silent += pq.read_table(path) != rows
        except OSError:
            continue
        bless(stages / "shards")
        assert f"{path}: cannot be read: " in problems(stages / "shards")
    assert num_silent > 3


def set_value(row: int, column: str, value: Any) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows[row][column] = value(rows[row][column]) if callable(value) else value

    return change


def set_in(row: int, column: str, item: int, **values: Any) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows[row][column][item] = rows[row][column][item] | values

    return change


def swap(first: int, second: int) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows[first], rows[second] = rows[second], rows[first]

    return change


def repeat(row: int) -> Callable[[Rows], None]:
    return lambda rows: rows.insert(row, rows[row])


def drop(row: int) -> Callable[[Rows], None]:
    return lambda rows: rows.pop(row)


def add_convention(convention: str, step: int, start: int, end: int) -> Callable[[Rows], None]:
    span = {"convention": convention, "step": step, "start": start, "end": end}
    return lambda rows: rows[0]["convention_spans"].append(span)


DAMAGES: dict[str, tuple[str, Callable[[Rows], Any], str]] = {
    # trajectories
    "an id twice": (
        "trajectories",
        set_value(3, "trajectory_id", "attempt-1/example__pathglob-7"),
        "attempt-1/example__pathglob-7: the id occurs twice",
    ),
    "a wrong number of steps": (
        "trajectories",
        set_value(0, "num_steps", lambda count: count + 1),
        "attempt-1/example__pathglob-7: num_steps is",
    ),
    "a forged hash": (
        "trajectories",
        set_value(0, "content_hash", "0" * 32),
        "attempt-1/example__pathglob-7: content_hash does not belong to its messages",
    ),
    "an edited message": (
        "trajectories",
        set_in(0, "messages", 2, content="something else"),
        "attempt-1/example__pathglob-7: content_hash does not belong to its messages",
    ),
    "an action declared context": (
        "trajectories",
        set_in(0, "messages", 2, kind="demo"),
        "its actions are",
    ),
    "an unknown kind": (
        "trajectories",
        set_in(0, "messages", 0, kind="thought"),
        "expected kinds prompt, action, observation, demo, artifact, got thought",
    ),
    "tool calls that are no JSON": (
        "trajectories",
        set_in(0, "messages", 2, tool_calls="bash(ls)"),
        "message 2: tool_calls is no JSON list",
    ),
    "tools that are no list": (
        "trajectories",
        set_value(0, "tools", "{}"),
        "attempt-1/example__pathglob-7: tools is no JSON list",
    ),
    "an outcome turned round": (
        "trajectories",
        set_value(0, "resolved", lambda resolved: not resolved),
        "the manifest counts {'resolved': 11, 'unresolved': 13} outcomes",
    ),
    "a trajectory gone": ("trajectories", drop(5), "the manifest counts 24 trajectories"),
    # labels
    "a label that is none": (
        "labels",
        set_value(0, "label", "great"),
        "step 0: expected a label of good, unnecessary, harmful, got 'great'",
    ),
    "another label": ("labels", set_value(0, "label", "harmful"), "harmful, the files hold"),
    "two labels of a step": ("labels", repeat(4), "step 4: has two labels"),
    "a label gone": ("labels", drop(1), "step 2: out of order, expected step 1"),
    "labels out of order": ("labels", swap(1, 2), "step 2: out of order, expected step 1"),
    "another critic": ("labels", set_value(0, "critic_id", "me"), "expected critic_id listed@1"),
    "a negative probability": (
        "labels",
        lambda rows: rows[0].update(p_good=1.5, p_unnecessary=-0.5, p_harmful=0.0),
        "step 0: expected three probabilities that sum to 1, got [1.5, -0.5, 0.0]",
    ),
    "probabilities that do not sum to 1": (
        "labels",
        lambda rows: rows[0].update(p_good=0.5, p_unnecessary=0.5, p_harmful=0.5),
        "expected three probabilities that sum to 1",
    ),
    "probabilities that are no numbers": (
        "labels",
        lambda rows: rows[0].update(p_good=float("nan"), p_unnecessary=0.5, p_harmful=0.5),
        "expected three probabilities that sum to 1",
    ),
    "one probability of three": (
        "labels",
        set_value(0, "p_good", 1.0),
        "expected three probabilities that sum to 1, got [1.0, None, None]",
    ),
    "a failure with labels": (
        "requests",
        set_value(0, "failure", "no"),
        "attempt-1/example__pathglob-7: has labels, but failed: no",
    ),
    "a request twice": ("requests", repeat(0), "attempt-1/example__pathglob-7: part all occurs"),
    "an endless cost": ("requests", set_value(0, "usd", float("inf")), "expected counts, seconds"),
    "a request gone": (
        "requests",
        drop(0),
        "the manifest counts 24 trajectories, the files hold 23",
    ),
    # tokens
    "a wrong number of tokens": (
        "tokens",
        set_value(0, "num_tokens", 5),
        "attempt-1/example__pathglob-7: num_tokens is 5, there are",
    ),
    "a negative token": (
        "tokens",
        set_value(0, "input_ids", lambda ids: [*ids[:-1], -1]),
        "attempt-1/example__pathglob-7: a negative token id",
    ),
    "a span beyond the end": (
        "tokens",
        set_in(0, "step_spans", -1, end=99_999),
        "-99999 is out of order or bounds",
    ),
    "a span turned round": (
        "tokens",
        set_in(0, "step_spans", 0, start=700, end=600),
        "step 0: span 700-600 is out of order or bounds",
    ),
    "overlapping spans": (
        "tokens",
        set_in(0, "step_spans", 1, start=470),
        "step 1: span 470-",
    ),
    "a longer span": (
        "tokens",
        lambda rows: rows[0]["step_spans"][0].update(end=rows[0]["step_spans"][0]["end"] + 1),
        "the manifest counts 13277 step_tokens, the files hold 13278",
    ),
    "a step twice in a row": (
        "tokens",
        set_in(0, "step_spans", 1, step=0),
        "step 0 comes after step 0",
    ),
    "a row twice": ("tokens", repeat(0), "attempt-1/example__pathglob-7: step 0 occurs twice"),
    "another token": (
        "tokens",
        lambda rows: rows.pop(),
        "the manifest counts 24 sequences, the files hold 23",
    ),
    "a part that is none": (
        "tokens",
        set_in(0, "part_spans", 0, part="header"),
        "step 0: part 'header': expected one of thought, tool_call, end_of_turn of a step",
    ),
    "a part of no step": (
        "tokens",
        set_in(0, "part_spans", -1, step=99),
        "step 99: part 'end_of_turn': expected one of",
    ),
    "a part that is cut short": (
        "tokens",
        lambda rows: rows[0]["part_spans"][-1].update(end=rows[0]["part_spans"][-1]["end"] - 1),
        "is empty, out of order or overlaps",
    ),
    "a part gone": ("tokens", lambda rows: rows[0]["part_spans"].pop(), "its parts end at"),
    "parts out of order": (
        "tokens",
        lambda rows: rows[0]["part_spans"].reverse(),
        "is empty, out of order or overlaps",
    ),
    "a field of no step": (
        "tokens",
        set_in(0, "field_spans", 0, step=99),
        "step 99: field 'content': expected a field of content, reasoning_content of a step",
    ),
    "a field beyond its text": (
        "tokens",
        set_in(0, "field_spans", 0, end=99_999),
        "-99999, 0 skipped, of a text of",
    ),
    "a convention that is none": (
        "tokens",
        add_convention("mine", 0, 0, 1),
        "convention 'mine', step 0: expected one of trl, axolotl and a step of the row, or -1",
    ),
    "a convention's span beyond the end": (
        "tokens",
        add_convention("trl", 0, 99_998, 99_999),
        "-99999 is out of order or bounds",
    ),
    "a token without characters": (
        "tokens",
        lambda rows: rows[0]["step_chars"].pop(),
        "step_chars counts",
    ),
    "a negative number of characters": (
        "tokens",
        lambda rows: rows[0]["step_chars"].__setitem__(0, -1),
        "step_chars has a negative count",
    ),
    # shards
    "a run of weight 0": (
        "shards",
        set_in(0, "loss_weights", 0, weight=0.0),
        "has weight 0.0, expected a finite one > 0",
    ),
    "a run of weight nan": (
        "shards",
        set_in(0, "loss_weights", 0, weight=float("nan")),
        "has weight nan, expected a finite one > 0",
    ),
    "an infinite weight": (
        "shards",
        set_in(0, "loss_weights", 0, weight=float("inf")),
        "has weight inf, expected a finite one > 0",
    ),
    "another weight": (
        "shards",
        set_in(0, "loss_weights", 0, weight=0.25),
        "sum_weights, the files hold",
    ),
    "runs out of order": (
        "shards",
        lambda rows: rows[0]["loss_weights"].reverse(),
        "is empty, out of order or out of bounds",
    ),
    "a run before the start": (
        "shards",
        set_in(0, "loss_weights", 0, start=-4),
        "is empty, out of order or out of bounds",
    ),
    "a run beyond the end": (
        "shards",
        set_in(0, "loss_weights", -1, length=9_999),
        "is empty, out of order or out of bounds",
    ),
    "a run that crosses a boundary": (
        "shards",
        lambda rows: cross_a_boundary(rows[0]),
        "crosses from one document into the next",
    ),
    "a weighted first token": (
        "shards",
        lambda rows: weight_the_first_token(rows[0]),
        "weights a document's first token: nothing predicts it",
    ),
    "another sum of a sequence": ("shards", set_value(0, "sum_weights", 1.5), "sum_weights is 1.5"),
    "another sum of a document": (
        "shards",
        lambda rows: rows[0]["document_sum_weights"].__setitem__(0, 1.5),
        ": sum 1.5, its weights add up to",
    ),
    "another sum of a trajectory": (
        "shards",
        lambda rows: rows[0]["trajectory_sum_weights"].__setitem__(0, 1.5),
        ": its sum is 1.5, its weights add up to",
    ),
    "a sum too many": (
        "shards",
        lambda rows: rows[0]["document_sum_weights"].append(0.0),
        "expected a sum of weights for each document and its trajectory",
    ),
    "a label where no weight is": (
        "shards",
        lambda rows: rows[0]["labels"].__setitem__(0, rows[0]["input_ids"][0]),
        "labels are not the ids where the weight is > 0 and -100 elsewhere",
    ),
    "a wrong label": (
        "shards",
        lambda rows: rows[0]["labels"].__setitem__(rows[0]["loss_weights"][0]["start"], 7),
        "labels are not the ids where the weight is > 0 and -100 elsewhere",
    ),
    "wrong lengths": (
        "shards",
        lambda rows: rows[0]["seq_lengths"].__setitem__(0, 5),
        "ids, labels and seq_lengths disagree, or exceed seq_len 4096",
    ),
    "a sequence that is too long": (
        "shards",
        lambda rows: lengthen(rows[0], 5_000),
        "ids, labels and seq_lengths disagree, or exceed seq_len 4096",
    ),
    "an owner too many": (
        "shards",
        set_value(0, "trajectory_ids", lambda ids: [*ids, "more"]),
        "expected one trajectory id and a length >= 1 for each document",
    ),
    "no document": (
        "shards",
        lambda rows: rows[0].update(
            input_ids=[], labels=[], seq_lengths=[], loss_weights=[], trajectory_ids=[]
        ),
        "expected one trajectory id and a length >= 1 for each document",
    ),
    "a sequence twice": ("shards", repeat(0), "occurs twice"),
    "a sequence gone": ("shards", drop(0), "num_sequences, the files hold"),
}


def cross_a_boundary(row: dict[str, Any]) -> None:
    """Lengthen the last run of the first document into the second."""
    [bound] = row["seq_lengths"][:1]
    run = next(run for run in reversed(row["loss_weights"]) if run["start"] < bound)
    run["length"] = bound - run["start"] + 1
    for place in range(run["start"], bound + 1):
        row["labels"][place] = row["input_ids"][place]


def weight_the_first_token(row: dict[str, Any]) -> None:
    run = row["loss_weights"][0]
    run.update(start=0, length=run["start"] + run["length"])
    row["labels"][: run["length"]] = row["input_ids"][: run["length"]]


def lengthen(row: dict[str, Any], count: int) -> None:
    row["input_ids"] += [1] * count
    row["labels"] += [-100] * count
    row["seq_lengths"][-1] += count


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_row_that_breaks_a_law_is_named_though_the_files_agree(stages: Path, damage: str) -> None:
    table, change, expected = DAMAGES[damage]
    found = rewrite(stages, table, change)
    assert expected in found
    assert "cannot be read" not in found
    assert len({*found.splitlines()}) == len(found.splitlines())  # each problem is told once


def test_other_columns_are_named(stages: Path) -> None:
    path = stages / "tokens" / FILES["tokens"]
    table = pq.read_table(path)
    ids = table["input_ids"].cast(pa.list_(pa.int64()))
    write_table(table.set_column(3, "input_ids", ids), path, row_group_rows=4)
    bless(stages / "tokens")
    assert "expected the columns trajectory_id string" in problems(stages / "tokens")
    assert "int64" in problems(stages / "tokens")


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_sequences", 3), ("num_loss_tokens", 0), ("sum_weights", 12345.0), ("fill", 1.0)],
)
def test_a_total_of_the_manifest_that_the_files_do_not_hold_is_named(
    stages: Path, name: str, value: float
) -> None:
    folder = stages / "shards"
    manifest = orjson.loads((folder / "manifest.json").read_bytes())
    bless(folder, counts=manifest["counts"] | {name: value})
    assert f"the manifest counts {value} {name}, the files hold" in problems(folder)
    bless(folder, **{"counts": manifest["counts"], name: value})
    assert f"the manifest counts {value} {name}, the files hold" in problems(folder)


def test_a_wrong_number_of_rows_in_the_manifest_is_named(stages: Path) -> None:
    folder = stages / "tokens"
    path = folder / "manifest.json"
    manifest = orjson.loads(path.read_bytes())
    manifest["files"][0]["rows"] = 99
    path.write_bytes(orjson.dumps(manifest))
    assert f"{folder / FILES['tokens']}: expected 99 rows, got 24" in problems(folder)


def test_rejected_records_are_counted_and_have_reasons(stages: Path) -> None:
    folder = stages / "trajectories"
    (folder / "rejected.jsonl").write_bytes(b'{"file": "a", "line": 1}\nnonsense\n')
    bless(folder)
    found = problems(folder)
    assert "rejected.jsonl: expected 0 lines, got 2" in found
    assert "rejected.jsonl: line 1 is no rejected record with a reason" in found
    assert "rejected.jsonl: line 2 is no rejected record with a reason" in found


def test_many_problems_of_a_file_are_cut_short(stages: Path) -> None:
    def spoil(rows: Rows) -> None:
        for row in rows:
            row["label"] = "bad"

    found = rewrite(stages, "labels", spoil).splitlines()
    of_the_file = [line for line in found if "labels.parquet" in line]
    assert len(of_the_file) == MAX_PROBLEMS + 1
    assert of_the_file[-1].endswith("labels.parquet: more problems")


def test_the_command_prints_the_problems_and_exits_with_1(stages: Path) -> None:
    rewrite(stages, "shards", set_in(0, "loss_weights", 0, weight=0.0))
    run = srft_prep("verify", stages / "shards", "--json")
    assert run.status == 1
    *lines, summary, document = run.stdout.splitlines()
    assert summary == f"damaged: pack, 1 files, 13 rows, {len(lines)} problems"
    assert orjson.loads(document) == {"stage": "pack", "problems": lines}


def test_a_directory_without_a_manifest_is_an_error(tmp_path: Path) -> None:
    run = srft_prep("verify", tmp_path)
    assert run.status == 2
    assert "there is no manifest.json" in run.stderr


def test_windows_and_copies_of_a_trajectory_are_sound(sound: Path, tmp_path: Path) -> None:
    config = PackConfig(
        recipe="naive", weights=dict(DEFAULT_WEIGHTS), seq_len=1200, overlong="windows"
    )
    manifest = pack(sound / "tokens", tmp_path / "shards", config)
    assert manifest.counts["num_documents"] > manifest.counts["num_trajectories"] == 24
    assert verify(tmp_path / "shards").problems == ()


def test_sums_that_a_shard_or_the_manifest_tells_otherwise_are_named(stages: Path) -> None:
    path = stages / "shards" / FILES["shards"]
    write_table(pq.read_table(path), path, row_group_rows=4)
    bless(stages / "shards")
    assert f"{path}: its metadata say nothing of its sum of weights" in problems(stages / "shards")
    shutil.copytree(stages / "shards", stages / "other")
    manifest = orjson.loads((stages / "shards" / "manifest.json").read_bytes())
    [told] = manifest["shards"]
    for change in ({"sum_weights": 1.5}, {"num_tokens": 7}, {"name": "shard-00001.parquet"}):
        bless(stages / "shards", shards=[told | change])
        assert "`shards` do not fit shard-00000.parquet" in problems(stages / "shards")


def test_labels_with_failures_and_copies_are_sound(tmp_path: Path) -> None:
    said = Message(role="assistant", kind="action", content="the same")
    runs = [
        Trajectory(trajectory_id=name, instance_id="", format="messages", messages=(said,) * count)
        for name, count in (("one", 2), ("two", 2), ("three", 3))
    ]
    source = write_trajectories(tmp_path / "runs", runs)
    run_critic(source, tmp_path / "labels", ListedCritic(failing={"three"}))
    assert verify(tmp_path / "labels").problems == ()
