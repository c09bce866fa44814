"""The process of a real vLLM engine killed in the midst of labelling, and then the whole run."""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest

from srft_prep.examples.record import RUNS_DIR
from srft_prep.verification import verify
from tests.faults.runs import ledger_keys
from tests.processes import processes_with, wait_until_gone
from tests.stages import srft_prep
from tests.tiny_models import EXAMPLE_TOKENIZER, make_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm (make setup, .venv-vllm)"),
]

SECONDS = 400.0


@contextmanager
def labelling(words: tuple[object, ...]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command in a process of its own; give it and what its environment is known by."""
    value = str(uuid.uuid4())
    process = subprocess.Popen(
        [sys.executable, "-m", "srft_prep", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "SRFT_TEST_MARK": value},
    )
    try:
        yield process, f"SRFT_TEST_MARK={value}"
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not ready():
        if process.poll() is not None:
            assert process.stdout is not None
            pytest.fail(f"it ended by itself: {process.stdout.read()}")
        assert time.monotonic() < until
        time.sleep(0.01)


def engine_of(command: int) -> int:
    """Return the process that computes: the child of the guardian that a command starts."""
    (guardian,) = children_of(command)
    (engine,) = children_of(guardian)
    return engine


def children_of(process: int) -> list[int]:
    """Return the processes that any thread of a process started and that live."""
    files = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def test_a_killed_engine_is_started_again_and_a_killed_run_goes_on_with_one_answer_a_key(
    tmp_path: Path, rng: random.Random
) -> None:
    model = make_tiny_model(tmp_path / "model", tokenizer=EXAMPLE_TOKENIZER)
    runs, output = tmp_path / "runs", tmp_path / "labels"
    assert srft_prep("ingest", RUNS_DIR, "-o", runs).status == 0
    words = ("label", runs, "-o", output, "--critic", "vllm", "--model", model, "--only", "all")
    words += ("--max-input-tokens", 2500)
    with labelling(words) as (process, mark):
        goal = rng.randrange(1, 30)
        wait_for(process, lambda: len(ledger_keys(output)) >= goal)
        os.kill(engine_of(process.pid), signal.SIGKILL)
        goal = len(ledger_keys(output)) + rng.randrange(1, 30)
        wait_for(process, lambda: len(ledger_keys(output)) >= goal)
        process.kill()
        process.wait()
        wait_until_gone(mark)
    kept = ledger_keys(output)
    with labelling(words) as (process, mark):
        said, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said
        assert "Traceback" not in said
        wait_until_gone(mark)
    keys = ledger_keys(output)
    assert set(kept) <= set(keys)
    assert set(Counter(keys).values()) == {1}
    labels = pl.read_parquet(output / "labels.parquet")
    steps = sum(pl.read_parquet(runs / "part-00000.parquet")["num_steps"])
    assert labels.height == steps
    assert labels["label"].is_not_null().all()
    assert processes_with(mark) == []
    assert verify(output).problems == ()
