"""What a target of `export` is: a tool's columns, its files, and the lines that load them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa

from srft_prep.export.packs import Packs
from srft_prep.export.tally import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a finished export holds, for what stands beside its rows."""

    seq_len: int
    """Tokens in a packed sequence, at most."""
    shards_hash: str
    """Of the shards' files, in hex."""
    names: list[str]
    """Its files of rows, in order."""
    tally: Tally


class Rows(Protocol):
    """Makes a tool's rows of packs."""

    def __call__(self, packs: Packs, *, seq_len: int) -> pa.Table:
        """Return rows; `seq_len` is the most that a pack may hold."""


def nothing_beside(_folder: Path, _written: Written) -> list[str]:
    """Write no further files."""
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A form that a tool loads."""

    tool: str
    """The tool's name, for people."""
    schema: pa.Schema
    """The columns of its rows."""
    rows: Rows | None
    """Makes rows of packs; None: the shards' own files, byte for byte."""
    loading: Callable[[Written], str]
    """Returns the lines that load it and what a user must know, as Markdown; DIR is the folder."""
    keeps_weights: bool = False
    """Whether the tool can train with weights other than 0 and 1."""
    format: Literal["parquet", "arrow"] = "parquet"
    """The format of its files: `arrow` is a stream that `datasets` maps into memory."""
    rows_together: int | None = None
    """Rows in a Parquet row group; None: all of a batch."""
    beside: Callable[[Path, Written], list[str]] = nothing_beside
    """Writes what the tool needs beside the rows; returns the names."""
