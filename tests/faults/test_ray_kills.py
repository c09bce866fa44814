"""Workers and actors of a Ray cluster that are killed in the midst: the local engine's bytes."""

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.commands import Command, after, started
from tests.faults.runs import Runs, assert_same, ledger_keys, more_progress
from tests.gates import MANIFEST
from tests.ray_clusters import RAY_TOKEN, actors, local_cluster

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(sys.platform != "linux", reason="finds Ray's processes in /proc"),
]

SECONDS = 300.0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with local_cluster() as cluster:
        yield cluster.ray.get_runtime_context().gcs_address


def kill_one(kind: str, run: Command, rng: random.Random) -> None:
    """Kill one of a command's two workers with SIGKILL, once both are there."""
    assert run.wait_until(lambda: len(actors(kind)) == 2, SECONDS), run.said
    run.wait_until(after(rng.uniform(0, 0.3)), SECONDS)
    os.kill(rng.choice(actors(kind)), signal.SIGKILL)
    run.let_go()


@pytest.mark.parametrize(
    ("stage", "kind", "holds"),
    [("tokenize", "_Worker", "part-00003.parquet"), ("label", "CriticActor", MANIFEST)],
)
def test_a_run_whose_worker_in_a_cluster_is_killed_ends_with_the_local_bytes(
    stage: str, kind: str, holds: str, runs: Runs, address: str, tmp_path: Path, rng: random.Random
) -> None:
    """It waits for the kill while it still has both."""
    output = tmp_path / "out"
    words = [word for word in runs.command(stage, output) if word not in ("--workers", "1")]
    words += ["--engine", "ray", "--ray-address", address, "--workers", 2]
    environment = {"RAY_AUTH_TOKEN": RAY_TOKEN, "RAY_AUTH_MODE": "token"}
    with started(words, tmp_path / "log", environment=environment, holds=holds) as run:
        if rng.random() < 0.5:  # in the midst of its work, or when it begins
            assert run.wait_until(more_progress(output), SECONDS), run.said
        kill_one(kind, run, rng)
        assert run.wait(SECONDS) == 0, run.said
        assert "Traceback" not in run.said
    assert_same(output, runs.expected(stage))
    if stage == "label":
        assert set(Counter(ledger_keys(output)).values()) == {1}, "something was written twice"
    until = time.monotonic() + 60
    while left := actors(kind):
        assert time.monotonic() < until, left
        time.sleep(0.05)
