"""`label --critic vllm` as a user runs it, with the real engine on this CPU."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import orjson
import polars as pl
import pytest

from srft_prep.verification import verify
from tests.gates import gated
from tests.processes import processes_with, wait_until_gone
from tests.stages import srft_prep
from tests.tiny_models import make_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm (make setup, .venv-vllm)"),
]

NUM_RUNS = 16
LIMIT = 2500
"""Input tokens: most runs are asked about in windows."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def runs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "trajectories"
    source = shared_data / "trajectories"
    done = srft_prep("ingest", source, "--limit", NUM_RUNS, "-o", folder)
    assert done.status in (0, 1), done.stderr
    return folder


@contextmanager
def started(*words: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the program in its own process; give it and what its environment is known by."""
    mark = f"SRFT_TEST_MARK={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        [sys.executable, "-m", "srft_prep", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, name: value},
    )
    try:
        yield process, mark
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """Run vLLM's own server; give its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20), "--block-size", "32"]
    # A schema alone allows blanks between any two tokens, and a random model writes nothing else.
    compact = {"backend": "xgrammar", "disable_any_whitespace": True}
    command += ["--structured-outputs-config", json.dumps(compact)]
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True) as process,
    ):
        try:
            for _ in range(1200):
                assert process.poll() is None, log.read_text()[-2000:]
                with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/v1/models"):
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def entries_in(output: Path) -> list[dict[str, object]]:
    files = [file.read_bytes().split(b"\n")[:-1] for file in output.glob("ledger-*.jsonl")]
    return [orjson.loads(line) for lines in files for line in lines]


def test_a_run_killed_at_random_goes_on_with_one_answer_a_key_and_no_engine_left(
    runs: Path, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    words = ("label", runs, "-o", output, "--critic", "vllm", "--model", model, "--only", "all")
    words += ("--max-input-tokens", LIMIT, "--json")
    rng = random.Random(11)
    for _ in range(2):
        enough = len(entries_in(output)) + rng.randint(1, 25)
        mark = f"srft-test-{uuid.uuid4()}"
        with gated(tmp_path / "gate", *words, SRFT_TEST_MARK=mark) as command:
            command.wait_until(lambda enough=enough: len(entries_in(output)) >= enough)
            assert len(processes_with(mark)) > 1, "the engine has a process of its own"
            command.kill()
            wait_until_gone(mark)
    before = {(entry["content_hash"], entry["part"]) for entry in entries_in(output)}
    with started(*words) as (process, mark):
        stdout, stderr = process.communicate(timeout=400)
        assert process.returncode == 0, stderr
        wait_until_gone(mark)
    entries = entries_in(output)
    keys = Counter((entry["content_hash"], entry["part"]) for entry in entries)
    assert set(keys.values()) == {1}
    usage = orjson.loads(stdout.splitlines()[-1])["usage"]
    assert usage["requests"] == len(keys) - len(before)
    assert all(entry["failure"] is None for entry in entries)
    labels = pl.read_parquet(output / "labels.parquet")
    shares = labels.select(pl.sum_horizontal("p_good", "p_unnecessary", "p_harmful")).to_series()
    assert shares.to_list() == pytest.approx([1.0] * labels.height, abs=1e-5)
    assert verify(output).problems == ()


def test_vllms_own_server_answers_both_api_critics(
    runs: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none-is-needed")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    labels: dict[str, list[str]] = {}
    with served(model, tmp_path / "server.log") as url:
        for critic, path in (("openai", "/v1"), ("anthropic", "")):
            output = tmp_path / critic
            words = ("label", runs, "-o", output, "--critic", critic, "--model", "tiny")
            words += ("--base-url", url + path, "--only", "all", "--tokenizer", model)
            done = srft_prep(*words, "--max-input-tokens", LIMIT)
            assert done.status == 0, done.stderr
            assert verify(output).problems == ()
            table = pl.read_parquet(output / "labels.parquet")
            assert table["p_harmful"].is_not_null().all() == (critic == "openai")
            labels[critic] = table["label"].to_list()
    same = sum(map(str.__eq__, labels["openai"], labels["anthropic"]))
    assert same > 0.9 * len(labels["openai"]), "the same question to the same model"


@pytest.mark.gpu
def test_on_a_gpu_every_step_is_labelled_and_the_use_of_the_peak_is_told(
    runs: Path, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    words = ("label", runs, "-o", output, "--critic", "vllm", "--model", model, "--only", "all")
    with started(*words, "--gpu-usd-per-hour", "3", "--json") as (process, mark):
        stdout, stderr = process.communicate(timeout=900)
        assert process.returncode == 0, stderr
        wait_until_gone(mark)
    usage = orjson.loads(stdout.splitlines()[-1])["usage"]
    assert usage["flops"] > 0
    assert usage["usd"] > 0
    assert "of the bf16 peak, attention included" in stderr
    assert verify(output).problems == ()
