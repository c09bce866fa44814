"""Ray clusters that tests start, and the processes that run their actors."""

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from srft_prep.ray_cluster import RayCluster
from tests.processes import processes_with, wait_until

RAY_TOKEN: Final = secrets.token_hex(32)
"""Of all clusters that this process starts: Ray goes on with the first token that it saw."""


@contextmanager
def local_cluster() -> Iterator[RayCluster]:
    """Run a local cluster of two cores, as the command line starts one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_TOKEN", RAY_TOKEN)
        with RayCluster(num_cpus=2) as cluster:
            yield cluster


def actors(kind: str, *, token: str = RAY_TOKEN) -> list[int]:
    """Return the processes of the cluster of a token that run a kind of actor."""
    found = []
    for number in processes_with(f"RAY_AUTH_TOKEN={token}"):
        with suppress(OSError):  # one that ends while it is looked at
            if f"ray::{kind}".encode() in Path(f"/proc/{number}/cmdline").read_bytes():
                found.append(number)
    return found


def kill_actors(kind: str, *, number: int = 1) -> int:
    """Kill all processes of a kind of actor once there are so many; return how many there were."""
    wait_until(lambda: len(actors(kind)) >= number)
    victims = actors(kind)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    return len(victims)
