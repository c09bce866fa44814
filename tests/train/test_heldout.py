"""Held-out trajectories: what is looked at, and the mean NLLs by label and outcome."""

import math
import shutil
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from srft_prep.config import Overlong, PackConfig
from srft_prep.errors import ShardError
from srft_prep.hold_out import read_held_out
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.shards import pack
from srft_prep.train.batches import Batch
from srft_prep.train.heldout import HeldOut, evaluate
from srft_prep.weights import DEFAULT_WEIGHTS
from tests.stages import make_examples
from tests.train.small_shards import write_shards

SEQ_LEN = 1500
OUTCOMES = {None: "unknown", False: "unresolved", True: "resolved"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of the recorded example runs: some tasks held out, over-long trajectories among them."""
    root = tmp_path_factory.mktemp("heldout")
    make_examples(root)
    return packed(root, "shards", seq_len=SEQ_LEN)


def packed(root: Path, name: str, *, seq_len: int, overlong: Overlong = "truncate") -> Manifest:
    weights = dict(DEFAULT_WEIGHTS) | {"unnecessary": 0.3}
    config = PackConfig(
        recipe="srft", weights=weights, seq_len=seq_len, hold_out=0.4, overlong=overlong
    )
    return pack(root / "tokens", root / name, config, labels=root / "labels")


def opened(shards: Manifest, *, limit: int | None = None) -> HeldOut:
    root = shards.path.parent
    return HeldOut.open(root / "tokens", root / "labels", shards, limit=limit)


def pretended_nll(batch: Batch) -> Tensor:
    """An NLL that tells terms apart: of the target and the token before it."""
    return _nll(batch.input_ids[batch.positions], batch.targets)


def _nll(before: Tensor, target: Tensor) -> Tensor:
    return ((before * 31 + target * 17) % 1009).to(torch.float32) / 100


def rows_of(path: Path, pattern: str) -> list[dict]:
    return [row for part in sorted(path.glob(pattern)) for row in pq.read_table(part).to_pylist()]


def held_out_rows(shards: Manifest) -> list[dict]:
    held_out = {each.trajectory_id for each in read_held_out(shards.path)}
    rows = rows_of(shards.path.parent / "tokens", "part-*.parquet")
    return [row for row in rows if row["trajectory_id"] in held_out]


def measured_spans(row: dict, seq_len: int) -> list[dict]:
    """Steps that fit into a window behind one token of context."""
    return [span for span in row["step_spans"] if span["end"] - span["start"] < seq_len]


def terms_of(shards: Manifest) -> list[tuple[str, str, float, float]]:
    """(outcome, label, weight, NLL) of every token of held-out steps, in plain Python."""
    labels = {
        (row["trajectory_id"], row["step_index"]): row["label"]
        for row in rows_of(shards.path.parent / "labels", "labels.parquet")
    }
    by_label, seq_len = shards.data["config"]["weights"], shards.data["seq_len"]
    terms = []
    for row in held_out_rows(shards):
        for span in measured_spans(row, seq_len):
            label = labels[row["trajectory_id"], span["step"]]
            weight = 1.0 if row["resolved"] else by_label[label]
            for index in range(span["start"], span["end"]):
                before, target = torch.tensor(row["input_ids"][index - 1 : index + 1])
                terms.append(
                    (OUTCOMES[row["resolved"]], label, weight, float(_nll(before, target)))
                )
    return terms


def test_means_are_those_of_a_plain_reading_of_the_tokens(shards: Manifest) -> None:
    terms = terms_of(shards)
    sizes = [len(row["input_ids"]) for row in held_out_rows(shards)]
    assert min(sizes) < SEQ_LEN < max(sizes)
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


def test_every_step_that_fits_is_looked_at_once_behind_its_own_context(shards: Manifest) -> None:
    """Whatever `pack` does with over-long trajectories: here it cuts them."""
    assert shards.data["config"]["overlong"] == "truncate"
    whole = {
        row["trajectory_id"]: np.array(row["input_ids"], ">i4") for row in held_out_rows(shards)
    }
    found: Counter[tuple[str, int]] = Counter()
    later = 0
    for each in opened(shards).batches():
        ids, positions = each.batch.input_ids.numpy().astype(">i4"), each.batch.positions.numpy()
        for start, end in pairwise(each.batch.cu_seqlens.tolist()):
            name, first = place_of(ids[start:end], whole)
            later += first > 0
            inside = positions[(positions >= start) & (positions < end)]
            found.update((name, int(place) - start + first + 1) for place in inside)
    rows = held_out_rows(shards)
    spans = [(row["trajectory_id"], span) for row in rows for span in row["step_spans"]]
    assert found == Counter((name, i) for name, s in spans for i in range(s["start"], s["end"]))
    assert later > 3


def place_of(ids: np.ndarray, whole: dict[str, np.ndarray]) -> tuple[str, int]:
    """Return whose stretch of tokens this is, and where it starts."""
    for name, tokens in whole.items():
        place = tokens.tobytes().find(ids.tobytes())
        if place >= 0:
            assert place % 4 == 0
            return name, place // 4
    raise AssertionError("tokens of no trajectory")


def test_it_is_said_how_much_is_measured_and_what_is_not(shards: Manifest) -> None:
    """Windows of 150 tokens do not hold the longest steps."""
    narrow = packed(shards.path.parent, "narrow", seq_len=150, overlong="windows")
    terms = terms_of(narrow)
    first, *others = opened(narrow).remarks()
    assert f"{len(terms):,} tokens" in first
    assert f"harmful {sum(label == 'harmful' for _, label, _, _ in terms):,}" in first
    lost = [
        span["end"] - span["start"]
        for row in held_out_rows(narrow)
        for span in row["step_spans"]
        if span not in measured_spans(row, 150)
    ]
    assert lost
    assert f"{len(lost)} steps with {sum(lost):,} tokens are longer" in others[-1]
    assert evaluate(opened(narrow), pretended_nll)["nll/all"] == pytest.approx(
        math.fsum(nll for _, _, _, nll in terms) / len(terms)
    )


def test_a_group_without_a_token_is_named_and_has_no_value(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, hold_out=0.3)
    held_out = HeldOut.open(tmp_path / "tokens", tmp_path / "labels", shards, limit=1)
    values = evaluate(held_out, pretended_nll)
    _, missing = held_out.remarks()
    names = missing.removeprefix("held out: no token is ").partition(":")[0].split(", ")
    outcome = {"resolved", "unresolved"} - {*names}
    assert len(outcome) == 1
    assert not {f"nll/{name}" for name in names} & values.keys()
    assert f"nll/{outcome.pop()}" in values


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


def test_a_limit_takes_a_sample_of_the_list(shards: Manifest, tmp_path: Path) -> None:
    """The list has trajectories by source; a smaller sample is within a larger one."""
    whole = opened(shards).num_trajectories
    assert whole == len(read_held_out(shards.path)) > 2
    assert [opened(shards, limit=limit).num_trajectories for limit in (1, 2)] == [1, 2]
    many = write_shards(tmp_path, runs=300, hold_out=0.5, seq_len=1024)
    names = [each.trajectory_id for each in read_held_out(many.path)]
    ids = {row["trajectory_id"]: row["input_ids"] for row in rows_of(tmp_path / "tokens", "part-*")}
    chosen = [chosen_of(many, ids, limit) for limit in (20, 40)]
    assert [len(each) for each in chosen] == [20, 40]
    assert chosen[0] < chosen[1]
    halves = {name in names[: len(names) // 2] for name in chosen[0]}
    assert halves == {False, True}


def chosen_of(shards: Manifest, ids: dict[str, list[int]], limit: int) -> set[str]:
    held_out = HeldOut.open(shards.path.parent / "tokens", None, shards, limit=limit)
    found = set()
    for sequence in held_out.sequences:
        bounds = [0, *sequence.lengths.cumsum().tolist()]
        stretches = {tuple(sequence.ids[a:b].tolist()) for a, b in pairwise(bounds)}
        found |= {name for name, tokens in ids.items() if tuple(tokens) in stretches}
    return found


def test_shards_without_a_held_out_set_are_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    with pytest.raises(ShardError, match=r"held_out\.jsonl: missing.*--hold-out"):
        opened(shards)


@pytest.mark.parametrize(
    ("key", "what"), [("tokenizer_hash", "tokenizer"), ("template_hash", "chat template")]
)
def test_tokens_of_another_tokenizer_or_template_are_refused(
    shards: Manifest, key: str, what: str
) -> None:
    other = read_manifest(shards.path)
    other.data[key] = "0" * 64
    with pytest.raises(ShardError, match=f"hash of the {what}: expected 0+, .*; give those"):
        opened(other)


def test_other_tokens_are_refused(shards: Manifest, tmp_path: Path) -> None:
    """Of the same tokenizer and template, but of other trajectories."""
    write_shards(tmp_path)
    made = read_manifest(tmp_path / "tokens").data["tokenizer"]
    other = read_manifest(shards.path)
    other.data.update({key: made[key] for key in ("tokenizer_hash", "template_hash")})
    with pytest.raises(ShardError, match=r"hash of the contents: .*; give those tokens"):
        HeldOut.open(tmp_path / "tokens", None, other)


def test_a_list_that_names_what_the_tokens_do_not_have_is_refused(
    shards: Manifest, tmp_path: Path
) -> None:
    shutil.copytree(shards.path, tmp_path / "shards")
    with (tmp_path / "shards" / "held_out.jsonl").open("a") as file:
        file.write('{"trajectory_id":"nobody","instance_id":"","resolved":null}\n')
    other = read_manifest(tmp_path / "shards")
    with pytest.raises(ShardError, match=r"no trajectory nobody, .* restore that list"):
        HeldOut.open(shards.path.parent / "tokens", None, other)


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


def test_of_a_gold_file_by_several_the_labels_count_that_the_shards_were_packed_by(
    shards: Manifest,
) -> None:
    root = shards.path.parent
    gold = root / "gold.jsonl"
    with gold.open("wb") as file:
        for row in rows_of(root / "labels", "labels.parquet"):
            key = {"trajectory_id": row["trajectory_id"], "step_index": row["step_index"]}
            for annotator, label in (("ada", row["label"]), ("bob", "good")):
                line = {**key, "label": label, "annotator": annotator, "reason": "by hand"}
                file.write(orjson.dumps(line) + b"\n")
    config = PackConfig(**shards.data["config"])
    by_hand = pack(root / "tokens", root / "by-hand", config, labels=gold, annotator="ada")
    measured = evaluate(HeldOut.open(root / "tokens", gold, by_hand), pretended_nll)
    assert measured == evaluate(opened(shards), pretended_nll)
    again = evaluate(HeldOut.open(root / "tokens", root / "labels", by_hand), pretended_nll)
    assert again == measured, "a label directory names nobody"
