"""Shards as they are trained from: an index of all packed sequences, and row groups on request.

Opening reads the small columns once (some 1% of the bytes) and keeps 40 bytes a sequence: what a
step weighs is known to every rank before a token is read, without communication. Token ids are
read a row group at a time; the arrays are views of Arrow's buffers.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.errors import ShardError
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.ragged import offsets_of
from srft_prep.train.batches import PackedSequence, kept_lengths

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SMALL: Final = ("seq_lengths", "loss_weights", "sum_weights")
_READ: Final = ("input_ids", "seq_lengths", "loss_weights")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSet:
    """The N packed sequences of a directory of `pack`, in G row groups, in the stored order."""

    manifest: Manifest
    files: "tuple[tuple[Path, pq.FileMetaData], ...]"
    """The shards and their footers, parsed once."""
    group_files: "NDArray[np.int64]"
    """File of each row group [G]."""
    group_numbers: "NDArray[np.int64]"
    """Number of each row group in its file [G]."""
    group_offsets: "NDArray[np.int64]"
    """Sequences of group g: [group_offsets[g], group_offsets[g + 1])."""
    sum_weights: "NDArray[np.float64]"
    """Sum of the weights of each sequence, as `pack` wrote it: exact, rounded once [N]."""
    tokens: "NDArray[np.int64]"
    """Tokens of each sequence [N]."""
    kept_tokens: "NDArray[np.int64]"
    """Tokens that the trim leaves of each sequence [N]."""
    loss_tokens: "NDArray[np.int64]"
    """Tokens with weight of each sequence [N]."""

    @classmethod
    def open(cls, path: Path, *, check: bool = True) -> Self:
        """Return the shards of a directory.

        Args:
            path: output of `pack`.
            check: compare every file with its hash in the manifest, 0.8 GB/s.

        Raises:
            ShardError: no finished output of `pack`, a damaged one, one without weighted tokens,
                or one of an older version.
        """
        manifest = read_manifest(path, stage="pack")
        if check:
            manifest.checked()
        if not manifest.parts:
            raise ShardError(f"{path}: the manifest names no shard; run pack again")
        try:
            footers = [pq.read_metadata(file) for file in manifest.parts]
            indices = [_index(file) for file in manifest.parts]
        except (OSError, pa.ArrowException) as error:
            raise ShardError(f"{path}: cannot be read: {error}; run pack again") from None
        sums, tokens, kept, loss = (
            np.concatenate([np.empty(0, np.int64), *columns])
            for columns in zip(*indices, strict=True)
        )
        if not sums.sum() > 0:
            raise ShardError(
                f"{path}: no token carries weight, so there is nothing to train on; choose another "
                "--recipe or --weights of pack"
            )
        groups = [footer.num_row_groups for footer in footers]
        rows = [
            footer.row_group(group).num_rows
            for footer in footers
            for group in range(footer.num_row_groups)
        ]
        return cls(
            manifest=manifest,
            files=tuple(zip(manifest.parts, footers, strict=True)),
            group_files=np.repeat(np.arange(len(groups)), groups),
            group_numbers=np.concatenate([np.arange(number) for number in groups]),
            group_offsets=offsets_of(np.array(rows, np.int64)),
            sum_weights=sums,
            tokens=tokens,
            kept_tokens=kept,
            loss_tokens=loss,
        )

    @property
    def num_sequences(self) -> int:
        """N."""
        return len(self.sum_weights)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, before any trim."""
        return int(self.tokens.sum())

    @property
    def seq_len(self) -> int:
        """Tokens in a packed sequence, at most."""
        return int(self.manifest.data["seq_len"])

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer's files."""
        return str(self.manifest.data["tokenizer_hash"])

    @property
    def groups(self) -> "NDArray[np.int64]":
        """Row group of each sequence [N]."""
        return np.repeat(np.arange(len(self.group_files)), np.diff(self.group_offsets))

    @property
    def group_rows(self) -> int:
        """Sequences of the largest row group."""
        return int(np.diff(self.group_offsets).max())

    def group_of(self, index: int) -> int:
        """Return the row group of a sequence."""
        return int(np.searchsorted(self.group_offsets, index, side="right")) - 1

    def read_group(self, group: int) -> tuple[PackedSequence, ...]:
        """Return the packed sequences of a row group.

        Safe in any thread: the file is opened for this call, its footer is not parsed again.

        Raises:
            ShardError: the file is gone, or its bytes changed.
        """
        path, footer = self.files[self.group_files[group]]
        number = int(self.group_numbers[group])
        try:
            with pq.ParquetFile(path, metadata=footer, page_checksum_verification=True) as file:
                table = file.read_row_group(number, columns=list(_READ), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise ShardError(
                f"{path}: row group {number} cannot be read: {error}; restore the file, or run "
                "pack again"
            ) from None
        first = int(self.group_offsets[group] - self.group_offsets[self._first_group(group)])
        return _sequences(table, f"{path}: row", first)

    def sequence(self, index: int) -> PackedSequence:
        """Return one packed sequence; it decodes the whole row group."""
        group = self.group_of(index)
        return self.read_group(group)[index - int(self.group_offsets[group])]

    def _first_group(self, group: int) -> int:
        return group - int(self.group_numbers[group])


class RecentGroups:
    """Row groups decoded in threads ahead of their use; those asked for last are kept.

    Use as a context manager, from one thread.
    """

    def __init__(self, shards: ShardSet, *, capacity: int, threads: int) -> None:
        self._shards = shards
        self._capacity = capacity
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="srft-decode")
        self._groups: OrderedDict[int, Future[tuple[PackedSequence, ...]]] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def request(self, index: int) -> Callable[[], PackedSequence]:
        """Have a packed sequence decoded; return what waits for it, in any thread.

        What is returned raises ShardError where the file is gone or its bytes changed.
        """
        group = self._shards.group_of(index)
        if group not in self._groups:
            self._groups[group] = self._pool.submit(self._shards.read_group, group)
        self._groups.move_to_end(group)
        if len(self._groups) > self._capacity:
            self._groups.popitem(last=False)
        rows, row = self._groups[group], index - int(self._shards.group_offsets[group])
        return lambda: rows.result()[row]


def _index(path: Path) -> "tuple[NDArray[Any], ...]":
    """Return the sum of weights and the tokens, kept tokens and loss tokens of a file's rows."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if missing := {*_SMALL, *_READ} - set(file.schema_arrow.names):
            raise ShardError(
                f"{path}: no column {', '.join(sorted(missing))}: written by an older version; run "
                "pack again"
            )
        table = file.read(columns=list(_SMALL))
    lengths, documents = _flat(table, "seq_lengths")
    runs, owned = _flat(table, "loss_weights")
    bounds = offsets_of(lengths.to_numpy())
    rows = bounds[documents]
    run_lengths = runs.field("length").to_numpy()
    starts = runs.field("start").to_numpy() + np.repeat(rows[:-1], np.diff(owned))
    kept = offsets_of(kept_lengths(bounds, starts, starts + run_lengths))[documents]
    sums = table["sum_weights"].to_numpy()
    return sums, np.diff(rows), np.diff(kept), np.diff(offsets_of(run_lengths)[owned])


def _sequences(table: pa.Table, source: str, first: int) -> tuple[PackedSequence, ...]:
    """Return the rows of a table, numbered from `first`."""
    ids, tokens = _flat(table, "input_ids")
    lengths, documents = _flat(table, "seq_lengths")
    runs, owned = _flat(table, "loss_weights")
    starts, run_lengths, weights = (
        runs.field(name).to_numpy() for name in ("start", "length", "weight")
    )
    ids, lengths = ids.to_numpy(), lengths.to_numpy()
    return tuple(
        PackedSequence(
            ids=ids[tokens[row] : tokens[row + 1]],
            lengths=lengths[documents[row] : documents[row + 1]],
            run_starts=starts[owned[row] : owned[row + 1]],
            run_lengths=run_lengths[owned[row] : owned[row + 1]],
            run_weights=weights[owned[row] : owned[row + 1]],
            source=f"{source} {first + row}",
        )
        for row in range(table.num_rows)
    )


def _flat(table: pa.Table, name: str) -> "tuple[pa.Array, NDArray[np.int64]]":
    """Return a list column's values and offsets."""
    chunks = table[name].chunks
    lists = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return lists.flatten(), offsets - offsets[0]
