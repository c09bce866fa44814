"""A run's directory, killed while it changes hands: always whole, always somebody's."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srft_prep.train.checkpoints import CHECKPOINTS, Kept
from srft_prep.train.directory import Claim, RunDirectory
from srft_prep.train.settings import TrainConfig

SHARDS = {"path": "shards", "sha256": "00"}
MODEL = {"path": "model", "model": "00"}


def claim(output: Path, **settings: Any) -> Claim:
    return Claim(output=output, config=TrainConfig(**settings), inputs=[SHARDS, MODEL])


def opened(wanted: Claim) -> RunDirectory:
    kept = Kept(wanted.output / CHECKPOINTS, keep=2)
    return RunDirectory(wanted, kept=kept, say=lambda line: None)


def run(wanted: Claim, *, finish: bool = True) -> str:
    """Stand for a run: return what its checkpoint holds, all the runs that it went on from."""
    with opened(wanted) as directory:
        checkpoint = wanted.output / CHECKPOINTS / "step-00000001" / "history"
        if not directory.finished:
            directory.begin()
            history = checkpoint.read_text() if checkpoint.exists() else ""
            directory.adopt()
            checkpoint.parent.mkdir(exist_ok=True)
            checkpoint.write_text(f"{history} {wanted.config.learning_rate}")
            if finish:
                directory.finish(counts={"steps": 1}, names=[], command=[])
        return checkpoint.read_text()


class Killed(BaseException):
    """Stands for kill -9: nothing cleans up after it."""


CHANGES = ("unlink", "mkdir", "replace", "rename", "rmdir")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_kill_while_a_directory_changes_hands_leaves_what_can_be_gone_on_with(
    how: str, finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {name: getattr(os, name) for name in CHANGES}
    calls, deadline = 0, 0

    def dying(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > deadline:
                raise Killed
            return plain[name](*args, **kwargs)

        return call

    for deadline in range(60):
        output = tmp_path / str(deadline)
        run(claim(output, learning_rate=1.0), finish=finished)
        wanted = replace(claim(output, learning_rate=2.0), **{how: True})
        calls, killed = 0, True
        with monkeypatch.context() as patch, suppress(Killed):
            for name in plain:
                patch.setattr(os, name, dying(name))
            history = run(wanted)
            killed = False
        if killed:
            history = run(wanted)
        assert " 1.0" not in history if how == "overwrite" else history.startswith(" 1.0")
        assert history.endswith(" 2.0")
        assert not (output / ".progress").exists()
        assert run(claim(output, learning_rate=2.0)) == history
        if not killed:
            break
    assert deadline > 4
    assert not killed


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_until_a_run_begins_the_directory_is_still_that_of_the_run_before(
    how: str, finished: bool, tmp_path: Path
) -> None:
    before = claim(tmp_path / "run", learning_rate=1.0)
    history = run(before, finish=finished)
    wanted = replace(claim(tmp_path / "run", learning_rate=2.0), **{how: True})
    with opened(wanted) as directory:
        assert directory.finished is None
    with opened(before) as directory:
        assert (directory.finished is not None) == finished
    assert run(before) == (history if finished else f"{history} 1.0")


def test_a_new_directory_where_nothing_began_is_gone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with opened(claim(tmp_path / name)):
            assert (tmp_path / name).exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
