"""What one rank finds wrong, all ranks raise."""

import fcntl
import os
import threading
from contextlib import redirect_stderr
from datetime import timedelta
from io import StringIO
from pathlib import Path

import pytest
import torch.distributed as dist

from srft_prep.errors import ConfigError
from srft_prep.train.agreement import TOLD, agreed, agreed_at_length, together
from srft_prep.train.parallel import started
from tests.train.ranks import run_ranks


def meet(way: str, failing: int, error: Exception) -> tuple[str, str, bool]:
    with started() as world:

        def call() -> str:
            if world.rank == failing:
                raise error
            return f"rank {world.rank}"

        try:
            value = (agreed if way == "agreed" else together)(call)
        except Exception as caught:  # noqa: BLE001  # what is raised is what is looked at
            return type(caught).__name__, str(caught), TOLD in getattr(caught, "__notes__", ())
        return "", value, False


@pytest.mark.parametrize(("way", "failing"), [("agreed", 0), ("together", 0), ("together", 1)])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigError("no"), ("ConfigError", "no")),
        (OSError("disk full"), ("TrainError", "rank {} failed: OSError: disk full")),
    ],
)
def test_no_rank_waits_for_one_that_failed(
    way: str, failing: int, error: Exception, told: tuple[str, str]
) -> None:
    found = run_ranks(2, meet, way, failing, error)
    assert found[failing][:2] == (type(error).__name__, str(error))
    assert found[1 - failing][:2] == (told[0], told[1].format(failing))
    assert [muted for *_, muted in found] == [False, True]


def test_without_a_failure_each_way_returns_what_it_should() -> None:
    assert [value for _, value, _ in run_ranks(2, meet, "agreed", 9, OSError())] == ["rank 0"] * 2
    assert [value for _, value, _ in run_ranks(2, meet, "together", 9, OSError())] == [
        "rank 0",
        "rank 1",
    ]


def wait_long(seconds: float, most_seconds: float) -> str:
    with started() as world:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=most_seconds))

        def call() -> str:
            threading.Event().wait(seconds)
            return f"rank {world.rank}"

        return agreed_at_length(call, beat=most_seconds / 20)


@pytest.mark.slow
def test_ranks_wait_for_the_first_one_for_longer_than_a_collective_does() -> None:
    # A loaded machine may let a rank stand still for some seconds, but not for so many.
    assert run_ranks(2, wait_long, 18.0, 15.0) == ["rank 0"] * 2


def lose_a_rank(folder: Path) -> str:
    with started() as world, (folder / "alive").open("w") as alive:
        if world.rank == 1:
            fcntl.flock(alive, fcntl.LOCK_EX)  # until it is gone
        dist.barrier()

        def call() -> None:
            fcntl.flock(alive, fcntl.LOCK_EX)

        if world.rank == 1:
            threading.Timer(0.3, os._exit, (0,)).start()
        with redirect_stderr(StringIO()) as said, pytest.raises(RuntimeError):
            agreed_at_length(call, beat=0.1)
        (folder / "said").write_text(said.getvalue())
        os._exit(0)  # nobody is there to say goodbye to


def test_a_rank_that_is_gone_meanwhile_is_told_of_once(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died without an answer"):
        run_ranks(2, lose_a_rank, tmp_path)
    assert (tmp_path / "said").read_text() == ""


def fail_at_length() -> str:
    with started() as world:

        def call() -> None:
            raise ConfigError(f"rank {world.rank}")

        with pytest.raises(ConfigError) as caught:
            agreed_at_length(call)
        return str(caught.value)


def test_what_fails_at_length_fails_in_all_ranks() -> None:
    assert run_ranks(2, fail_at_length) == ["rank 0"] * 2
