"""Fixtures of all tests: the shared data beside the checkout, and small stage directories."""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.object_stores import Bucket, Machine
    from tests.stages import Examples

if "PYTEST_XDIST_WORKER" in os.environ:
    # as many processes as cores: more threads of torch would wait for each other, and compute it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

settings.register_profile("shared machine", deadline=None)  # a slow moment is no failure
settings.load_profile("shared machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say why a test that is selected cannot run here; in CI the vllm tests must (make test)."""
    for item in items:
        if item.get_closest_marker("vllm") and find_spec("vllm") is None:
            reason = "vllm is not in this environment; make test runs these in .venv-vllm"
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("browser") and not (has_browser() or os.environ.get("CI")):
            reason = "NOT RUN: there is no Chromium here; make setup says how to get it"
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and shutil.which("nvidia-smi") is None:
            item.add_marker(pytest.mark.skip(reason="there is no GPU here"))


def has_browser() -> bool:
    """Whether the browser tests can run: the system's Chromium, and what drives it."""
    return browser_program() is not None and find_spec("playwright") is not None


def browser_program() -> str | None:
    """The system's Chromium, by whichever name it has."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """The system's Chromium, headless; pytest_collection_modifyitems says where it is missing."""
    from playwright.sync_api import sync_playwright

    program = browser_program()
    assert program, "CI must have Chromium (make setup installs it): looked for it on PATH"
    with sync_playwright() as playwright:
        # no sandbox of its own: the tests run as root in containers
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> "Examples":
    """The example runs, ingested, labelled and tokenized; to be read only."""
    from tests.stages import make_examples

    return make_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of an S3 server on loopback: moto's, as a process of its own."""
    from tests.object_stores import s3_server

    with s3_server() as port:
        yield port


@pytest.fixture
def bucket(s3_port: int) -> "Bucket":
    """A new bucket of the S3 server."""
    from tests.object_stores import Bucket

    return Bucket(s3_port, f"bucket-{os.urandom(6).hex()}")


@pytest.fixture
def machine(s3_port: int, tmp_path: Path) -> Iterator["Machine"]:
    """A machine that reaches the S3 server, with an empty cache."""
    from tests.object_stores import Machine

    here = Machine(tmp_path / "machine", s3_port)
    yield here
    here.gate.close()


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
