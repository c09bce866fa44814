"""Raw files become records, streamed, whatever wraps them and wherever one starts."""

import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.errors import ConfigError
from srft_prep.records import MAX_RECORD_BYTES, Record, discover, printable, records

RUN = {"messages": [{"role": "user", "content": "fix"}, {"role": "assistant", "content": "done"}]}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
objects = st.dictionaries(st.text(min_size=1, max_size=4), json_values, min_size=1, max_size=3)
lines = st.lists(
    st.one_of(
        objects.map(orjson.dumps),
        st.sampled_from([b"", b"  ", b"\t", b"{", b"\xff", b"null", b"[1]", b'{"a": 1} x']),
    ),
    min_size=1,
    max_size=12,
)


def read(name: str, data: bytes, *, start: int = 0) -> list[Record]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        return list(records(path, start=start))


def told(found: list[Record]) -> list[tuple[int | None, Any, str | None]]:
    return [(record.origin.line, record.value, record.error) for record in found]


def values(found: list[Record]) -> list[Any]:
    return [record.value for record in found if record.error is None]


def parquet(rows: list[dict[str, Any]], *, row_group_size: int = 2) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, sink, row_group_size, write_page_checksum=True, use_dictionary=False)
    return sink.getvalue().to_pybytes()


@given(lines, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_every_line_of_jsonl_is_a_value_or_an_error_under_its_number(
    texts: list[bytes], newline: str, ends: bool, bom: bool
) -> None:
    end = newline.encode()
    data = b"\xef\xbb\xbf" * bom + end.join(texts) + end * ends
    found = read("a.jsonl", data)
    told_lines = [n for n, text in enumerate(texts, start=1) if text.strip()]
    if told_lines:
        assert [record.origin.line for record in found] == told_lines
    else:
        assert len(found) == 1
    for record in found:
        assert (record.value is None) or record.error is None
        if record.error is None and record.origin.line:
            assert record.value == orjson.loads(texts[record.origin.line - 1])


@given(lines, st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.ndjson.zst", "a.json", "b.traj"]))
def test_reading_on_at_a_record_gives_what_reading_through_gives(
    texts: list[bytes], name: str
) -> None:
    data = packed(name, b"\n".join(texts))
    assert_resumable(name, data)


@given(st.lists(json_values, min_size=1, max_size=6))
def test_reading_on_at_an_element_gives_what_reading_through_gives(elements: list[Any]) -> None:
    assert_resumable("a.json", orjson.dumps(elements, option=orjson.OPT_INDENT_2))


@given(st.lists(st.fixed_dictionaries({"a": st.integers(0, 9)}), min_size=1, max_size=9))
def test_reading_on_at_a_row_gives_what_reading_through_gives(rows: list[dict[str, Any]]) -> None:
    assert_resumable("a.parquet", parquet(rows))


def assert_resumable(name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        through = list(records(path))
        assert through, "an empty file says so"
        positions = [record.position for record in through]
        assert positions == sorted(set(positions))
        for index, record in enumerate(through):
            assert list(records(path, start=record.position)) == through[index:]


def packed(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    return zstandard.compress(data) if name.endswith(".zst") else data


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_the_kind_of_a_file_is_read_off_its_bytes_not_its_name(
    pack: Callable[[bytes], bytes],
) -> None:
    data = pack(b'{"a": 1}\n{"a": 2}\n')
    for name in ("runs.json", "runs.traj", "runs.jsonl", "runs.jsonl.gz", "runs.parquet"):
        assert told(read(name, data)) == [(1, {"a": 1}, None), (2, {"a": 2}, None)]
    assert values(read("runs.json", parquet([{"a": 1}]))) == [{"a": 1}]


@pytest.mark.parametrize(
    "text", [b'{"a": 1}', b'{"a": 1}\n', b'{\n "a": 1\n}\n', b'{"a": 1}\r\n\n']
)
def test_a_document_has_no_line_however_it_is_indented(text: bytes) -> None:
    assert told(read("run.traj.json", text)) == [(None, {"a": 1}, None)]


def test_one_line_of_jsonl_has_its_number() -> None:
    assert told(read("runs.jsonl", b'\n{"a": 1}')) == [(2, {"a": 1}, None)]


def test_a_list_of_messages_is_one_run_and_a_list_of_runs_is_many() -> None:
    messages = [{**message, "extra": 1} for message in RUN["messages"]]
    assert len(read("a.json", orjson.dumps(messages))) == 1
    assert len(read("a.json", orjson.dumps([RUN, RUN, RUN]))) == 3
    broken = [*messages, {"role": 5, "content": "x"}, 7]
    assert told(read("a.json", orjson.dumps(broken))) == [(None, broken, None)]


def test_jsonl_under_another_name_survives_a_broken_first_line() -> None:
    found = read("runs.json", b'{"half": \n{"a": 1}\n\n{"a": 2}\n')
    assert [record.origin.line for record in found] == [1, 2, 4]
    assert values(found) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gz"), (zstandard.compress, "zst")])
def test_lines_before_the_end_of_a_cut_file_are_taken_and_the_cut_is_an_error(
    pack: Callable[[bytes], bytes], name: str
) -> None:
    rows = [b'{"n": %d, "pad": "%s"}' % (n, str(n**90).encode()) for n in range(5000)]
    data = pack(b"\n".join(rows))
    found = read(f"runs.jsonl.{name}", data[: len(data) * 2 // 3])
    good = values(found)
    assert 1000 < len(good) < 5000
    assert [row["n"] for row in good] == list(range(len(good)))
    assert found[-1].error is not None
    assert found[-1].error.startswith("compressed data is cut short or damaged from here on")
    assert found[-1].origin.line == len(good) + 1


def test_concatenated_frames_and_members_are_one_stream() -> None:
    for pack in (gzip.compress, zstandard.compress):
        data = b"".join(pack(b'{"n": %d}\n' % n) for n in range(300))
        assert [row["n"] for row in values(read("a.jsonl", data))] == list(range(300))


def test_a_row_of_parquet_that_is_no_text_is_the_only_one_lost() -> None:
    texts = pa.array([b"a", b"\xff\xfe", b"c"]).cast(pa.string(), safe=False)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink)
    found = read("a.parquet", sink.getvalue().to_pybytes())
    assert values(found) == [{"text": "a"}, {"text": "c"}]
    assert [record.origin.line for record in found if record.error] == [2]


def test_a_damaged_row_group_is_the_only_one_lost() -> None:
    rows = [{"n": n, "text": f"text of {n}" * 9} for n in range(6)]
    data = bytearray(parquet(rows))
    with pq.ParquetFile(pa.BufferReader(bytes(data))) as file:
        column = file.metadata.row_group(1).column(1)
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    found = read("a.parquet", bytes(data))
    assert [row["n"] for row in values(found)] == [0, 1, 4, 5]
    (lost,) = [record for record in found if record.error]
    assert lost.origin.line == 3
    assert "rows 3 to 4 are lost" in (lost.error or "")


@pytest.mark.slow
def test_a_decompression_bomb_is_rejected_and_what_follows_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range((MAX_RECORD_BYTES >> 20) + 5):
            file.write(b"x" * (1 << 20))
        file.write(b'\n{"a": 1}\n')
    assert path.stat().st_size < MAX_RECORD_BYTES / 100
    assert told(list(records(path))) == [
        (1, None, "line longer than 256 MiB"),
        (2, {"a": 1}, None),
    ]


def test_a_folder_gives_its_files_of_known_endings_in_order(tmp_path: Path) -> None:
    names = ("b/x.traj", "b/x.traj.json", "a.jsonl", "c.parquet", "d.json.gz", "e.ndjson.zst")
    others = ("notes.txt", ".hidden/x.json", "b/.x.json", "x.csv", "x.jsonl.bak", "d.json/y.md")
    for name in (*names, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = discover([str(tmp_path)])
    assert [str(path.relative_to(tmp_path)) for path in found] == sorted(names)


def test_sources_are_taken_once_in_the_order_given(tmp_path: Path) -> None:
    for name in ("b.json", "a.json"):
        (tmp_path / name).write_text("{}")
    b, a = tmp_path / "b.json", tmp_path / "a.json"
    assert discover([str(b), str(tmp_path), str(a)]) == [b, a]
    assert discover([str(tmp_path / "*.json")]) == [a, b]
    assert discover([str(tmp_path / "**" / "a.*")]) == [a]


def test_a_name_with_brackets_is_a_name_before_it_is_a_glob(tmp_path: Path) -> None:
    path = tmp_path / "runs[1].json"
    path.write_text("{}")
    assert discover([str(path)]) == [path]


@pytest.mark.parametrize("name", ["nothing", "nothing-*.json"])
def test_a_source_that_is_not_there_stops_at_once(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        discover([str(tmp_path / name)])


def test_a_folder_without_runs_is_a_record_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (found,) = records(*discover([str(tmp_path)]))
    assert found.error is not None
    assert found.error.startswith("no file with runs in this folder (looked for .json, .jsonl")


def test_a_link_to_nowhere_is_a_record_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.json").symlink_to("gone.json")
    (path,) = discover([str(tmp_path)])
    assert told(list(records(path))) == [(None, None, "cannot be read: No such file or directory")]
    assert discover([str(path)]) == [path]


def stage_folder(path: Path, stage: str, *, finished: bool = True) -> Path:
    data = orjson.dumps({"schema_version": 1, "stage": stage})
    marker = path / ("manifest.json" if finished else ".progress/plan.json")
    marker.parent.mkdir(parents=True)
    marker.write_bytes(data)
    (path / "part-00000.parquet").write_bytes(parquet([RUN]))
    (path / "rejected.jsonl").write_text("{}")
    return path


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("stage", ["ingest", "label", "tokenize", "pack"])
def test_what_a_stage_wrote_is_no_source(stage: str, finished: bool, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(orjson.dumps(RUN))
    folder = stage_folder(tmp_path / "out" / "T", stage, finished=finished)
    assert discover([str(tmp_path)]) == [tmp_path / "run.json"]
    assert discover([str(tmp_path / "**" / "*.*")]) == [tmp_path / "run.json"]
    for source in (folder, folder / "part-00000.parquet", folder / "*.parquet"):
        with pytest.raises(ConfigError) as error:
            discover([str(source)])
        assert str(error.value) == f"{source}: is the output of {stage}; give the raw runs"


def test_a_manifest_of_something_else_hides_no_runs(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 3, "stage": "production"}')
    (tmp_path / "run.json").write_bytes(orjson.dumps(RUN))
    assert discover([str(tmp_path)]) == [tmp_path / "manifest.json", tmp_path / "run.json"]


def test_a_null_in_a_struct_of_parquet_is_a_field_that_is_not_there() -> None:
    calls = [
        {"name": "view", "arguments": {"path": "a", "view_range": [1, None]}},
        {"name": "sh", "arguments": {"command": "ls", "deep": {"x": 1}}},
        {"name": "sh", "arguments": {"command": "", "deep": {"y": False}}},
    ]
    rows = [{"id": str(n), "calls": [call], "note": None} for n, call in enumerate(calls)]
    assert values(read("a.parquet", parquet(rows))) == rows
    lines_ = b"\n".join(map(orjson.dumps, [{"a": {"b": None}}, {"a": {"c": 1}}]))
    assert values(read("a.jsonl", lines_)) == [{"a": {"b": None}}, {"a": {"c": 1}}]


def test_a_path_is_printable_whatever_its_bytes() -> None:
    assert printable("a/é.json") == "a/é.json"
    assert printable(b"a/\xff.json".decode(errors="surrogateescape")) == r"a/\xff.json"
