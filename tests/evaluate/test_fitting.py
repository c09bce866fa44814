"""Calibration: fitted without looking at what it is judged on, and applied as it was fitted."""

import re
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from srft_prep.calibration import calibrated, read_calibration, write_calibration
from srft_prep.errors import ConfigError
from srft_prep.eval_commands import how_to_apply
from srft_prep.evaluate.critic import Row
from srft_prep.evaluate.critic_labels import read_critics
from srft_prep.evaluate.fitting import Fitting, fit_calibration, refuse_unfit, why_unfit
from srft_prep.evaluate.fitting_report import fitting_lines
from srft_prep.evaluate.gold_steps import GoldSteps
from srft_prep.label_metrics import confusion, scores
from tests.evaluate.critic_sets import Planted, label_by_rules, opened, write_gold
from tests.stages import srft_prep, token_row, write_labels, write_tokens

SAMPLES = 200


def fitted(study: Planted) -> tuple[GoldSteps, Fitting]:
    gold, critics = opened(study.gold_file, study.labels)
    return gold, fit_calibration(gold, critics, [study.gold_file], samples=SAMPLES)


def row_of(found: Fitting, name: str) -> Row:
    return next(row for row in found.rows if row.name == name)


def applied_f1(gold: GoldSteps, found: Fitting) -> float:
    labels = calibrated(found.calibration, gold.steps, gold.members)["label"]
    return float(scores(confusion(gold.gold, gold.codes(labels))).f1[2])


def test_a_critic_that_ranks_well_but_flags_nothing_becomes_better(tmp_path: Path) -> None:
    gold, found = fitted(Planted(tmp_path, skill=4.0, offset=-9.0))
    assert row_of(found, "labels").harmful["f1"].value == 0
    assert row_of(found, "calibrated").harmful["f1"].value > 0.8
    none, uncalibrated = found.contrasts
    assert (none.other, uncalibrated.other) == ("no critic", "labels")
    assert none.verdict == "better"
    assert uncalibrated.f1.low > 0
    assert applied_f1(gold, found) > 0.8
    assert not [line for line in fitting_lines(found) if line.startswith("warning")]


def test_a_critic_that_is_right_as_it_is_is_kept(tmp_path: Path) -> None:
    _, found = fitted(Planted(tmp_path, skill=9.0, offset=-4.5, tasks=6))
    told = "\n".join(fitting_lines(found))
    assert "warning: by F1 it is not better than labels as it is: keep that" in told
    assert "gold steps are harmful: below 30, much of what was fitted is chance" in told
    assert "no critic\n" not in told.partition("chosen")[2]


def test_labels_of_critics_together_are_calibrated_alone_and_for_pack(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=4)
    gold, (critic,) = opened(study.gold_file, study.labels)
    together = replace(critic, together=True)
    assert why_unfit(gold, [together]) is None
    assert "takes single critics" in str(why_unfit(gold, [critic, together]))
    out = tmp_path / "cal.json"
    applied = how_to_apply([together], out, with_rules=False)
    assert applied == f"pack --labels {study.labels} --calibration {out}"
    assert how_to_apply([critic], out, with_rules=True) == f"label --calibration {out}"
    joined = how_to_apply([critic, critic], out, with_rules=True)
    assert joined == f"label --critics ... --ensemble head --calibration {out}"


def test_a_calibration_of_few_steps_is_refused(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=4)
    few = dict.fromkeys(study.gold, "good") | {("run-00", step): "harmful" for step in range(4)}
    gold, critics = opened(write_gold(tmp_path / "few.jsonl", few), study.labels)
    with pytest.raises(ConfigError, match="got 4 and 28; label more"):
        refuse_unfit(gold, critics)


def test_a_critic_that_knows_nothing_is_not_made_better_than_no_critic(tmp_path: Path) -> None:
    _, found = fitted(Planted(tmp_path, skill=0.0, tasks=12))
    assert not found.contrasts[0].flags_better
    told = "\n".join(fitting_lines(found))
    assert re.search("warning: by F1 it is (worse than|not told apart from) no critic", told)
    looks = any(name.startswith("position") for name in found.calibration.features)
    assert found.position_does_it == looks
    assert ("of position and outcome does it" in told) == looks


def test_what_was_written_labels_as_what_was_fitted(tmp_path: Path) -> None:
    gold, found = fitted(Planted(tmp_path, skill=2.0))
    write_calibration(tmp_path / "c.json", found.calibration)
    read = read_calibration(tmp_path / "c.json")
    ours = calibrated(found.calibration, gold.steps, gold.members)
    assert calibrated(read, gold.steps, gold.members).equals(ours)
    assert read.fitted_on.steps == len(gold.gold)
    assert read.fitted_on.harmful == gold.harmful.sum()
    assert len(read.fitted_on.gold[0]) == 64
    told = read.scores["out_of_fold"]
    assert set(told) == {row.name for row in found.rows}
    assert told["calibrated"]["f1"]["value"] == row_of(found, "calibrated").harmful["f1"].value


def test_fitting_again_gives_the_same_file(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=5)
    assert fitted(study)[1].calibration == fitted(study)[1].calibration


def test_several_critics_share_a_head(tmp_path: Path) -> None:
    one, other = (Planted(tmp_path / name, skill=2.0, seed=0) for name in ("one", "other"))
    noise = pl.read_parquet(other.labels / "labels.parquet").with_columns(
        label=pl.lit("good"), p_good=pl.lit(None, pl.Float32), p_unnecessary=None, p_harmful=None
    )
    noise_labels = write_labels(tmp_path / "noise", noise.to_dicts())
    gold, critics = opened(one.gold_file, one.labels, noise_labels)
    found = fit_calibration(gold, critics, [one.gold_file], samples=SAMPLES)
    assert len(found.calibration.members) == 2
    assert found.calibration.kind == "head"
    assert "threshold" not in {row.name for row in found.rows}
    assert row_of(found, "calibrated").harmful["f1"].value > 0.5


def test_the_rules_are_calibrated_on_human_labels_as_the_documents_say(
    tmp_path: Path, shared_data: Path
) -> None:
    source = shared_data / "human_labels" / "trail_swe"
    labels = label_by_rules(tmp_path, source)
    gold, critics = opened(source / "gold.jsonl", labels, rules=True)
    found = fit_calibration(gold, critics, [source / "gold.jsonl"], samples=SAMPLES)
    assert {"head: critic", "head: rules, position"} <= {row.name for row in found.rows}
    uncalibrated = found.contrasts[1]
    assert uncalibrated.f1.low > 0, "docs/critic-eval.md says that it is better than the rules"
    assert found.contrasts[0].f1.low <= 0, "docs/critic-eval.md says: not better than no critic"
    assert applied_f1(gold, found) > 0.6
    write_calibration(tmp_path / "cal.json", found.calibration)
    words = ("label", tmp_path / "trajectories", "--critic", "rules", "--only", "all")
    done = srft_prep(*words, "--calibration", tmp_path / "cal.json", "-o", tmp_path / "calibrated")
    assert done.status == 0, done.stderr
    told = pl.read_parquet(tmp_path / "calibrated" / "labels.parquet")
    told = told.sort("trajectory_id", "step_index")
    ours = calibrated(found.calibration, gold.steps, gold.members)
    assert told["label"].equals(ours["label"])
    assert told["p_harmful"].equals(ours["p_harmful"])
    critics = read_critics([(None, tmp_path / "calibrated")])
    with pytest.raises(ConfigError, match="went through a calibration already; label again"):
        fit_calibration(gold, critics, [])


def test_what_cannot_be_calibrated_is_said(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=4)
    gold, critics = opened(study.gold_file, study.labels)
    good = write_gold(tmp_path / "good.jsonl", dict.fromkeys(study.gold, "good"))
    gold, critics = opened(good, study.labels)
    with pytest.raises(ConfigError, match="all 32 gold steps are not harmful"):
        fit_calibration(gold, critics, [good])


def test_what_is_fitted_on_a_file_of_labels_is_applied_as_the_report_says(tmp_path: Path) -> None:
    study = Planted(tmp_path, tasks=8, skill=4.0, offset=-9.0)
    rows = pl.read_parquet(study.labels / "labels.parquet")
    mine = tmp_path / "mine.parquet"
    rows.drop("critic_id", "prompt_hash").write_parquet(mine)
    out = tmp_path / "cal.json"
    words = ("critic-eval", "--gold", study.gold_file, "--samples", SAMPLES)
    words += ("--trajectories", tmp_path / "trajectories", "--calibrate", "-o", out)
    run = srft_prep(*words, "--labels", mine)
    assert run.status == 0, run.stderr
    told = run.stdout.splitlines()[-1]
    assert told == f"written to {out}: pack --labels {mine} --calibration {out}"
    tokens = write_tokens(tmp_path / "tokens", [token_row(each) for each in study.trajectories])
    command = told.partition(": ")[2].split()
    done = srft_prep(*command[:1], tokens, *command[1:], "-o", tmp_path / "shards")
    assert done.status == 0, done.stderr
    masked = srft_prep("verify", tmp_path / "shards")
    assert masked.status == 0, masked.stdout
    plain = srft_prep("pack", tokens, "--labels", mine, "-o", tmp_path / "plain")
    assert plain.status == 0, plain.stderr
    weighted = [
        pl.read_parquet(tmp_path / name / "*.parquet")["loss_weights"].list.len().sum()
        for name in ("shards", "plain")
    ]
    assert weighted[0] < weighted[1], "uncalibrated, this critic finds nothing to mask"
    out.unlink()
    refused = srft_prep(*words, "--labels", mine, "--labels", study.labels)
    assert refused.status == 2
    assert "a file does not say whose labels it holds" in refused.stderr
    assert not out.exists()
