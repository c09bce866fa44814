"""The pool of worker processes, with real processes that really die."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from srft_prep.critic.engine.pool import EnginePool, Job
from srft_prep.errors import BackendError, ConfigError
from tests.processes import processes_with, wait_until, wait_until_gone

TOY = Path(__file__).with_name("toy_worker.py")
REPOSITORY = Path(__file__).resolve().parents[2]


def pool_of(num_workers: int = 1, **greeting: Any) -> EnginePool:
    environments = [{"PYTHONPATH": str(REPOSITORY), "TOY": str(i)} for i in range(num_workers)]
    return EnginePool(
        (sys.executable, str(TOY)), greeting, environments, name="toy", remedy="mend it"
    )


def jobs_of(count: int) -> Iterator[Job]:
    for number in range(count):
        yield Job(key=number, message={"number": number}, num_tokens=1, group=str(number // 3))


def doubles(pool: EnginePool, count: int) -> dict[int, Any]:
    answers: dict[int, Any] = {}
    for job, answer in pool.ask(jobs_of(count)):
        assert job.key not in answers
        answers[job.key] = answer if isinstance(answer, str) else answer["double"]
    return answers


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_job_is_answered_once(num_workers: int) -> None:
    pool = pool_of(num_workers)
    assert doubles(pool, 500) == {number: 2 * number for number in range(500)}
    assert doubles(pool, 20) == {number: 2 * number for number in range(20)}
    pool.close()
    assert pool.process_ids == ()


def test_nothing_is_taken_before_a_worker_can_use_it() -> None:
    pool = pool_of(2, window=4)
    taken = 0

    def counted() -> Iterator[Job]:
        nonlocal taken
        for job in jobs_of(100):
            taken += 1
            yield job

    for answered, _ in enumerate(pool.ask(counted())):
        assert taken <= answered + 1 + 2 * 4
    pool.close()


@pytest.mark.parametrize(("window", "count"), [(1, 6), (8, 30), (200, 400)])
def test_a_job_that_kills_its_worker_is_given_up_and_no_other(window: int, count: int) -> None:
    poison = {3, count - 2}
    pool = pool_of(window=window, poison=sorted(poison))
    answers = doubles(pool, count)
    pool.close()
    given_up = {number for number, answer in answers.items() if isinstance(answer, str)}
    assert given_up == poison
    assert set(answers) == set(range(count))
    assert "SIGSEGV" in answers[3]


def test_a_killed_worker_is_replaced_and_its_jobs_are_asked_again() -> None:
    pool = pool_of(2, seconds=0.005)
    answers: dict[int, Any] = {}
    for job, answer in pool.ask(jobs_of(300)):
        answers[job.key] = answer
        if len(answers) in (50, 150):  # one that was ready; others may be starting still
            os.kill(answer["guardian"], signal.SIGKILL)
    pool.close()
    assert len(answers) == 300
    assert not any(isinstance(answer, str) for answer in answers.values())


def test_a_backend_that_only_dies_is_unusable() -> None:
    pool = pool_of(window=1, poison=list(range(100)))
    with pytest.raises(BackendError, match="died 12 times without an answer"):
        doubles(pool, 100)


def test_a_worker_that_cannot_start_is_named_with_its_last_lines() -> None:
    with pytest.raises(BackendError) as raised:
        doubles(pool_of(refuse="no memory"), 1)
    for part in (
        "toy, worker 0: could not start: no memory (mend it)",
        "before the end: no memory",
    ):
        assert part in str(raised.value)


def test_a_refused_setting_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="no such setting"):
        doubles(pool_of(refuse="no such setting", config=True), 1)


def test_jobs_of_a_run_that_was_left_are_not_answered_in_the_next() -> None:
    pool = pool_of(seconds=0.01)
    run = pool.ask(jobs_of(100))
    next(run)
    run.close()
    later = [
        Job(key=1000 + number, message={"number": number}, num_tokens=1, group="")
        for number in range(5)
    ]
    assert sorted(job.key for job, _ in pool.ask(later)) == [1000, 1001, 1002, 1003, 1004]
    pool.close()


@pytest.mark.parametrize("victim", ["parent", "guardian", "closed"])
def test_no_process_is_left(victim: str) -> None:
    mark = f"TOY_MARK={victim}-{os.getpid()}"
    script = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.critic.test_engine_pool import jobs_of, pool_of
pool = pool_of(2, grandchild=True, seconds=0.01)
for number, _ in enumerate(pool.ask(jobs_of(100000))):
    if number == 20:
        print(*pool.process_ids, flush=True)
        {"break" if victim == "closed" else "pass"}
"""
    name, value = mark.split("=")
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, name: value},
        text=True,
    )
    assert process.stdout is not None
    guardians = list(map(int, process.stdout.readline().split()))
    if victim == "closed":
        assert process.wait(60) == 0
    else:
        wait_until(lambda: len(grandchildren_of(mark)) == 2)
        assert len(processes_with(mark)) >= 1 + 2 * 3  # itself, guardians, workers, grandchildren
        if victim == "guardian":
            os.kill(guardians[0], signal.SIGKILL)
            wait_until(lambda: not Path(f"/proc/{guardians[0]}").exists())
        process.kill()
        process.wait()
    process.stdout.close()
    if victim == "guardian":  # a grandchild of a killed guardian is its worker's own to end
        for left in grandchildren_of(mark):
            with suppress(ProcessLookupError):  # the other guardian's ends by itself
                os.kill(left, signal.SIGKILL)
    wait_until_gone(mark)


def grandchildren_of(mark: str) -> list[int]:
    """Return the processes that the workers of a marked pool started."""
    found = []
    for process_id in processes_with(mark):
        with suppress(OSError):  # it has ended since
            if Path(f"/proc/{process_id}/comm").read_text() == "sleep\n":
                found.append(process_id)
    return found
