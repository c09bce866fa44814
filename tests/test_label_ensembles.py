"""`label` with several critics together, and labels through a calibration, as a user runs them."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
import pytest

from srft_prep.calibration import (
    Calibration,
    FittedOn,
    Member,
    calibrated,
    read_calibration,
    write_calibration,
)
from srft_prep.calibration import rules_fired as fired_by
from srft_prep.critic.rules import RulesCritic
from srft_prep.ensembles import JUDGEMENT, combine
from srft_prep.hashes import sha256_of
from srft_prep.ledger import ledger_files
from srft_prep.manifest import (
    read_manifest,
)
from srft_prep.trajectories import read_trajectories
from srft_prep.types import LABELS
from srft_prep.verification import verify
from tests.stages import Examples, Run, srft_prep

KEY = ["trajectory_id", "step_index"]


@pytest.fixture(scope="module")
def said(examples: Examples) -> Path:
    """What a scripted critic says of the examples, with probabilities."""
    path = examples.labels.parent / "said.jsonl"
    steps = [
        (run.trajectory_id, step)
        for part in read_manifest(examples.trajectories).parts
        for run in read_trajectories([part])
        for step in range(run.num_steps)
    ]
    with path.open("w") as file:
        for number, (name, step) in enumerate(steps):
            chances = np.roll([0.7, 0.2, 0.1], number % 3)
            if number % 7 == 0:
                chances = np.array([0.45, 0.1, 0.45])
            row = {
                "trajectory_id": name,
                "step_index": step,
                "label": LABELS[int(chances.argmax())],
                "rationale": f"number {number}",
                **{f"p_{label}": float(p) for label, p in zip(LABELS, chances, strict=True)},
            }
            file.write(json.dumps(row) + "\n")
    return path


def label(examples: Examples, output: Path, *words: object) -> Run:
    return srft_prep("label", examples.trajectories, "-o", output, "--only", "all", *words)


def critic_of(folder: Path) -> Member:
    config = read_manifest(folder).data["config"]
    return Member(critic_id=config["critic_id"], prompt_hash=config["prompt_hash"])


def rows(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "labels.parquet")


def calibration(path: Path, members: tuple[Member, ...], **values: Any) -> Path:
    fitted = FittedOn(gold=("0" * 64,), trajectories=3, steps=30, harmful=5)
    settings: dict[str, Any] = {"kind": "threshold", "threshold": 0.4} | values
    write_calibration(
        path, Calibration(members=members, fitted_on=fitted, package_version="0.1.0", **settings)
    )
    return path


@pytest.fixture(scope="module")
def alone(examples: Examples, said: Path) -> Mapping[str, Path]:
    """Label directories of each critic by itself."""
    folder = examples.labels.parent
    assert label(examples, folder / "rules").status == 0
    assert label(examples, folder / "scripted", "--critic", "scripted", "--model", said).status == 0
    return {"rules": folder / "rules", "scripted": folder / "scripted"}


@pytest.mark.parametrize("how", ["any", "majority", "mean"])
def test_an_ensemble_is_what_combine_makes_of_its_critics(
    how: Any, examples: Examples, said: Path, alone: Mapping[str, Path], tmp_path: Path
) -> None:
    words = ("--critics", f"rules,scripted:{said}", "--ensemble", how, "--json")
    done = label(examples, tmp_path / "labels", *words)
    assert done.status == 0, done.stderr
    found = rows(tmp_path / "labels")
    expected = combine([rows(folder) for folder in alone.values()], how)
    assert found.select(expected.columns).equals(expected)
    names = ", ".join(found["critic_id"].unique())
    ids = [critic_of(folder).critic_id for folder in alone.values()]
    assert names == f"{how}({' + '.join(ids)})"
    assert verify(tmp_path / "labels").problems == ()
    requests = pl.read_parquet(tmp_path / "labels" / "requests.parquet")
    assert dict(requests["critic_id"].value_counts().iter_rows()) == dict.fromkeys(ids, 24)
    assert orjson.loads(done.stdout.splitlines()[-1])["asked"] == 48


def test_another_rule_asks_nothing_and_needs_overwrite(
    examples: Examples, said: Path, tmp_path: Path
) -> None:
    words = ("--critics", f"rules,scripted:{said}", "--ensemble")
    assert label(examples, tmp_path / "labels", *words, "any").status == 0
    refused = label(examples, tmp_path / "labels", *words, "majority")
    assert refused.status == 2
    assert "holds labels of any(rules@1 + scripted@" in refused.stderr
    done = label(examples, tmp_path / "labels", *words, "majority", "--overwrite", "--json")
    assert done.status == 0, done.stderr
    document = orjson.loads(done.stdout.splitlines()[-1])
    assert (document["reused"], document.get("asked")) == (48, None)
    assert len(ledger_files(tmp_path / "labels")) == 1
    assert verify(tmp_path / "labels").problems == ()


def test_a_step_that_a_critic_of_an_ensemble_failed_on_has_no_label(
    examples: Examples, said: Path, tmp_path: Path
) -> None:
    lines = said.read_bytes().splitlines(keepends=True)
    first = orjson.loads(lines[0])["trajectory_id"]
    less = tmp_path / "less.jsonl"
    less.write_bytes(
        b"".join(line for line in lines if orjson.loads(line)["trajectory_id"] != first)
    )
    done = label(
        examples, tmp_path / "labels", "--critics", f"rules,scripted:{less}", "--ensemble", "any"
    )
    assert done.status == 1
    assert f"failed: {first}: less.jsonl has no line" in done.stderr
    assert first not in set(rows(tmp_path / "labels")["trajectory_id"])
    assert rows(tmp_path / "labels")["trajectory_id"].n_unique() == 23
    assert verify(tmp_path / "labels").problems == ()


def steps_of(examples: Examples, *, rules: bool) -> pl.DataFrame:
    parts = read_manifest(examples.trajectories).parts
    outcomes = pl.read_parquet(parts, columns=["trajectory_id", "num_steps", "resolved"])
    steps = fired_by(run for part in parts for run in read_trajectories([part]))
    if not rules:
        steps = steps.with_columns(rules=pl.lit(None, dtype=pl.List(pl.String)))
    return steps.join(outcomes, on="trajectory_id", how="left", maintain_order="left")


HEAD = {
    "kind": "head",
    "threshold": 0.5,
    "features": (
        "position:fraction",
        "outcome:unresolved",
        "rules:harmful",
        "rules:harmful@+1",
        "critic[0]:harmful",
    ),
    "coefficients": (1.0, 0.5, 3.0, 1.0, 1.0),
    "intercept": -1.2,
    "rules": RulesCritic().prompt_hash,
}


def test_labels_go_through_a_calibration_and_the_ledger_keeps_them_as_given(
    examples: Examples, alone: Mapping[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    file = calibration(tmp_path / "head.json", (critic_of(alone["rules"]),), **HEAD)
    done = label(examples, output, "--calibration", file)
    assert done.status == 0, done.stderr
    found = rows(output)
    expected = calibrated(
        read_calibration(file), steps_of(examples, rules=True), [rows(alone["rules"])]
    )
    assert found.select(expected.columns).equals(expected)
    assert found["label"].to_list() != rows(alone["rules"])["label"].to_list()
    assert set(found["critic_id"]) == {"rules@1"}
    assert read_manifest(output).data["config"]["calibration"] == sha256_of(file)
    (ledger,) = ledger_files(output)
    (raw,) = ledger_files(alone["rules"])
    answers = [
        [orjson.loads(line)["labels"] for line in path.read_bytes().splitlines()]
        for path in (ledger, raw)
    ]
    assert answers[0] == answers[1]
    assert verify(output).problems == ()
    again = label(examples, output, "--calibration", file, "--json")
    assert orjson.loads(again.stdout.splitlines()[-1])["reused"] == 24
    assert rows(output).equals(found)


def test_another_calibration_is_another_setting_and_asks_nothing(
    examples: Examples, alone: Mapping[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    one = calibration(tmp_path / "one.json", (critic_of(alone["rules"]),), **HEAD)
    other = calibration(
        tmp_path / "other.json", (critic_of(alone["rules"]),), **{**HEAD, "threshold": 0.9}
    )
    assert label(examples, output).status == 0
    for words in (("--calibration", one), ("--calibration", other), ()):
        refused = label(examples, output, *words)
        assert refused.status == 2
        assert "(calibration " in refused.stderr
        done = label(examples, output, *words, "--overwrite", "--json")
        assert done.status == 0, done.stderr
        assert "asked" not in orjson.loads(done.stdout.splitlines()[-1])
    assert rows(output).equals(rows(alone["rules"]))


def test_a_calibration_of_other_labels_is_refused_by_name(
    examples: Examples, alone: Mapping[str, Path], tmp_path: Path
) -> None:
    file = calibration(tmp_path / "head.json", (critic_of(alone["rules"]),), **HEAD)
    done = label(examples, tmp_path / "labels", "--calibration", file, "--context", "outcome")
    assert done.status == 2
    assert "was fitted on the labels of rules@1 (prompt " in done.stderr
    assert critic_of(alone["rules"]).prompt_hash in done.stderr
    assert not (tmp_path / "labels").exists()
    missing = label(examples, tmp_path / "labels", "--calibration", tmp_path / "none.json")
    assert missing.status == 2
    assert "there is no such calibration" in missing.stderr


def test_a_head_combines_the_critics_that_it_was_fitted_on(
    examples: Examples, said: Path, alone: Mapping[str, Path], tmp_path: Path
) -> None:
    members = tuple(critic_of(folder) for folder in alone.values())
    head = {**HEAD, "features": (*HEAD["features"], "critic[1]:log_odds_harmful")}
    head["coefficients"] = (*HEAD["coefficients"], 0.7)
    file = calibration(tmp_path / "head.json", members, **head)
    words = ("--ensemble", "head", "--calibration", file)
    done = label(examples, tmp_path / "labels", "--critics", f"rules,scripted:{said}", *words)
    assert done.status == 0, done.stderr
    expected = calibrated(
        read_calibration(file),
        steps_of(examples, rules=True),
        [rows(folder) for folder in alone.values()],
    )
    assert rows(tmp_path / "labels").select(expected.columns).equals(expected)
    assert verify(tmp_path / "labels").problems == ()
    turned = label(examples, tmp_path / "turned", "--critics", f"scripted:{said},rules", *words)
    assert turned.status == 2
    assert "was fitted on the labels of rules@1" in turned.stderr


def test_a_critic_of_a_cascade_that_has_a_calibration_is_sure_by_it(
    examples: Examples, said: Path, alone: Mapping[str, Path], tmp_path: Path
) -> None:
    file = calibration(tmp_path / "head.json", (critic_of(alone["rules"]),), **HEAD)
    critics = tmp_path / "critics.toml"
    critics.write_text(
        f'[cheap]\ncritic = "rules"\ncalibration = "{file}"\n'
        f'[dear]\ncritic = "scripted"\nmodel = "{said}"\n'
    )
    words = ("--cascade", "cheap,dear", "--critics-file", critics, "--sure", "0.8")
    done = label(examples, tmp_path / "labels", *words, "--json")
    assert done.status == 0, done.stderr
    first = calibrated(
        read_calibration(file), steps_of(examples, rules=True), [rows(alone["rules"])]
    )
    second = rows(alone["scripted"])
    chances = first["p_harmful"].cast(pl.Float64)
    sure = ((chances >= 0.8) | (1 - chances >= 0.8)).to_list()
    assert 0 < sum(sure) < len(sure)
    expected = [
        a if is_sure else b
        for is_sure, a, b in zip(
            sure, first.rows(), second.select(first.columns).rows(), strict=True
        )
    ]
    assert rows(tmp_path / "labels").select(first.columns).rows() == expected
    owners = Counter(rows(tmp_path / "labels")["critic_id"])
    assert owners["rules@1"] == sum(sure)
    assert verify(tmp_path / "labels").problems == ()


def pack(examples: Examples, labels: Path, output: Path, *words: object) -> Run:
    return srft_prep("pack", examples.tokens, "--labels", labels, "-o", output, *words)


def shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in read_manifest(folder).parts]


@pytest.mark.parametrize("soft", [(), ("--soft",)])
def test_pack_through_a_calibration_is_pack_of_calibrated_labels(
    soft: tuple[str, ...], examples: Examples, said: Path, alone: Mapping[str, Path], tmp_path: Path
) -> None:
    """A directory, or a file of the same labels."""
    features = ("position:fraction", "outcome:unresolved", "critic[0]:log_odds_harmful@-1")
    values = {"kind": "head", "threshold": 0.5, "features": features}
    values |= {"coefficients": (1.0, 0.5, 2.0), "intercept": 0.2}
    file = calibration(tmp_path / "head.json", (critic_of(alone["scripted"]),), **values)
    scripted = ("--critic", "scripted", "--model", said)
    assert label(examples, tmp_path / "labels", *scripted, "--calibration", file).status == 0
    assert pack(examples, tmp_path / "labels", tmp_path / "a", *soft).status == 0
    for number, labels in enumerate((alone["scripted"], said)):
        done = pack(examples, labels, tmp_path / f"b{number}", "--calibration", file, *soft)
        assert done.status == 0, done.stderr
        assert shards(tmp_path / f"b{number}") == shards(tmp_path / "a")
        config = read_manifest(tmp_path / f"b{number}").data["config"]
        assert config["calibration"] == sha256_of(file)
        assert verify(tmp_path / f"b{number}").problems == ()
        assert ("does not say whose labels it holds" in done.stderr) == labels.is_file()
    beside = ("--tokens", examples.tokens, "--labels", alone["scripted"])
    name = pl.read_parquet(read_manifest(tmp_path / "b0").parts[0])["trajectory_ids"][0][0]
    seen = srft_prep("inspect", tmp_path / "b0", "--id", name, *beside)
    assert "as the critic gave them; pack weighted them calibrated" in seen.stdout
    assert pack(examples, alone["scripted"], tmp_path / "c", *soft).status == 0
    assert shards(tmp_path / "c") != shards(tmp_path / "a")


def test_pack_refuses_a_calibration_that_it_cannot_apply(
    examples: Examples, said: Path, alone: Mapping[str, Path], tmp_path: Path
) -> None:
    own = critic_of(alone["scripted"])
    plain = calibration(tmp_path / "plain.json", (own,))
    rules = calibration(tmp_path / "rules.json", (critic_of(alone["rules"]),), **HEAD)
    other = calibration(tmp_path / "other.json", (Member(critic_id="x@1", prompt_hash="y"),))
    both = calibration(
        tmp_path / "both.json",
        (own, critic_of(alone["rules"])),
        kind="head",
        features=("critic[1]:harmful",),
        coefficients=(1.0,),
    )
    through = tmp_path / "through"
    scripted = ("--critic", "scripted", "--model", said, "--calibration", plain)
    assert label(examples, through, *scripted).status == 0
    for labels, file, words, message in (
        (alone["rules"], rules, (), "which rules fired, which labels and tokens do not tell"),
        (alone["scripted"], other, (), "was fitted on the labels of x@1"),
        (alone["scripted"], both, (), "--ensemble head --calibration"),
        (through, plain, (), "went through a calibration when they were made"),
        (alone["scripted"], tmp_path / "none.json", (), "there is no such file"),
        (alone["scripted"], plain, ("--recipe", "naive"), "--soft and --calibration"),
    ):
        done = pack(examples, labels, tmp_path / "shards", "--calibration", file, *words)
        assert done.status == 2
        assert message in " ".join(done.stderr.split())
        assert not (tmp_path / "shards").exists()


def test_labels_of_a_trajectory_that_lacks_some_go_with_a_calibration(
    examples: Examples, said: Path, alone: Mapping[str, Path], tmp_path: Path
) -> None:
    file = calibration(tmp_path / "plain.json", (critic_of(alone["scripted"]),))
    less = tmp_path / "less.jsonl"
    less.write_bytes(b"".join(said.read_bytes().splitlines(keepends=True)[1:]))
    done = pack(
        examples, less, tmp_path / "shards", "--calibration", file, "--recipe", "srft-all", "--json"
    )
    assert done.status == 1, done.stderr
    assert orjson.loads(done.stdout.splitlines()[-1])["missing_label"] == 1


def test_columns_of_members_are_those_of_the_contract() -> None:
    assert list(JUDGEMENT) == ["label", *(f"p_{name}" for name in LABELS), "rationale"]


def test_verify_knows_whose_labels_a_cascade_can_have(
    examples: Examples, said: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    assert label(examples, output, "--cascade", f"rules,scripted:{said}").status == 0
    assert verify(output).problems == ()
    manifest = orjson.loads((output / "manifest.json").read_bytes())
    for key in ("critic_id", "prompt_hash"):
        changed = orjson.loads(orjson.dumps(manifest))
        changed["config"]["members"][0][key] = "another"
        (output / "manifest.json").write_bytes(orjson.dumps(changed))
        (problem, *_) = verify(output).problems
        assert "expected a critic of the cascade, got rules@1 with prompt " in problem


@pytest.mark.parametrize("option", ["--cascade", "--critics"])
def test_what_only_some_of_the_critics_were_asked_about_is_not_in_the_tables(
    option: str, examples: Examples, said: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    assert label(examples, output).status == 0  # the rules, and about all trajectories
    words = (option, f"rules,scripted:{said}", *(("--ensemble", "any") * (option == "--critics")))
    both = ("label", examples.trajectories, "-o", output, *words, "--overwrite")
    assert srft_prep(*both, "--only", "unresolved").status == 0
    assert verify(output).problems == ()
    assert rows(output)["trajectory_id"].n_unique() == 13
    assert srft_prep(*both, "--only", "resolved").status == 0
    assert rows(output)["trajectory_id"].n_unique() == 24
    assert verify(output).problems == ()
