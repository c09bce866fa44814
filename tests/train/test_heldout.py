"""Held-out trajectories: what is looked at, and the mean NLLs by label and outcome."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from srft_prep.config import PackConfig
from srft_prep.errors import ShardError
from srft_prep.hold_out import read_held_out
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.shards import pack
from srft_prep.train.batches import Batch
from srft_prep.train.heldout import HeldOut, evaluate
from srft_prep.weights import DEFAULT_WEIGHTS
from tests.stages import make_examples
from tests.train.small_shards import write_shards

OUTCOMES = {None: "unknown", False: "unresolved", True: "resolved"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of the recorded example runs: some tasks held out, over-long trajectories among them."""
    root = tmp_path_factory.mktemp("heldout")
    examples = make_examples(root)
    weights = dict(DEFAULT_WEIGHTS) | {"unnecessary": 0.3}
    config = PackConfig(recipe="srft", weights=weights, seq_len=3000, hold_out=0.4)
    return pack(examples.tokens, root / "shards", config, labels=examples.labels)


def opened(shards: Manifest, *, limit: int | None = None) -> HeldOut:
    root = shards.path.parent
    return HeldOut.open(root / "tokens", root / "labels", shards, limit=limit)


def pretended_nll(batch: Batch) -> Tensor:
    """An NLL that tells terms apart: of the target, the token before it and its place."""
    before, place = batch.input_ids[batch.positions], batch.position_ids[batch.positions]
    return _nll(before, batch.targets, place)


def _nll(before: Tensor, target: Tensor, place: Tensor) -> Tensor:
    return ((before * 31 + target * 17 + place * 7) % 1009).to(torch.float32) / 100


def rows_of(path: Path, pattern: str) -> list[dict]:
    return [row for part in sorted(path.glob(pattern)) for row in pq.read_table(part).to_pylist()]


def terms_of(shards: Manifest) -> list[tuple[str, str, float, float]]:
    """(outcome, label, weight, NLL) of every token of held-out steps, in plain Python."""
    root = shards.path.parent
    labels = {
        (row["trajectory_id"], row["step_index"]): row["label"]
        for row in rows_of(root / "labels", "labels.parquet")
    }
    held_out = {each.trajectory_id for each in read_held_out(shards.path)}
    by_label = shards.data["config"]["weights"]
    terms = []
    for row in rows_of(root / "tokens", "part-*.parquet"):
        if row["trajectory_id"] not in held_out:
            continue
        for span in row["step_spans"]:
            if span["end"] > shards.data["seq_len"]:
                break
            label = labels[row["trajectory_id"], span["step"]]
            weight = 1.0 if row["resolved"] else by_label[label]
            for index in range(span["start"], span["end"]):
                ids = torch.tensor(row["input_ids"][index - 1 : index + 1])
                nll = float(_nll(ids[0], ids[1], torch.tensor(index - 1)))
                terms.append((OUTCOMES[row["resolved"]], label, weight, nll))
    return terms


def test_means_are_those_of_a_plain_reading_of_the_tokens(shards: Manifest) -> None:
    terms = terms_of(shards)
    sizes = [len(row["input_ids"]) for row in rows_of(shards.path.parent / "tokens", "part-*")]
    assert min(sizes) < shards.data["seq_len"] < max(sizes)
    groups = defaultdict(list)
    for outcome, label, _, nll in terms:
        for name in ("all", label, outcome, f"{outcome}/{label}"):
            groups[f"nll/{name}"].append(nll)
    expected = {name: math.fsum(values) / len(values) for name, values in groups.items()}
    total = math.fsum(weight for _, _, weight, _ in terms)
    expected["nll/weighted"] = math.fsum(weight * nll for _, _, weight, nll in terms) / total
    found = evaluate(opened(shards), pretended_nll)
    assert found == pytest.approx(expected, rel=1e-9)
    assert {"nll/good", "nll/harmful", "nll/unresolved/harmful", "nll/resolved"} <= found.keys()
    counts = {name.removeprefix("nll/"): len(values) for name, values in groups.items()}
    assert opened(shards).num_tokens == counts


def test_ranks_look_at_each_trajectory_once_and_at_as_many_batches(shards: Manifest) -> None:
    held_out = opened(shards)
    alone = list(held_out.batches())
    assert len(alone) > 3
    for world_size in (2, 3, len(alone) + 2):
        ranks = [list(held_out.batches(rank=r, world_size=world_size)) for r in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        found = [each for batches in ranks for each in batches if each.batch.num_loss_tokens]
        assert sorted(each.batch.input_ids.tolist() for each in found) == sorted(
            each.batch.input_ids.tolist() for each in alone
        )


def test_batches_fit_and_every_agents_token_is_a_target_of_weight_1(shards: Manifest) -> None:
    held_out = opened(shards)
    for each in held_out.batches():
        assert each.batch.num_tokens <= shards.data["seq_len"]
        assert each.batch.weights.unique().tolist() == [1.0]
        assert len(each.groups) == len(each.weights) == each.batch.num_loss_tokens
    targets = sum(each.batch.num_loss_tokens for each in held_out.batches())
    assert targets == len(terms_of(shards)) == held_out.num_tokens["all"]


def test_without_labels_steps_are_unlabelled_and_the_weighted_loss_is_not_guessed(
    shards: Manifest,
) -> None:
    held_out = HeldOut.open(shards.path.parent / "tokens", None, shards)
    found = evaluate(held_out, pretended_nll)
    assert found["nll/unlabelled"] == found["nll/all"]
    assert "nll/weighted" not in found
    assert "nll/good" not in found


def test_a_limit_takes_the_first_of_the_list(shards: Manifest) -> None:
    whole = opened(shards).num_trajectories
    assert whole == len(read_held_out(shards.path)) > 2
    assert [opened(shards, limit=limit).num_trajectories for limit in (1, 2)] == [1, 2]


def test_shards_without_a_held_out_set_are_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    with pytest.raises(ShardError, match=r"held_out\.jsonl: missing.*--hold-out"):
        opened(shards)


def test_tokens_of_another_tokenizer_are_refused(shards: Manifest) -> None:
    other = read_manifest(shards.path)
    other.data["tokenizer_hash"] = "0" * 64
    with pytest.raises(ShardError, match=r"made with tokenizer .* give the tokens that were"):
        opened(other)


def test_other_tokens_are_refused(shards: Manifest, tmp_path: Path) -> None:
    """Of the same tokenizer, but of other trajectories."""
    write_shards(tmp_path)
    with pytest.raises(ShardError, match=r"no trajectory .*, which was held out"):
        HeldOut.open(tmp_path / "tokens", None, shards)


def test_weights_of_steps_follow_the_recipe(tmp_path: Path) -> None:
    """A recipe that leaves trajectories out gives their tokens no weight."""
    root = write_shards(tmp_path).path.parent
    config = PackConfig(recipe="rft", weights=dict(DEFAULT_WEIGHTS), seq_len=128, hold_out=0.3)
    shards = pack(root / "tokens", root / "rft", config)
    held_out = HeldOut.open(root / "tokens", None, shards)
    found = evaluate(held_out, pretended_nll)
    assert found["nll/weighted"] == pytest.approx(found["nll/resolved"])
    assert found["nll/weighted"] != pytest.approx(found["nll/all"])
    weights = np.concatenate([each.weights.numpy() for each in held_out.batches()])
    assert set(weights.tolist()) == {0.0, 1.0}
