"""Runs over batches that die by kill -9: nothing is submitted twice, nothing is left out."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.critic.batch_child import committed, id_of, request_of
from tests.critic.batch_server import KEY, BatchServer

pytestmark = pytest.mark.slow

CHILD = Path(__file__).with_name("batch_child.py")
ROOT = Path(__file__).resolve().parents[2]
NUM_REQUESTS = 10
MAX_REQUESTS = 4
DEADLINE_SECONDS = 60


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as server:
        yield server


@pytest.fixture(params=["openai", "anthropic"])
def name(request: pytest.FixtureRequest) -> str:
    provider: str = request.param
    return provider


@contextmanager
def child(name: str, server: BatchServer, folder: Path) -> Iterator[subprocess.Popen[str]]:
    numbers = str(NUM_REQUESTS), str(MAX_REQUESTS)
    environment = {"OPENAI_API_KEY": KEY, "ANTHROPIC_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(CHILD), name, server.url, str(folder), *numbers],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def kill_when(name: str, server: BatchServer, folder: Path, ready: Callable[[], bool]) -> None:
    """Start a run and kill -9 it once something is so."""
    with child(name, server, folder) as process:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert process.poll() is None, process.communicate()
        assert ready()


def finish(name: str, server: BatchServer, folder: Path) -> None:
    with child(name, server, folder) as process:
        _, errors = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 0, errors


def assert_each_once(server: BatchServer, folder: Path) -> None:
    expected = {id_of(request_of(number)): 1 for number in range(NUM_REQUESTS)}
    assert server.accepted == expected
    lines = committed(folder / "ledger.jsonl")
    assert {line["id"] for line in lines} == set(expected)
    assert len(lines) == NUM_REQUESTS
    assert all(line["failure"] is None and line["usd"] > 0 for line in lines)


def test_killed_while_the_provider_works(server: BatchServer, name: str, tmp_path: Path) -> None:
    server.faults.end = "never"
    kill_when(name, server, tmp_path, lambda: len(server.jobs) == 3)
    assert committed(tmp_path / "ledger.jsonl") == []
    server.faults.end = "completed"
    finish(name, server, tmp_path)
    assert_each_once(server, tmp_path)
    assert len(server.jobs) == 3


def test_killed_after_a_batch_was_accepted_and_before_its_name_came_back(
    server: BatchServer, name: str, tmp_path: Path
) -> None:
    server.faults.create.extend(["", "accept-and-hang"])
    kill_when(name, server, tmp_path, server.hanging.is_set)
    events = [line["event"] for line in committed(tmp_path / "batches.jsonl")]
    assert events == ["intent", "submitted", "intent"]
    finish(name, server, tmp_path)
    assert_each_once(server, tmp_path)
    assert len(server.jobs) == 3


def test_killed_before_a_batch_was_accepted(server: BatchServer, name: str, tmp_path: Path) -> None:
    server.faults.create.extend(["", "hang"])
    kill_when(name, server, tmp_path, server.hanging.is_set)
    assert len(server.jobs) == 1
    finish(name, server, tmp_path)
    assert_each_once(server, tmp_path)


def test_killed_in_the_middle_of_the_results(
    server: BatchServer, name: str, tmp_path: Path
) -> None:
    server.faults.results.append("hang")
    kill_when(
        name,
        server,
        tmp_path,
        lambda: server.hanging.is_set() and len(committed(tmp_path / "ledger.jsonl")) >= 2,
    )
    assert len(committed(tmp_path / "ledger.jsonl")) < NUM_REQUESTS
    finish(name, server, tmp_path)
    assert_each_once(server, tmp_path)
    assert len(server.jobs) == 3


def test_killed_again_and_again_at_random(server: BatchServer, name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    server.faults.polls_until_end = 6
    for _ in range(6):
        calls = sum(server.calls.values()) + rng.randint(1, 12)
        with child(name, server, tmp_path) as process:
            while sum(server.calls.values()) < calls and process.poll() is None:
                time.sleep(0.001)
    finish(name, server, tmp_path)
    assert_each_once(server, tmp_path)
