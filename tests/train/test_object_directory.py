"""A run's directory in a store: killed or failed at any moment, whole, and always somebody's."""

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from srft_prep import object_uploads
from srft_prep.errors import ConfigError
from srft_prep.manifest import describe_file
from srft_prep.object_mirror import output_place
from srft_prep.storage import StageWriter, write_bytes
from srft_prep.train.checkpoints import CHECKPOINTS, COMPLETE, name_of
from srft_prep.train.directory import Claim
from tests.object_stores import Bucket, Machine, reaching
from tests.processes import wait_until
from tests.train.test_directory import claim, opened

pytestmark = pytest.mark.slow
MODEL = "model.safetensors"
CHANGES = ("write_object", "remove_object", "upload")


class Killed(OSError):
    """Stands for kill -9: nothing of the run reaches the store after it."""


def run(wanted: Claim) -> bool:
    """Stand for a run, whose checkpoint holds all the runs that it went on from.

    Return whether it was finished before.
    """
    with opened(wanted) as directory:
        if directory.finished:
            return True
        directory.begin()
        before = sorted((wanted.output / CHECKPOINTS).glob("step-*"))
        history = (before[-1] / "history").read_text() if before else ""
        directory.adopt()
        save(wanted, len(history.split()) + 1, f"{history} {wanted.config.learning_rate}")
        write_bytes(wanted.output / MODEL, b"weights")
        directory.finish(counts={"steps": 1}, names=[MODEL], command=[])
        return False


def save(wanted: Claim, step: int, content: str) -> Path:
    """Stand for a checkpoint of a step; return the file that holds its state."""
    state = checkpoint(wanted, step)
    state.parent.mkdir(parents=True)
    state.write_text(content)
    write_bytes(state.with_name(COMPLETE), orjson.dumps({"files": [describe_file(state)]}))
    return state


def checkpoint(wanted: Claim, step: int) -> Path:
    return wanted.output / CHECKPOINTS / name_of(step) / "history"


def stored(bucket: Bucket, step: int) -> bytes:
    return bucket.get(f"run/{CHECKPOINTS}/{name_of(step)}/history")


def stop_at(wanted: Claim, step: int, content: str) -> None:
    """Stand for a run that is stopped after a step, whose checkpoint is in the store."""
    with opened(wanted) as directory:
        directory.begin()
        directory.adopt()
        save(wanted, step, content)


@pytest.fixture
def wanted(bucket: Bucket, machine: Machine) -> Iterator[Claim]:
    """A run into the store, by this process, which has the machine's cache."""
    with reaching(machine):
        yield claim(output_place(f"{bucket.url}/run"), learning_rate=1.0)


def changed(wanted: Claim) -> Claim:
    """The same run with another setting."""
    return replace(claim(wanted.output, learning_rate=2.0), resume=True)


@pytest.mark.parametrize(
    ("how", "where"), [("resume", "next"), ("overwrite", "next"), ("resume", "killed")]
)
def test_a_kill_while_a_directory_changes_hands_leaves_what_any_machine_goes_on_with(
    how: str, where: str, bucket: Bucket, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {name: getattr(object_uploads, name) for name in CHANGES}
    lock = threading.Lock()
    calls, deadline = 0, 0

    def dying(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            with lock:
                calls += 1
                if calls > deadline:
                    raise Killed(name)
            return plain[name](*args, **kwargs)

        return call

    def on(cache: str, number: int, **settings: Any) -> Claim:
        monkeypatch.setenv("SRFT_CACHE", str(machine.folder / f"{number}-{cache}"))
        return claim(output_place(f"{bucket.url}/{number}"), **settings)

    with reaching(machine):
        for deadline in range(60):
            run(on("first", deadline, learning_rate=1.0))
            calls, killed = 0, True
            with monkeypatch.context() as patch, suppress(Killed):
                wanted = replace(on("killed", deadline, learning_rate=2.0), **{how: True})
                for name in plain:
                    patch.setattr(object_uploads, name, dying(name))
                run(wanted)
                killed = False
            if killed:
                run(replace(on(where, deadline, learning_rate=2.0), **{how: True}))
            assert run(on("last", deadline, learning_rate=2.0))
            newest = max(bucket.names(f"{deadline}/{CHECKPOINTS}/step-")).rpartition("/")[0]
            history = bucket.get(f"{newest}/history").decode()
            assert " 1.0" not in history if how == "overwrite" else history.startswith(" 1.0")
            assert history.endswith(" 2.0")
            assert not bucket.names(f"{deadline}/.progress/")
            if not killed:
                break
    assert 4 < deadline < 59


def test_a_resumed_run_that_cannot_begin_leaves_what_the_same_command_goes_on_with(
    bucket: Bucket, wanted: Claim
) -> None:
    """Of a finished run whose weights were deleted in the store, say to save room."""
    run(wanted)
    bucket.delete(f"run/{MODEL}")
    (wanted.output / MODEL).unlink()
    with opened(changed(wanted)):
        pass  # the model does not fit into memory
    with opened(changed(wanted)) as directory:
        directory.begin()
        assert checkpoint(wanted, 1).read_text() == " 1.0"
    assert stored(bucket, 1) == b" 1.0"


def test_checkpoints_of_nobody_knows_which_run_are_not_deleted(
    bucket: Bucket, wanted: Claim
) -> None:
    stop_at(wanted, 3, "three")
    bucket.delete("run/.progress/plan.json")
    with pytest.raises(ConfigError, match=r"s3://.*/run/checkpoints: holds checkpoints of a run"):
        opened(changed(wanted))
    assert stored(bucket, 3) == b"three"


def test_a_checkpoint_that_was_damaged_here_is_fetched(bucket: Bucket, wanted: Claim) -> None:
    stop_at(wanted, 3, "three")
    checkpoint(wanted, 3).write_text("damaged")
    with opened(wanted) as directory:
        directory.begin()
        assert checkpoint(wanted, 3).read_text() == "three"
    assert stored(bucket, 3) == b"three"


def test_a_step_that_is_done_again_takes_the_place_of_what_the_store_has(
    bucket: Bucket, wanted: Claim
) -> None:
    stop_at(wanted, 3, "old")
    with opened(changed(wanted)) as directory:
        directory.begin()
        state = checkpoint(wanted, 3)
        state.parent.rename(state.parent.with_suffix(".damaged"))  # as loading does
        directory.adopt()
        save(wanted, 3, "new")
    assert stored(bucket, 3) == b"new"


@pytest.mark.parametrize("why", ["settings", "version"])
def test_a_checkpoint_that_is_only_here_outlives_a_change_that_fails(
    why: str, bucket: Bucket, wanted: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(wanted, 3, "three")
    save(wanted, 9, "nine")
    then = replace(wanted, resume=True)
    if why == "version":
        for module in ("srft_prep.manifest", "srft_prep.train.directory"):
            monkeypatch.setattr(f"{module}.__version__", "99")
        with opened(then):
            pass  # the model does not fit into memory
    else:
        then = changed(wanted)
        with opened(then) as directory, monkeypatch.context() as patch:
            directory.begin()
            write = object_uploads.write_object

            def away(url: str, content: bytes) -> None:
                if url.endswith("/plan.json") and b"2.0" in content:
                    raise Killed
                write(url, content)

            patch.setattr(object_uploads, "write_object", away)
            with pytest.raises(Killed):
                directory.adopt()
    with opened(then) as directory:
        directory.begin()
        directory.adopt()
        assert checkpoint(wanted, 9).read_text() == "nine"
    assert stored(bucket, 9) == b"nine"


def test_what_a_person_laid_beside_the_files_of_a_run_stays(bucket: Bucket, wanted: Claim) -> None:
    """Also where another stage's output has folders with the names of a run's."""
    run(wanted)
    for name in ("run/model/README.md", "shards/model/weights", "shards/adapter/notes"):
        bucket.put(name, b"mine")
    assert run(wanted), "finished before"
    shards = output_place(f"{bucket.url}/shards")
    bucket.put("shards/.progress/clock-x", b"")  # asks for the time; it is no run's
    with pytest.raises(ConfigError, match="is not empty and no srft-prep directory"):
        StageWriter.open(shards, stage="pack", config={}, inputs=[])
    for name in ("run/model/README.md", "shards/model/weights", "shards/adapter/notes"):
        assert bucket.get(name) == b"mine"


class Clock:
    """Stands for `time`, in which an upload takes as long as is wished."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_after_a_slow_upload_the_next_checkpoint_follows_soon(
    bucket: Bucket, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause between two looks follows from how long small files take."""
    clock, looks = Clock(), 0

    def upload_for_an_hour() -> None:
        nonlocal looks
        looks += 1
        clock.now += 3600

    monkeypatch.setattr(object_uploads, "time", clock)
    with reaching(machine):
        place = output_place(f"{bucket.url}/run")
        with StageWriter.open(place, stage="train", config={}, inputs=[]) as writer:
            assert writer.remote
            writer.remote.uploads.also = upload_for_an_hour
            wait_until(lambda: looks > 1)
            writer.remote.uploads.also = lambda: None
