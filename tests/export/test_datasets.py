"""The real `datasets` library on exported folders, and what stands in the lines to load them."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml

from srft_prep.export.stage import export
from tests.export.shards_fixture import (
    SEQ_LEN,
    code_of,
    flat,
    ordinary,
    packs_of,
    positions,
    write_shards,
)

WEIGHTS = (1.0, 0.5, 0.0)
PACKS = packs_of(ordinary(WEIGHTS))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", ordinary(WEIGHTS))


def test_load_dataset_opens_the_hf_form_with_every_weight(shards: Path, tmp_path: Path) -> None:
    export(shards, tmp_path / "out", "hf")
    made: dict[str, Any] = {}
    exec(compile(code_of(tmp_path / "out", "python"), "README.md", "exec"), made)
    assert len(made["dataset"]) == len(PACKS)
    for row, pack in zip(made["dataset"], PACKS, strict=True):
        assert row["input_ids"] == flat(each.ids.tolist() for each in pack)
        assert row["labels"] == flat(each.labels for each in pack)
        assert row["seq_lengths"] == [len(each.ids) for each in pack]
        assert row["trajectory_ids"] == [each.owner for each in pack]
        weights = np.concatenate([each.weights for each in pack])
        assert np.array_equal(made["weights_of"](row), weights)
        assert row["sum_weights"] == pytest.approx(weights.sum())


def test_load_dataset_opens_the_documents_for_axolotl(shards: Path, tmp_path: Path) -> None:
    export(shards, tmp_path / "out", "axolotl")
    settings = yaml.safe_load(code_of(tmp_path / "out", "yaml"))
    assert settings["datasets"] == [{"path": str(tmp_path / "out"), "type": None}]
    assert settings["sequence_len"] == SEQ_LEN
    rows = datasets.load_dataset(settings["datasets"][0]["path"])["train"]
    assert rows.column_names == ["input_ids", "attention_mask", "labels"]
    documents = flat(PACKS)
    assert len(rows) == len(documents)
    for row, each in zip(rows, documents, strict=True):
        assert row["input_ids"] == each.ids.tolist()
        assert row["labels"] == each.labels
        assert row["attention_mask"] == [1] * len(each.ids)


def test_load_from_disk_opens_the_packs_for_llama_factory(shards: Path, tmp_path: Path) -> None:
    export(shards, tmp_path / "out", "llama-factory")
    settings = yaml.safe_load(code_of(tmp_path / "out", "yaml"))
    rows = datasets.load_from_disk(settings["tokenized_path"])
    assert len(rows) == len(PACKS)
    for row, pack in zip(rows, PACKS, strict=True):
        ids = flat(each.ids.tolist() for each in pack)
        length, padding = len(ids), SEQ_LEN + 8 - len(ids)
        numbers = flat([n] * len(each.ids) for n, each in enumerate(pack, start=1))
        assert row["input_ids"][:length] == ids
        assert row["labels"] == flat(each.labels for each in pack) + [-100] * padding
        assert row["attention_mask"] == numbers + [0] * padding
        assert row["position_ids"][:length] == positions(pack)


def test_datasets_saves_and_shuffles_what_it_loaded(shards: Path, tmp_path: Path) -> None:
    """The folder is whole: the library itself can write it anew."""
    export(shards, tmp_path / "out", "llama-factory")
    rows = datasets.load_from_disk(tmp_path / "out")
    rows.shuffle(seed=1).save_to_disk(tmp_path / "again")
    again = datasets.load_from_disk(tmp_path / "again")
    assert sorted(again["input_ids"]) == sorted(rows["input_ids"])
    assert again.features == rows.features
