"""One trajectory part -> the token part of the same name, in one process.

Memory holds one batch of renderings and one row group, whatever the part's size.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow.parquet as pq

from srft_prep.array_jobs import ArrayJob
from srft_prep.chat import LoadedTokenizer
from srft_prep.config import History
from srft_prep.conversations import Conversation
from srft_prep.engines import FAST, REFERENCE
from srft_prep.errors import FormatError
from srft_prep.manifest import Manifest
from srft_prep.schemas import TOKENS
from srft_prep.storage import PARQUET_OPTIONS, atomic_path
from srft_prep.token_rows import TokenRow, row_groups, token_table
from srft_prep.trajectories import read_trajectories
from srft_prep.types import Trajectory

BATCH_ROWS: Final = 16
"""Conversations encoded together, at most."""
BATCH_CHARACTERS: Final = 1 << 23
"""Text encoded together, about."""
TOKEN_OPTIONS: Final[dict[str, Any]] = {
    **PARQUET_OPTIONS,
    "compression_level": 1,
    "write_statistics": False,
    "column_encoding": {"step_chars.list.element": "BYTE_STREAM_SPLIT"},
}
"""Level 3 takes a fifth longer and makes files 4% smaller, which are read once or twice. Small
numbers with their high bytes apart take half the space and two thirds of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadePart:
    """What came of a part, beside its file."""

    entry: dict[str, Any]
    """The journal's entry: `counts`, `rejected`, and the `engine` in use."""
    started: float
    ended: float
    """When, on the machine's monotonic clock, in seconds."""


@dataclass(slots=True)
class _Tally:
    rejected: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=lambda: Counter(trajectories=0, sequences=0))


def tokenize_part(
    part: Path,
    output: Path,
    tokenizer: LoadedTokenizer,
    history: History,
    *,
    array: ArrayJob | None = None,
) -> MadePart:
    """Write the token part of one trajectory part, or of an array job's trajectories in it.

    Raises:
        MismatchError: the fast engine is found to differ from the reference; nothing is written.
    """
    started = time.monotonic()
    tally = _Tally()
    tokenizer.encoder.counts.clear()
    with (
        atomic_path(output) as temporary,
        pq.ParquetWriter(temporary, TOKENS, **TOKEN_OPTIONS) as writer,
    ):
        for group in row_groups(_token_rows(part, tally, tokenizer, history, array)):
            writer.write_table(token_table(group))
    tally.counts["rejected"] = len(tally.rejected)
    entry = {
        "counts": dict(tally.counts),
        "rejected": tally.rejected,
        "engine": FAST if tokenizer.encoder.is_fast else REFERENCE,
        "compared": dict(tokenizer.encoder.counts),
    }
    return MadePart(entry=entry, started=started, ended=time.monotonic())


def count_share(source: Manifest, array: ArrayJob) -> int:
    """Return how many trajectories are an array job's, for a progress bar's total.

    Raises:
        ShardError: a part cannot be read.
    """
    try:
        return sum(
            array.has(content_hash)
            for part in source.parts
            for content_hash in pl.read_parquet(part, columns=["content_hash"])["content_hash"]
        )
    except (OSError, pl.exceptions.PolarsError):
        source.checked()
        raise


def _share_of(part: Path, array: ArrayJob) -> pl.Expr:
    """Return the condition for a part's trajectories to be an array job's."""
    hashes = pl.read_parquet(part, columns=["content_hash"])["content_hash"]
    return pl.col("content_hash").is_in([each for each in hashes if array.has(each)])


def _token_rows(
    part: Path,
    tally: _Tally,
    tokenizer: LoadedTokenizer,
    history: History,
    array: ArrayJob | None,
) -> Iterator[TokenRow]:
    """Yield the rows of a part in order; what is refused goes into the tally."""
    batch: list[tuple[Trajectory, Conversation]] = []
    characters = 0
    for trajectory in read_trajectories([part], where=_share_of(part, array) if array else None):
        tally.counts["trajectories"] += 1
        try:
            conversations = tokenizer.conversations(trajectory, history=history)
        except FormatError as error:
            tally.rejected.append({"trajectory_id": trajectory.trajectory_id, "reason": str(error)})
            continue
        tally.counts.update(tokenizer.renderer.findings(trajectory, conversations))
        for conversation in conversations:
            batch.append((trajectory, conversation))
            characters += len(conversation.rendering.text)
            if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
                yield from _encoded(batch, tally, tokenizer)
                batch, characters = [], 0
    yield from _encoded(batch, tally, tokenizer)


def _encoded(
    batch: Sequence[tuple[Trajectory, Conversation]], tally: _Tally, tokenizer: LoadedTokenizer
) -> Iterator[TokenRow]:
    encoded = tokenizer.encode([conversation for _, conversation in batch])
    for (trajectory, conversation), tokens in zip(batch, encoded, strict=True):
        tally.counts["sequences"] += 1
        tally.counts["tokens"] += len(tokens.ids)
        tally.counts["steps"] += len(tokens.step_spans)
        tally.counts["step_tokens"] += len(tokens.step_chars)
        tally.counts["control_tokens_as_text"] += len(conversation.rendering.forged)
        yield TokenRow(
            trajectory_id=trajectory.trajectory_id,
            resolved=trajectory.resolved,
            content_hash=trajectory.content_hash,
            input_ids=tokens.ids,
            step_spans=tokens.step_spans,
            part_spans=tokens.part_spans,
            field_spans=tokens.field_spans,
            convention_spans=tokens.convention_spans,
            step_chars=tokens.step_chars,
            instance_id=trajectory.instance_id,
        )
