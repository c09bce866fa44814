"""Fixtures of all tests: the shared data beside the checkout, and small stage directories."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]

settings.register_profile("shared machine", deadline=None)  # a slow moment is no failure
settings.load_profile("shared machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say why a test that is selected cannot run here; in CI the vllm tests must (make test)."""
    for item in items:
        if item.get_closest_marker("vllm") and find_spec("vllm") is None:
            reason = "vllm is not in this environment; make test runs these in .venv-vllm"
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and shutil.which("nvidia-smi") is None:
            item.add_marker(pytest.mark.skip(reason="there is no GPU here"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; it is there in CI."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI must have the shared data, looked for {path}")
        pytest.skip(f"needs the shared data, looked for {path}")
    return path


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> "Golden":
    return Golden(update=request.config.getoption("--update-golden"))


class Golden:
    """Compares text with a file under tests/golden."""

    def __init__(self, *, update: bool) -> None:
        self.update = update

    def check(self, name: str, text: str) -> None:
        path = REPOSITORY / "tests" / "golden" / name
        if self.update:
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"see {path}; --update-golden rewrites it"
