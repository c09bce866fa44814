"""Masks, packing, shift and loss at once: what carries weight is learnt by heart, and nothing else.

Twenty real trajectories, their messages clipped, are learnt by the tiny model until it predicts the
weighted tokens. Harmful steps of unresolved trajectories, which stand between them in the context,
stay as surprising as text that it never saw. If a mask were off by a token, a document saw another
one, or the loss counted what it should not, one of the two numbers would be elsewhere.
"""

import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from srft_prep.config import IngestConfig
from srft_prep.ingest import ingest
from srft_prep.train.batches import assemble
from srft_prep.train.data import ShardSet
from srft_prep.train.model import load_model
from srft_prep.train.settings import RunOptions, TrainConfig
from srft_prep.train.training import Job, train
from srft_prep.trajectories import read_trajectories
from srft_prep.types import Message, Trajectory
from tests.stages import ListedCritic, run_critic, srft_prep, write_trajectories

NUM_TRAJECTORIES = 20
NUM_STEPS = 5
"""Steps that are left of a trajectory; the critic calls the fourth harmful."""
CLIPPED = 60
"""Characters that are left of a message."""


def clipped(owner: Trajectory) -> Trajectory:
    """Return a trajectory's first steps, as plain text, behind a prompt that names it."""
    kept = [
        Message(
            role="user", kind="prompt", content=f"Task {zlib.crc32(owner.trajectory_id.encode())}"
        )
    ]
    steps = 0
    for message in owner.messages:
        text = f"{message.content or ''}{message.tool_calls or ''}".strip()[-CLIPPED:]
        if message.kind == "action" and text:
            steps += 1
            if steps > NUM_STEPS:
                break
            kept.append(Message(role="assistant", kind="action", content=text))
        elif message.kind == "observation" and kept[-1].kind == "action":
            kept.append(Message(role="user", kind="observation", content=text[:20] or "(nothing)"))
    return replace(owner, messages=tuple(kept), tools=None)


@pytest.fixture(scope="module")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real trajectories, clipped, packed twice: as they are trained, and harmful steps alone."""
    folder = tmp_path_factory.mktemp("overfit")
    raw = ingest([str(shared_data / "trajectories")], folder / "raw", IngestConfig(limit=120))
    long = [each for each in read_trajectories(raw.parts) if each.num_steps > NUM_STEPS]
    by_task = {each.instance_id: clipped(each) for each in reversed(long)}
    chosen = list(by_task.values())[:NUM_TRAJECTORIES]
    assert len(chosen) == NUM_TRAJECTORIES
    chosen = [replace(each, resolved=number % 4 == 0) for number, each in enumerate(chosen)]
    write_trajectories(folder / "trajectories", chosen)
    run_critic(folder / "trajectories", folder / "labels", ListedCritic())
    tokens = ("tokenize", folder / "trajectories", "--tokenizer", "example")
    assert srft_prep(*tokens, "-o", folder / "tokens").status == 0
    pack = ("pack", folder / "tokens", "--labels", folder / "labels", "--seq-len", 1024)
    assert srft_prep(*pack, "--recipe", "srft", "-o", folder / "shards").status == 0
    harmful = ("--recipe", "unresolved-masked", "--weights", "good=0,unnecessary=0,harmful=1")
    assert srft_prep(*pack, *harmful, "-o", folder / "harmful").status == 0
    return folder


def mean_nll(model: Path, shards: Path) -> float:
    """Return the mean NLL of the tokens with weight."""
    wrapped = load_model(model)
    data = ShardSet.open(shards)
    batches = [assemble([data.sequence(index)]) for index in range(data.num_sequences)]
    return float(torch.cat([wrapped.token_nll(batch) for batch in batches]).mean())


def test_weighted_tokens_are_learnt_by_heart_and_masked_harmful_steps_are_not(
    folder: Path,
) -> None:
    job = Job(
        shards=folder / "shards",
        output=folder / "run",
        model=None,
        config=TrainConfig(epochs=55, batch_sequences=2, learning_rate=1e-2, precision="float32"),
        options=RunOptions(micro_batch_sequences=2, checkpoint_every=0),
    )
    train(job)
    weighted = mean_nll(folder / "run" / "model", folder / "shards")
    harmful = mean_nll(folder / "run" / "model", folder / "harmful")
    assert weighted < 0.1  # 0.0002 after 90 epochs
    assert harmful > 5.0  # 7.2 then, of 8.3 by chance
