"""Weights of parts, characters and conventions, from files to shards, against a second computation
that weighs every token by itself."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.chat import load_backend
from srft_prep.config import PackConfig
from srft_prep.errors import ConfigError, LabelError, ShardError
from srft_prep.manifest import Manifest
from srft_prep.shards import pack
from srft_prep.token_rows import TokenRow
from srft_prep.trajectories import read_trajectories
from srft_prep.verification import verify
from srft_prep.weights import DEFAULT_WEIGHTS, FIELDS, PARTS
from tests.stages import (
    labels_by,
    make_examples,
    srft_prep,
    token_row,
    trajectory,
    write_labels,
    write_tokens,
)

RUN = trajectory("run", num_steps=2)
OTHER = trajectory("other", num_steps=3, resolved=True)
EXACT = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.0])
"""Weights whose products no rounding changes."""


def config(**values: Any) -> PackConfig:
    settings = {"recipe": "naive", "weights": dict(DEFAULT_WEIGHTS), "seq_len": 4096}
    return PackConfig(**settings | values)


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def weight(step: int, value: float, **of: Any) -> dict[str, Any]:
    return {"trajectory_id": "run", "step_index": step, "weight": value} | of


def documents_of(manifest: Manifest) -> Iterator[tuple[str, list[int], list[float]]]:
    """Trajectory, ids and weight of each token of every document."""
    for part in manifest.parts:
        for row in pq.read_table(part).to_pylist():
            weights = [0.0] * len(row["input_ids"])
            for run in row["loss_weights"]:
                stop = run["start"] + run["length"]
                weights[run["start"] : stop] = [run["weight"]] * run["length"]
            bounds = np.cumsum([0, *row["seq_lengths"]]).tolist()
            for name, (start, end) in zip(row["trajectory_ids"], pairwise(bounds), strict=True):
                yield name, row["input_ids"][start:end], weights[start:end]


def weights_of(manifest: Manifest, name: str = "run") -> list[float]:
    [found] = [weights for owner, _, weights in documents_of(manifest) if owner == name]
    return found


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    #   run: 4 of context, then 3 of thought, 2 of tool call, 1 of end of turn; twice
    return write_tokens(tmp_path / "tokens", [token_row(OTHER), token_row(RUN)])


def test_parts_have_their_weights_in_every_step(tokens: Path, tmp_path: Path) -> None:
    parts = {"thought": 0.5, "end_of_turn": 2.0}
    manifest = pack(tokens, tmp_path / "shards", config(part_weights=parts))
    step = [0, 0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 2]
    assert weights_of(manifest) == [*step, *step, 0]
    assert weights_of(manifest, "other") == [*step, *step, *step, 0]
    assert verify(tmp_path / "shards").problems == ()


def test_a_file_weighs_steps_parts_and_characters_and_all_multiply(
    tokens: Path, tmp_path: Path
) -> None:
    #   3 characters a token; the content shows from the second one of the step to the ninth, and
    #   2 of its first characters were stripped
    path = lines(
        tmp_path / "weights.jsonl",
        weight(0, 0.5),
        weight(0, 0.0, part="tool_call"),
        weight(0, 3.0, field="content", start=0, end=5),
        weight(1, 4.0, field="content", start=4, end=5),
        weight(1, 0.0, field="content", start=7, end=8),
    )
    manifest = pack(
        tokens, tmp_path / "s", config(part_weights={"thought": 0.5}), weight_files=[path]
    )
    #   content 0-5 is the step's text 1-4: the second token's first character is its fourth
    first = [0, 0, 0, 0, 0.25, 0.75, 0.25, 0, 0, 0.5]
    second = [0, 0, 0, 0, 0.5, 2.0, 0.0, 1, 1, 1]
    assert weights_of(manifest) == [*first, *second, 0]
    assert "clipped_spans" not in manifest.counts


def test_files_and_words_of_the_option_compose_on_the_command_line(
    tokens: Path, tmp_path: Path
) -> None:
    one = lines(tmp_path / "one.jsonl", weight(0, 0.5))
    two = lines(tmp_path / "two.jsonl", weight(0, 0.5, part="thought"), weight(1, 0.0))
    run = srft_prep(
        *("pack", tokens, "-o", tmp_path / "shards", "--recipe", "naive"),
        *("--weights", "thought=0.5", "--weights", one, "--weights", two),
        *("--weights", "end_of_turn=0"),
    )
    assert (run.status, run.stderr) == (0, "")
    [row] = pq.read_table(tmp_path / "shards" / "shard-00000.parquet").to_pylist()
    assert row["trajectory_ids"] == ["other", "run"]
    runs = [(run["length"], run["weight"]) for run in row["loss_weights"]]
    assert runs == [(3, 0.5), (2, 1.0)] * 3 + [(3, 0.125), (2, 0.5)]
    manifest = orjson.loads((tmp_path / "shards" / "manifest.json").read_bytes())
    assert [each.get("file") for each in manifest["inputs"]] == [None, "weights", "weights"]
    assert manifest["part_weights"] == {"thought": 0.5, "end_of_turn": 0.0}


def test_another_weights_file_is_another_plan(tokens: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "weights.jsonl", weight(0, 0.5))
    args = ("pack", tokens, "-o", tmp_path / "s", "--recipe", "naive", "--weights", path)
    assert srft_prep(*args).status == 0
    assert srft_prep(*args).status == 0
    lines(path, weight(0, 0.25))
    run = srft_prep(*args)
    assert run.status == 2
    assert "with other settings or inputs" in run.stderr


def test_labels_may_stand_in_a_file_with_weights_of_parts_and_characters(
    tokens: Path, tmp_path: Path
) -> None:
    span = {"field": "content", "start": 7, "end": 8, "weight": 0.0}
    row = {"trajectory_id": "run", "step_index": 0, "label": "good", "weight": 0.5}
    path = lines(
        tmp_path / "labels.jsonl",
        row | {"parts": {"tool_call": 0.5}, "spans": [span]},
        row | {"step_index": 1, "label": "harmful", "weight": None},
    )
    manifest = pack(tokens, tmp_path / "s", config(recipe="srft"), labels=path)
    first = [0, 0, 0, 0, 0.5, 0.5, 0.0, 0.25, 0.25, 0.5]
    assert weights_of(manifest) == [*first, *[0] * 11]
    assert manifest.data["inputs"][1]["file"] == "labels"
    assert verify(tmp_path / "s").problems == ()


def test_what_a_labels_file_says_counts_only_where_the_recipe_weights_by_label(
    tokens: Path, tmp_path: Path
) -> None:
    rows = [
        {"trajectory_id": run.trajectory_id, "step_index": step, "label": "good", "weight": 0.5}
        for run in (RUN, OTHER)
        for step in range(run.num_steps)
    ]
    path = lines(tmp_path / "labels.jsonl", *rows)
    srft = pack(tokens, tmp_path / "srft", config(recipe="srft"), labels=path)
    both = pack(tokens, tmp_path / "all", config(recipe="srft-all"), labels=path)
    assert set(weights_of(srft)) == set(weights_of(both)) == {0, 0.5}
    assert set(weights_of(srft, "other")) == {0, 1.0}
    assert set(weights_of(both, "other")) == {0, 0.5}


def test_a_labels_file_weighs_as_the_directory_with_the_same_labels(
    tokens: Path, tmp_path: Path
) -> None:
    chances = {"p_good": 0.5, "p_unnecessary": 0.25, "p_harmful": 0.25}
    rows = labels_by([RUN, OTHER], {"run": ("good", "harmful"), "other": ("good",) * 3})
    rows[1] |= chances
    folder = write_labels(tmp_path / "labels", rows)
    table = tmp_path / "labels.parquet"
    table.write_bytes((folder / "labels.parquet").read_bytes())
    for soft in (False, True):
        settings = config(recipe="srft-all", soft=soft)
        of_folder, of_file = (
            pack(tokens, tmp_path / f"{labels.name}-{soft}", settings, labels=labels)
            for labels in (folder, table)
        )
        assert [part.read_bytes() for part in of_folder.parts] == [
            part.read_bytes() for part in of_file.parts
        ]
        assert of_folder.counts == of_file.counts


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a trajectory": (
        weight(0, 1.0) | {"trajectory_id": "nobody"},
        "a weight for the trajectory 'nobody', which the tokens do not have; were these weights",
    ),
    "a step": (weight(2, 1.0), "run: a weight for step 2, but the trajectory has the steps 0 to 1"),
    "a field": (
        weight(0, 1.0, field="reasoning_content", start=0, end=1),
        "run: step 0: the step shows no reasoning_content: the message has none, or the chat",
    ),
    "characters": (
        weight(1, 1.0, field="content", start=10, end=11),
        "run: step 1: expected characters within the 10 of content that the step shows, got 10-11",
    ),
    "a second weight": (weight(1, 1.0), "a second weight for the same step or part; keep one"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_weight_for_what_is_not_there_is_an_error_that_names_file_and_line(
    tokens: Path, tmp_path: Path, what: str
) -> None:
    row, message = REFUSED[what]
    path = lines(tmp_path / "weights.jsonl", weight(1, 0.5), row)
    args = ("pack", tokens, "-o", tmp_path / "s", "--recipe", "naive", "--weights", path)
    run = srft_prep(*args)
    assert run.status == 2
    assert f"{path}:2: {message}" in run.stderr
    assert not (tmp_path / "s").exists()


def test_a_label_in_a_file_for_what_is_not_there_is_an_error_too(
    tokens: Path, tmp_path: Path
) -> None:
    row = {"trajectory_id": "run", "step_index": 0, "label": "good"}
    for second, message in (
        (row, "run: step 0 has two labels; keep one"),
        (row | {"step_index": 7}, "run: a label for step 7, but the trajectory has the steps 0 to"),
        (row | {"trajectory_id": "x"}, "a label for the trajectory 'x', which the tokens do not"),
    ):
        path = lines(tmp_path / "labels.jsonl", row, second)
        with pytest.raises(LabelError, match=rf"labels\.jsonl:2: {message}"):
            pack(tokens, tmp_path / "s", config(recipe="srft"), labels=path)


def test_characters_that_reach_behind_a_field_end_with_it_and_are_counted(
    tokens: Path, tmp_path: Path
) -> None:
    path = lines(tmp_path / "w.jsonl", weight(0, 0.0, field="content", start=0, end=99))
    manifest = pack(tokens, tmp_path / "s", config(), weight_files=[path])
    #   the first token begins with a character before the content
    assert weights_of(manifest)[4:10] == [1, 0, 0, 1, 1, 1]
    assert manifest.counts["clipped_spans"] == 1


def test_labels_of_trajectories_that_tokenize_rejected_are_no_trouble(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", [token_row(RUN)])
    labels = write_labels(
        tmp_path / "labels", labels_by([RUN, OTHER], {"run": ("good",) * 2, "other": ("good",) * 3})
    )
    with pytest.raises(LabelError, match="'other', which the tokens do not have"):
        pack(tokens, tmp_path / "s", config(recipe="srft"), labels=labels)
    lines(tokens / "rejected.jsonl", {"trajectory_id": "other", "reason": "no user message"})
    assert pack(tokens, tmp_path / "s", config(recipe="srft"), labels=labels).counts[
        "num_trajectories"
    ] == 1  # fmt: skip


def test_weights_that_multiply_beyond_float32_are_refused(tokens: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "w.jsonl", weight(0, 3e38), weight(0, 2.0, part="thought"))
    with pytest.raises(ConfigError, match="multiply to more than float32 holds"):
        pack(tokens, tmp_path / "s", config(), weight_files=[path])


def test_a_convention_trains_its_own_tokens_with_the_weights_of_the_steps(
    tokens: Path, tmp_path: Path
) -> None:
    labels = write_labels(tmp_path / "labels", labels_by([RUN], {"run": ("harmful", "good")}))
    settings = config(recipe="srft", convention="axolotl")
    manifest = pack(tokens, tmp_path / "s", settings, labels=labels)
    #   one token of the header, too: see tests.stages.token_row
    assert weights_of(manifest) == [*[0] * 10, *[0] * 3, *[1] * 7, 0]
    assert weights_of(manifest, "other") == [*[0, 0, 0, 1, 1, 1, 1, 1, 1, 1] * 3, 0]
    assert manifest.data["convention"] == "axolotl"


def test_a_turn_that_is_no_step_has_weight_1_under_another_convention(tmp_path: Path) -> None:
    row = token_row(RUN)
    demo = replaced(row, convention_spans=(("axolotl", -1, 1, 3), ("axolotl", 0, 4, 10)))
    tokens = write_tokens(tmp_path / "tokens", [demo])
    path = lines(tmp_path / "w.jsonl", weight(0, 0.5))
    settings = config(convention="axolotl")
    manifest = pack(tokens, tmp_path / "s", settings, weight_files=[path])
    assert weights_of(manifest) == [0, 1, 1, 0, *[0.5] * 6, *[0] * 11]


def test_a_convention_that_the_tokens_do_not_hold_says_what_to_do(
    tokens: Path, tmp_path: Path
) -> None:
    run = srft_prep(
        *("pack", tokens, "-o", tmp_path / "s", "--recipe", "naive", "--convention", "trl")
    )
    assert run.status == 2
    assert (
        "--convention trl: the tokens hold no spans of it; it needs a chat template" in run.stderr
    )


def test_conventions_and_weights_of_parts_exclude_each_other(tokens: Path, tmp_path: Path) -> None:
    settings = config(convention="axolotl", part_weights={"thought": 0.5})
    with pytest.raises(ConfigError, match="--convention axolotl trains whole turns"):
        pack(tokens, tmp_path / "s", settings)
    path = lines(tmp_path / "w.jsonl", weight(0, 0.5, part="thought"))
    with pytest.raises(ConfigError, match="--convention axolotl trains whole turns"):
        pack(tokens, tmp_path / "s", config(convention="axolotl"), weight_files=[path])


def test_tokens_whose_parts_do_not_cover_a_step_are_refused(tmp_path: Path) -> None:
    row = token_row(RUN)
    tokens = write_tokens(tmp_path / "t", [replaced(row, part_spans=row.part_spans[:-1])])
    with pytest.raises(ShardError, match=r"step 1: its parts .* do not cover it; run tokenize"):
        pack(tokens, tmp_path / "s", config(part_weights={"thought": 0.5}))


def replaced(row: TokenRow, **values: Any) -> TokenRow:
    names = (*TokenRow.__dataclass_fields__,)
    return TokenRow(**{name: getattr(row, name) for name in names} | values)


@dataclass
class Step:
    """A step as text, cut into tokens anywhere, between or within characters."""

    text: str
    cuts: list[int]
    """Bytes at which tokens end, the last one left out."""
    parts: tuple[int, int]
    """Characters at which the tool call and the end of turn begin."""
    shown: tuple[int, int, int]
    """Characters of the field, and how many of its first ones were stripped."""
    factors: list[tuple[str | None, int, int, float]] = field(default_factory=list)
    """(part or field or None, start, end, weight)."""

    def first_chars(self) -> list[int]:
        """The first character of each token: one that begins in it, or the one it goes on with."""
        bounds = [0]
        for char in self.text:
            bounds.append(bounds[-1] + len(char.encode()))
        found = []
        for start, end in pairwise([0, *self.cuts, bounds[-1]]):
            begun = [i for i, place in enumerate(bounds[:-1]) if start <= place < end]
            found.append(begun[0] if begun else max(i for i, at in enumerate(bounds) if at < start))
        return found

    def begun(self) -> list[int]:
        """How many characters each token begins."""
        size = len(self.text.encode())
        starts = np.cumsum([0, *(len(char.encode()) for char in self.text)])[:-1]
        return [
            int(((starts >= a) & (starts < b)).sum()) for a, b in pairwise([0, *self.cuts, size])
        ]

    def part(self, char: int) -> str:
        return PARTS[sum(char >= place for place in self.parts)]

    def weights(self, everywhere: dict[str, float]) -> list[float]:
        """The weight of each token, from what is said of its first character."""
        start, end, skipped = self.shown
        found = []
        for char in self.first_chars():
            value = everywhere.get(self.part(char), 1.0)
            for target, first, last, factor in self.factors:
                in_field = start <= char < end and first <= char - start + skipped < last
                if (
                    target is None
                    or target == self.part(char)
                    or (target == FIELDS[0] and in_field)
                ):
                    value *= factor
            found.append(value)
        return found


@st.composite
def steps(draw: st.DrawFn) -> Step:
    text = draw(st.text(st.sampled_from("ab \né\u4e16\U0001f600"), min_size=1, max_size=12))
    size = len(text.encode())
    cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=8))) if size > 1 else []
    first, last = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    skipped = draw(st.integers(0, 2))
    factors: list[tuple[str | None, int, int, float]] = []
    if draw(st.booleans()):
        factors.append((None, 0, 0, draw(EXACT)))
    factors += [(part, 0, 0, draw(EXACT)) for part in draw(st.sets(st.sampled_from(PARTS)))]
    if end > start:
        for _ in range(draw(st.integers(0, 3))):
            begin = draw(st.integers(0, skipped + end - start - 1))
            stop = draw(st.integers(begin + 1, skipped + end - start + 3))
            factors.append((FIELDS[0], begin, stop, draw(EXACT)))
    return Step(text, cuts, (first, last), (start, end, skipped), factors)


def row_of(name: str, made: list[Step], first_id: int) -> TokenRow:
    position, spans, parts, fields, chars = 2, [], [], [], []
    for number, step in enumerate(made):
        firsts = step.first_chars()
        spans.append((number, position, position + len(firsts)))
        owned = Counter(step.part(char) for char in firsts)
        place = position
        for part in PARTS:
            if owned[part]:
                parts.append((number, part, place, place + owned[part]))
                place += owned[part]
        if step.shown[0] < step.shown[1]:
            fields.append((number, FIELDS[0], *step.shown))
        chars += step.begun()
        position = place + number % 2
    return TokenRow(
        trajectory_id=name,
        resolved=None,
        content_hash="0" * 32,
        input_ids=np.arange(first_id, first_id + position + 1, dtype=np.int32),
        step_spans=tuple(spans),
        part_spans=tuple(parts),
        field_spans=tuple(fields),
        step_chars=np.array(chars, np.int16),
    )


@settings(deadline=None)  # writes files
@given(
    st.lists(st.lists(steps(), max_size=4), min_size=1, max_size=5),
    st.dictionaries(st.sampled_from(PARTS), EXACT),
    st.integers(1, 3),
)
def test_every_token_has_the_product_of_the_weights_of_its_first_character(
    tmp_path_factory: pytest.TempPathFactory,
    runs: list[list[Step]],
    everywhere: dict[str, float],
    split: int,
) -> None:
    root = tmp_path_factory.mktemp("any")
    rows = [row_of(f"run-{i}", made, 1000 * i) for i, made in enumerate(runs)]
    tokens = write_tokens(root / "tokens", rows[:split], rows[split:])
    assert verify(tokens).problems == ()
    said = []
    for number, made in enumerate(runs):
        for index, step in enumerate(made):
            for target, start, end, value in step.factors:
                of: dict[str, Any] = {} if target is None else {"part": target}
                if target in FIELDS:
                    of = {"field": target, "start": start, "end": end}
                said.append(weight(index, value, **of) | {"trajectory_id": f"run-{number}"})
    path = lines(root / "weights.jsonl", *said)
    settings = config(part_weights=everywhere)
    manifest = pack(tokens, root / "shards", settings, weight_files=[path])
    assert verify(root / "shards").problems == ()
    found = {name: (ids, weights) for name, ids, weights in documents_of(manifest)}
    for row, made in zip(rows, runs, strict=True):
        expected = [0.0] * len(row.input_ids)
        for (_, start, end), step in zip(row.step_spans, made, strict=True):
            expected[start:end] = step.weights(everywhere)
        assert found[row.trajectory_id] == (row.input_ids.tolist(), expected)
    for part in manifest.parts:
        for row in pq.read_table(part).to_pylist():
            bounds = np.cumsum(row["seq_lengths"]).tolist()
            for one, two in pairwise(row["loss_weights"]):
                end = one["start"] + one["length"]
                assert end < two["start"] or end in bounds or one["weight"] != two["weight"]


@settings(deadline=None)  # writes files
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=4),
    st.integers(3, 40),
    st.sampled_from(["truncate", "windows", "drop"]),
)
def test_no_token_is_trained_twice_under_another_convention(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, int]],
    seq_len: int,
    overlong: str,
) -> None:
    root = tmp_path_factory.mktemp("any")
    rows = []
    for number, (num_steps, gap) in enumerate(shapes):
        row = token_row(trajectory(f"run-{number}", num_steps=num_steps), gap=gap + 3)
        demos = [("axolotl", -1, start - gap - 3, start - 1) for _, start, _ in row.step_spans]
        spans = sorted([*row.convention_spans, *demos], key=lambda span: span[2])
        first = number * 1000
        ids = np.arange(first, first + len(row.input_ids), dtype=np.int32)
        rows.append(replaced(row, convention_spans=tuple(spans), input_ids=ids))
    tokens = write_tokens(root / "tokens", rows)
    settings = config(convention="axolotl", seq_len=seq_len, overlong=overlong)
    try:
        manifest = pack(tokens, root / "shards", settings)
    except ConfigError:  # nothing is left
        return
    trained = Counter(
        token
        for _, ids, weights in documents_of(manifest)
        for token, weight in zip(ids, weights, strict=True)
        if weight
    )
    wanted = {
        int(row.input_ids[place])
        for row in rows
        for _, _, start, end in row.convention_spans
        for place in range(start, end)
    }
    assert set(trained.values()) <= {1}
    assert trained.keys() <= wanted
    assert len(trained) + manifest.counts["lost_tokens"] == len(wanted)
    assert verify(root / "shards").problems == ()


def test_characters_of_a_real_message_are_weighted_where_they_stand(tmp_path: Path) -> None:
    examples = make_examples(tmp_path)
    run = next(read_trajectories([examples.trajectories / "part-00000.parquet"]))
    said = [message.content or "" for message in run.messages if message.kind == "action"]
    rows, words = [], []
    for step, text in enumerate(said):
        start = text.index("```bash\n") + len("```bash\n")
        end = text.index("\n```", start)
        words.append(text[start:end])
        span = {"field": "content", "start": start, "end": end, "weight": 0.0}
        rows.append({"trajectory_id": run.trajectory_id, "step_index": step} | span)
    path = lines(tmp_path / "weights.jsonl", *rows)
    manifest = pack(examples.tokens, tmp_path / "shards", config(), weight_files=[path])
    whole = pack(examples.tokens, tmp_path / "whole", config())
    backend, _ = load_backend("example")
    [(ids, weights)] = [
        (ids, weights) for name, ids, weights in documents_of(manifest) if name == run.trajectory_id
    ]
    unweighted = [
        token
        for token, weight, before in zip(
            ids, weights, weights_of(whole, run.trajectory_id), strict=True
        )
        if before and not weight
    ]
    assert backend.decode(unweighted, skip_special_tokens=False) == "".join(words)
