"""Raw records of every format, damaged at random: quarantined with their line, or taken whole."""

import gzip
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from srft_prep.verification import verify
from tests.faults.commands import started
from tests.faults.mutations import damaged_bytes, mutated, mutated_line
from tests.stages import srft_prep
from tests.test_broken_inputs import is_a_sentence, marked, records_by_format, texts_of

EXAMPLES = int(os.environ.get("SRFT_FUZZ_EXAMPLES", "30"))
"""Damaged records of each format, and damaged files; `make test-faults` makes 1,000."""

GOOD_EVERY = 10

MOST_MESSAGES = 12
"""Of a record: longer ones cost time and meet no other code."""

FORMATS = (
    "messages, object",
    "mini-swe-agent, bare list",
    "mini-swe-agent, object",
    "nebius, object",
    "openhands, bare list",
    "openhands, object",
    "swe-agent, object",
    "swe-smith, object",
)

FILES = ("json", "jsonl", "jsonl.gz", "jsonl.zst", "parquet")


@pytest.fixture(scope="module")
def real(shared_data: Path) -> dict[str, list[Any]]:
    """Two real records of every format."""
    found = records_by_format(shared_data / "trajectories")
    assert set(found) == set(FORMATS)
    return {name: list(map(shortened, values)) for name, values in found.items()}


def shortened(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return {**value, "messages": value["messages"][:MOST_MESSAGES]}
    return value


def ingested(folder: Path, tmp_path: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """Ingest a folder; return what was rejected and the markers in what was taken."""
    output = tmp_path / "out"
    run = srft_prep("ingest", folder, "--keep-duplicates", "-o", output)
    assert run.status == 1, run.stderr
    assert "Traceback" not in run.stderr
    lines = (output / "rejected.jsonl").read_bytes().splitlines()
    taken = {marker for text in texts_of(output) for marker in re.findall(r"<copy-\w+>", text)}
    return [orjson.loads(line) for line in lines], taken


def test_damaged_values_are_quarantined_with_their_line_and_their_neighbours_are_kept(
    real: dict[str, list[Any]], tmp_path: Path, rng: random.Random
) -> None:
    (tmp_path / "runs").mkdir()
    good: dict[str, tuple[str, int]] = {}
    for number, values in enumerate(real.values()):
        name = f"{number:02d}.jsonl"
        lines: list[bytes] = []
        for line in range(1, EXAMPLES + EXAMPLES // GOOD_EVERY + 1):
            value = rng.choice(values)
            if line % (GOOD_EVERY + 1) == 0:
                marker = f"<copy-{len(good):06d}>"
                good[marker] = (name, line)
                lines.append(orjson.dumps(marked(value, marker)))
            else:
                lines.append(orjson.dumps(mutated(value, rng, times=rng.choice((1, 1, 2, 4)))))
        (tmp_path / "runs" / name).write_bytes(b"\n".join(lines) + b"\n")
    rejected, taken = ingested(tmp_path / "runs", tmp_path)
    assert taken >= set(good)
    places = Counter((Path(each["file"]).name, each["line"]) for each in rejected)
    assert set(places.values()) == {1}
    assert not set(places) & set(good.values())
    rejected_of = Counter(file for file, _ in places)
    for number, name in enumerate(real):
        assert rejected_of[f"{number:02d}.jsonl"] > EXAMPLES / 50, f"{name}: too little damage"
    for each in rejected:
        assert is_a_sentence(each["reason"]), each
    assert verify(tmp_path / "out").problems == ()
    check_later_stages(tmp_path)


def check_later_stages(tmp_path: Path) -> None:
    """Take whatever was accepted through the stages: in words, whatever they find."""
    for words in (
        ("label", "out", "--only", "all", "-o", "labels"),
        ("tokenize", "out", "--tokenizer", "example", "--workers", 1, "-o", "tokens"),
        ("pack", "tokens", "--labels", "labels", "--recipe", "srft-all", "-o", "shards"),
    ):
        folders = {"out", "labels", "tokens", "shards"}
        places = [tmp_path / word if word in folders else word for word in words]
        with started(places, tmp_path / "log") as run:
            assert run.wait() in (0, 1), run.said
            assert "Traceback" not in run.said
        assert verify(tmp_path / str(words[-1])).problems == ()


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_bytes_are_quarantined_with_their_line_and_their_neighbours_are_kept(
    name: str, real: dict[str, list[Any]], tmp_path: Path, rng: random.Random
) -> None:
    (tmp_path / "runs").mkdir()
    texts = [orjson.dumps(value) for value in real[name]]
    lines: list[bytes] = []
    good: dict[str, int] = {}
    while len(lines) < EXAMPLES + len(good):
        if len(lines) % (GOOD_EVERY + 1) == 0:
            marker = f"<copy-{len(good):06d}>"
            lines.append(orjson.dumps(marked(rng.choice(real[name]), marker)))
            good[marker] = len(lines)
        else:
            lines.append(mutated_line(rng.choice(texts), rng, times=rng.choice((1, 2, 8))))
    (tmp_path / "runs" / "runs.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    rejected, taken = ingested(tmp_path / "runs", tmp_path)
    assert taken >= set(good)
    for each in rejected:
        assert each["line"] not in good.values(), each
        assert is_a_sentence(each["reason"]), each


@pytest.mark.parametrize("ending", FILES)
def test_files_damaged_anywhere_lose_what_lay_there_and_nothing_else(
    ending: str, real: dict[str, list[Any]], tmp_path: Path, rng: random.Random
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    records = sorted((orjson.dumps(value) for values in real.values() for value in values), key=len)
    whole = file_of(ending, records[:3])
    for number in range(EXAMPLES):
        data = damaged_bytes(whole, rng, times=rng.choice((1, 3)))
        (runs / f"{number:05d}.{ending}").write_bytes(data)
    (runs / "good.json").write_bytes(orjson.dumps(marked(real[FORMATS[0]][0], "<copy-good>")))
    rejected, taken = ingested(runs, tmp_path)
    assert "<copy-good>" in taken
    assert not any("good.json" in each["file"] for each in rejected)
    for each in rejected:
        assert is_a_sentence(each["reason"]), each


def file_of(ending: str, records: list[bytes]) -> bytes:
    """Return a file of a kind that holds some records."""
    lines = b"\n".join(records)
    if ending == "parquet":
        messages = orjson.dumps([{"role": "user", "content": "x"}]).decode()
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"messages": [messages] * 9}), sink, row_group_size=3)
        whole: bytes = sink.getvalue().to_pybytes()
        return whole
    return {
        "json": lambda: records[0],
        "jsonl": lambda: lines,
        "jsonl.gz": lambda: gzip.compress(lines, mtime=0),
        "jsonl.zst": lambda: zstandard.compress(lines),
    }[ending]()
