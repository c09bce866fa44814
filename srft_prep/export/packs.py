"""Shards as flat arrays, a bounded number of tokens at a time; read by column name."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.ragged import offsets_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH_TOKENS: Final = 1 << 20
"""Tokens that are in memory at a time, about: some 40 bytes each."""

_IDS: Final = "input_ids.list.element"
_COLUMNS: Final = ("input_ids", "labels", "seq_lengths", "loss_weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packs:
    """Packed sequences, one after the other; N tokens, P packs, D documents, R runs of weight."""

    ids: "NDArray[np.int32]"
    """Token ids [N]."""
    labels: "NDArray[np.int32]"
    """Unshifted labels [N], -100 where the weight is 0."""
    tokens: "NDArray[np.int64]"
    """Offsets of the packs' tokens [P + 1]."""
    lengths: "NDArray[np.int32]"
    """Lengths of the documents [D]."""
    documents: "NDArray[np.int64]"
    """Offsets of the packs' documents [P + 1]."""
    run_lengths: "NDArray[np.int32]"
    """Tokens of each run [R]."""
    run_weights: "NDArray[np.float32]"
    """Weight of each run [R]."""

    @property
    def num_packs(self) -> int:
        """P."""
        return len(self.tokens) - 1

    @property
    def positions(self) -> "NDArray[np.int32]":
        """Return each token's place in its document [N]."""
        starts = np.repeat(offsets_of(self.lengths)[:-1], self.lengths)
        return (np.arange(len(self.ids)) - starts).astype(np.int32)


def read_packs(path: Path, batch_tokens: int = BATCH_TOKENS) -> Iterator[Packs]:
    """Yield a shard's packs in order, about `batch_tokens` at a time, at least a row group."""
    with pq.ParquetFile(path) as file:
        leaves = [file.schema.column(index).path for index in range(len(file.schema.names))]
        ids = leaves.index(_IDS)
        groups: list[int] = []
        waiting = 0
        for group in range(file.num_row_groups):
            groups.append(group)
            waiting += file.metadata.row_group(group).column(ids).num_values
            if waiting >= batch_tokens or group == file.num_row_groups - 1:
                yield _packs(file.read_row_groups(groups, columns=list(_COLUMNS)))
                groups, waiting = [], 0


def _packs(table: pa.Table) -> Packs:
    lists = {name: pa.concat_arrays(table[name].chunks) for name in _COLUMNS}
    runs = lists["loss_weights"].flatten()
    return Packs(
        ids=lists["input_ids"].flatten().to_numpy(),
        labels=lists["labels"].flatten().to_numpy(),
        tokens=_offsets(lists["input_ids"]),
        lengths=lists["seq_lengths"].flatten().to_numpy(),
        documents=_offsets(lists["seq_lengths"]),
        run_lengths=runs.field("length").to_numpy(),
        run_weights=runs.field("weight").to_numpy(),
    )


def _offsets(lists: pa.ListArray) -> "NDArray[np.int64]":
    offsets: NDArray[np.int64] = lists.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    return offsets


def list_column(values: "NDArray[np.integer]", offsets: "NDArray[np.int64]") -> pa.ListArray:
    """Return flat values as a column of lists."""
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
