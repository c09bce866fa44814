"""The clustered bootstrap: what a plain loop over drawn trajectories gives, and its coverage."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom
from sklearn import metrics

from srft_prep.evaluate import resampling
from srft_prep.evaluate.critic import evaluate
from srft_prep.evaluate.critic_labels import read_critics
from srft_prep.evaluate.gold_steps import Cluster, join_gold
from srft_prep.evaluate.resampling import (
    Estimate,
    Resampling,
    estimate,
    estimate_of,
    with_gold,
)
from srft_prep.gold import read_gold
from srft_prep.label_metrics import cohen_kappa, scores
from srft_prep.manifest import read_manifest
from srft_prep.types import Label
from tests.evaluate.critic_sets import write_gold
from tests.stages import label_row, trajectory, write_labels, write_trajectories


def sample_set(*, clusters: int = 9, seed: int = 3) -> tuple:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 12, size=clusters)
    places = np.repeat(np.arange(clusters), sizes)
    gold = random.integers(0, 3, size=len(places))
    own = np.where(random.random(len(places)) < 0.5, gold, random.integers(0, 3, len(places)))
    return places, gold, own, random.random(len(places)).round(1)


def test_samples_are_those_of_a_plain_loop_over_drawn_trajectories() -> None:
    places, gold, own, chances = sample_set()
    draws = Resampling(clusters=places, samples=120, seed=5)
    whole, samples = draws.matrices(gold, own, num_labels=3)
    assert (whole == metrics.confusion_matrix(gold, own, labels=[0, 1, 2])).all()
    point, ranked = draws.average_precisions(gold == 2, chances)
    assert point == pytest.approx(metrics.average_precision_score(gold == 2, chances))
    f1, kappa, area = [], [], []
    for counts in draws.drawn:
        assert counts.sum() == 9
        steps = np.concatenate(
            [np.flatnonzero(places == each) for each in range(9) for _ in range(counts[each])]
        )
        f1.append(
            metrics.f1_score(gold[steps], own[steps], labels=[2], average="macro", zero_division=0)
        )
        kappa.append(metrics.cohen_kappa_score(gold[steps], own[steps]))
        area.append(metrics.average_precision_score(gold[steps] == 2, chances[steps]))
    np.testing.assert_allclose(scores(samples).f1[:, 2], f1)
    np.testing.assert_allclose(cohen_kappa(samples), kappa)
    np.testing.assert_allclose(ranked, area)
    low, high = np.quantile(kappa, [0.025, 0.975])
    assert estimate_of(cohen_kappa, (whole, samples)) == Estimate(
        value=pytest.approx(metrics.cohen_kappa_score(gold, own)),
        low=pytest.approx(low),
        high=pytest.approx(high),
    )


def test_how_much_is_in_memory_at_a_time_changes_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places, gold, own, chances = sample_set()
    whole = Resampling(clusters=places, samples=50, seed=5)
    in_one = whole.matrices(gold, own, num_labels=3)[1]
    ranked = whole.average_precisions(gold == 2, chances)[1]
    monkeypatch.setattr(resampling, "_CELLS", 64)
    pieces = Resampling(clusters=places, samples=50, seed=5)
    assert (pieces.matrices(gold, own, num_labels=3)[1] == in_one).all()
    assert (pieces.average_precisions(gold == 2, chances)[1] == ranked).all()


def test_samples_without_a_meaning_are_left_out_of_an_interval() -> None:
    found = estimate(0.5, np.array([np.nan, 0.25, 0.75, np.nan]))
    assert (found.low, found.high) == pytest.approx((0.2625, 0.7375))
    nothing = estimate(float("nan"), np.array([0.5]))
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


def test_samples_with_nothing_to_find_are_left_out_of_precision_recall_and_f1() -> None:
    matrices = np.array([[[3, 1], [0, 0]], [[2, 0], [2, 0]], [[2, 0], [0, 2]]])
    found = with_gold(scores(matrices).f1[:, 1], matrices, 1)
    assert np.isnan(found[0]), "nothing is harmful: as in average precision, it tells nothing"
    assert found[1:].tolist() == [0.0, 1.0], "nothing flagged where something is harmful is 0"


def test_two_equally_good_critics_are_told_apart_no_more_often_than_promised() -> None:
    # steps of a trajectory are alike: a critic is lucky with a trajectory, not with a step
    random = np.random.default_rng(0)
    trials, told = 200, 0
    for trial in range(trials):
        sizes = random.integers(4, 25, size=40)
        places = np.repeat(np.arange(40), sizes)
        share = random.beta(1, 2, size=40)[places]
        gold = random.random(len(places)) < share
        draws = Resampling(clusters=places, samples=400, seed=trial)
        f1 = []
        for _ in range(2):
            hit = random.beta(4, 4, size=40)[places]
            own = np.where(gold, random.random(len(places)) < hit, random.random(len(places)) < 0.2)
            f1.append(scores(draws.matrices(gold, own, num_labels=2)[1]).f1[:, 1])
        told += np.quantile(f1[0] - f1[1], 0.025) > 0
    assert told <= binom.ppf(0.999, trials, 0.025)


def attempts(root: Path, *, tasks: int, copies: int) -> tuple[Path, Path]:
    """Write attempts at tasks that all are the same attempt; return gold and labels."""
    random = np.random.default_rng(1)
    owners, rows, gold = [], [], {}
    for number in range(tasks):
        harmful, flagged = random.random((2, 6)) < [[0.4], [0.3]]
        for copy in range(copies):
            owner = trajectory(f"run-{number:02d}-{copy}", num_steps=6)
            owners.append(replace(owner, instance_id=f"task-{number}"))
            for step in range(6):
                label: Label = "harmful" if flagged[step] else "good"
                rows.append(label_row(owners[-1], step, label))
                gold[owner.trajectory_id, step] = "harmful" if harmful[step] else "good"
    write_trajectories(root / "trajectories", owners)
    return write_gold(root / "gold.jsonl", gold), write_labels(root / "labels", rows)


def f1_interval(root: Path, gold: Path, labels: Path, cluster: Cluster) -> Estimate:
    critics = read_critics([("critic", labels)])
    source = read_manifest(root / "trajectories")
    steps = join_gold(read_gold([gold]), critics, source, rules=False, cluster=cluster)
    return evaluate(steps, critics, samples=2000).rows[0].harmful["f1"]


def test_attempts_at_a_task_that_say_the_same_make_no_interval_narrower(tmp_path: Path) -> None:
    once = f1_interval(tmp_path / "1", *attempts(tmp_path / "1", tasks=20, copies=1), "task")
    given = attempts(tmp_path / "5", tasks=20, copies=5)
    assert f1_interval(tmp_path / "5", *given, "task") == once
    by_run = f1_interval(tmp_path / "5", *given, "trajectory")
    assert by_run.value == once.value
    assert by_run.high - by_run.low < 0.6 * (once.high - once.low)
