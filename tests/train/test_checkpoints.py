"""Checkpoints: whole or not there, believed only after a look at every byte."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.optim import AdamW

from srft_prep.errors import ConfigError, ShardError
from srft_prep.manifest import describe_file
from srft_prep.train.checkpoints import COMPLETE, Checkpoints, Kept
from srft_prep.train.model import WeightedModel, add_lora, tiny_model
from srft_prep.train.optim import make_optimizer
from srft_prep.train.settings import TrainConfig

pytestmark = pytest.mark.usefixtures("group")


def made(*, lora: bool = False) -> tuple[WeightedModel, AdamW]:
    model = tiny_model(96, hidden_size=32, tie_word_embeddings=True)
    if lora:
        torch.manual_seed(0)
        add_lora(model, rank=2, alpha=4)
    return model, make_optimizer(model, TrainConfig(weight_decay=0.1, learning_rate=1e-2))


def advance(model: nn.Module, optimizer: AdamW, first: int, last: int) -> None:
    """Take steps whose gradients depend on their numbers."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: AdamW) -> list[torch.Tensor]:
    weights = [weight.detach().clone() for weight in model.parameters()]
    moments = [
        value.clone()
        for entry in optimizer.state_dict()["state"].values()
        for _, value in sorted(entry.items())
    ]
    return weights + moments


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def opened(folder: Path, *, keep: int = 2) -> tuple[Checkpoints, list[str]]:
    said: list[str] = []
    return Checkpoints(Kept(folder, keep=keep), say=said.append), said


def write(folder: Path, *steps: int, keep: int = 2) -> dict[int, list[torch.Tensor]]:
    """Write checkpoints of a run; return the state at each."""
    model, optimizer = made()
    states, done = {}, 0
    with opened(folder, keep=keep)[0] as checkpoints:
        for step in steps:
            advance(model, optimizer, done, step)
            done, states[step] = step, state_of(model, optimizer)
            checkpoints.save(step, model, optimizer)
    return states


def load(folder: Path) -> tuple[int | None, list[torch.Tensor], list[str]]:
    model, optimizer = made()
    checkpoints, said = opened(folder)
    with checkpoints:
        step = checkpoints.load(model, optimizer)
    return step, state_of(model, optimizer), said


@pytest.mark.parametrize("lora", [False, True])
def test_weights_and_moments_come_back_bit_for_bit(lora: bool, tmp_path: Path) -> None:
    model, optimizer = made(lora=lora)
    advance(model, optimizer, 0, 3)
    with opened(tmp_path)[0] as checkpoints:
        checkpoints.save(3, model, optimizer)
    expected = state_of(model, optimizer)
    again, its_optimizer = made(lora=lora)
    with opened(tmp_path)[0] as checkpoints:
        assert checkpoints.load(again, its_optimizer) == 3
    assert_same(state_of(again, its_optimizer), expected)
    for each in ((model, optimizer), (again, its_optimizer)):
        advance(*each, 3, 6)
    assert_same(state_of(again, its_optimizer), state_of(model, optimizer))


def test_adapters_are_saved_without_the_frozen_model(tmp_path: Path) -> None:
    model, optimizer = made(lora=True)
    advance(model, optimizer, 0, 1)
    with opened(tmp_path)[0] as checkpoints:
        checkpoints.save(1, model, optimizer)
    names = FileSystemReader(tmp_path / "step-00000001").read_metadata().state_dict_metadata
    weights = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert weights == {name for name, each in model.named_parameters() if each.requires_grad}


def test_training_that_goes_on_meanwhile_changes_nothing_in_a_checkpoint(tmp_path: Path) -> None:
    model, optimizer = made()
    advance(model, optimizer, 0, 2)
    expected = state_of(model, optimizer)
    with opened(tmp_path)[0] as checkpoints:
        checkpoints.save(2, model, optimizer)
        for weight in model.parameters():
            weight.data.fill_(7.0)
        for entry in optimizer.state.values():
            entry["exp_avg"].fill_(7.0)
    step, found, _ = load(tmp_path)
    assert step == 2
    assert_same(found, expected)


def test_the_newest_stay(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_one_that_is_being_read_stays_too(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, keep=2)
    (tmp_path / "step-00000002" / COMPLETE).unlink()
    kept = Kept(tmp_path, keep=2)
    with kept.newest() as step:
        assert step == 1, "the newest that is whole"
        for later in (3, 4):
            (tmp_path / f"step-{later:08d}").mkdir()
        kept.prune()
        assert {path.name[-1] for path in tmp_path.iterdir()} == {"1", "3", "4"}
    kept.prune()
    assert {path.name[-1] for path in tmp_path.iterdir()} == {"3", "4"}


def test_a_run_that_may_write_no_more_writes_no_checkpoint(tmp_path: Path) -> None:
    def assure() -> None:
        raise ConfigError("another run took over")

    model, optimizer = made()
    checkpoints, _ = opened(tmp_path / "folder")
    checkpoints.kept.assure = assure
    with checkpoints, pytest.raises(ConfigError, match="another run took over"):
        checkpoints.save(1, model, optimizer)
    assert not (tmp_path / "folder").exists()


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert load(tmp_path / "new")[0] is None


def test_what_a_killed_run_was_writing_is_no_checkpoint(tmp_path: Path) -> None:
    states = write(tmp_path, 2)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / ".step-00000005.tmp")
    step, found, said = load(tmp_path)
    assert step == 2
    assert_same(found, states[2])
    assert said == []
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "how", "problem"),
    [
        ("__0_0.distcp", "cut", "__0_0.distcp is cut short"),
        ("__0_0.distcp", "flip", "__0_0.distcp was changed"),
        ("__0_0.distcp", "remove", "__0_0.distcp is missing"),
        (".metadata", "flip", ".metadata was changed"),
        (COMPLETE, "remove", "complete.json cannot be read"),
        (COMPLETE, "cut", "complete.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(
    name: str, how: str, problem: str, tmp_path: Path
) -> None:
    states = write(tmp_path, 2, 4)
    path = tmp_path / "step-00000004" / name
    data = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data[:-10] if how == "cut" else data)
    step, found, said = load(tmp_path)
    assert step == 2
    assert_same(found, states[2])
    assert len(said) == 1
    assert problem in said[0]
    assert (tmp_path / "step-00000004.damaged").is_dir()
    assert load(tmp_path)[0] == 2


def test_damaged_ones_do_not_count_among_those_that_stay(tmp_path: Path) -> None:
    write(tmp_path, 2, 4)
    (tmp_path / "step-00000004" / COMPLETE).unlink()
    model, optimizer = made()
    with opened(tmp_path, keep=1)[0] as checkpoints:
        assert checkpoints.load(model, optimizer) == 2
        checkpoints.save(3, model, optimizer)
    assert load(tmp_path)[0] == 3


def test_without_a_whole_checkpoint_nothing_is_begun_anew_silently(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (tmp_path / "step-00000002" / COMPLETE).unlink()
    with pytest.raises(ShardError, match="no checkpoint is whole"):
        load(tmp_path)


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    model, optimizer = made()
    checkpoints, _ = opened(tmp_path / "folder")
    advance(model, optimizer, 0, 1)
    with checkpoints:
        checkpoints.save(1, model, optimizer)
        checkpoints.wait()
        shutil.rmtree(tmp_path / "folder")
        (tmp_path / "folder").write_text("in the way")
        with pytest.raises(OSError, match="folder"):
            checkpoints.save(2, model, optimizer)


def test_settings_of_the_optimizer_are_those_of_the_run_that_goes_on(tmp_path: Path) -> None:
    write(tmp_path, 2)
    model = made()[0]
    config = TrainConfig(weight_decay=0.5, beta1=0.8, beta2=0.9, epsilon=1e-6)
    optimizer = make_optimizer(model, config)
    with opened(tmp_path)[0] as checkpoints:
        assert checkpoints.load(model, optimizer) == 2
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.5, 0.0]
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.9)
        assert group["eps"] == 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 64}, r"the checkpoint has \(.*32.*\), the model \(.*64.*\)"),
        ({"hidden_size": 32, "num_layers": 3}, r"layers\.2\..* has no tensor, the model \("),
        ({"hidden_size": 32, "num_layers": 1}, r"layers\.1\..* has \(.*\), the model no tensor"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_changed(
    settings: dict[str, int], message: str, tmp_path: Path
) -> None:
    write(tmp_path, 2)
    model = tiny_model(96, tie_word_embeddings=True, **settings)
    optimizer = make_optimizer(model, TrainConfig())
    before = [weight.detach().clone() for weight in model.parameters()]
    with opened(tmp_path)[0] as checkpoints, pytest.raises(ConfigError, match=message):
        checkpoints.load(model, optimizer)
    assert_same([weight.detach() for weight in model.parameters()], before)
    assert load(tmp_path)[0] == 2


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    write(tmp_path, 2)
    path = tmp_path / "step-00000002"
    (path / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    about = orjson.loads((path / COMPLETE).read_bytes())
    about["files"] = [describe_file(path / file["name"]) for file in about["files"]]
    (path / COMPLETE).write_bytes(orjson.dumps(about))
    with pytest.raises(ShardError, match=r"mkdir does not belong there"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)
