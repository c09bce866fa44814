"""Random faults, by a seed that every failure tells, so that it can be had again.

`make test-faults ROUNDS=20` runs all 20 times with fresh seeds, `make test-faults ROUNDS=1 SEED=7`
has the faults of a failure that told the seed 7.
"""

import os
import random
from pathlib import Path

import pytest

from tests.faults.runs import Runs, shared_runs

SEED = os.environ.get("SRFT_FAULTS_SEED", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Chance of this test's own, by the seed and the test's name."""
    request.node.add_report_section("setup", "faults", f"SRFT_FAULTS_SEED={SEED}")
    return random.Random(f"{SEED}: {request.node.name}")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Raw runs, and what every stage makes of them uninterrupted; to be read only."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder above is that of all workers
        base = base.parent
    return shared_runs(Path(os.environ.get("SRFT_FAULTS_RUNS") or base / "faults"))
