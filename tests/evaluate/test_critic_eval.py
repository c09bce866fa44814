"""critic-eval: numbers that scikit-learn finds too, and no praise that chance could earn."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import polars as pl
import pytest
from scipy.stats import binom
from sklearn import metrics

from srft_prep.ensembles import combine
from srft_prep.evaluate.baselines import without_critic
from srft_prep.evaluate.critic import (
    Contrast,
    Judged,
    codes_of,
    contrast,
    evaluate,
    judged_no_critic,
    judged_trivial,
)
from srft_prep.evaluate.critic_labels import read_critics
from srft_prep.evaluate.critic_report import lines
from srft_prep.evaluate.gold_steps import join_gold
from srft_prep.evaluate.regression import predict_out_of_fold
from srft_prep.evaluate.resampling import Estimate, Resampling
from srft_prep.gold import read_gold
from srft_prep.label_metrics import HARMFUL, calibration_error, reliability
from srft_prep.manifest import read_manifest
from srft_prep.types import LABELS
from tests.evaluate.critic_sets import SETS, Planted, label_by_rules, opened, write_gold

SAMPLES = 200


@pytest.fixture(scope="module")
def human(
    tmp_path_factory: pytest.TempPathFactory, shared_data: Path
) -> dict[str, tuple[Path, Path, Path]]:
    """Gold, the rules' labels, and labels with probabilities of a critic that knows nothing."""
    found = {}
    for name in SETS:
        folder = tmp_path_factory.mktemp(name)
        source = shared_data / "human_labels" / name
        labels = label_by_rules(folder, source)
        keys = pl.read_parquet(labels / "labels.parquet").select("trajectory_id", "step_index")
        chances = np.random.default_rng(0).integers(1, 9, size=(keys.height, 3)) / 1.0
        chances /= chances.sum(axis=1, keepdims=True)
        guess = keys.with_columns(
            pl.Series("label", np.array(LABELS)[chances.argmax(axis=1)]),
            *(pl.Series(f"p_{label}", chances[:, at]) for at, label in enumerate(LABELS)),
        )
        guess.write_ndjson(folder / "guess.jsonl")
        found[name] = (source / "gold.jsonl", labels, folder / "guess.jsonl")
    return found


def values(found: dict[str, Estimate]) -> dict[str, float]:
    return {name: each.value for name, each in found.items()}


@pytest.mark.parametrize("name", SETS)
def test_every_number_of_every_row_is_scikit_learns(human, name: str) -> None:
    gold_file, *paths = human[name]
    gold, critics = opened(gold_file, *paths)
    found = evaluate(gold, critics, samples=SAMPLES)
    raw = {}
    for line in gold_file.read_bytes().splitlines():
        row = orjson.loads(line)
        raw[row["trajectory_id"], row["step_index"]] = row["label"]
    judged = gold.steps.filter(pl.Series(gold.judged))
    truth = [raw[key] for key in judged.select("trajectory_id", "step_index").iter_rows()]
    assert len(truth) == len(raw) == found.num_steps
    harmful = np.array([label == "harmful" for label in truth])
    length = judged.group_by("trajectory_id").agg(pl.len())
    last = judged.join(length, on="trajectory_id", maintain_order="left")
    none = without_critic(gold, seed=0)
    own = {
        "labels": (gold.members[0]["label"].to_list(), None),
        "guess.jsonl": (gold.members[1]["label"].to_list(), gold.members[1]["p_harmful"]),
        "flag all": (["harmful"] * len(truth), np.ones(len(truth))),
        "flag nothing": (["good"] * len(truth), None),
        "flag last": (
            np.where(last["step_index"] == last["len"] - 1, "harmful", "good").tolist(),
            None,
        ),
        "no critic": (np.where(none.flagged, "harmful", "good").tolist(), none.probabilities),
    }
    for how in ("any", "majority", "mean"):
        together = combine(gold.members, how)
        chances = together["p_harmful"] if together["p_harmful"].null_count() == 0 else None
        own[f"{how} of 2"] = (together["label"].to_list(), chances)
    assert {row.name for row in found.rows} == own.keys()
    for row in found.rows:
        labels, chances = own[row.name]
        flags = np.array([label == "harmful" for label in labels])
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            harmful, flags, average="binary", zero_division=0
        )
        expected = {
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "accuracy": metrics.accuracy_score(harmful, flags),
            "kappa": metrics.cohen_kappa_score(harmful, flags),
        }
        if chances is not None:
            expected["average_precision"] = metrics.average_precision_score(harmful, chances)
        assert values(row.harmful) == pytest.approx(expected), row.name
        table = metrics.precision_recall_fscore_support(
            truth, labels, labels=LABELS, zero_division=0
        )
        for place, label in enumerate(LABELS):
            told = list(values(row.labels[label]).values())
            if label in truth:
                assert told == pytest.approx([column[place] for column in table[:3]])
            else:
                assert np.isnan(told).all()
        assert values(row.overall) == pytest.approx(
            {
                "accuracy": metrics.accuracy_score(truth, labels),
                "macro_f1": metrics.f1_score(truth, labels, average="macro", zero_division=0),
                "kappa": metrics.cohen_kappa_score(truth, labels),
            }
        )
        assert row.confusion == metrics.confusion_matrix(truth, labels, labels=LABELS).tolist()
        assert row.flagged == flags.sum()
        for each in (*row.harmful.values(), *row.overall.values()):
            assert each.low <= each.value + 1e-9
            assert each.value <= each.high + 1e-9


def test_the_no_critic_row_knows_position_and_outcome_and_nothing_else(human) -> None:
    gold, _ = opened(human["who_and_when"][0], human["who_and_when"][1])
    found = without_critic(gold, seed=0)
    index = gold.steps["step_index"].to_numpy().astype(float)
    count = gold.steps["num_steps"].to_numpy().astype(float)
    by_hand = np.stack(
        [
            index / 10,
            np.log1p(index),
            (index + 0.5) / count,
            index == 0,
            index == count - 1,
            np.log(count),
            np.zeros(len(index)),
            np.ones(len(index)),  # all are unresolved
        ],
        axis=1,
    )
    expected = predict_out_of_fold(by_hand, gold.harmful, gold.groups)
    np.testing.assert_allclose(found.probabilities, expected.probabilities)


def trials(gold, no_critic: Judged, draws: Resampling, *, ranked: bool) -> Iterator[Contrast]:
    """Yield how critics compare that have people's own labels, shuffled."""
    random = np.random.default_rng(0)
    flag_all = judged_trivial(gold, draws)[0]
    for _ in range(200):
        chances = random.random(len(gold.gold)) if ranked else None
        shuffled = Judged(
            name="shuffled",
            kind="critic",
            gold=gold,
            draws=draws,
            codes=random.permutation(gold.gold),
            probabilities=chances,
        )
        yield contrast(shuffled, no_critic, floor=flag_all)


@pytest.mark.parametrize("name", SETS)
def test_shuffled_labels_are_never_better_than_no_critic_beyond_chance(human, name: str) -> None:
    gold, _ = opened(human[name][0], human[name][1])
    draws = Resampling(clusters=gold.clusters, samples=SAMPLES, seed=0)
    no_critic = judged_no_critic(gold, draws, seed=0)
    for ranked in (False, True) if name == "trail_swe" else (False,):
        found = [each.verdict for each in trials(gold, no_critic, draws, ranked=ranked)]
        praised = sum(verdict in ("better", "ranks better", "flags better") for verdict in found)
        assert praised <= binom.ppf(0.999, len(found), 0.025)


def test_a_critic_that_knows_is_called_better_and_one_that_is_wrong_worse(tmp_path: Path) -> None:
    study = Planted(tmp_path, skill=6.0)
    gold, critics = opened(study.gold_file, study.labels)
    (good,) = evaluate(gold, critics, samples=SAMPLES).against_no_critic
    assert good.verdict == "better"
    turned = {key: "good" if label == "harmful" else "harmful" for key, label in study.gold.items()}
    gold, critics = opened(write_gold(tmp_path / "turned.jsonl", turned), study.labels)
    (bad,) = evaluate(gold, critics, samples=SAMPLES).against_no_critic
    assert bad.verdict == "worse"


def test_a_critic_that_ranks_well_and_flags_nothing_is_sent_to_calibration(tmp_path: Path) -> None:
    study = Planted(tmp_path, skill=4.0, offset=-9.0)
    gold, critics = opened(study.gold_file, study.labels)
    found = evaluate(gold, critics, samples=SAMPLES)
    assert found.rows[0].flagged == 0
    assert found.against_no_critic[0].verdict == "ranks better"


def test_two_critics_are_held_against_each_other_over_the_same_samples(tmp_path: Path) -> None:
    good, poor = (
        Planted(tmp_path / name, skill=skill, offset=-1.5)
        for name, skill in (("good", 4.0), ("poor", 0.5))
    )
    good.labels.rename(tmp_path / "first")
    poor.labels.rename(tmp_path / "second")
    gold, critics = opened(good.gold_file, tmp_path / "first", tmp_path / "second")
    (pair,) = evaluate(gold, critics, samples=SAMPLES).pairs
    assert (pair.row, pair.other) == ("second", "first")
    assert pair.verdict == "worse"
    assert pair.f1.high < 0


def test_perfect_labels_have_no_doubt_about_them(tmp_path: Path) -> None:
    study = Planted(tmp_path, unnecessary=True)
    gold, critics = opened(study.gold_file, study.gold_file)
    row = evaluate(gold, critics, samples=SAMPLES).rows[0]
    assert gold.marks_unnecessary
    for each in (*row.harmful.values(), *row.overall.values()):
        assert (each.value, each.low, each.high) == (1, 1, 1)


def test_the_order_of_gold_and_of_labels_changes_no_number(tmp_path: Path) -> None:
    study = Planted(tmp_path)
    rows = [
        orjson.dumps({"trajectory_id": name, "step_index": step, "label": label}) + b"\n"
        for (name, step), label in study.gold.items()
    ]
    (tmp_path / "back.jsonl").write_bytes(b"".join(reversed(rows)))
    first = evaluate(*opened(study.gold_file, study.labels), samples=SAMPLES)
    second = evaluate(*opened(tmp_path / "back.jsonl", study.labels), samples=SAMPLES)
    assert orjson.dumps(first) == orjson.dumps(second)


def test_flags_become_labels_of_two_kinds() -> None:
    assert codes_of(np.array([True, False])).tolist() == [HARMFUL, 0]


def test_who_flags_everything_is_not_praised_for_beating_an_unlucky_guess(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=10, steps=12)
    gold, _ = opened(study.gold_file, study.labels)
    draws = Resampling(clusters=gold.clusters, samples=SAMPLES, seed=0)
    flag_all, flag_nothing, _ = judged_trivial(gold, draws)
    alone = contrast(flag_all, flag_nothing)
    assert alone.verdict == "better"
    held = contrast(flag_all, flag_nothing, floor=flag_all)
    assert (held.f1, held.verdict) == (alone.f1, "not told apart")


def test_reliability_is_of_the_steps_that_have_a_probability(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=6)
    rows = pl.read_parquet(study.labels / "labels.parquet")
    names = [f"p_{label}" for label in LABELS]
    known = pl.col("step_index") % 2 == 0
    half = rows.with_columns(pl.when(known).then(pl.col(name)).alias(name) for name in names)
    half.drop("critic_id", "prompt_hash").write_parquet(tmp_path / "half.parquet")
    gold, critics = opened(study.gold_file, tmp_path / "half.parquet")
    found = evaluate(gold, critics, samples=SAMPLES)
    row = found.rows[0]
    measured = rows.filter(known).sort("trajectory_id", "step_index")
    assert row.measured_steps == measured.height == 24
    assert row.reliability is not None
    assert sum(each.count for each in row.reliability) == 24
    keys = measured.select("trajectory_id", "step_index").iter_rows()
    harmful = np.array([study.gold[key] == "harmful" for key in keys])
    curve = reliability(harmful, measured["p_harmful"].cast(pl.Float64).to_numpy())
    assert row.calibration_error == pytest.approx(calibration_error(curve))
    told = "\n".join(lines(found))
    assert "of 24 steps; 24 have no probability, and count as certain in average precision" in told
    assert "flag all: is P" not in told
    nowhere = rows.with_columns(
        pl.when(pl.col("trajectory_id") == "run-00").then(pl.col(name)).alias(name)
        for name in names
    )
    nowhere.drop("critic_id", "prompt_hash").write_parquet(tmp_path / "nowhere.parquet")
    others = {key: label for key, label in study.gold.items() if key[0] != "run-00"}
    gold_file = write_gold(tmp_path / "others.jsonl", others)
    row = evaluate(*opened(gold_file, tmp_path / "nowhere.parquet"), samples=SAMPLES).rows[0]
    assert (row.measured_steps, row.reliability) == (None, None)
    assert "average_precision" not in row.harmful


def test_the_report_says_what_folds_are_made_of(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=6)
    critics = read_critics([("hand", study.labels)])
    gold = read_gold([study.gold_file])
    for source, expected in (
        (read_manifest(tmp_path / "trajectories"), "predicted by folds of tasks"),
        (None, "predicted by folds of trajectories"),
    ):
        steps = join_gold(gold, critics, source, rules=False)
        told = lines(evaluate(steps, critics, samples=SAMPLES))
        assert any(line.endswith(expected) for line in told)


def test_samples_without_a_harmful_step_are_counted_and_left_out(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=4)
    rare = dict.fromkeys(study.gold, "good") | {("run-00", 0): "harmful", ("run-00", 5): "harmful"}
    gold, critics = opened(write_gold(tmp_path / "rare.jsonl", rare), study.labels)
    found = evaluate(gold, critics, samples=SAMPLES)
    count = found.samples_without["harmful"]
    assert 0 < count < SAMPLES
    flag_all = next(row for row in found.rows if row.name == "flag all")
    recall = flag_all.harmful["recall"]
    assert (recall.value, recall.low, recall.high) == (1, 1, 1)
    assert f"intervals of harmful: {count} samples without" in "\n".join(lines(found))
    none = opened(write_gold(tmp_path / "none.jsonl", dict.fromkeys(rare, "good")), study.labels)
    told = evaluate(*none, samples=SAMPLES)
    assert np.isnan(told.rows[0].harmful["f1"].value), "there is nothing to find"
    assert "note: no gold label is harmful" in "\n".join(lines(told))
    every = opened(write_gold(tmp_path / "all.jsonl", dict.fromkeys(rare, "harmful")), study.labels)
    told = evaluate(*every, samples=SAMPLES)
    assert "note: every gold label is harmful" in "\n".join(lines(told))
