"""Tokenizers and models at the hub: one that answers slowly, and one that does not answer."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer

import pytest

from srft_prep import hub
from srft_prep.chat import load_spec, tokenizer_path
from srft_prep.errors import ConfigError
from tests.hub_server import COMMIT, REPOSITORY, serving
from tests.hub_server import hub as hub_server
from tests.stages import trajectory, write_trajectories

TOKENIZER = {path.name: path.read_bytes() for path in Path(tokenizer_path("example")).iterdir()}
HASH = "from srft_prep.chat import load_spec; print(load_spec({!r}).tokenizer_hash);"
SLOW_IMPORT = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "httpx2":
            time.sleep(4)
sys.meta_path.insert(0, Slow())
"""
COMMIT_OF = (
    "from srft_prep.critic.engine.checkpoint import open_checkpoint;"
    "print(open_checkpoint({!r}).commit);"
)


class _Hub(ThreadingTCPServer):
    """Takes connections, and closes them without an answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(StreamRequestHandler):
    server: _Hub

    def handle(self) -> None:
        asked = self.rfile.readline().decode().partition(" HTTP")[0]
        if "agent-harnesses" not in asked:  # its client asks so where an agent runs it
            self.server.asked.append(asked)


@contextmanager
def silent_hub() -> Iterator[_Hub]:
    with _Hub() as server, serving(server):
        yield server


def python(*words: object, url: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with a hub: its client reads the environment when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_hub_that_does_not_answer_is_asked_twice_and_named(tmp_path: Path) -> None:
    source = write_trajectories(tmp_path / "runs", [trajectory("one")])
    words = ("-m", "srft_prep", "tokenize", source, "--tokenizer", "some/id", "-o")
    with silent_hub() as server:
        run = python(*words, tmp_path / "out", url=server.url, home=tmp_path / "hf")
    assert server.asked == ["HEAD /"] * 2
    assert run.returncode == 2
    assert (
        "--tokenizer some/id: expected a folder or a hub id, got no such folder, nothing usable in "
        f"the hub's cache, and the hub does not answer ({server.url}: "
    ) in run.stderr
    assert "Traceback" not in run.stderr


def test_a_model_to_train_is_asked_for_twice_at_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    code = "from srft_prep.train.sources import model_input; model_input('some/id')"
    with silent_hub() as server:
        run = python("-c", code, url=server.url, home=tmp_path / "hf")
    assert server.asked == ["HEAD /"] * 2
    assert (
        "ConfigError: --model some/id: expected a folder or a hub id, got no such folder, and "
        f"nothing in its cache, and the hub does not answer ({server.url}: "
    ) in run.stderr


def test_a_model_at_a_hub_that_does_not_answer_is_refused_as_soon(tmp_path: Path) -> None:
    with silent_hub() as server:
        run = python("-c", COMMIT_OF.format("some/id"), url=server.url, home=tmp_path / "hf")
    assert server.asked == ["HEAD /"] * 2
    assert "nothing in the hub's cache, and the hub does not answer" in run.stderr


def test_a_client_that_is_slow_to_load_is_not_taken_for_a_hub_that_is_slow_to_refuse(
    tmp_path: Path,
) -> None:
    code = f"{SLOW_IMPORT}\nfrom srft_prep.hub import hub_problem; print(hub_problem())"
    with silent_hub() as server:
        run = python("-c", code, url=server.url, home=tmp_path / "hf")
    assert "the hub does not answer" in run.stdout, run.stderr
    assert server.asked == ["HEAD /"] * 2


def test_a_slow_hub_is_waited_for_and_then_its_cache_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {**TOKENIZER, "config.json": b'{"max_position_embeddings": 8192}'}
    with hub_server(files, kind="models", seconds=0.2) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "CONNECT_SECONDS", 0.1)
        assert hub.hub_problem() is None
        code = (HASH + COMMIT_OF).format(REPOSITORY, REPOSITORY)
        loaded = python("-c", code, url=server.url, home=tmp_path / "hf")
    assert set(server.sent) == set(files)
    assert loaded.stdout.split() == [load_spec("example").tokenizer_hash, COMMIT], loaded.stderr
    with silent_hub() as nobody:
        again = python("-c", code, url=nobody.url, home=tmp_path / "hf")
    assert nobody.asked == ["HEAD /"] * 2
    assert again.stdout == loaded.stdout, again.stderr


def test_a_path_of_several_folders_is_no_hub_id() -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer no/such/folder: there is no such folder"):
        load_spec("no/such/folder")
