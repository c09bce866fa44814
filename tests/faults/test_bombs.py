"""Small files that expand to 10 GiB or nest without end: rejected, in memory that is bounded."""

import gzip
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
import zstandard

from srft_prep.parquet_rows import MAX_DECODED_BYTES
from srft_prep.records import MAX_RECORD_BYTES, MAX_RECORD_VALUES, Record, records
from tests.faults.bombs import BOMBS, written
from tests.faults.runs import Runs

MEASURED = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "srft_prep", *sys.argv[1:]], timeout=500)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_of_10_gib_is_rejected_in_bounded_memory_and_its_neighbour_is_taken(
    name: str, runs: Runs, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    bomb = shutil.copy(runs.bombs / name, tmp_path / "runs" / name)
    assert bomb.stat().st_size < 12 << 20
    run = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "runs" / "run.json").write_bytes(orjson.dumps({"messages": run}))
    words = ("ingest", tmp_path / "runs", "-o", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
    )
    status, peak_kib = map(int, done.stdout.split()[-2:])
    assert status == 1, done.stderr
    assert "Traceback" not in done.stderr
    rejected = (tmp_path / "out" / "rejected.jsonl").read_bytes().splitlines()
    assert 1 <= len(rejected) <= 2
    assert {orjson.loads(line)["file"] for line in rejected} == {str(bomb)}
    counts = orjson.loads((tmp_path / "out" / "manifest.json").read_bytes())["counts"]
    assert counts["trajectories"] == 1
    assert peak_kib << 10 < MAX_DECODED_BYTES + (1 << 29)


def found(path: Path, data: bytes) -> list[Record]:
    path.write_bytes(data)
    return list(records(path))


def test_a_frame_that_expands_too_much_ends_its_file_and_what_came_before_is_taken(
    runs: Runs, tmp_path: Path
) -> None:
    data = zstandard.compress(b'{"a": 1}\n') + (runs.bombs / "zeros.json.zst").read_bytes()
    first, second = found(tmp_path / "a.jsonl.zst", data)
    assert first.value == {"a": 1}
    assert second.origin.line == 2
    assert second.error is not None
    assert second.error.startswith("expands to more than 1000 times its size")


def test_a_file_that_expands_much_but_not_far_is_read(tmp_path: Path) -> None:
    text = orjson.dumps({"a": "x" * (8 << 20)}) + b"\n"
    for name, data in (
        ("a.jsonl.zst", zstandard.compress(text)),
        ("b.jsonl.gz", gzip.compress(text)),
    ):
        assert len(text) > 900 * len(data)
        (record,) = found(tmp_path / name, data)
        assert record.error is None


def test_a_record_of_too_many_values_is_an_error_and_the_next_is_taken(tmp_path: Path) -> None:
    full = b"[" + b"[]," * (MAX_RECORD_VALUES // 2) + b"[]]"
    first, second = found(tmp_path / "a.jsonl", full + b'\n{"a": 1}\n')
    assert first.error == "a record of more than 16,777,216 JSON values"
    assert second.value == {"a": 1}
    (whole,) = found(tmp_path / "b.json", full)
    assert whole.error == first.error


def test_a_row_of_too_many_values_is_an_error_and_the_next_is_taken(tmp_path: Path) -> None:
    number = MAX_RECORD_VALUES + 1
    bits = pa.DictionaryArray.from_arrays(pa.array([0] * number, pa.int32()), pa.array(["x"]))
    column = pa.ListArray.from_arrays([0, number, number], bits)
    first, second = found(tmp_path / "a.parquet", written(pa.table({"a": column})))
    assert first.error == "row of more than 16,777,216 values"
    assert second.value == {"a": []}


def test_a_megabyte_of_line_breaks_is_no_list_of_as_many_lines(tmp_path: Path) -> None:
    (record,) = found(tmp_path / "a.json", b"\n" * (1 << 20))
    assert record.error is not None


def test_values_nested_without_end_are_an_error(tmp_path: Path) -> None:
    for text in (b"[" * 10**6, b'{"a":' * 10**6, b"[" * 10**6 + b"]" * 10**6):
        first, second = found(tmp_path / "a.jsonl", text + b'\n{"a": 1}\n')
        assert first.error is not None
        assert second.value == {"a": 1}
    column: pa.Array = pa.array([1])
    for _ in range(300):
        column = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), column)
    for record in found(tmp_path / "a.parquet", written(pa.table({"a": column}))):
        assert record.error or record.value


def test_the_limit_on_memory_is_lifted_again(runs: Runs) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    for record in records(runs.bombs / "list.parquet"):
        assert record.error is not None
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytes(MAX_RECORD_BYTES)) == MAX_RECORD_BYTES
