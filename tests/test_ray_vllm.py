"""`label --critic vllm --engine ray` as a user runs it: engines in actors, one of them killed."""

import os
import secrets
import signal
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import orjson
import polars as pl
import pytest

from srft_prep.critic import Critic, CriticReply, CriticRequest
from srft_prep.critic.cut_answers import OnlyCutAnswers
from srft_prep.critic.on_ray import RayCritic
from srft_prep.verification import verify
from tests.critic.real_questions import real_trajectories, settings_of, with_room
from tests.gates import gated
from tests.processes import wait_until_gone
from tests.ray_clusters import actors, local_cluster
from tests.stages import srft_prep
from tests.tiny_models import make_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm (make setup, .venv-vllm)"),
]

NUM_RUNS = 4
LIMIT = 2500
"""Input tokens: most runs are asked about in windows."""


def test_two_engines_in_actors_give_the_local_labels_although_one_is_killed(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model(tmp_path / "model")
    runs, output = tmp_path / "runs", tmp_path / "ray"
    source = shared_data / "trajectories"
    assert srft_prep("ingest", source, "--limit", NUM_RUNS, "-o", runs).status in (0, 1)
    words = ("label", runs, "--critic", "vllm", "--model", model, "--only", "all")
    words += ("--max-input-tokens", LIMIT, "-o")
    local = srft_prep(*words, tmp_path / "local")
    assert local.status == 0, local.stderr

    token = secrets.token_hex(32)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray = ("--engine", "ray", "--workers", 2)
    with gated(tmp_path / "gate", *words, output, *ray, RAY_AUTH_TOKEN=token) as command:
        command.wait_until(
            lambda: any(file.stat().st_size for file in output.glob("ledger-*.jsonl")), 400
        )
        os.kill(actors("CriticActor", token=token)[0], signal.SIGKILL)
        assert command.wait(500) == 0, command.said
    wait_until_gone(token)
    lines = [
        line for file in output.glob("ledger-*.jsonl") for line in file.read_bytes().splitlines()
    ]
    keys = Counter((each["content_hash"], each["part"]) for each in map(orjson.loads, lines))
    assert set(keys.values()) == {1}
    assert verify(output).problems == ()
    ours, theirs = (
        pl.read_parquet(each / "labels.parquet") for each in (output, tmp_path / "local")
    )
    steps = ["trajectory_id", "step_index", "critic_id", "prompt_hash"]
    assert ours.select(steps).equals(theirs.select(steps))
    same = (ours["label"] == theirs["label"]).mean()
    assert same is not None
    assert same > 0.98, "what is computed together differs in the last bits"


def test_an_engine_whose_answers_are_all_cut_off_ends_the_run_and_is_not_replaced(
    shared_data: Path, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "model")
    with local_cluster() as cluster:
        critic = RayCritic("vllm", {"model": str(model), "settings": settings_of()}, cluster)
        requests = (with_room(each, 3) for each in planned(critic, shared_data))
        replies: list[CriticReply] = []
        with pytest.raises(OnlyCutAnswers, match="expected labels, got only answers that were cut"):
            replies.extend(critic.label(islice(requests, 40)))
        assert len(replies) == 10
        critic.close()


def planned(critic: Critic, shared_data: Path) -> Iterator[CriticRequest]:
    for trajectory in real_trajectories(shared_data):
        yield from critic.plan(trajectory)
