"""The transformers critic, and that vLLM's engine gives the same labels and probabilities."""

from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

from srft_prep.critic import CriticReply
from srft_prep.critic.transformers import TransformersCritic
from srft_prep.critic.vllm import VllmCritic
from srft_prep.errors import BackendError, ConfigError
from tests.critic.real_questions import real_trajectories, settings_of
from tests.stages import trajectory
from tests.tiny_models import make_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("xgrammar") is None, reason="needs xgrammar (.venv-vllm)"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def by_part(replies: list[CriticReply]) -> dict[tuple[str, str], CriticReply]:
    return {(reply.request.trajectory_id, reply.request.part): reply for reply in replies}


def test_transformers_and_vllm_give_the_same_labels(model: Path, shared_data: Path) -> None:
    slow = TransformersCritic(model=str(model), settings=settings_of(), usd_per_hour=3.6)
    fast = VllmCritic(model=str(model), settings=settings_of(), engine_args={"dtype": "float32"})
    assert slow.critic_id == fast.critic_id
    assert slow.prompt_hash == fast.prompt_hash
    planned = (
        request
        for trajectory in real_trajectories(shared_data)
        for request in slow.plan(trajectory)
    )
    requests = list(islice(planned, 40))
    expected = by_part(list(slow.label(iter(requests))))
    got = by_part(list(fast.label(iter(requests))))
    fast.close()
    assert len(expected) == 40
    assert got.keys() == expected.keys()
    for key, reply in expected.items():
        assert reply.failure is None
        assert reply.usd == pytest.approx(reply.seconds / 1000)
        other = got[key]
        assert [label.label for label in other.labels] == [label.label for label in reply.labels]
        assert other.completion_tokens == reply.completion_tokens
        for ours, theirs in zip(reply.labels, other.labels, strict=True):
            for name in ("p_good", "p_unnecessary", "p_harmful"):
                assert getattr(theirs, name) == pytest.approx(getattr(ours, name), abs=1e-3)
                assert getattr(ours, name) is not None


def test_a_question_that_exceeds_the_context_is_a_failure(model: Path, shared_data: Path) -> None:

    critic = TransformersCritic(model=str(model), settings=settings_of())
    request = critic.plan(next(real_trajectories(shared_data)))[0]
    long = replace(request, question=replace(request.question, prompt_ids=(1,) * 9000))
    (reply,) = critic.label([long])
    assert reply.failure is not None
    assert reply.failure.startswith("over-long: ")


def test_what_is_no_model_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match=r"without config\.json"):
        TransformersCritic(model=str(tmp_path), settings=settings_of())
    with pytest.raises(ConfigError, match="got no folder"):
        TransformersCritic(model=str(tmp_path / "none"), settings=settings_of())
    critic = TransformersCritic(model=str(model), settings=settings_of(), device="warp9")
    with pytest.raises(BackendError, match="--device cpu"):
        list(critic.label(critic.plan(trajectory("a"))))
