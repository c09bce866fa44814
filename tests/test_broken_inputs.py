"""Broken raw files and damaged stage directories: a reason for each, and never a traceback."""

import gzip
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from srft_prep.errors import FormatError, ShardError
from srft_prep.manifest import read_manifest
from srft_prep.readers import recognised
from srft_prep.records import records
from srft_prep.verification import verify
from tests.stages import Run, srft_prep

REPOSITORY = Path(__file__).resolve().parents[1]
RUNS = REPOSITORY / "srft_prep" / "examples" / "runs"
COLUMNS = ("messages", "conversations", "history", "trajectory", "fncall_messages")
TEXT_KEYS = ("content", "text", "value")

Place = tuple[str, int | None]
"""(file below the folder, line or None)."""


def process(*words: str | Path) -> Run:
    """Run the program in a process of its own, which may hang or die."""
    command = [sys.executable, "-m", "srft_prep", *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in run.stderr, run.stderr
    assert "panicked" not in run.stderr, run.stderr
    return Run(run.returncode, run.stdout, run.stderr)


@dataclass
class Corpus:
    """A folder of files with known good and bad records."""

    folder: Path
    rng: random.Random = field(default_factory=lambda: random.Random(20240917))
    good: set[str] = field(default_factory=set)
    """Markers in the text of records that must be taken."""
    doubtful: set[str] = field(default_factory=set)
    """Markers of records that lie in damaged compressed files: before the damage, or lost."""
    bad: Counter[Place] = field(default_factory=Counter)
    damaged_files: set[str] = field(default_factory=set)
    """Files of which at least one record must be rejected."""
    values: list[Any] = field(default_factory=list)
    """Real records, at least one of every format."""
    made: int = 0

    def fresh(self, value: Any = None, *, doubtful: bool = False) -> Any:
        """Return a good record that says something that no other one says."""
        self.made += 1
        marker = f"<copy-{self.made:04d}>"
        (self.doubtful if doubtful else self.good).add(marker)
        if value is None:
            value = self.values[self.made % len(self.values)]
        return marked(value, marker)

    def write(self, name: str, data: bytes, *bad_lines: int | None) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.bad.update((name, line) for line in bad_lines)

    def write_lines(self, name: str, lines: list[tuple[bytes, bool]]) -> None:
        bad = [number for number, (_, good) in enumerate(lines, start=1) if not good]
        self.write(name, b"".join(line + b"\n" for line, _ in lines), *bad)


def marked(value: Any, marker: str) -> Any:
    """Return a record with a marker at the end of every longer text."""

    def visit(item: Any, key: str | None) -> Any:
        if isinstance(item, str) and key in COLUMNS and item.startswith("[{"):
            return orjson.dumps(visit(orjson.loads(item), None)).decode()
        if isinstance(item, str) and key in TEXT_KEYS and len(item) > 20:
            return f"{item} {marker}"
        if isinstance(item, list):
            return [visit(each, key) for each in item]
        if isinstance(item, dict):
            return {name: visit(each, name) for name, each in item.items()}
        return item

    return visit(value, None)


def real_records(folder: Path) -> list[Any]:
    """Return the two smallest real records with some text of every format."""
    return [value for _, values in sorted(records_by_format(folder).items()) for value in values]


def records_by_format(folder: Path) -> dict[str, list[Any]]:
    """Return the two smallest real records with some text of every format, by name and shape."""
    by_format: dict[str, list[tuple[int, str, Any]]] = {}
    for path in sorted(folder.rglob("*.json*")) + sorted(folder.rglob("*.traj")):
        for record in records(path):
            reader = recognised(record.value)
            size = len(orjson.dumps(record.value))
            if reader is None or not 2_000 < size < 300_000:
                continue
            try:
                name = reader.read(record.value, origin=record.origin).format
            except FormatError:
                continue
            kind = "bare list" if isinstance(record.value, list) else "object"
            found = by_format.setdefault(f"{name}, {kind}", [])
            found.append((size, str(record.origin), record.value))
    assert len(by_format) >= 8, sorted(by_format)
    return {name: [value for *_, value in sorted(found)[:2]] for name, found in by_format.items()}


def broken_texts(corpus: Corpus, value: Any) -> Iterator[tuple[str, bytes]]:
    """Yield texts that are no JSON, each made of a good record's text."""
    rng = corpus.rng
    text = orjson.dumps(marked(value, "<broken>"))
    inside = text.index(b"<broken>")
    for _ in range(4):
        yield "cut-short", text[: rng.randrange(1, len(text))]
    for kind, piece in (
        ("no-utf-8", b"\xff\xfe"),
        ("half-utf-8", "é".encode()[:1]),
        ("nul", b"\x00"),
        ("surrogate", rb"\ud83d"),
        ("escape", rb"\q"),
        ("quote", b'"'),
    ):
        yield kind, text[:inside] + piece + text[inside:]
    middle = rng.randrange(2, len(text) - 2)
    yield "head-missing", text[middle:].lstrip(b"0123456789-[]{}\"' \t")
    yield "deep", b"[" * 100_000 + text
    yield "deep-object", b'{"a":' * 100_000
    yield "nan", b'{"cost": NaN, "run": ' + text + b"}"
    yield "twice", text + b" " + text
    yield "python", repr(value).replace("\n", " ").encode("utf-8", "replace")
    yield "tail", text + b"}"
    yield "junk", rng.randbytes(200).replace(b"\n", b"?")


def broken_values(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield JSON values that are no trajectory, each made of a good record."""
    wrong_columns: tuple[Any, ...] = (5, True, "plain words", [1, 2], [None], [["x"]], {"a": 1})
    if isinstance(value, list):
        for index in (0, len(value) // 2, len(value) - 1):
            for wrong in (None, 7, "text", [5], {}, {"role": 3, "content": "x"}):
                yield "element", [*value[:index], wrong, *value[index + 1 :]]
        return
    column = next(name for name in COLUMNS if value.get(name))
    for wrong in wrong_columns:
        yield f"{column}", {**value, column: wrong}
    yield "no-column", {key: item for key, item in value.items() if key not in COLUMNS}
    rows = orjson.loads(value[column]) if isinstance(value[column], str) else value[column]
    for wrong in (None, 7, "text", {}, [1, 2]):
        yield "row", {**value, column: [*rows[:1], wrong, *rows[2:]]}
    for key in ("role", "content", "text", "source"):
        if isinstance(rows[1], dict) and isinstance(rows[1].get(key), str):
            for wrong in (5, True, {"a": 1}):
                yield f"{key}", {**value, column: [rows[0], {**rows[1], key: wrong}, *rows[2:]]}


def fill(corpus: Corpus) -> None:
    """Lay broken records into the corpus, among good ones, as files and inside files."""
    for number, value in enumerate(corpus.values):
        for kind, text in broken_texts(corpus, value):
            name = f"texts/{number:02d}-{corpus.rng.randrange(1 << 32):08x}-{kind}.json"
            corpus.write(name, text, None)
        lines = [(text, False) for _, text in broken_texts(corpus, value)]
        lines += [(orjson.dumps(corpus.fresh()), True) for _ in lines]
        corpus.rng.shuffle(lines)
        corpus.write_lines(f"mixed/{number:02d}.jsonl", lines)
        for kind, broken in broken_values(value):
            name = f"values/{number:02d}-{corpus.rng.randrange(1 << 32):08x}-{kind}.json"
            corpus.write(name, orjson.dumps(broken, option=orjson.OPT_INDENT_2), None)
        if isinstance(value, dict):
            lines = [(orjson.dumps(broken), False) for _, broken in broken_values(value)]
            lines += [(orjson.dumps(corpus.fresh()), True) for _ in lines]
            corpus.rng.shuffle(lines)
            corpus.write_lines(f"mixed/{number:02d}-values.jsonl", lines)
        corpus.write(f"good/{number:02d}.json", orjson.dumps(corpus.fresh(value)))
    fill_odd_files(corpus)
    fill_first_lines(corpus)
    fill_compressed(corpus)
    fill_parquet(corpus)
    fill_no_files(corpus)


def fill_odd_files(corpus: Corpus) -> None:
    for number, text in enumerate(
        (
            b"",
            b" ",
            b"\n\n \n",
            b"\xef\xbb\xbf",
            b"null",
            b"5",
            b'"x"',
            b"[]",
            b"{}",
            b"[[]]",
            b"\x00",
        )
    ):
        for suffix in (".json", ".jsonl", ".traj"):
            line = 1 if suffix == ".jsonl" and text.strip(b" \n\xef\xbb\xbf") else None
            line = 1 if text == b"[[]]" else line
            corpus.write(f"odd/{number}{suffix}", text, line)
    rows = [corpus.fresh(), 5, corpus.fresh(), None, {"a": 1}, [], corpus.fresh(), "x"]
    bad = [number for number, row in enumerate(rows, start=1) if not has_marker(row)]
    corpus.write("odd/list.json", orjson.dumps(rows), *bad)
    corpus.write("good/bom.json", b"\xef\xbb\xbf" + orjson.dumps(corpus.fresh()))
    corpus.write("good/bom.jsonl", b"\xef\xbb\xbf" + orjson.dumps(corpus.fresh()) + b"\r\n\r\n")
    dicts = [value for value in corpus.values if isinstance(value, dict)]
    twice = orjson.dumps(corpus.fresh(dicts[0]))
    corpus.write(
        "good/duplicate-keys.json", b'{"messages": 5, "extra": 1, "extra": [],' + twice[1:]
    )
    huge = orjson.dumps(corpus.fresh(dicts[0]))
    corpus.write("good/huge-integer.jsonl", b'{"number": ' + b"9" * 99 + b"," + huge[1:])
    corpus.write("odd/huger-integer.jsonl", b'{"number": ' + b"9" * 400 + b"," + huge[1:], 1)
    corpus.write("good/one-line.traj", orjson.dumps(corpus.fresh()) + b"\n")
    named = os.fsdecode(b"good/\xff-name-\xfe.json")
    corpus.write(named, orjson.dumps(corpus.fresh()))
    bad_name = os.fsdecode(b"odd/\xff-name.json")
    (corpus.folder / bad_name).write_bytes(b"{")
    corpus.bad[(r"odd/\xff-name.json", None)] += 1


def has_marker(row: Any) -> bool:
    return b"<copy-" in orjson.dumps(row)


def fill_first_lines(corpus: Corpus) -> None:
    for number in range(12):
        suffix = (".json", ".jsonl", ".ndjson", ".traj")[number % 4]
        text = orjson.dumps(corpus.values[number % len(corpus.values)])
        first = (text[: len(text) // 2], b"", b"{}", b"\xff")[number // 4 % 4]
        lines = [first, b"", orjson.dumps(corpus.fresh({**sample_object(corpus)}))]
        lines += [b'{"half": ', orjson.dumps(corpus.fresh(sample_object(corpus)))]
        bad = [4] if not first else [1, 4]
        corpus.write(f"first/{number}{suffix}", b"\n".join(lines) + b"\n", *bad)


def sample_object(corpus: Corpus) -> dict[str, Any]:
    return next(value for value in corpus.values if isinstance(value, dict))


def fill_compressed(corpus: Corpus) -> None:
    rng = corpus.rng
    for number in range(16):
        name = f"compressed/{number:02d}.jsonl"
        lines = [orjson.dumps(corpus.fresh(doubtful=True)) for _ in range(6)]
        pack, suffix = ((gzip.compress, ".gz"), (zstd_with_checksum, ".zst"))[number % 2]
        data = bytearray(pack(b"\n".join(lines)))
        if number % 4 < 2:
            data = data[: rng.randrange(20, len(data) - 4)]
        else:
            data[rng.randrange(len(data) // 4, len(data))] ^= 1 << rng.randrange(8)
        corpus.write(name + suffix, bytes(data))
        corpus.damaged_files.add(name + suffix)
    for pack, suffix in ((gzip.compress, ".gz"), (zstd_with_checksum, ".zst")):
        members = [pack(orjson.dumps(corpus.fresh()) + b"\n") for _ in range(3)]
        corpus.write(f"good/members.jsonl{suffix}", b"".join(members))
        corpus.write(f"good/one.json{suffix}", pack(orjson.dumps(corpus.fresh())))
        corpus.write(f"compressed/text.jsonl{suffix}", pack(b"hello\n"), 1)
        corpus.write(f"compressed/magic.jsonl{suffix}", pack(b"x")[:4], None)


def zstd_with_checksum(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def fill_parquet(corpus: Corpus) -> None:
    value = next(v for v in corpus.values if isinstance(v, dict) and "traj_id" in v)
    messages = value["messages"] if isinstance(value["messages"], list) else []

    def rows(*, doubtful: bool = False) -> list[dict[str, Any]]:
        values = [
            corpus.fresh({**value, "messages": messages}, doubtful=doubtful) for _ in range(4)
        ]
        return [
            {
                "messages": orjson.dumps(each["messages"]).decode(),
                "instance_id": "example__example-1",
                "traj_id": f"row-{number}",
            }
            for number, each in enumerate(values)
        ]

    table = pa.Table.from_pylist([*rows(), {"messages": "[{", "traj_id": "x"}, *rows()])
    corpus.write("parquet/mixed.parquet", parquet(table), 5)
    corpus.write("parquet/columns.parquet", parquet(pa.table({"a": [1, 2]})), 1, 2)
    corpus.write("parquet/empty.parquet", b"", None)
    corpus.write("parquet/magic.parquet", b"PAR1" + corpus.rng.randbytes(300), None)
    corpus.write("parquet/text.parquet", b"no Parquet at all", None)
    good = rows()
    text = good[1]["messages"]
    as_bytes = pa.table(
        {
            "messages": pa.array([row["messages"].encode() for row in good] + [b"\xff\xfe" * 9]),
            "traj_id": pa.array(["a", "b", "c", "d", "e"]),
        }
    ).cast(pa.schema({"messages": pa.string(), "traj_id": pa.string()}), safe=False)
    assert text in as_bytes["messages"].slice(0, 2).to_pylist()
    corpus.write("parquet/no-utf-8.parquet", parquet(as_bytes, row_group_size=5), 5)
    for number in range(10):
        data = bytearray(parquet(pa.Table.from_pylist(rows(doubtful=True))))
        if number % 2:
            data = data[: corpus.rng.randrange(8, len(data) - 1)]
        else:
            with pq.ParquetFile(pa.BufferReader(bytes(data))) as file:
                chunk = file.metadata.row_group(2).column(0)
            size = chunk.total_compressed_size
            data[chunk.data_page_offset + corpus.rng.randrange(size // 2, size)] ^= 16
        corpus.write(f"parquet/damaged-{number}.parquet", bytes(data))
        corpus.damaged_files.add(f"parquet/damaged-{number}.parquet")


def parquet(table: pa.Table, *, row_group_size: int = 1) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=row_group_size, write_page_checksum=True, use_dictionary=False
    )
    return sink.getvalue().to_pybytes()


def fill_no_files(corpus: Corpus) -> None:
    folder = corpus.folder / "no-files"
    folder.mkdir()
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "left.jsonl").symlink_to("right.jsonl")
    (folder / "right.jsonl").symlink_to("left.jsonl")
    (folder / "dangling.traj").symlink_to("nowhere.traj")
    os.mkfifo(folder / "pipe.jsonl")
    names = ["loop.json", "left.jsonl", "right.jsonl", "dangling.traj", "pipe.jsonl"]
    corpus.bad.update((f"no-files/{name}", None) for name in names)
    (folder / "folder.jsonl").mkdir()
    (folder / "circle").symlink_to(folder, target_is_directory=True)


def test_every_broken_record_gets_a_reason_and_every_good_one_is_taken(
    shared_data: Path, tmp_path: Path
) -> None:
    corpus = Corpus(tmp_path / "runs", values=real_records(shared_data / "trajectories"))
    fill(corpus)
    assert corpus.bad.total() + len(corpus.damaged_files) >= 400
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no run")

    out = tmp_path / "out"
    run = process("ingest", corpus.folder, empty, "-o", out, "--json")
    assert run.status == 1, run.stderr
    counts = orjson.loads(run.stdout.splitlines()[-1])

    texts = texts_of(out)
    taken = set(re.findall(r"<copy-\d{4}>", "\n".join(texts)))
    assert corpus.good <= taken
    rejected = [orjson.loads(line) for line in (out / "rejected.jsonl").read_bytes().splitlines()]
    found = Counter((place(each["file"], corpus.folder), each["line"]) for each in rejected)
    found[(str(empty), None)] -= 1
    damaged = {name for name, _ in found if name in corpus.damaged_files}
    assert damaged == corpus.damaged_files
    found = Counter({key: n for key, n in found.items() if key[0] not in damaged and n})
    assert found == corpus.bad
    assert counts["rejected"] == len(rejected)
    assert counts["trajectories"] == len(texts)
    assert len(corpus.good) <= len(texts) <= len(corpus.good) + len(corpus.doubtful)
    for each in rejected:
        assert is_a_sentence(each["reason"]), each


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("empty.json", b"", "empty file"),
        ("blank.jsonl", b" \n\n", "nothing but blank lines"),
        ("cut.json", b'{"messages": [', "not JSON: unexpected end of data at line 1, column 15"),
        ("text.json", b"\xff{}", "not JSON: bytes that are no UTF-8 text at line 1, column 1"),
        ("deep.json", b"[" * 100_000, "not JSON: depth limit exceeded at line 1, column 1026"),
        ("list.json", b"[]", "no trajectory: an empty list"),
        (
            "key.json",
            rb'{"a\u0000\t\u001b[31m": 1}',
            r"no trajectory: an object with the keys a\x00 \x1b[31m; known formats are",
        ),
        ("text.parquet", b"hello", "neither Parquet nor JSON"),
    ],
)
def test_a_single_broken_file_is_rejected_in_words(
    name: str, data: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    run = srft_prep("ingest", path, "-o", tmp_path / "out")
    assert run.status == 1
    assert "1 rejected, 0 trajectories, 0 steps" in run.stdout
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_bytes().splitlines()
    rejected = orjson.loads(line)
    assert rejected["file"] == str(path)
    assert rejected["line"] is None
    assert rejected["reason"].startswith(reason)


def test_a_pipe_given_by_name_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    run = process("ingest", tmp_path / "pipe.json", "-o", tmp_path / "out")
    assert run.status == 1
    assert "1 rejected" in run.stdout


def place(file: str, folder: Path) -> str:
    return file.removeprefix(f"{folder}/")


def is_a_sentence(reason: str) -> bool:
    """Return whether a reason is a line of words, and no dump of Python's."""
    words = reason.split()
    raw = any(piece in reason for piece in ("<class", "object at 0x", "Exception", "Error("))
    return len(words) >= 2 and len(reason) < 400 and reason.isprintable() and not raw


def texts_of(directory: Path) -> list[str]:
    """Return the whole text of each trajectory of an ingest output."""
    return [
        "\n".join(str(message["content"]) for message in row["messages"])
        for part in sorted(directory.glob("part-*.parquet"))
        for row in pq.read_table(part, columns=["messages"]).to_pylist()
    ]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the output of every stage, made of the example runs."""
    folder = tmp_path_factory.mktemp("stages")
    for words in (
        ("ingest", RUNS, "--outcomes", RUNS, "-o", folder / "ingest"),
        ("label", folder / "ingest", "-o", folder / "label", "--only", "all"),
        ("tokenize", folder / "ingest", "-o", folder / "tokenize", "--tokenizer", "example"),
        ("pack", folder / "tokenize", "--labels", folder / "label", "-o", folder / "pack"),
    ):
        assert srft_prep(*words).status == 0, words
    return folder


TRAJECTORY = "attempt-1/example__slots-12"
CONSUMERS = {
    "ingest": {
        "label": ("label", "ingest", "-o", "new"),
        "tokenize": ("tokenize", "ingest", "--tokenizer", "example", "-o", "new"),
        "stats": ("stats", "ingest"),
        "inspect": ("inspect", "ingest", "--id", TRAJECTORY),
        "verify": ("verify", "ingest"),
    },
    "label": {
        "pack": ("pack", "tokenize", "--labels", "label", "-o", "new"),
        "stats": ("stats", "ingest", "--labels", "label"),
        "inspect": ("inspect", "ingest", "--labels", "label", "--id", TRAJECTORY),
        "verify": ("verify", "label"),
    },
    "tokenize": {
        "pack": ("pack", "tokenize", "--labels", "label", "-o", "new"),
        "stats": ("stats", "ingest", "--tokens", "tokenize"),
        "inspect": ("inspect", "tokenize", "--id", TRAJECTORY),
        "verify": ("verify", "tokenize"),
    },
    "pack": {
        "inspect": ("inspect", "pack", "--id", TRAJECTORY),
        "verify": ("verify", "pack"),
    },
}
"""Stage directory -> what reads it, with its command in the words of the `stages` folder."""

TABLE = {
    "ingest": "part-00000.parquet",
    "label": "labels.parquet",
    "tokenize": "part-00000.parquet",
    "pack": "shard-00000.parquet",
}

each_consumer = pytest.mark.parametrize(
    ("stage", "command"), [(stage, name) for stage, names in CONSUMERS.items() for name in names]
)


def consume(folder: Path, stage: str, command: str) -> Run:
    names = {*CONSUMERS, "new"}
    words = CONSUMERS[stage][command]
    return srft_prep(*(folder / w if w in names and i else w for i, w in enumerate(words)))


@pytest.fixture
def copied(stages: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stages, tmp_path / "stages")


@each_consumer
def test_a_manifest_cut_short_is_an_error_of_one_line(
    stage: str, command: str, copied: Path
) -> None:
    manifest = copied / stage / "manifest.json"
    data = manifest.read_bytes()
    manifest.write_bytes(data[: len(data) // 2])
    run = consume(copied, stage, command)
    assert run.status == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"Error: {manifest}: damaged, not JSON: ")
    assert not (copied / "new").exists()


@each_consumer
def test_a_missing_part_is_an_error_of_one_line(stage: str, command: str, copied: Path) -> None:
    part = copied / stage / TABLE[stage]
    part.unlink()
    assert_names_the_file(consume(copied, stage, command), part, command, word="missing")
    assert not (copied / "new").exists()


@each_consumer
def test_a_flipped_bit_is_never_read_as_good_data(stage: str, command: str, copied: Path) -> None:
    part = copied / stage / TABLE[stage]
    flip_an_unseen_bit(part)
    assert_names_the_file(consume(copied, stage, command), part, command, word="written")
    assert not (copied / "new").exists()


def assert_names_the_file(run: Run, path: Path, command: str, *, word: str) -> None:
    if command == "verify":
        assert run.status == 1
        lines = run.stdout.splitlines()
        assert any(line.startswith(f"{path}: ") and word in line for line in lines), run.stdout
    else:
        assert run.status == 2
        (line,) = run.stderr.splitlines()
        assert line.startswith(f"Error: {path}: ")
        assert word in line


def flip_an_unseen_bit(path: Path) -> None:
    """Flip one bit of a table such that it still reads, as other data: half of all bits do."""
    data = path.read_bytes()
    good = pq.read_table(path)
    rng = random.Random(3)
    for _ in range(100):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with suppress(pa.ArrowException, OSError, UnicodeDecodeError):
            if not pq.read_table(path).equals(good):
                return
    raise AssertionError("every flipped bit was seen")


@pytest.mark.parametrize("stage", list(CONSUMERS))
def test_any_flipped_bit_of_a_manifest_is_an_error_in_words_or_does_no_harm(
    stage: str, copied: Path
) -> None:
    file = copied / stage / "manifest.json"
    data = file.read_bytes()
    rng = random.Random(5)
    for _ in range(300):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        with suppress(ShardError):
            verify(copied / stage)
        with suppress(ShardError):
            parts = read_manifest(copied / stage).checked().parts
            assert parts == [copied / stage / TABLE[stage]] or stage == "label"
