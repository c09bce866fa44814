"""The vLLM critic with the real engine on this CPU; runs in .venv-vllm, where vllm is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

from srft_prep.critic import CriticReply, CriticRequest
from srft_prep.critic.vllm import VllmCritic
from srft_prep.errors import BackendError, ConfigError
from srft_prep.types import LABELS
from tests.critic.real_questions import real_trajectories, settings_of, with_room
from tests.processes import processes_with, wait_until_gone
from tests.tiny_models import make_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm (make setup, .venv-vllm)"),
]

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def critic(model: Path) -> Iterator[VllmCritic]:
    critic = VllmCritic(model=str(model), settings=settings_of(), usd_per_hour=3.6)
    yield critic
    critic.close()


@pytest.fixture(scope="module")
def requests(critic: VllmCritic, shared_data: Path) -> list[CriticRequest]:
    planned = (
        request
        for trajectory in real_trajectories(shared_data)
        for request in critic.plan(trajectory)
    )
    return list(islice(planned, 240))


def check(replies: list[CriticReply], requests: list[CriticRequest]) -> None:
    """Check that every request has exactly one reply, with a label for every step."""
    key = sorted((request.trajectory_id, request.part) for request in requests)
    assert sorted((reply.request.trajectory_id, reply.request.part) for reply in replies) == key
    for reply in replies:
        assert reply.failure is None
        assert tuple(label.step_index for label in reply.labels) == reply.request.steps
        assert reply.request.question is None
        assert reply.request.trajectory is None
        assert {label.label for label in reply.labels} <= set(LABELS)


def test_every_answer_fits_the_schema(critic: VllmCritic, requests: list[CriticRequest]) -> None:
    assert len(requests) >= 200
    started = time.monotonic()
    replies = list(critic.label(iter(requests)))
    wall_seconds = time.monotonic() - started
    check(replies, requests)
    labels = [label for reply in replies for label in reply.labels]
    for label in labels:
        shares = {"good": label.p_good, "unnecessary": label.p_unnecessary}
        shares["harmful"] = label.p_harmful
        assert sum(shares.values()) == pytest.approx(1.0)
        assert all(0 <= share <= 1 for share in shares.values())
    assert {label.label for label in labels} >= {"good", "harmful"}
    assert 0 < sum(reply.seconds for reply in replies) <= wall_seconds
    assert all(reply.seconds > 0 for reply in replies)
    assert sum(reply.usd for reply in replies) == pytest.approx(
        sum(reply.seconds for reply in replies) / 1000
    )
    assert sum(reply.cached_tokens for reply in replies) > 0


def test_a_killed_engine_is_replaced_and_no_request_lost(
    critic: VllmCritic, requests: list[CriticRequest]
) -> None:
    replies: list[CriticReply] = []
    for reply in critic.label(iter(requests)):
        replies.append(reply)
        if len(replies) == 40:
            (guardian,) = critic._pool.process_ids
            children = Path(f"/proc/{guardian}/task/{guardian}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
    check(replies, requests)


def test_an_overlong_question_is_a_failure_and_nothing_else_is(
    critic: VllmCritic, requests: list[CriticRequest]
) -> None:
    question = requests[0].question
    long = replace(requests[0], question=replace(question, prompt_ids=(1,) * 9000))
    bad = replace(requests[1], question=replace(requests[1].question, schema={"type": "no such"}))
    replies = list(critic.label([long, bad, *requests[2:6]]))
    failures = {reply.request.part: reply.failure for reply in replies if reply.failure}
    assert len(replies) == 6
    assert failures[long.part].startswith("over-long: 9000 tokens")
    assert failures[bad.part].startswith("rejected: ")
    assert len(failures) == 2


def test_an_answer_that_is_cut_off_is_asked_for_with_twice_the_room(
    critic: VllmCritic, requests: list[CriticRequest]
) -> None:
    (whole,) = critic.label(requests[:1])
    assert whole.failure is None
    room = whole.completion_tokens - 3
    replies = list(critic.label([with_room(requests[0], room), *requests[1:6]]))
    check(replies, requests[:6])
    (reply,) = (each for each in replies if each.request.part == requests[0].part)
    assert reply.labels == whole.labels
    assert reply.completion_tokens == room + whole.completion_tokens
    assert reply.prompt_tokens == 2 * whole.prompt_tokens
    assert 0 < reply.usd == pytest.approx(reply.seconds / 1000)


def test_an_answer_that_is_cut_off_twice_is_unparseable_and_both_are_counted(
    critic: VllmCritic, requests: list[CriticRequest]
) -> None:
    (reply,) = critic.label([with_room(requests[0], 3)])
    assert reply.failure is not None
    assert reply.failure.startswith("unparseable: cut off after 6 tokens")
    assert reply.failure.endswith("(asked twice)")
    assert reply.completion_tokens == 3 + 6


def test_more_room_than_the_context_has_is_not_asked_for(
    critic: VllmCritic, requests: list[CriticRequest]
) -> None:
    for spare, words in ((0, "cut off after 3 tokens"), (2, "cut off after 5 tokens")):
        ids = (1,) * (8192 - 3 - spare)
        (reply,) = critic.label([with_room(requests[0], 3, prompt_ids=ids)])
        assert words in (reply.failure or "")
        assert reply.completion_tokens == (3 + 5 if spare else 3)


def test_a_run_of_which_every_answer_is_cut_off_twice_ends(
    critic: VllmCritic, requests: list[CriticRequest]
) -> None:
    replies: list[CriticReply] = []
    with pytest.raises(BackendError, match="only answers that were cut off, of 10 requests also"):
        replies.extend(critic.label(with_room(request, 3) for request in requests))
    assert len(replies) == 10
    few = list(critic.label(with_room(request, 3) for request in requests[:9]))
    assert len(few) == 9


def test_no_process_outlives_a_killed_parent(model: Path, shared_data: Path) -> None:
    mark = f"SRFT_TEST_MARK={os.getpid()}"
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from srft_prep.critic.vllm import VllmCritic
from tests.critic.real_questions import real_trajectories, settings_of
critic = VllmCritic(model={str(model)!r}, settings=settings_of())
trajectories = real_trajectories(Path({str(shared_data)!r}))
requests = (request for each in trajectories for request in critic.plan(each))
for _ in critic.label(requests):
    print("answered", flush=True)
"""
    name, value = mark.split("=")
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, name: value},
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "answered\n"
    assert len(processes_with(mark)) >= 3  # it, a guardian, an engine
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until_gone(mark)


@pytest.mark.parametrize(
    ("engine_args", "error", "words"),
    [
        ({"max_model_length": "4096"}, ConfigError, "did you mean max_model_len"),
        ({"max_model_len": "many"}, ConfigError, "expected a number of tokens, got 'many'"),
        ({"data_parallel_size": "2"}, ConfigError, "--gpus"),
        ({"dtype": "float3"}, BackendError, "float3"),
        ({"kv_cache_memory_bytes": "4096"}, BackendError, "worker 0: could not start"),
    ],
)
def test_a_bad_engine_argument_is_named(
    engine_args: dict[str, str],
    error: type[Exception],
    words: str,
    model: Path,
    requests: list[CriticRequest],
) -> None:
    def label() -> None:
        critic = VllmCritic(model=str(model), settings=settings_of(), engine_args=engine_args)
        list(critic.label(requests[:1]))

    with pytest.raises(error, match=words):
        label()


def test_reasoning_needs_a_model_whose_thoughts_are_known(model: Path) -> None:
    with pytest.raises(ConfigError, match="reasoning_parser"):
        VllmCritic(model=str(model), settings=settings_of(reasoning="low"))


def test_each_gpu_has_an_engine_of_its_own(
    model: Path, requests: list[CriticRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    rows = "".join(f"{i}, GPU-{i}, NVIDIA H200, 143771\\n" for i in range(4))
    smi.write_text(f"#!/bin/sh\nprintf '{rows}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    with pytest.raises(ConfigError, match="--gpus"):
        VllmCritic(model=str(model), settings=settings_of(), gpus=3)
    critic = VllmCritic(model=str(model), settings=settings_of())
    replies: list[CriticReply] = []
    devices: set[str] = set()
    for reply in critic.label(iter(requests)):
        if not replies:
            for pid in critic._pool.process_ids:
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                (device,) = (each for each in environ if each.startswith(b"CUDA_VISIBLE_DEVICES="))
                devices.add(device.decode().partition("=")[2])
        replies.append(reply)
    critic.close()
    check(replies, requests)
    assert devices == {"3", "1"}
