"""The process of a real vLLM engine killed in the midst of labelling, and then the whole run."""

import os
import random
import signal
import uuid
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest

from srft_prep.examples.record import RUNS_DIR
from srft_prep.verification import verify
from tests.faults.runs import ledger_keys
from tests.gates import gated
from tests.processes import processes_with, wait_until_gone
from tests.stages import srft_prep
from tests.tiny_models import EXAMPLE_TOKENIZER, make_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm (make setup, .venv-vllm)"),
]

SECONDS = 400.0


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
    mark = f"srft-test-{uuid.uuid4()}"
    with gated(tmp_path / "gate", *words, SRFT_TEST_MARK=mark) as command:
        goal = rng.randrange(1, 30)
        command.wait_until(lambda: len(ledger_keys(output)) >= goal, SECONDS)
        os.kill(engine_of(command.process.pid), signal.SIGKILL)
        goal = len(ledger_keys(output)) + rng.randrange(1, 30)
        command.wait_until(lambda: len(ledger_keys(output)) >= goal, SECONDS)
        command.kill()
        wait_until_gone(mark)
    kept = ledger_keys(output)
    with gated(tmp_path / "gate", *words, SRFT_TEST_MARK=mark) as command:
        assert command.wait(SECONDS) == 0, command.said
        assert "Traceback" not in command.said
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
