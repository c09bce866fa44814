"""The transformers critic gives on a GPU what it gives on a CPU."""

from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

from srft_prep.critic.transformers import TransformersCritic
from tests.critic.real_questions import real_trajectories, settings_of
from tests.tiny_models import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("xgrammar") is None, reason="needs xgrammar"),
]


def test_labels_on_a_gpu_are_those_on_a_cpu(shared_data: Path, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    critics = [
        TransformersCritic(model=str(model), settings=settings_of(), device=device)
        for device in ("cuda", "cpu")
    ]
    planned = (
        request
        for trajectory in real_trajectories(shared_data)
        for request in critics[0].plan(trajectory)
    )
    requests = list(islice(planned, 6))
    found, expected = (list(critic.label(iter(requests))) for critic in critics)
    assert len(found) == len(expected) == 6
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.failure is None
        assert [each.label for each in ours.labels] == [each.label for each in theirs.labels]
        for one, other in zip(ours.labels, theirs.labels, strict=True):
            for name in ("p_good", "p_unnecessary", "p_harmful"):
                assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-3)
