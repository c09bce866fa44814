"""What one rank finds wrong, all ranks raise."""

import pytest

from srft_prep.errors import ConfigError
from srft_prep.train.agreement import TOLD, agreed, together
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
