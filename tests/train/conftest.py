"""What the tests of training share: small shards of the example runs, a group of one process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.stages import Examples, srft_prep


@pytest.fixture(scope="module", autouse=True)
def on_cpus_unless_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Modules that are not for a GPU compute on CPUs on every machine: numbers stay the same."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("gpu"):
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that tests start
        yield


@pytest.fixture(scope="session")
def short_shards(examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of short packed sequences, some tasks held out: a step takes some milliseconds."""
    folder = tmp_path_factory.mktemp("shards") / "short"
    done = srft_prep(
        *("pack", examples.tokens, "--labels", examples.labels, "-o", folder),
        *("--seq-len", 1024, "--overlong", "windows", "--hold-out", 0.2),
    )
    assert done.status == 0, done.stderr
    return folder


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
