import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.config import PackConfig
from srft_prep.errors import ConfigError, LabelError
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.schemas import SHARDS
from srft_prep.shard_files import IGNORED, ROW_GROUP_ROWS, SUM_KEY
from srft_prep.shards import pack
from srft_prep.token_rows import TokenRow
from srft_prep.types import Label, Trajectory
from srft_prep.verification import verify
from srft_prep.weights import DEFAULT_WEIGHTS, RECIPES
from tests.stages import (
    Examples,
    Run,
    label_row,
    labels_by,
    srft_prep,
    token_row,
    trajectory,
    write_labels,
    write_tokens,
)

G, U, H = "good", "unnecessary", "harmful"

RUNS = (
    trajectory("solved", resolved=True),
    trajectory("failed", resolved=False, num_steps=4),
    trajectory("unknown", resolved=None),
    trajectory("hopeless", resolved=False, num_steps=2),
)
GIVEN: Mapping[str, Sequence[Label]] = {
    "solved": (G, H, G),
    "failed": (G, H, U, G),
    "unknown": (H, H, U),
    "hopeless": (H, H),
}

TREATED = {
    "naive": ("solved", "failed", "unknown", "hopeless"),
    "rft": ("solved",),
    "unresolved": ("failed", "hopeless"),
    "unresolved-masked": ("failed", "hopeless"),
    "srft": ("solved", "failed", "unknown", "hopeless"),
    "srft-all": ("solved", "failed", "unknown", "hopeless"),
}
BY_LABEL = {
    "unresolved-masked": ("failed", "hopeless"),
    "srft": ("failed", "unknown", "hopeless"),
    "srft-all": ("solved", "failed", "unknown", "hopeless"),
}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    rows = [token_row(run) for run in RUNS]
    return write_tokens(tmp_path / "tokens", rows[:2], rows[2:])


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    return write_labels(tmp_path / "labels", labels_by(RUNS, GIVEN))


def config(**values: Any) -> PackConfig:
    settings = {"recipe": "srft", "weights": dict(DEFAULT_WEIGHTS), "seq_len": 64}
    return PackConfig(**settings | values)


def rows_of(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for part in manifest.parts:
        yield from pq.read_table(part, page_checksum_verification=True).to_pylist()


def packed(manifest: Manifest) -> dict[str, tuple[list[int], list[float], list[int]]]:
    """Ids, weight of each token and labels of each document, by trajectory, from the files."""
    found: dict[str, tuple[list[int], list[float], list[int]]] = {}
    for row in rows_of(manifest):
        weights = [0.0] * len(row["input_ids"])
        for run in row["loss_weights"]:
            for place in range(run["start"], run["start"] + run["length"]):
                weights[place] = run["weight"]
        bounds = np.cumsum([0, *row["seq_lengths"]]).tolist()
        for name, (start, end) in zip(row["trajectory_ids"], pairwise(bounds), strict=True):
            assert name not in found, "a trajectory is packed twice"
            found[name] = (
                row["input_ids"][start:end],
                weights[start:end],
                row["labels"][start:end],
            )
    return found


def expected_weights(run: Trajectory, by_step: Sequence[float]) -> list[float]:
    row = token_row(run)
    weights = [0.0] * len(row.input_ids)
    for (_, start, end), weight in zip(row.step_spans, by_step, strict=True):
        weights[start:end] = [weight] * (end - start)
    return weights


def weights_by_step(manifest: Manifest, run: Trajectory) -> list[float]:
    """The one weight of each step of a packed trajectory."""
    _, weights, _ = packed(manifest)[run.trajectory_id]
    spans = token_row(run).step_spans
    found = [set(weights[start:end]) for _, start, end in spans]
    assert all(len(each) == 1 for each in found), "a step has two weights"
    assert sum(map(bool, weights)) == sum(
        (end - start) * bool(weights[start]) for _, start, end in spans
    )
    return [each.pop() for each in found]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_its_trajectories_whole_and_weights_them_by_its_rule(
    tokens: Path, labels: Path, tmp_path: Path, recipe: str
) -> None:
    manifest = pack(tokens, tmp_path / "shards", config(recipe=recipe), labels=labels)
    found = packed(manifest)
    assert found.keys() == set(TREATED[recipe])
    assert manifest.counts["left_out"] == len(RUNS) - len(found)
    for run in RUNS:
        name = run.trajectory_id
        if name in found:
            masked = name in BY_LABEL.get(recipe, ())
            by_step = [0.0 if masked and label == H else 1.0 for label in GIVEN[name]]
            ids, weights, token_labels = found[name]
            assert ids == token_row(run).input_ids.tolist()
            assert weights == expected_weights(run, by_step)
            assert token_labels == [
                token if weight else IGNORED for token, weight in zip(ids, weights, strict=True)
            ]


def test_the_recipes_of_the_examples_differ_in_weights_and_membership_only(
    examples: Examples, tmp_path: Path
) -> None:
    written = {path: path.stat().st_mtime_ns for path in examples.tokens.iterdir()}
    token_ids = {
        row["trajectory_id"]: row["input_ids"]
        for part in examples.tokens.glob("part-*.parquet")
        for row in pq.read_table(part).to_pylist()
    }
    seen = {}
    for recipe in RECIPES:
        settings = config(recipe=recipe, seq_len=4096)
        manifest = pack(examples.tokens, tmp_path / recipe, settings, labels=examples.labels)
        found = packed(manifest)
        assert {name: ids for name, (ids, _, _) in found.items()} == {
            name: token_ids[name] for name in found
        }
        assert verify(tmp_path / recipe).problems == ()
        seen[recipe] = found
    assert {path: path.stat().st_mtime_ns for path in examples.tokens.iterdir()} == written
    assert seen["rft"].keys() | seen["unresolved"].keys() == seen["naive"].keys()
    assert seen["unresolved"].keys() == seen["unresolved-masked"].keys()
    naive, srft, both = seen["naive"], seen["srft"], seen["srft-all"]
    assert all(srft[name] == naive[name] for name in seen["rft"])
    assert all(srft[name] == both[name] for name in seen["unresolved"])
    assert any(srft[name] != naive[name] for name in seen["unresolved"])
    assert any(srft[name] != both[name] for name in seen["rft"])


def test_a_trajectory_without_any_weight_stays_and_is_counted(
    tokens: Path, labels: Path, tmp_path: Path
) -> None:
    manifest = pack(tokens, tmp_path / "shards", config(recipe="unresolved-masked"), labels=labels)
    ids, weights, token_labels = packed(manifest)["hopeless"]
    assert ids == token_row(RUNS[3]).input_ids.tolist()
    assert not any(weights)
    assert set(token_labels) == {IGNORED}
    assert manifest.counts["weightless"] == 1


def test_naive_takes_a_trajectory_that_has_no_steps(tmp_path: Path) -> None:
    idle = trajectory("idle", num_steps=0)
    tokens = write_tokens(tmp_path / "tokens", [token_row(idle), token_row(RUNS[0])])
    manifest = pack(tokens, tmp_path / "shards", config(recipe="naive"))
    assert packed(manifest)["idle"] == (token_row(idle).input_ids.tolist(), [0.0], [IGNORED])
    assert manifest.counts["weightless"] == 1


def test_the_same_inputs_and_seed_give_the_same_bytes(
    tokens: Path, labels: Path, tmp_path: Path
) -> None:
    one, other = (
        pack(tokens, tmp_path / name, config(shard_tokens=32), labels=labels)
        for name in ("one", "other")
    )
    assert len(one.parts) > 1
    assert [part.read_bytes() for part in one.parts] == [part.read_bytes() for part in other.parts]
    assert one.files == other.files


def test_another_seed_permutes_the_sequences_and_nothing_else(
    examples: Examples, tmp_path: Path
) -> None:
    def sequences(seed: int) -> list[bytes]:
        settings = config(recipe="naive", seq_len=4096, shuffle_seed=seed)
        manifest = pack(examples.tokens, tmp_path / f"seed-{seed}", settings)
        return [orjson.dumps(row) for row in rows_of(manifest)]

    zero, one = sequences(0), sequences(1)
    assert zero != one
    assert Counter(zero) == Counter(one)


def test_the_number_of_threads_changes_no_byte(tokens: Path, labels: Path, tmp_path: Path) -> None:
    one, two = (
        pack(tokens, tmp_path / f"{n}", config(shard_tokens=32), labels=labels, workers=n)
        for n in (1, 3)
    )
    assert len(one.parts) > 1
    assert one.files == two.files
    assert [part.read_bytes() for part in one.parts] == [part.read_bytes() for part in two.parts]


def without_step(rows: list[dict[str, Any]], name: str, step: int) -> list[dict[str, Any]]:
    return [row for row in rows if (row["trajectory_id"], row["step_index"]) != (name, step)]


@pytest.fixture
def gap(tmp_path: Path) -> Path:
    """Labels that lack step 2 of `failed`."""
    return write_labels(tmp_path / "gap", without_step(labels_by(RUNS, GIVEN), "failed", 2))


def test_missing_label_drop_leaves_the_trajectory_out(
    tokens: Path, gap: Path, tmp_path: Path
) -> None:
    run = pack_command(tokens, tmp_path, gap)
    assert run.status == 1
    assert "1 missing_label" in run.stdout
    assert "failed" not in packed_names(tmp_path)


def test_missing_label_mask_gives_the_step_no_weight(
    tokens: Path, gap: Path, tmp_path: Path
) -> None:
    settings = config(missing_label="mask")
    manifest = pack(tokens, tmp_path / "shards", settings, labels=gap)
    assert weights_by_step(manifest, RUNS[1]) == [1.0, 0.0, 0.0, 1.0]
    assert manifest.counts["missing_label"] == 1


def test_missing_label_error_names_trajectory_and_step_and_writes_nothing(
    tokens: Path, gap: Path, tmp_path: Path
) -> None:
    run = pack_command(tokens, tmp_path, gap, "--missing-label", "error")
    assert run.status == 2
    assert "failed: no label for step 2 (1 missing)" in run.stderr
    assert not (tmp_path / "shards").exists()


def test_a_label_that_the_recipe_does_not_ask_for_may_be_missing(
    tokens: Path, tmp_path: Path
) -> None:
    rows = labels_by([run for run in RUNS if not run.resolved], GIVEN)
    labels = write_labels(tmp_path / "labels", rows)
    manifest = pack(tokens, tmp_path / "shards", config(missing_label="error"), labels=labels)
    assert manifest.counts["missing_label"] == 0


def test_labels_of_an_earlier_version_of_a_trajectory_count_as_missing(
    tokens: Path, tmp_path: Path
) -> None:
    old = [
        row | {"content_hash": "0" * 32} if row["trajectory_id"] == "failed" else row
        for row in labels_by(RUNS, GIVEN)
    ]
    manifest = pack(
        tokens, tmp_path / "shards", config(), labels=write_labels(tmp_path / "labels", old)
    )
    assert "failed" not in packed(manifest)
    assert (manifest.counts["stale_labels"], manifest.counts["missing_label"]) == (1, 1)


def broken(change: str) -> list[dict[str, Any]]:
    rows = labels_by(RUNS, GIVEN)
    failed = RUNS[1]
    if change == "a step that is not there":
        rows.append(label_row(failed, 4, G))
    elif change == "two labels":
        rows.append(label_row(failed, 1, G))
    elif change == "two versions":
        rows[-1]["content_hash"] = "0" * 32
    elif change == "no label of ours":
        rows[0]["label"] = "great"
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a step that is not there", "failed: a label for step 4, but .* the steps 0 to 3"),
        ("two labels", "failed: step 1 has two labels"),
        ("two versions", "hopeless: step 1 was labelled in another version"),
        ("no label of ours", "expected labels good, unnecessary, harmful, got 'great'"),
    ],
)
def test_labels_that_do_not_fit_are_an_error_that_names_them(
    tokens: Path, tmp_path: Path, change: str, message: str
) -> None:
    labels = write_labels(tmp_path / "labels", broken(change))
    with pytest.raises(LabelError, match=message):
        pack(tokens, tmp_path / "direct", config(), labels=labels)
    assert pack_command(tokens, tmp_path, labels).status == 2
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if RECIPES[name].needs_labels])
def test_a_masked_recipe_without_labels_says_what_to_give(
    tokens: Path, tmp_path: Path, recipe: str
) -> None:
    run = srft_prep("pack", tokens, "-o", tmp_path / "shards", "--recipe", recipe)
    assert run.status == 2
    assert f"--recipe {recipe} weights steps by labels: give --labels DIR" in run.stderr
    assert not (tmp_path / "shards").exists()


def test_soft_without_probabilities_says_so(tokens: Path, labels: Path, tmp_path: Path) -> None:
    run = pack_command(tokens, tmp_path, labels, "--soft")
    assert run.status == 2
    assert "carry no probabilities" in run.stderr
    assert not (tmp_path / "shards").exists()


def soft_labels(path: Path, chances: Mapping[tuple[str, int], Sequence[float | None]]) -> Path:
    names = ("p_good", "p_unnecessary", "p_harmful")
    rows = labels_by(RUNS, GIVEN)
    for row in rows:
        given = chances.get((row["trajectory_id"], row["step_index"]))
        if given is not None:
            row |= dict(zip(names, given, strict=True))
    return write_labels(path, rows)


CHANCES = {
    ("failed", 0): (0.7, 0.2, 0.1),
    ("failed", 1): (0.0, 0.0, 1.0),
    ("failed", 2): (1 / 3, 1 / 3, 1 / 3),
}


def test_soft_weights_are_expected_values_in_float32(tokens: Path, tmp_path: Path) -> None:
    labels = soft_labels(tmp_path / "labels", CHANCES)
    weights = {"good": 1.0, "unnecessary": 0.5, "harmful": 0.0}
    settings = config(soft=True, weights=weights)
    manifest = pack(tokens, tmp_path / "shards", settings, labels=labels)
    as_stored = [[np.float32(p) for p in chances] for chances in CHANCES.values()]
    expected = [float(np.float32(float(g) + 0.5 * float(u))) for g, u, _ in as_stored]
    assert weights_by_step(manifest, RUNS[1]) == [*expected, 1.0]
    assert manifest.counts["steps_without_probabilities"] == 1 + 3 + 2
    for row in rows_of(manifest):
        places = {
            place
            for run in row["loss_weights"]
            for place in range(run["start"], run["start"] + run["length"])
        }
        for place, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
            assert label == (token if place in places else IGNORED)


@pytest.mark.parametrize(
    "chances", [(0.5, 0.5, 0.5), (float("nan"), 0.5, 0.5), (1.5, -0.5, 0.0), (0.0, 0.0, 0.0)]
)
def test_probabilities_that_are_none_are_refused_with_soft(
    tokens: Path, tmp_path: Path, chances: tuple[float, float, float]
) -> None:
    labels = soft_labels(tmp_path / "labels", {**CHANCES, ("failed", 3): chances})
    with pytest.raises(LabelError, match="failed: step 3: expected probabilities that sum to 1"):
        pack(tokens, tmp_path / "shards", config(soft=True), labels=labels)


@pytest.mark.parametrize(("weight", "stored"), [(-0.0, 0.0), (1e-46, 0.0), (1e-44, 9.8e-45)])
def test_a_weight_that_float32_cannot_hold_makes_no_run(
    tokens: Path, labels: Path, tmp_path: Path, weight: float, stored: float
) -> None:
    weights = {"good": 1.0, "unnecessary": weight, "harmful": 0.0}
    manifest = pack(tokens, tmp_path / "shards", config(weights=weights), labels=labels)
    by_step = weights_by_step(manifest, RUNS[1])
    assert by_step == [1.0, 0.0, pytest.approx(stored, rel=1e-3), 1.0]
    runs = [run["weight"] for row in rows_of(manifest) for run in row["loss_weights"]]
    assert all(each > 0 for each in runs)


def test_totals_of_the_manifest_are_what_the_files_hold(examples: Examples, tmp_path: Path) -> None:
    settings = config(
        seq_len=1500, overlong="windows", weights={"good": 1.0, "unnecessary": 0.1, "harmful": 0.0}
    )
    manifest = pack(examples.tokens, tmp_path / "shards", settings, labels=examples.labels)
    rows = pl.read_parquet(manifest.parts)
    runs = rows["loss_weights"].explode().drop_nulls().struct.unnest()
    num_tokens = int(rows["input_ids"].list.len().sum())
    expected = {
        "num_sequences": rows.height,
        "num_documents": int(rows["seq_lengths"].list.len().sum()),
        "num_trajectories": rows["trajectory_ids"].explode().n_unique(),
        "num_tokens": num_tokens,
        "num_loss_tokens": int((rows["labels"].explode() != IGNORED).sum()),
        "fill": num_tokens / (rows.height * 1500),
    }
    assert {name: manifest.data[name] for name in expected} == expected
    assert {name: manifest.counts[name] for name in expected} == expected
    assert expected["num_loss_tokens"] == runs["length"].sum()
    sum_weights = (runs["length"].cast(pl.Float64) * runs["weight"].cast(pl.Float64)).sum()
    assert manifest.data["sum_weights"] == pytest.approx(sum_weights, rel=1e-12)
    assert manifest.data["min_sequences"] <= rows.height
    assert manifest.counts["overlong"] > 0
    assert manifest.data["seq_len"] == 1500
    assert manifest.data["recipe"] == "srft"
    assert manifest.data["tokenizer"] == "example"
    assert len(manifest.data["tokenizer_hash"]) == len(manifest.data["template_hash"]) == 64


def fraction_sums(manifest: Manifest) -> dict[str, Fraction]:
    """The sum of the weights of each trajectory, without any rounding."""
    sums: dict[str, Fraction] = {}
    for row in rows_of(manifest):
        bounds = np.cumsum([0, *row["seq_lengths"]]).tolist()
        for name, (start, end) in zip(row["trajectory_ids"], pairwise(bounds), strict=True):
            runs = [run for run in row["loss_weights"] if start <= run["start"] < end]
            products = [run["length"] * Fraction(run["weight"]) for run in runs]
            sums[name] = sums.get(name, Fraction()) + sum(products, start=Fraction())
    return sums


def test_sums_of_weights_are_exact_and_rounded_once_at_every_level(
    examples: Examples, tmp_path: Path
) -> None:
    weights = {"good": 0.1, "unnecessary": 1e-9, "harmful": 1e9}
    settings = config(
        seq_len=1500, overlong="windows", weights=weights, recipe="srft-all", shard_tokens=20_000
    )
    manifest = pack(examples.tokens, tmp_path / "shards", settings, labels=examples.labels)
    assert len(manifest.parts) > 2
    sums = fraction_sums(manifest)
    for row in rows_of(manifest):
        products = [run["length"] * Fraction(run["weight"]) for run in row["loss_weights"]]
        assert row["sum_weights"] == float(sum(products))
        assert math.fsum(row["document_sum_weights"]) == pytest.approx(row["sum_weights"])
        for name, total in zip(row["trajectory_ids"], row["trajectory_sum_weights"], strict=True):
            assert total == float(sums[name])
    assert manifest.data["sum_weights"] == float(sum(sums.values()))
    for part, told in zip(manifest.parts, manifest.data["shards"], strict=True):
        runs = pl.read_parquet(part)["loss_weights"].explode().drop_nulls().to_list()
        total = float(sum(run["length"] * Fraction(run["weight"]) for run in runs))
        assert told["name"] == part.name
        assert told["sum_weights"] == total
        assert float(pq.read_metadata(part).metadata[SUM_KEY.encode()]) == total
    assert verify(tmp_path / "shards").problems == ()


def test_a_documents_first_token_never_carries_weight(tmp_path: Path) -> None:
    """A trainer shifts labels by one: it would be predicted from the document before."""
    rows = [token_row(trajectory(name), gap=0) for name in ("one", "two")]
    tokens = write_tokens(tmp_path / "tokens", rows)
    manifest = pack(tokens, tmp_path / "shards", config(recipe="naive"))
    assert packed(manifest)["two"][1] == [0.0, *[1.0] * 17, 0.0]
    assert manifest.counts["lost_tokens"] == 2
    assert verify(tmp_path / "shards").problems == ()


def test_windows_of_a_trajectory_train_each_weighted_step_once(
    examples: Examples, tmp_path: Path
) -> None:
    """Against the tokens: every weighted step that fits is found once in the shards, as ids."""
    settings = config(recipe="naive", seq_len=1500, overlong="windows")
    manifest = pack(examples.tokens, tmp_path / "shards", settings)
    trained: Counter[tuple[int, ...]] = Counter()
    for row in rows_of(manifest):
        for run in row["loss_weights"]:
            trained[tuple(row["labels"][run["start"] : run["start"] + run["length"]])] += 1
    steps: Counter[tuple[int, ...]] = Counter()
    for part in examples.tokens.glob("part-*.parquet"):
        for row in pq.read_table(part).to_pylist():
            for span in row["step_spans"]:
                steps[tuple(row["input_ids"][span["start"] : span["end"]])] += 1
    assert trained == steps
    assert manifest.counts["lost_steps"] == 0


def test_one_sequence_a_step_gives_the_same_weights_and_counts_trajectories_once(
    tokens: Path, labels: Path, tmp_path: Path
) -> None:
    """Token rows as `--history per-step` makes them: each with all that came before its step."""
    rows = []
    for run in RUNS:
        whole = token_row(run)
        for place, (step, start, end) in enumerate(whole.step_spans):
            rows.append(
                TokenRow(
                    trajectory_id=run.trajectory_id,
                    resolved=run.resolved,
                    content_hash=run.content_hash,
                    input_ids=whole.input_ids[:end],
                    step_spans=((step, start, end),),
                    part_spans=tuple(part for part in whole.part_spans if part[0] == step),
                    step_chars=whole.step_chars[6 * place : 6 * place + 6],
                )
            )
    by_step = write_tokens(tmp_path / "by-step", rows[:5], rows[5:])
    assert verify(by_step).problems == ()
    manifest = pack(by_step, tmp_path / "shards", config(), labels=labels)
    expected = pack(tokens, tmp_path / "whole", config(), labels=labels)
    assert manifest.counts["num_documents"] == len(rows) > len(RUNS)
    for name in ("num_trajectories", "num_loss_tokens", "sum_weights"):
        assert manifest.counts[name] == expected.counts[name]
    sums = {
        name: total
        for row in rows_of(expected)
        for name, total in zip(row["trajectory_ids"], row["trajectory_sum_weights"], strict=True)
    }
    for row in rows_of(manifest):
        for name, total in zip(row["trajectory_ids"], row["trajectory_sum_weights"], strict=True):
            assert total == sums[name]
    assert verify(tmp_path / "shards").problems == ()


def test_overlong_error_names_the_trajectory_and_writes_nothing(
    tokens: Path, tmp_path: Path
) -> None:
    options = ("--recipe", "naive", "--seq-len", 30, "--overlong", "error")
    run = srft_prep("pack", tokens, "-o", tmp_path / "shards", *options)
    assert run.status == 2
    assert "solved: 31 tokens, more than --seq-len 30" in run.stderr
    assert not (tmp_path / "shards").exists()


def test_overlong_drop_and_truncate_count_what_is_lost(tokens: Path, tmp_path: Path) -> None:
    drop = pack(tokens, tmp_path / "d", config(recipe="naive", seq_len=31, overlong="drop"))
    assert (drop.counts["overlong"], drop.counts["lost_steps"]) == (1, 4)
    assert drop.counts["lost_tokens"] == 4 * 6
    cut = pack(tokens, tmp_path / "t", config(recipe="naive", seq_len=31))
    assert (cut.counts["overlong"], cut.counts["lost_steps"]) == (1, 1)
    assert packed(cut)["failed"][0] == token_row(RUNS[1]).input_ids[:30].tolist()


def test_a_recipe_that_leaves_nothing_says_why(tokens: Path, tmp_path: Path) -> None:
    only = write_tokens(tmp_path / "only", [token_row(RUNS[1])])
    with pytest.raises(ConfigError, match=r"rft leaves no trajectory to pack \(1 left_out\)"):
        pack(only, tmp_path / "shards", config(recipe="rft"))
    none = write_labels(tmp_path / "labels", [])
    with pytest.raises(LabelError, match=r"none of the 1 trajectories .* has a label"):
        pack(only, tmp_path / "shards", config(), labels=none)


def test_labels_of_other_trajectories_are_refused_and_not_packed_as_rft(
    tokens: Path, tmp_path: Path
) -> None:
    foreign = write_labels(tmp_path / "labels", [label_row(trajectory("another"), 0, "good")])
    with pytest.raises(LabelError, match="made for other trajectories"):
        pack(tokens, tmp_path / "shards", config(), labels=foreign)
    assert not (tmp_path / "shards").exists()


def test_weights_are_refused_where_no_step_is_weighted_by_its_label(
    tokens: Path, tmp_path: Path
) -> None:
    for change in ({"soft": True}, {"weights": {"good": 1.0, "unnecessary": 1.0, "harmful": 0.5}}):
        with pytest.raises(ConfigError, match="gives every step weight 1"):
            pack(tokens, tmp_path / "shards", config(recipe="naive", **change))


def test_lost_steps_are_told_with_what_helps(tokens: Path, tmp_path: Path) -> None:
    args = ("pack", tokens, "--recipe", "naive", "-o")
    cut = srft_prep(*args, tmp_path / "cut", "--seq-len", 31)
    assert "1 steps with 6 weighted tokens are lost: they lie behind the cut" in cut.stderr
    windows = srft_prep(*args, tmp_path / "w", "--seq-len", 31, "--overlong", "windows")
    assert windows.stderr == ""
    tight = srft_prep(*args, tmp_path / "t", "--seq-len", 6, "--overlong", "windows")
    assert tight.status == 2
    long = trajectory("long", num_steps=1)
    mixed = [token_row(long, step_tokens=40), token_row(RUNS[0])]
    args = ("pack", write_tokens(tmp_path / "mixed", mixed), *args[2:])
    some = srft_prep(*args, tmp_path / "s", "--seq-len", 31, "--overlong", "windows")
    assert "1 steps with 40 weighted tokens are lost: each alone is longer than" in some.stderr


def test_what_stands_behind_the_last_weighted_token_can_be_left_out(
    tokens: Path, labels: Path, tmp_path: Path
) -> None:
    whole = pack(tokens, tmp_path / "whole", config(), labels=labels)
    trimmed = pack(tokens, tmp_path / "trimmed", config(trim_suffix=True), labels=labels)
    before, after = packed(whole), packed(trimmed)
    assert after.keys() == before.keys() - {"hopeless"}
    for name, (ids, weights, _) in after.items():
        assert weights[-1] > 0
        assert ids == before[name][0][: len(ids)]
        assert [*weights, *[0.0] * (len(before[name][0]) - len(ids))] == before[name][1]
    saved = whole.counts["num_tokens"] - trimmed.counts["num_tokens"]
    assert trimmed.counts["trimmed_tokens"] == saved > 0
    assert trimmed.counts["weightless"] == 1
    assert trimmed.counts["sum_weights"] == whole.counts["sum_weights"]
    assert verify(tmp_path / "trimmed").problems == ()


def test_documents_without_a_weighted_token_can_be_left_out(tmp_path: Path) -> None:
    rows = [token_row(RUNS[0]), token_row(RUNS[1])]
    tokens = write_tokens(tmp_path / "tokens", rows)
    harmful = labels_by(RUNS[1:2], {"failed": (H, H, H, H)})
    labels = write_labels(tmp_path / "labels", harmful)
    kept = pack(tokens, tmp_path / "kept", config(), labels=labels)
    dropped = pack(tokens, tmp_path / "dropped", config(drop_weightless=True), labels=labels)
    assert (kept.counts["num_documents"], kept.counts["weightless"]) == (2, 1)
    assert (dropped.counts["num_documents"], dropped.counts["weightless"]) == (1, 1)
    assert dropped.counts["sum_weights"] == kept.counts["sum_weights"]


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_flipped_byte_of_a_page_is_found_on_reading(
    examples: Examples, tmp_path: Path, place: float
) -> None:
    manifest = pack(examples.tokens, tmp_path / "shards", config(recipe="naive", seq_len=4096))
    path = manifest.parts[0]
    chunk = pq.read_metadata(path).row_group(0).column(0)
    data = bytearray(path.read_bytes())
    header = 40  # the page's own header, which the checksum does not cover
    start = chunk.data_page_offset + header
    data[start + int(place * (chunk.total_compressed_size - header))] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        pq.read_table(path, page_checksum_verification=True)


def test_shards_are_small_row_groups_of_the_declared_columns(
    examples: Examples, tmp_path: Path
) -> None:
    manifest = pack(examples.tokens, tmp_path / "shards", config(recipe="naive", seq_len=4096))
    with pq.ParquetFile(manifest.parts[0]) as file:
        assert file.schema_arrow.equals(SHARDS)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert max(sizes) <= ROW_GROUP_ROWS
        columns = file.metadata.row_group(0)
        assert {columns.column(i).compression for i in range(columns.num_columns)} == {"ZSTD"}


def test_polars_pyarrow_and_torch_read_the_same(examples: Examples, tmp_path: Path) -> None:
    settings = config(seq_len=4096)
    manifest = pack(examples.tokens, tmp_path / "shards", settings, labels=examples.labels)
    [path] = manifest.parts
    by_arrow = pq.read_table(path).to_pylist()
    assert pl.read_parquet(path).to_dicts() == by_arrow
    for row, lists in zip(by_arrow, pq.read_table(path).to_batches()[0].to_pylist(), strict=False):
        assert row == lists
    table = pq.read_table(path)
    for index, row in enumerate(by_arrow):
        ids, labels = (
            torch.from_numpy(table[name][index].values.to_numpy().copy())
            for name in ("input_ids", "labels")
        )
        weights = torch.zeros(len(ids))
        for run in row["loss_weights"]:
            weights[run["start"] : run["start"] + run["length"]] = run["weight"]
        assert ids.tolist() == row["input_ids"]
        assert torch.equal(labels, torch.where(weights > 0, ids, IGNORED))
        assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)


def test_a_sequence_mixes_trajectories_in_the_order_of_their_ids(
    tokens: Path, labels: Path, tmp_path: Path
) -> None:
    manifest = pack(tokens, tmp_path / "shards", config(seq_len=200), labels=labels)
    [row] = rows_of(manifest)
    assert row["trajectory_ids"] == ["failed", "solved", "unknown", "hopeless"]
    assert row["seq_lengths"] == [41, 31, 31, 21]


@settings(deadline=None)  # writes files
@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([True, False, None])), min_size=1),
    st.integers(12, 80),
    st.sampled_from(["truncate", "windows"]),
    st.data(),
)
def test_any_pack_is_sound_and_holds_each_weighted_step_once(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, bool | None]],
    seq_len: int,
    overlong: str,
    data: st.DataObject,
) -> None:
    root = tmp_path_factory.mktemp("any")
    runs = [
        trajectory(f"run-{number}", num_steps=steps, resolved=resolved)
        for number, (steps, resolved) in enumerate(shapes)
    ]
    given_labels = {
        run.trajectory_id: data.draw(
            st.lists(st.sampled_from((G, U, H)), min_size=run.num_steps, max_size=run.num_steps)
        )
        for run in runs
    }
    tokens = write_tokens(root / "tokens", [token_row(run) for run in runs])
    labels = write_labels(root / "labels", labels_by(runs, given_labels))
    settings = config(seq_len=seq_len, overlong=overlong)
    manifest = pack(tokens, root / "shards", settings, labels=labels)
    assert verify(root / "shards").problems == ()
    wanted = sum(
        6 * (run.resolved is True or label != H)
        for run in runs
        for label in given_labels[run.trajectory_id]
    )
    assert manifest.counts["num_loss_tokens"] + manifest.counts["lost_tokens"] == wanted
    if overlong == "windows":
        assert manifest.counts["lost_tokens"] == 0


def pack_command(tokens: Path, tmp_path: Path, labels: Path, *options: object) -> Run:
    return srft_prep(
        "pack", tokens, "-o", tmp_path / "shards", "--labels", labels, "--seq-len", 64, *options
    )


def packed_names(tmp_path: Path) -> set[str]:
    table: pa.Table = pq.read_table(tmp_path / "shards" / "shard-00000.parquet")
    return {name for names in table["trajectory_ids"].to_pylist() for name in names}


def test_pack_weighs_by_one_annotator_of_a_gold_file(
    tokens: Path, labels: Path, tmp_path: Path
) -> None:
    rows = [
        {
            "trajectory_id": run.trajectory_id,
            "step_index": step,
            "label": label,
            "annotator": annotator,
            "reason": "by hand",
        }
        for annotator, given in (("ada", GIVEN), ("bob", dict.fromkeys(GIVEN, ["good"] * 9)))
        for run in RUNS
        for step, label in enumerate(given.get(run.trajectory_id, ())[: run.num_steps])
    ]
    gold = tmp_path / "gold.jsonl"
    gold.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    unsaid = pack_command(tokens, tmp_path, gold)
    assert unsaid.status == 2
    assert "labels by ada, bob; say whose: --annotator ada" in unsaid.stderr
    by_critic = pack(tokens, tmp_path / "by-critic", config(), labels=labels)
    said = pack_command(tokens, tmp_path, gold, "--annotator", "ada")
    assert said.status == 0, said.stderr
    by_hand = read_manifest(tmp_path / "shards")
    assert packed(by_hand) == packed(by_critic)
    assert by_hand.data["inputs"][1]["annotator"] == "ada"
    again = pack_command(tokens, tmp_path, gold, "--annotator", "bob")
    assert again.status == 2
    assert "other settings or inputs" in again.stderr


def test_an_annotator_of_a_label_directory_is_refused(
    tokens: Path, labels: Path, tmp_path: Path
) -> None:
    run = pack_command(tokens, tmp_path, labels, "--annotator", "ada")
    assert run.status == 2
    assert "names no annotator" in run.stderr
