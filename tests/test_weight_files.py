from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from srft_prep.errors import ConfigError, LabelError
from srft_prep.gold import read_gold
from srft_prep.types import LABELS
from srft_prep.weight_files import (
    FIRST_FIELD,
    STEP_TARGET,
    Factor,
    FileRow,
    read_label_rows,
    read_weight_rows,
)

STEP = {"trajectory_id": "a", "step_index": 3}
LABEL = STEP | {"label": "good"}
WEIGHT = STEP | {"weight": 0.5}
SPAN = {"field": "content", "start": 2, "end": 5, "weight": 0.5}


def lines(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def test_a_row_of_weights_is_of_a_step_a_part_or_characters(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "weights.jsonl",
        WEIGHT,
        WEIGHT | {"part": "end_of_turn"},
        STEP | SPAN,
        STEP | SPAN | {"field": "reasoning_content", "part": None},
    )
    assert [row.factors for row in read_weight_rows(path)] == [
        (Factor(target=STEP_TARGET, weight=0.5),),
        (Factor(target=2, weight=0.5),),
        (Factor(target=FIRST_FIELD, weight=0.5, start=2, end=5),),
        (Factor(target=FIRST_FIELD + 1, weight=0.5, start=2, end=5),),
    ]


def test_a_row_of_labels_may_say_more_of_its_step(tmp_path: Path) -> None:
    full = LABEL | {
        "p_good": 0.5,
        "p_unnecessary": 0.25,
        "p_harmful": 0.25,
        "weight": 2,
        "parts": {"thought": 0.5, "tool_call": None},
        "spans": [SPAN],
        "content_hash": "0" * 32,
        "rationale": "so",
        "critic_id": "me",
        "prompt_hash": "x",
    }
    path = lines(tmp_path / "labels.jsonl", LABEL, full)
    plain, row = read_label_rows(path)
    assert plain == FileRow(line=1, trajectory_id="a", step=3, label=0)
    assert (row.line, row.probabilities, row.content_hash) == (2, (0.5, 0.25, 0.25), "0" * 32)
    assert row.factors == (
        Factor(target=STEP_TARGET, weight=2.0),
        Factor(target=0, weight=0.5),
        Factor(target=FIRST_FIELD, weight=0.5, start=2, end=5),
    )


def test_parquet_says_the_same_as_jsonl(tmp_path: Path) -> None:
    rows = [LABEL, LABEL | {"step_index": 4, "parts": {"thought": 0.5}, "spans": [SPAN]}]
    pq.write_table(pa.Table.from_pylist(rows[1:] + rows[:1]), tmp_path / "rows.parquet")
    found = read_label_rows(tmp_path / "rows.parquet")
    expected = read_label_rows(lines(tmp_path / "rows.jsonl", *rows[1:], *rows[:1]))
    assert list(found) == list(expected)
    parts = pa.array([[("thought", 0.5)]], pa.map_(pa.string(), pa.float64()))
    table = pa.Table.from_pylist([LABEL]).append_column("parts", parts)
    pq.write_table(table, tmp_path / "map.parquet")
    [row] = read_label_rows(tmp_path / "map.parquet")
    assert row.factors == (Factor(target=0, weight=0.5),)


def without(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


BAD_WEIGHTS: dict[str, tuple[Any, str]] = {
    "no object": ([1], "expected a JSON object, got"),
    "no trajectory": (without(WEIGHT, "trajectory_id"), "expected trajectory_id as text, got None"),
    "no step": (without(WEIGHT, "step_index"), "expected step_index as a whole number from 0"),
    "a step that is true": (WEIGHT | {"step_index": True}, "expected step_index as a whole number"),
    "a step beyond": (WEIGHT | {"step_index": 2**31}, "expected step_index as a whole number"),
    "half a step": (WEIGHT | {"step_index": 1.0}, "expected step_index as a whole number"),
    "no weight": (STEP, "expected weight as a finite number >= 0, got None"),
    "a negative weight": (WEIGHT | {"weight": -1}, "expected weight as a finite number >= 0"),
    "a weight too great": (WEIGHT | {"weight": 1e39}, "expected weight as a finite number >= 0"),
    "a weight as text": (WEIGHT | {"weight": "1"}, "expected weight as a finite number >= 0"),
    "an unknown part": (
        WEIGHT | {"part": "plan"},
        "expected part as one of thought, tool_call, end_of_turn, got 'plan'",
    ),
    "an unknown field": (
        STEP | SPAN | {"field": "tool_calls"},
        "expected field as one of content, reasoning_content, got 'tool_calls'",
    ),
    "part and field": (
        STEP | SPAN | {"part": "thought"},
        "expected either part or field, start, end",
    ),
    "half a span": (without(STEP | SPAN, "end"), "expected a span with field, start, end and"),
    "an empty span": (STEP | SPAN | {"end": 2}, "expected a span with start < end, got '2-2'"),
    "a late name": (WEIGHT | {"wieght": 1}, "expected the names end, field, .* got 'wieght'"),
}
BAD_LABELS: dict[str, tuple[Any, str]] = {
    "no label": (STEP, "expected label as one of good, unnecessary, harmful, got None"),
    "an unknown label": (LABEL | {"label": "great"}, "expected label as one of good, .* 'great'"),
    "one probability": (LABEL | {"p_good": 1.0}, "expected three probabilities that sum to 1"),
    "no distribution": (
        LABEL | {"p_good": 1.0, "p_unnecessary": 0.5, "p_harmful": 0.5},
        "expected three probabilities that sum to 1",
    ),
    "parts as a list": (LABEL | {"parts": ["thought"]}, "expected parts as an object"),
    "spans as text": (LABEL | {"spans": "all"}, "expected spans as a list"),
    "a span of more": (LABEL | {"spans": [SPAN | {"why": 1}]}, "expected a span with field, start"),
    "an unknown part": (LABEL | {"parts": {"plan": 1}}, "expected part as one of thought"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_a_row_that_is_no_weight_is_named_by_file_and_line(tmp_path: Path, name: str) -> None:
    row, message = BAD_WEIGHTS[name]
    path = lines(tmp_path / "weights.jsonl", *[WEIGHT] * 300, row)
    with pytest.raises(LabelError, match=rf"weights\.jsonl:301: {message}"):
        list(read_weight_rows(path))


@pytest.mark.parametrize("name", BAD_LABELS)
def test_a_row_that_is_no_label_is_named_by_file_and_line(tmp_path: Path, name: str) -> None:
    row, message = BAD_LABELS[name]
    path = lines(tmp_path / "labels.jsonl", LABEL, row)
    with pytest.raises(LabelError, match=rf"labels\.jsonl:2: {message}"):
        list(read_label_rows(path))


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.jsonl"
    path.write_bytes(orjson.dumps(WEIGHT) + b'\n\n{"weight": NaN}\n')
    with pytest.raises(LabelError, match=r"weights\.jsonl:3: expected a JSON object"):
        list(read_weight_rows(path))
    table = tmp_path / "weights.parquet"
    table.write_bytes(b"no table")
    with pytest.raises(LabelError, match=r"weights\.parquet: cannot be read as Parquet"):
        list(read_weight_rows(table))
    pq.write_table(pa.Table.from_pylist([WEIGHT, WEIGHT | {"weight": None}]), table)
    with pytest.raises(LabelError, match=r"weights\.parquet: row 2: expected weight"):
        list(read_weight_rows(table))


json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from([*LABEL, *SPAN, "part", "parts", "spans", "p_good", "content_hash"])


@given(st.dictionaries(names, json), st.booleans())
@example({"content_hash": 7}, True)
@example({"parts": {"thought": {}}}, True)
@example({"label": []}, True)
def test_any_row_is_a_row_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], of_labels: bool
) -> None:
    base, read = (LABEL, read_label_rows) if of_labels else (WEIGHT, read_weight_rows)
    path = lines(tmp_path_factory.mktemp("any") / "rows.jsonl", base | values)
    try:
        [row] = read(path)
    except LabelError:
        with pytest.raises(LabelError, match=rf"{path}:1: expected"):
            list(read(path))
        return
    assert isinstance(row.trajectory_id, str)
    assert row.content_hash is None or isinstance(row.content_hash, str)
    assert all(0 <= factor.weight < 3.5e38 for factor in row.factors)


def gold_line(step: int, label: str | None, annotator: str | None = "ada", **more: Any) -> Any:
    named = {} if annotator is None else {"annotator": annotator}
    return {"trajectory_id": "a", "step_index": step, "label": label, **named, **more}


def labels_of(path: Path, annotator: str | None = None) -> dict[int, str]:
    return {row.step: LABELS[row.label] for row in read_label_rows(path, annotator=annotator)}


def test_a_gold_file_with_notes_is_a_file_of_labels(tmp_path: Path) -> None:
    notes = {"reason": "it ran the wrong tests", "severity": 2, "time": "2026-11-26T08:00:00Z"}
    path = lines(tmp_path / "gold.jsonl", LABEL | notes, LABEL | notes | {"step_index": 4})
    assert labels_of(path) == {3: "good", 4: "good"}
    with pytest.raises(LabelError, match="got 'wieght'"):
        labels_of(lines(path, LABEL | notes | {"wieght": 1}))


def test_the_newest_line_of_an_annotator_is_the_label_as_in_gold(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "gold.jsonl",
        gold_line(0, "good"),
        gold_line(1, "harmful", blind=True),
        gold_line(0, "harmful", blind=False, weight=0.5),
        gold_line(1, None, undoes=True),
        gold_line(2, "unnecessary"),
    )
    path.write_bytes(path.read_bytes() + b'{"trajectory_id": "a", "step_in')
    first, second = read_label_rows(path)
    assert (first.line, first.step, LABELS[first.label]) == (3, 0, "harmful")
    assert first.factors == (Factor(target=STEP_TARGET, weight=0.5),)
    assert (second.line, second.step, LABELS[second.label]) == (5, 2, "unnecessary")
    assert read_gold([path]).labels == {("a", 0): "harmful", ("a", 2): "unnecessary"}


def test_of_several_annotators_one_must_be_named(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "gold.jsonl",
        gold_line(0, "good"),
        gold_line(0, "harmful", "bob"),
        gold_line(1, "good", "bob"),
        gold_line(1, "good", None),
        gold_line(2, "harmful", "cy"),
        gold_line(2, None, "cy"),
        gold_line(3, "harmful", "ada"),
        gold_line(3, "good", "bob"),
        gold_line(3, "unnecessary", "cy", adjudicates=True),
    )
    with pytest.raises(ConfigError, match=r"labels by \(unnamed\), ada, bob, cy; say whose"):
        labels_of(path)
    assert labels_of(path, "ada") == {0: "good", 3: "harmful"}
    assert labels_of(path, "bob") == {0: "harmful", 1: "good", 3: "good"}
    assert labels_of(path, "cy") == {3: "unnecessary"}
    assert labels_of(path, "") == {1: "good"}
    assert labels_of(path, "agreed") == {1: "good", 3: "unnecessary"}
    with pytest.raises(ConfigError, match="expected labels by 'eve', there are some by"):
        labels_of(path, "eve")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_labels_that_name_nobody_are_nobodys_by_name(suffix: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "labels.jsonl", LABEL)
    if suffix == "parquet":
        path = tmp_path / "labels.parquet"
        pq.write_table(pa.Table.from_pylist([LABEL]), path)
    with pytest.raises(ConfigError, match=f"{path}: .*names no annotator"):
        labels_of(path, "ada")


def test_a_text_that_only_mentions_an_annotator_makes_no_gold_file(tmp_path: Path) -> None:
    path = lines(tmp_path / "labels.jsonl", LABEL | {"rationale": "annotator"}, LABEL)
    assert [row.line for row in read_label_rows(path)] == [1, 2]
