"""Small files that expand to 10 GiB; they take a while to make, and are made once."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

BOMB_BYTES = 10 << 30
PIECE = bytes(256 << 20)


def gzip_bomb() -> bytes:
    piece = PIECE[: 32 << 20]
    return gzip.compress(piece, 6) * (BOMB_BYTES // len(piece))


def zstd_bomb() -> bytes:
    return zstandard.compress(PIECE) * (BOMB_BYTES // len(PIECE))


def parquet_bomb(*, num_rows: int) -> bytes:
    """Return a file with one long text that rows name without repeating it."""
    text = "\0" * (BOMB_BYTES // num_rows)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array([text]))
    return written(pa.table({"messages": column}))


def nested_parquet_bomb() -> bytes:
    """Return a file with one row, a list of as many texts as 10 GiB hold."""
    text = "\0" * (1 << 20)
    number = BOMB_BYTES >> 20
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * number, pa.int32()), pa.array([text]))
    return written(pa.table({"messages": pa.ListArray.from_arrays([0, number], texts)}))


def written(table: pa.Table) -> bytes:
    """Return the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue().to_pybytes()


BOMBS = {
    "zeros.jsonl.gz": gzip_bomb,
    "zeros.json.zst": zstd_bomb,
    "rows.parquet": lambda: parquet_bomb(num_rows=40),
    "list.parquet": nested_parquet_bomb,
}


def make_bombs(folder: Path) -> None:
    """Write all bombs."""
    folder.mkdir()
    for name, made in BOMBS.items():
        (folder / name).write_bytes(made())
