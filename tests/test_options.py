"""Options that several commands share."""

from pathlib import Path

import click
import pytest

from srft_prep.options import named_path
from tests.stages import (
    labels_by,
    srft_prep,
    trajectory,
    write_labels,
    write_trajectories,
)

RUN = trajectory("run", num_steps=2)


def test_a_path_with_an_equals_sign_is_no_name(tmp_path: Path) -> None:
    folder = tmp_path / "run=3"
    folder.mkdir()
    assert named_path(str(folder)) == (None, folder)
    assert named_path(f"mine={folder}") == ("mine", folder)
    assert named_path(str(tmp_path), folder=True) == (None, tmp_path)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("=there", "expected NAME=PATH, got '=there'"),
        ("name=", "expected NAME=PATH, got 'name='"),
        ("name=nowhere", "nowhere does not exist"),
        ("nowhere", "nowhere does not exist"),
    ],
)
def test_what_is_no_named_path_is_said(word: str, expected: str) -> None:
    with pytest.raises(click.BadParameter, match=expected):
        named_path(word)


def test_every_command_takes_named_paths_alike(tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "run=3", labels_by([RUN], {"run": ("good", "good")}))
    runs = write_trajectories(tmp_path / "runs", [RUN])
    (tmp_path / "gold.jsonl").touch()
    for words in (
        ("critic-eval", "--gold", tmp_path / "gold.jsonl", "--labels", labels),
        ("critic-eval", "--gold", tmp_path / "gold.jsonl", "--labels", f"a={labels}"),
    ):
        run = srft_prep(*words)
        assert "the gold files hold no label" in run.stderr, "its labels were read"
    for words, expected in (
        (("review", runs, "--labels"), "is no directory"),
        (("critic-eval", "--gold", tmp_path / "gold.jsonl", "--labels"), "does not exist"),
        (("compare", "--arm"), "does not exist"),
    ):
        for word in (f"a={tmp_path / 'none'}", f"a={tmp_path / 'b=none'}"):
            run = srft_prep(*words, word)
            assert run.status == 2
            assert f"{word.removeprefix('a=')} {expected}" in run.stderr
        assert "expected NAME=PATH" in srft_prep(*words, "=x").stderr
    assert "expected NAME=PATH" in srft_prep("compare", "--arm", labels).stderr


@pytest.mark.parametrize("command", ["tokenize", "label"])
def test_the_address_of_a_cluster_that_is_not_asked_for_is_refused(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = write_trajectories(tmp_path / "runs", [RUN])
    more = ("--tokenizer", "example") if command == "tokenize" else ("--critic", "rules")
    words = (command, runs, *more, "-o", tmp_path / "out")
    run = srft_prep(*words, "--ray-address", "auto")
    assert run.status == 2
    assert "--ray-address: expected --engine ray with it" in run.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    run = srft_prep(*words)
    assert run.status == 0, run.stderr


@pytest.mark.parametrize("command", ["label", "pack"])
def test_no_calibration_is_promised_that_does_not_come_with_the_package(command: str) -> None:
    assert "FILE|default" not in srft_prep(command, "--help").stdout
