"""Stage directories: whole or resumable, by one writer, and read only as they were written."""

import fcntl
import tempfile
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.errors import ConfigError, ShardError
from srft_prep.hashes import hash_of
from srft_prep.manifest import (
    Manifest,
    describe_file,
    read_manifest,
)
from srft_prep.storage import (
    LOCK,
    StageWriter,
    atomic_path,
    write_bytes,
    write_rejected,
    write_table,
)
from tests.faults.disks import read_only

COUNTS = {"trajectories": 3, "rejected": 0}
INPUTS = [{"path": "/somewhere", "sha256": "00"}]


def opened(path: Path, **changes: Any) -> StageWriter:
    given: dict[str, Any] = {"stage": "ingest", "config": {"limit": 3}, "inputs": INPUTS}
    return StageWriter.open(path, **{**given, **changes})


def write(path: Path, **changes: Any) -> Manifest:
    """Write a whole stage directory of one part."""
    with opened(path, **changes) as writer:
        if writer.finished:
            return writer.finished
        write_table(table(3), path / "part-00000.parquet", row_group_rows=2)
        return writer.finish(counts=COUNTS, names=["part-00000.parquet"], command=["test"])


def table(rows: int) -> pa.Table:
    return pa.table({"text": [f"row {n}" for n in range(rows)]})


def test_a_finished_directory_holds_its_files_and_a_manifest_that_describes_them(
    tmp_path: Path,
) -> None:
    manifest = write(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "part-00000.parquet",
    ]
    again = read_manifest(tmp_path / "out", stage="ingest")
    assert again == manifest
    assert again.counts == COUNTS
    assert again.parts == [tmp_path / "out" / "part-00000.parquet"]
    assert again.files == [describe_file(again.parts[0])]
    assert again.files[0]["rows"] == 3


def test_the_same_plan_again_has_nothing_to_do(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with opened(tmp_path / "out") as writer:
        assert writer.finished is not None


@pytest.mark.parametrize(
    "inputs", [[{"path": "/moved", "sha256": "00"}], [{"sha256": "00", "path": ["a", "b"]}]]
)
def test_inputs_that_only_moved_are_the_same_plan(inputs: Any, tmp_path: Path) -> None:
    write(tmp_path / "out")
    with opened(tmp_path / "out", inputs=inputs) as writer:
        assert writer.finished is not None


def test_a_plan_with_a_tuple_is_known_again(tmp_path: Path) -> None:
    config = {"exclude": ("a", "b"), "none": ()}
    write(tmp_path / "out", config=config)
    with opened(tmp_path / "out", config=config) as writer:
        assert writer.finished is not None


@pytest.mark.parametrize(
    "changes",
    [{"config": {"limit": 4}}, {"inputs": [{"sha256": "01"}]}],
)
def test_another_plan_is_refused_and_replaces_only_with_overwrite(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match=r"holds a finished ingest .* --overwrite"):
        opened(out, **changes)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with opened(out, overwrite=True, **changes) as writer:
        assert writer.finished is None
        assert [path.name for path in out.iterdir()] == [".progress"]


def test_a_finished_directory_with_a_missing_file_is_made_again(tmp_path: Path) -> None:
    manifest = write(tmp_path / "out")
    manifest.parts[0].unlink()
    assert write(tmp_path / "out").checked().data == manifest.data


def test_an_unfinished_run_goes_on_after_its_journal(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(out) as writer:
        assert writer.entry("part-0") is None
        writer.record("part-0", {"rows": 3})
        (out / ".part-00001.parquet.tmp").write_bytes(b"half")
        (out / ".model.tmp").mkdir()
        (out / ".model.tmp" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ShardError, match=r"unfinished: .* give its command again"):
        read_manifest(out)
    with opened(out) as writer:
        assert writer.entry("part-0") == {"rows": 3}
        assert not list(out.glob(".*.tmp"))


def test_an_unfinished_run_of_another_plan_is_refused_and_replaces_only_with_overwrite(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with opened(out) as writer:
        write_table(table(3), out / "part-00000.parquet", row_group_rows=2)
        writer.record("part-0", {"rows": 3})
    with pytest.raises(ConfigError, match=r"holds an unfinished ingest .* --overwrite"):
        opened(out, config={"limit": 5})
    with opened(out) as writer:
        assert writer.entry("part-0") == {"rows": 3}
    with opened(out, config={"limit": 5}, overwrite=True) as writer:
        assert writer.entry("part-0") is None
        assert not list(out.glob("part-*"))


class Killed(BaseException):
    """Stands for kill -9: nothing cleans up after it."""


@pytest.mark.parametrize("finished", [True, False])
def test_a_kill_anywhere_in_an_overwrite_leaves_what_can_be_gone_on_with(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {name: getattr(Path, name) for name in ("unlink", "mkdir", "replace")}
    calls, deadline = 0, 0

    def dying(name: str) -> Any:
        def call(self: Path, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > deadline:
                raise Killed
            return plain[name](self, *args, **kwargs)

        return call

    for deadline in range(40):
        out = tmp_path / str(deadline)
        if finished:
            write(out)
        else:
            with opened(out) as writer:
                write_table(table(3), out / "part-00000.parquet", row_group_rows=2)
                writer.record("part-0", {"rows": 3})
        (out / "rejected.jsonl").write_bytes(b"{}")
        calls, killed = 0, True
        with monkeypatch.context() as patch, suppress(Killed):
            for name in plain:
                patch.setattr(Path, name, dying(name))
            opened(out, config={"limit": 4}, overwrite=True).__exit__()
            killed = False
        write(out, config={"limit": 4}, overwrite=True)
        assert {path.name for path in out.iterdir()} == {"part-00000.parquet", "manifest.json"}
        if not killed:
            break
    assert deadline > 4
    assert not killed


TOKENIZER = dict.fromkeys(("tokenizer", "tokenizer_hash", "template_hash"), "")
STAGES = ["ingest", "label", "tokenize", "pack"]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("old", "new"), list(permutations(STAGES, 2)))
def test_a_directory_of_another_stage_is_refused_even_with_overwrite(
    old: str, new: str, finished: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with opened(out, stage=old, accumulates=old == "label") as writer:
        (out / "ledger-00000.jsonl").write_bytes(b"{}\n")
        if finished:
            counts = COUNTS | {"failures": 0}
            extra: dict[str, Any] = {"seq_len": 1, "recipe": "naive", **TOKENIZER}
            if old == "tokenize":
                extra["tokenizer"] = {"source": "example", **TOKENIZER}
            names = ["ledger-00000.jsonl"]
            writer.finish(counts=counts, names=names, command=[], extra=extra)
    before = sorted(out.rglob("*"))
    with pytest.raises(ConfigError, match=f"a directory of {new}, this is one of {old}"):
        opened(out, stage=new, accumulates=new == "label", overwrite=True)
    assert sorted(out.rglob("*")) == before


def test_ledgers_survive_every_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(out, stage="label") as writer:
        (out / "ledger-00000.jsonl").write_bytes(b"{}\n")
        names = ["ledger-00000.jsonl"]
        writer.finish(counts={"failures": 0}, names=names, command=[])
    with opened(out, stage="label", config={"limit": 9}, overwrite=True):
        assert (out / "ledger-00000.jsonl").exists()
    (out / ".progress" / "plan.json").unlink()
    with pytest.raises(ConfigError, match="this is one of label"):
        opened(out, overwrite=True)


@pytest.mark.parametrize("data", [b"", b"{", b"\x00\xff"])
def test_a_damaged_journal_entry_is_work_to_be_done_again(data: bytes, tmp_path: Path) -> None:
    with opened(tmp_path / "out") as writer:
        writer.record("part-0", {"rows": 3})
        (writer.progress / "part-0.json").write_bytes(data)
        assert writer.entry("part-0") is None
        (writer.progress / "plan.json").write_bytes(data)
    with opened(tmp_path / "out") as writer:
        assert writer.entry("part-0") is None


def test_what_a_kill_left_behind_a_finished_run_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out)
    (out / ".progress").mkdir()
    (out / ".progress" / "big").write_bytes(b"x")
    write(out)
    assert not (out / ".progress").exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty .* \(it holds notes.txt\)"):
        opened(tmp_path)


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be made a directory"):
        opened(tmp_path / "file")


def test_labels_accumulate_over_plans(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for limit in (1, 2):
        with opened(out, stage="label", config={"limit": limit}, accumulates=True) as writer:
            assert writer.finished is None
            (out / f"ledger-{limit:05d}.jsonl").write_bytes(b"{}\n")
            writer.finish(counts={"failures": 0}, names=[], command=[])
    assert len(list(out.glob("ledger-*.jsonl"))) == 2


def test_labels_are_named_by_their_table_and_not_by_how_they_came(tmp_path: Path) -> None:
    names = ["labels.parquet", "requests.parquet", "ledger-00000.jsonl"]
    identities = []
    for number in range(3):
        out = tmp_path / str(number)
        with opened(out, stage="label", accumulates=True) as writer:
            write_table(table(3 + number // 2), out / names[0], row_group_rows=2)
            write_table(table(number), out / names[1], row_group_rows=2)
            (out / names[2]).write_bytes(b"{}\n" * number)
            manifest = writer.finish(counts={"failures": 0}, names=names, command=[])
        identities.append(manifest.as_input()["sha256"])
    assert identities[0] == identities[1] != identities[2]


def test_what_a_run_did_is_returned_and_not_written(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        manifest = writer.finish(counts=COUNTS, names=[], command=[], run={"asked": 3})
    assert manifest.run == {"asked": 3}
    assert read_manifest(tmp_path).run == {}
    assert b"asked" not in (tmp_path / "manifest.json").read_bytes()


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with opened(tmp_path / "out"), pytest.raises(ConfigError, match="another srft-prep run"):
        opened(tmp_path / "out")
    write(tmp_path / "out")


@given(st.binary(max_size=64))
def test_a_changed_table_is_never_an_input(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest = write(Path(folder))
        assert manifest.checked() is manifest
        manifest.parts[0].write_bytes(data)
        with pytest.raises(ShardError, match="changed since it was written; restore it, or delete"):
            manifest.checked()
        manifest.parts[0].unlink()
        with pytest.raises(ShardError, match=r"part-00000.parquet: missing; "):
            manifest.checked()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"", "damaged, not JSON"),
        (b"[]", "damaged: expected an object with schema_version"),
        ({"schema_version": 2}, "schema version 2, this program reads 1; use the srft-prep versi"),
        ({"stage": "review"}, "damaged: stage: expected one of ingest, label, tokenize, pack"),
        ({"stage": ["ingest"]}, "damaged: stage"),
        ({"counts": []}, "damaged: counts: expected dict, got list"),
        ({"counts": {}}, "damaged: counts.trajectories is missing"),
        ({"files": [5]}, "damaged: files: expected objects with a name and its sha256"),
        ({"files": [{"name": 5, "sha256": "x"}]}, "damaged: files"),
        ({"config": None}, "damaged: config: expected dict, got NoneType"),
    ],
)
def test_a_manifest_of_another_shape_is_refused_in_words(
    change: Any, message: str, tmp_path: Path
) -> None:
    file = write(tmp_path).path / "manifest.json"
    data = (
        change
        if isinstance(change, bytes)
        else orjson.dumps({**orjson.loads(file.read_bytes()), **change})
    )
    file.write_bytes(data)
    with pytest.raises(ShardError) as error:
        read_manifest(tmp_path)
    assert str(error.value).startswith(f"{file}: {message}")


def test_what_is_no_stage_directory_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"expected srft-prep pack output, but there is no manif"):
        read_manifest(tmp_path, stage="pack")
    with pytest.raises(ShardError, match="expected srft-prep output"):
        read_manifest(tmp_path / "gone")
    write(tmp_path / "out")
    with pytest.raises(ShardError, match="expected the output of pack, this is one of ingest"):
        read_manifest(tmp_path / "out", stage="pack")


def test_an_input_is_named_by_what_it_holds_not_by_where_it_lies(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a").as_input(), write(tmp_path / "b").as_input()
    assert first["sha256"] == second["sha256"]
    assert first["path"] != second["path"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(ValueError, match="stop"):
        write_half(path)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def write_half(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half of the new")
        raise ValueError("stop")


def test_a_table_is_written_reproducibly_with_page_checksums(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.parquet", "b.parquet")]
    for path in paths:
        write_table(table(100), path, row_group_rows=16)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with pq.ParquetFile(paths[0]) as file:
        assert file.num_row_groups == 7
        offset = file.metadata.row_group(3).column(0).data_page_offset
        size = file.metadata.row_group(3).column(0).total_compressed_size
        assert file.metadata.row_group(3).column(0).compression == "ZSTD"
    data = bytearray(paths[0].read_bytes())
    data[offset + size - 2] ^= 1
    paths[0].write_bytes(data)
    with pytest.raises(OSError, match="CRC checksum verification failed"):
        pq.read_table(paths[0], page_checksum_verification=True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), json_values, max_size=5), st.randoms())
def test_a_hash_depends_on_the_value_and_not_on_the_order_of_its_keys(
    value: dict[str, Any], rng: Any
) -> None:
    items = list(value.items())
    rng.shuffle(items)
    assert hash_of(dict(items)) == hash_of(value)
    assert hash_of(orjson.loads(orjson.dumps(value))) == hash_of(value)
    assert hash_of([value]) != hash_of(value)


def test_a_file_that_changed_since_it_was_journalled_is_work_to_be_done_again(
    tmp_path: Path,
) -> None:
    part = tmp_path / "out" / "part-00000.parquet"
    with opened(tmp_path / "out") as writer:
        write_table(table(3), part, row_group_rows=2)
        writer.record("one", {"rows": 3}, files=[part])
        assert writer.entry("one") == {"rows": 3}
    whole = part.read_bytes()
    for damaged in (b"", whole[:-1], whole[:50] + b"?" + whole[51:], None):
        part.unlink(missing_ok=True) if damaged is None else part.write_bytes(damaged)
        with opened(tmp_path / "out") as writer:
            assert writer.entry("one") is None
    part.write_bytes(whole)
    with opened(tmp_path / "out") as writer:
        assert writer.entry("one") == {"rows": 3}
        write_table(table(4), part, row_group_rows=2)
        writer.record("one", {"rows": 4}, files=[part])
        manifest = writer.finish(counts=COUNTS, names=[part.name], command=[])
    assert manifest.files == [describe_file(part)]


def test_a_run_on_another_host_is_seen_by_its_lock_on_the_journal(tmp_path: Path) -> None:
    with opened(tmp_path / "out"):
        pass  # interrupted: its journal stays
    with (tmp_path / "out" / ".progress" / LOCK).open("rb+") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)  # a lock of the directory would not reach this host
        with pytest.raises(ConfigError, match="another srft-prep run is writing here"):
            opened(tmp_path / "out")
    write(tmp_path / "out")
    assert not (tmp_path / "out" / ".progress").exists()


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "..", "", "a\0b"])
def test_a_manifest_that_names_a_file_elsewhere_is_damaged(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "manifest.json"
    manifest = orjson.loads(file.read_bytes())
    manifest["files"][0]["name"] = name
    file.write_bytes(orjson.dumps(manifest))
    with pytest.raises(ShardError, match="is no place in the directory"):
        read_manifest(tmp_path)


def test_a_changed_list_is_never_an_input_either(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        write_rejected(tmp_path, [{"reason": "none"}])
        manifest = writer.finish(counts=COUNTS, names=["rejected.jsonl"], command=[])
    assert manifest.checked() == manifest
    (tmp_path / "rejected.jsonl").write_bytes(b'{"reason": "nine"}\n')
    with pytest.raises(ShardError, match=r"rejected\.jsonl: changed since it was written"):
        manifest.checked()


@pytest.mark.parametrize("accumulates", [False, True])
def test_what_cannot_be_written_to_is_told_in_words(accumulates: bool, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "empty").mkdir(parents=True)
    with opened(disk / "half", accumulates=accumulates) as writer:
        write_bytes(writer.path / "part-00000.parquet", b"one")
    write(disk / "whole")
    with read_only(disk):
        for place in ("empty", "half"):
            with pytest.raises(ConfigError, match=f"{place}: .* written to .Read-only file"):
                opened(disk / place, accumulates=accumulates)
        with opened(disk / "whole", accumulates=accumulates) as writer:
            assert writer.finished
    # what a kill between manifest and journal left behind
    (disk / "whole" / ".progress").mkdir()
    with read_only(disk), opened(disk / "whole", accumulates=accumulates) as writer:
        assert writer.finished
