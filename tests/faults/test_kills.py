"""Stages that are killed, interrupted or run twice at once: the result is the uninterrupted one.

Batch jobs have their own in tests/critic/test_batch_kill.py.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from srft_prep.storage import LOCK
from srft_prep.train.metrics import METRICS
from tests.critic.api_server import MODEL, ApiServer, late
from tests.faults.commands import (
    after,
    finish,
    kill_when,
    started,
    wait_for_orphans,
)
from tests.faults.runs import (
    STAGES,
    STATUS,
    TRAINING,
    Runs,
    assert_same,
    assert_same_training,
    ledger_keys,
    more_progress,
    progress_of,
)
from tests.gates import MANIFEST
from tests.train import runs as train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds orphans in /proc")


@pytest.mark.parametrize("stage", [*STAGES, "sample", "merge"])
def test_a_killed_stage_continues_to_the_same_bytes(
    stage: str, runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    """Killed once when it has just put something on disk, and once at random."""
    output, log = tmp_path / "out", tmp_path / "log"
    words = runs.command(stage, output, workers=1)
    moment = rng.uniform(0.05, 0.9) * runs.seconds[stage]
    kill_when(words, log, more_progress(output))
    kill_when(words, log, after(moment))
    finish(words, log, status=STATUS.get(stage, 0))
    assert_same(output, runs.expected(stage))
    if stage == "label":
        expected = ledger_keys(runs.expected(stage))
        assert set(Counter(ledger_keys(output)).values()) == {1}, "something was asked twice"
        assert set(ledger_keys(output)) == set(expected)


def test_a_killed_tokenize_leaves_none_of_its_workers_and_continues_to_the_same_bytes(
    runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    words, moment = runs.command("tokenize", output, workers=2), rng.uniform(0, 3)
    kill_when(words, log, rng.choice((after(moment), more_progress(output))))
    finish(runs.command("tokenize", output, workers=1), log)
    assert_same(output, runs.expected("tokenize"))


def changed_at(path: Path) -> int | None:
    """When a file was changed last; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_killed_training_goes_on_to_the_same_losses_and_weights(
    num_ranks: int,
    runs: Runs,
    tmp_path: Path,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One rank, or both, or, once they have met, one of two, which ends the other."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what is expected was made on CPUs
    output, words = tmp_path / "out", ("train", runs.short_shards, *TRAINING)
    for step in sorted(rng.sample(range(6), 2)):
        before = changed_at(output / METRICS)
        with train.started(output, words, ranks=num_ranks, holds=MANIFEST) as run:
            run.wait_until(run.has_done(step))
            run.wait_until(after(rng.uniform(0, 0.2)))
            assert run.ranks[0].is_alive(), run.said
            # a rank that has not met the other yet is waited for until torchrun ends them all:
            # they are all killed then
            have_met = changed_at(output / METRICS) != before
            number = rng.randint(1, num_ranks) if have_met else num_ranks
            victims = rng.sample(run.ranks, number)
            for victim in victims:
                victim.kill()
            run.let_go()
            assert None not in run.wait(), run.said
    train.finish(output, words, ranks=num_ranks)
    assert_same_training(output, runs.trained(ranks=num_ranks))


def test_a_worker_that_is_killed_ends_the_run_in_words_and_a_rerun_goes_on(
    runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    output = tmp_path / "out"
    words = runs.command("tokenize", output, workers=2)
    with started(words, tmp_path / "log") as run:
        run.wait_until(lambda: len(workers_of(run.started_by_it())) == 2)
        moment, begun = after(rng.uniform(0, 1)), more_progress(output)
        run.wait_until(lambda: moment() or begun())
        os.kill(rng.choice(workers_of(run.started_by_it())), signal.SIGKILL)
        assert run.wait() == 2, run.said
        assert run.said == (
            "Error: a worker process died, most often for lack of memory; choose fewer --workers, "
            "the same command continues\n"
        )
        wait_for_orphans(run)
    finish(runs.command("tokenize", output, workers=1), tmp_path / "log")
    assert_same(output, runs.expected("tokenize"))


def workers_of(processes: list[int]) -> list[int]:
    """Return which processes are workers of a pool."""
    found = []
    for process in processes:
        line = Path(f"/proc/{process}/cmdline").read_bytes()
        if b"spawn_main" in line:
            found.append(process)
    return found


def test_a_killed_critic_of_a_server_asks_nothing_twice_that_had_come_back(
    runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    output, log = tmp_path / "labels", tmp_path / "log"
    with ApiServer(lambda turn: late(turn, 0.02 * turn.share())) as server:
        keys = {"OPENAI_API_KEY": "sk-of-a-test"}
        words = (
            *("label", runs.expected("ingest"), "-o", output, "--only", "resolved", "--critic"),
            *("openai", "--model", MODEL, "--base-url", server.openai_url, "--concurrency", 8),
        )
        for _ in range(2):
            done = len(ledger_keys(output)) + rng.randrange(20, 150)
            with started(words, log, environment=keys, holds=MANIFEST) as run:
                enough = lambda done=done: len(ledger_keys(output)) >= done  # noqa: E731
                assert run.wait_until(enough), run.said
        kept, billed = set(ledger_keys(output)), sum(server.billed().values())
        with started(words, log, environment=keys) as run:
            assert run.wait() == 0, run.said
        asked = sum(server.billed().values()) - billed
    counted = Counter(ledger_keys(output))
    assert set(counted.values()) == {1}
    assert asked == len(counted) - len(kept)


def test_a_torn_last_line_of_a_ledger_is_asked_again_and_only_that(
    runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    output = tmp_path / "out"
    shutil.copytree(runs.expected("label"), output)
    (ledger,) = output.glob("ledger-*.jsonl")
    ledger.write_bytes(ledger.read_bytes()[: -rng.randrange(1, 200)])
    finish(runs.command("label", output), tmp_path / "log")
    assert_same(output, runs.expected("label"))
    assert set(Counter(ledger_keys(output)).values()) == {1}


HELD = """
import os, signal, threading, time
from srft_prep.part_pool import _interrupts_held

signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
try:
    with _interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        print("finished", end=" ")
    print("lost")
except KeyboardInterrupt:
    print("then interrupted")
"""


def test_ctrl_c_waits_although_another_thread_may_take_the_signal() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("finished then interrupted\n", 0), done.stderr


def test_ctrl_c_while_workers_start_shows_no_traceback(runs: Runs, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = runs.command("tokenize", output, workers=2)
    with started(words, tmp_path / "log", holds=MANIFEST) as run:
        run.wait_until(lambda: bool(workers_of(run.started_by_it())))
        time.sleep(0.5)
        os.killpg(run.process.pid or 0, signal.SIGINT)
        assert run.wait(60) == 130, run.said
        assert run.said == "\ninterrupted; the same command continues\n"
        wait_for_orphans(run)


@pytest.mark.parametrize("stage", ["ingest", "label", "tokenize", "pack"])
def test_ctrl_c_exits_with_130_and_a_rerun_continues(
    stage: str, runs: Runs, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = runs.command(stage, output, workers=2)
    with started(words, tmp_path / "log", holds=MANIFEST) as run:
        run.wait_until(lambda: bool(progress_of(output)))
        os.killpg(run.process.pid or 0, signal.SIGINT)
        assert run.wait(60) == 130, run.said
        assert "interrupted; the same command continues" in run.said
        assert "Traceback" not in run.said
        wait_for_orphans(run)
    finish(runs.command(stage, output, workers=1), tmp_path / "log", status=STATUS.get(stage, 0))
    assert_same(output, runs.expected(stage))


REFUSED = "another srft-prep run is writing here; wait for it, or choose another -o"


@pytest.mark.parametrize("stage", STAGES)
def test_of_two_runs_into_one_directory_the_second_is_refused(
    stage: str, runs: Runs, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = runs.command(stage, output, workers=1)
    with started(words, tmp_path / "first", holds=MANIFEST) as first:
        first.wait_until((output / ".progress" / LOCK).exists)
        first.send(signal.SIGSTOP)
        with started(words, tmp_path / "second") as second:
            assert second.wait() == 2
            assert second.said == f"Error: {output}: {REFUSED}\n"
        first.send(signal.SIGCONT)
        first.let_go()
        assert first.wait() == STATUS.get(stage, 0), first.said
    assert_same(output, runs.expected(stage))


@pytest.mark.parametrize("stage", ["ingest", "label", "pack"])
def test_runs_that_race_for_a_directory_leave_what_one_would(
    stage: str, runs: Runs, tmp_path: Path, rng: random.Random
) -> None:
    output = tmp_path / "out"
    words = runs.command(stage, output)
    with started(words, tmp_path / "first") as first, started(words, tmp_path / "second") as second:
        first.wait_until(after(rng.uniform(0, runs.seconds[stage])))
        with started(words, tmp_path / "third") as third:
            statuses = [run.wait() for run in (first, second, third)]
            said = [run.said for run in (first, second, third)]
    assert STATUS.get(stage, 0) in statuses, said
    for status, text in zip(statuses, said, strict=True):
        assert status == STATUS.get(stage, 0) or REFUSED in text, said
        assert "Traceback" not in text
    assert_same(output, runs.expected(stage))
    if stage == "label":
        assert set(Counter(ledger_keys(output)).values()) == {1}
