"""Fixtures of all tests: the shared data beside the checkout, and small stage directories."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]

settings.register_profile("shared machine", deadline=None)  # a slow moment is no failure
settings.load_profile("shared machine")


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
