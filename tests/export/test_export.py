import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.config import PackConfig
from srft_prep.errors import ConfigError, ShardError
from srft_prep.export.packs import read_packs
from srft_prep.export.stage import TARGETS, export
from srft_prep.hashes import sha256_of
from srft_prep.manifest import (
    read_manifest,
)
from srft_prep.shards import pack
from srft_prep.verification import verify
from tests.export.shards_fixture import (
    SEQ_LEN,
    Document,
    Documents,
    document,
    flat,
    ordinary,
    packs_of,
    write_shards,
)
from tests.stages import make_examples, srft_prep

Read = list[tuple[list[int], list[bool]]]
"""Documents: their ids, and which of them are trained."""

ALL = tuple(TARGETS)
LOSSY = tuple(name for name, target in TARGETS.items() if not target.keeps_weights)
FRACTIONS = (1.0, 0.5, 0.0, 0.25)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    tables = []
    for path in sorted(folder.glob("part-*")):
        if path.suffix == ".arrow":
            with pa.ipc.open_stream(path) as stream:
                tables.append(stream.read_all())
        else:
            tables.append(pq.read_table(path))
    return pa.concat_tables(tables).to_pylist()


def by_lengths(row: dict[str, Any], key: str = "labels") -> Iterator[tuple[list[int], list[int]]]:
    start = 0
    for length in row["seq_lengths"]:
        yield row["input_ids"][start : start + length], row[key][start : start + length]
        start += length


def read_packed(folder: Path) -> Read:
    return [
        (ids, [label != -100 for label in labels])
        for row in rows_of(folder)
        for ids, labels in by_lengths(row)
    ]


def read_documents(folder: Path) -> Read:
    rows = rows_of(folder)
    assert all(row["attention_mask"] == [1] * len(row["input_ids"]) for row in rows)
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in rows]


def read_padded(folder: Path) -> Read:
    read = []
    for row in rows_of(folder):
        number = np.array(row["attention_mask"])
        for each in range(1, number.max() + 1):
            places = np.flatnonzero(number == each)
            assert np.take(row["position_ids"], places).tolist() == list(range(len(places)))
            trained = np.take(row["labels"], places) != -100
            read.append((np.take(row["input_ids"], places).tolist(), trained.tolist()))
        assert set(np.take(row["labels"], np.flatnonzero(number == 0))) == {-100}
    return read


def read_predicting(folder: Path) -> Read:
    read = []
    for row in rows_of(folder):
        bounds = [*row["seq_start_id"], len(row["input_ids"])]
        for start, end in pairwise(bounds):
            mask = row["loss_mask"][start:end]
            assert mask[-1] == 0
            read.append((row["input_ids"][start:end], [False, *map(bool, mask[:-1])]))
    return read


READERS: dict[str, Callable[[Path], Read]] = {
    "trl": read_packed,
    "axolotl": read_documents,
    "llama-factory": read_padded,
    "megatron": read_predicting,
    "hf": read_packed,
}


def documents_of(packs: list[Documents]) -> Read:
    return [(each.ids.tolist(), (each.weights > 0).tolist()) for pack in packs for each in pack]


@st.composite
def shards(draw: st.DrawFn) -> list[list[list[Document]]]:
    def one(lengths: list[int], number: int) -> list[Document]:
        weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=3))
        return [document(f"{number}.{i}", each, weights) for i, each in enumerate(lengths)]

    pack = st.lists(st.integers(1, 16), min_size=1, max_size=4)
    files = draw(st.lists(st.lists(pack, min_size=1, max_size=5), min_size=1, max_size=3))
    return [
        [one(lengths, 10 * f + p) for p, lengths in enumerate(file)] for f, file in enumerate(files)
    ]


@pytest.mark.parametrize("target", ALL)
@settings(max_examples=15)
@given(shards())
def test_every_form_holds_the_documents_of_the_shards_in_order(
    target: str, made: list[list[list[Document]]]
) -> None:
    with TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        export(write_shards(Path(folder) / "shards", made), output, target)
        assert READERS[target](output) == documents_of(packs_of(made))


def test_packs_are_the_same_whatever_is_read_at_a_time(tmp_path: Path) -> None:
    made = ordinary(FRACTIONS)
    folder = write_shards(tmp_path / "shards", made)
    for batch in (1, 100, 1 << 20):
        read = [
            packs for part in sorted(folder.glob("shard-*")) for packs in read_packs(part, batch)
        ]
        ids = flat(packs.ids.tolist() for packs in read)
        assert ids == flat(each.ids.tolist() for pack in packs_of(made) for each in pack)
        assert sum(packs.num_packs for packs in read) == len(packs_of(made))
        for packs in read:
            assert packs.tokens[-1] == len(packs.ids) == packs.lengths.sum()
            assert packs.documents[-1] == len(packs.lengths)


def test_rows_for_llama_factory_have_one_length_and_at_least_one_token_of_padding(
    tmp_path: Path,
) -> None:
    export(write_shards(tmp_path / "shards", ordinary()), tmp_path / "out", "llama-factory")
    rows = rows_of(tmp_path / "out")
    assert {len(values) for row in rows for values in row.values()} == {SEQ_LEN + 8}
    assert all(row["attention_mask"][-1] == 0 for row in rows)


def test_the_hf_form_is_the_shards_byte_for_byte(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", ordinary(FRACTIONS))
    export(folder, tmp_path / "out", "hf")
    copies = sorted((tmp_path / "out").glob("part-*"))
    assert [sha256_of(copy) for copy in copies] == [
        file["sha256"] for file in read_manifest(folder).files
    ]


@pytest.mark.parametrize("target", LOSSY)
def test_a_lossy_form_says_what_weights_it_changes(target: str, tmp_path: Path) -> None:
    made = ordinary(FRACTIONS)
    folder = write_shards(tmp_path / "shards", made)
    weights = np.concatenate([each.weights for pack in packs_of(made) for each in pack])
    run = srft_prep("export", folder, "--to", target, "-o", tmp_path / "out", "--json")
    assert run.status == 0
    lost = read_manifest(tmp_path / "out").data["lost_weights"]
    changed = weights[(weights > 0) & (weights != 1)]
    assert lost == {
        "tokens": len(changed),
        "of_tokens": int((weights > 0).sum()),
        "sum_weights": float(changed.sum()),
        "least_weight": 0.25,
        "greatest_weight": 1.0,
        "tokens_by_weight": {
            str(weight): int((weights == weight).sum()) for weight in (0.25, 0.5, 1.0)
        },
    }
    assert "warning: weights are lost" in run.stderr
    for text in (run.stderr, (tmp_path / "out" / "README.md").read_text()):
        assert f"{len(changed):,} of {int((weights > 0).sum()):,} trained tokens" in text
    assert orjson.loads(run.stdout.splitlines()[-1])["changed_weights"] == len(changed)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 0.0), (2.0,)])
def test_equal_weights_lose_nothing(weights: tuple[float, ...], tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", ordinary(weights))
    run = srft_prep("export", folder, "--to", "trl", "-o", tmp_path / "out")
    assert run.status == 0
    assert "lost" not in run.stderr
    assert read_manifest(tmp_path / "out").data["lost_weights"] is None


def test_the_hf_form_loses_no_weights(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", ordinary(FRACTIONS))
    assert "lost" not in srft_prep("export", folder, "--to", "hf", "-o", tmp_path / "out").stderr
    assert read_manifest(tmp_path / "out").data["lost_weights"] is None


def test_many_different_weights_are_told_by_their_range_alone(tmp_path: Path) -> None:
    weights = tuple(float(each) for each in np.linspace(0.1, 0.9, 40))
    made = [[[document(f"{n}", SEQ_LEN, weights[n % 40 :] + weights[: n % 40])] for n in range(40)]]
    export(write_shards(tmp_path / "shards", made), tmp_path / "out", "trl")
    lost = read_manifest(tmp_path / "out").data["lost_weights"]
    assert lost["tokens_by_weight"] is None
    assert lost["least_weight"] == pytest.approx(0.1)
    assert lost["greatest_weight"] == pytest.approx(0.9)


@pytest.mark.parametrize("target", ALL)
def test_verify_knows_an_export_and_sees_a_flipped_byte(target: str, tmp_path: Path) -> None:
    export(write_shards(tmp_path / "shards", ordinary()), tmp_path / "out", target)
    assert verify(tmp_path / "out").problems == ()
    path = next(iter((tmp_path / "out").glob("part-*")))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "SHA-256 differs" in verify(tmp_path / "out").problems[0]


@pytest.mark.parametrize("target", ALL)
def test_an_export_is_the_same_bytes_again_and_names_its_shards(
    target: str, tmp_path: Path
) -> None:
    folder = write_shards(tmp_path / "shards", ordinary(FRACTIONS))
    first, second = (export(folder, tmp_path / name, target) for name in ("1", "2"))
    assert first.files == second.files
    assert first.data["inputs"] == [read_manifest(folder).as_input()]
    assert {file["name"] for file in first.files} == {
        path.name
        for path in first.path.iterdir()
        if path.name not in ("manifest.json", ".progress")
    }


@pytest.mark.parametrize("target", ALL)
def test_a_killed_export_goes_on_and_gives_the_same_bytes(target: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", ordinary(FRACTIONS))
    whole = export(folder, tmp_path / "whole", target)

    class Killed(Exception):
        pass

    class KillAtTwo:
        calls = 0

        def advance(self, count: int = 1, note: str = "") -> None:
            self.calls += 1
            if self.calls == 2:
                raise Killed

        def say(self, text: str) -> None:
            pass

    output = tmp_path / "out"
    with pytest.raises(Killed):
        export(folder, output, target, progress=KillAtTwo())
    with pytest.raises(ShardError, match="unfinished"):
        read_manifest(output)
    untouched = next(iter(output.glob("part-00000*"))).stat().st_mtime_ns
    resumed = export(folder, output, target)
    assert resumed.files == whole.files
    assert resumed.data["lost_weights"] == whole.data["lost_weights"]
    assert next(iter(output.glob("part-00000*"))).stat().st_mtime_ns == untouched


def test_another_target_replaces_an_export_only_when_told_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    folder = write_shards(tmp_path / "shards", ordinary())
    out = tmp_path / "out"
    export(folder, out, "llama-factory")
    with pytest.raises(ConfigError, match="--overwrite"):
        export(folder, out, "trl")
    made = export(folder, out, "trl", overwrite=True)
    names = {path.name for path in out.iterdir()}
    assert names == {"manifest.json", *(file["name"] for file in made.files)}
    assert not any(name.endswith(".arrow") for name in names)


def test_an_unfinished_export_of_another_target_leaves_nothing_either(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", ordinary())
    out = tmp_path / "out"
    export(folder, out, "llama-factory")
    (out / "manifest.json").unlink()
    (out / ".progress").mkdir()
    made = export(folder, out, "trl", overwrite=True)
    names = {path.name for path in out.iterdir()}
    assert names == {"manifest.json", *(file["name"] for file in made.files)}


def test_an_export_reads_finished_undamaged_shards_only(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", ordinary())
    with pytest.raises(ConfigError, match="expected one of trl, axolotl"):
        export(folder, tmp_path / "out", "nemo")
    exported = export(folder, tmp_path / "out", "hf").path
    with pytest.raises(ShardError, match="expected the output of pack, this is one of export"):
        export(exported, tmp_path / "other", "trl")
    with pytest.raises(ConfigError, match="expected a directory of export, this is one of pack"):
        export(folder, folder, "trl")
    run = srft_prep("inspect", exported, "--id", "a")
    assert run.status == 2
    assert "give the shards that it was made from" in run.stderr
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "shard-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ShardError, match="changed since it was written"):
        export(damaged, tmp_path / "third", "trl")


@pytest.mark.parametrize("target", ALL)
def test_the_readme_says_how_to_load_and_how_it_was_made(target: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", ordinary(), weights={"good": 1.0, "harmful": 0.0})
    export(folder, tmp_path / "out", target)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    if target == "llama-factory":
        assert text.startswith("# Packed training data for LLaMA-Factory\n")
    else:
        head = yaml.safe_load(text.split("---\n")[1])
        assert head["dataset_info"]["splits"] == [
            {"name": "train", "num_examples": len(rows_of(tmp_path / "out"))}
        ]
        columns = pq.read_schema(tmp_path / "out" / "part-00000.parquet").names
        assert [feature["name"] for feature in head["dataset_info"]["features"]] == columns
        assert "license" not in head
    for said in ("## Licence", "recipe | srft", "good 1, harmful 0", "0" * 64, "1" * 64):
        assert said in text


def test_the_command_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", ordinary())
    run = srft_prep("export", folder, "--to", "torchtune", "-o", tmp_path / "out")
    assert run.status == 2
    assert "megatron" in run.stderr
    assert not (tmp_path / "out").exists()


def test_shards_of_the_examples_go_into_every_form_alike(tmp_path: Path) -> None:
    """From raw runs to every form, through the program's own stages."""
    examples = make_examples(tmp_path)
    config = PackConfig(
        recipe="srft-all",
        weights={"good": 1.0, "unnecessary": 0.5, "harmful": 0.0},
        seq_len=2048,
        overlong="windows",
        shard_tokens=1 << 14,
    )
    packed = pack(examples.tokens, tmp_path / "shards", config, labels=examples.labels)
    forms = {}
    for target in ALL:
        made = export(packed.path, tmp_path / target, target)
        assert made.counts["num_tokens"] == packed.counts["num_tokens"]
        forms[target] = READERS[target](made.path)
    assert len(packed.parts) > 1
    assert sum(sum(trained) for _, trained in forms["hf"]) == packed.counts["num_loss_tokens"]
    assert all(form == forms["hf"] for form in forms.values())
    lost = read_manifest(tmp_path / "trl").data["lost_weights"]
    assert set(lost["tokens_by_weight"]) == {"0.5", "1.0"}
