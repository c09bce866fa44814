"""Shards as they are trained from."""

import math
import shutil
from pathlib import Path

import orjson
import pyarrow.parquet as pq
import pytest

from srft_prep.config import PackConfig
from srft_prep.errors import ShardError
from srft_prep.manifest import describe_file
from srft_prep.shards import pack
from srft_prep.train.batches import assemble
from srft_prep.train.data import RecentGroups, ShardSet
from srft_prep.weights import DEFAULT_WEIGHTS
from tests.stages import make_examples
from tests.train.small_shards import write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data")).path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the recorded example runs, weighted by labels, windows included."""
    root = tmp_path_factory.mktemp("real")
    examples = make_examples(root)
    weights = dict(DEFAULT_WEIGHTS) | {"unnecessary": 0.3}
    config = PackConfig(recipe="srft-all", weights=weights, seq_len=2048, overlong="windows")
    return pack(examples.tokens, root / "shards", config, labels=examples.labels).path


def oracle(row: dict) -> list[tuple[int, int, int, float]]:
    """(document, place in it of the predicting token, target, weight), token by token."""
    weights = [0.0] * len(row["input_ids"])
    for run in row["loss_weights"]:
        for index in range(run["start"], run["start"] + run["length"]):
            weights[index] = run["weight"]
    terms, start = [], 0
    for document, length in enumerate(row["seq_lengths"]):
        for place in range(length - 1):
            if weights[start + place + 1] > 0:
                target = row["input_ids"][start + place + 1]
                terms.append((document, place, target, weights[start + place + 1]))
        start += length
    return terms


def test_batches_of_real_shards_have_the_targets_of_a_plain_reading(real: Path) -> None:
    shards = ShardSet.open(real)
    rows = [row for part in shards.manifest.parts for row in pq.read_table(part).to_pylist()]
    assert len(rows) == shards.num_sequences > 10
    for index, row in enumerate(rows):
        batch = assemble([shards.sequence(index)], trim=False)
        starts = batch.cu_seqlens.tolist()
        owners = [d for d, length in enumerate(batch.lengths) for _ in range(length)]
        found = [
            (owners[position], position - starts[owners[position]], target, weight)
            for position, target, weight in zip(
                batch.positions.tolist(),
                batch.targets.tolist(),
                batch.weights.tolist(),
                strict=True,
            )
        ]
        assert found == oracle(row)
        assert batch.input_ids.tolist() == row["input_ids"]
        labels = [label for label in row["labels"] if label != -100]
        assert batch.targets.tolist() == labels
        assert shards.sum_weights[index] == pytest.approx(batch.sum_weights, rel=1e-12)


@pytest.mark.parametrize("which", ["folder", "real"])
def test_the_index_says_what_the_sequences_hold(which: str, request: pytest.FixtureRequest) -> None:
    shards = ShardSet.open(request.getfixturevalue(which))
    for index in range(shards.num_sequences):
        sequence = shards.sequence(index)
        batch = assemble([sequence])
        products = sequence.run_lengths.astype(float) * sequence.run_weights.astype(float)
        assert shards.tokens[index] == len(sequence.ids)
        assert shards.kept_tokens[index] == (batch.num_tokens if batch.num_loss_tokens else 0)
        assert shards.loss_tokens[index] == batch.num_loss_tokens
        assert shards.sum_weights[index] == math.fsum(products)
    counts = shards.manifest.counts
    assert shards.num_sequences == counts["num_sequences"]
    assert shards.num_tokens == counts["num_tokens"]
    assert shards.loss_tokens.sum() == counts["num_loss_tokens"]
    assert math.fsum(shards.sum_weights) == counts["sum_weights"]


def test_sequences_of_all_files_and_row_groups_come_in_the_stored_order(folder: Path) -> None:
    shards = ShardSet.open(folder)
    parts = shards.manifest.parts
    assert len(parts) > 2
    assert len(shards.group_files) > len(parts)
    rows = [row for part in parts for row in pq.read_table(part)["input_ids"].to_pylist()]
    found = [shards.sequence(index).ids.tolist() for index in range(shards.num_sequences)]
    assert found == rows
    with RecentGroups(shards, capacity=1, threads=2) as recent:
        requests = [recent.request(index) for index in range(len(rows))]
        assert [read().ids.tolist() for read in requests] == rows


def test_an_error_names_the_file_and_the_row(folder: Path) -> None:
    shards = ShardSet.open(folder)
    rows = [pq.read_metadata(part).num_rows for part in shards.manifest.parts]
    last = shards.sequence(shards.num_sequences - 1)
    assert last.source == f"{shards.manifest.parts[-1]}: row {rows[-1] - 1}"


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "shards")
    return tmp_path / "shards"


def test_changed_bytes_are_found_on_opening(copied: Path) -> None:
    path = copied / "shard-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard-00001\.parquet: changed since"):
        ShardSet.open(copied)


def test_bytes_that_change_while_training_are_found_on_reading(copied: Path) -> None:
    shards = ShardSet.open(copied)
    path = shards.manifest.parts[0]
    column = pq.read_metadata(path).row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard-00000\.parquet: row group 0 cannot be read"):
        shards.sequence(0)


def test_a_file_that_vanishes_while_training_is_named(copied: Path) -> None:
    shards = ShardSet.open(copied)
    shards.manifest.parts[0].unlink()
    with pytest.raises(ShardError, match=r"shard-00000\.parquet: row group 0 cannot be read"):
        shards.sequence(0)


def test_shards_of_an_older_version_are_refused(copied: Path) -> None:
    name = "shard-00000.parquet"
    table = pq.read_table(copied / name).drop_columns(["sum_weights"])
    pq.write_table(table, copied / name)
    manifest = orjson.loads((copied / "manifest.json").read_bytes())
    manifest["files"][0] = describe_file(copied / name)
    (copied / "manifest.json").write_bytes(orjson.dumps(manifest))
    with pytest.raises(ShardError, match=r"no column sum_weights: written by an older version"):
        ShardSet.open(copied)


def test_shards_without_any_weight_are_refused(tmp_path: Path) -> None:
    root = write_shards(tmp_path).path.parent
    weights = {"good": 0.0, "unnecessary": 0.0, "harmful": 0.0}
    config = PackConfig(recipe="srft-all", weights=weights, seq_len=128)
    weightless = pack(root / "tokens", root / "none", config, labels=root / "labels")
    with pytest.raises(ShardError, match="no token carries weight"):
        ShardSet.open(weightless.path)


def test_only_the_output_of_pack_is_opened(folder: Path) -> None:
    with pytest.raises(ShardError, match="expected the output of pack"):
        ShardSet.open(folder.parent / "tokens")
