"""Raw runs -> trajectories: read, join outcomes, exclude, drop duplicates, write parts.

Streams: memory holds one part (at most `PART_BYTES` of text or `PART_ROWS` trajectories), and of
everything read before only a hash, an id and a count of each. A part's journal entry says where
the next one begins, so that an interrupted run goes on there. A sample is drawn afterwards, from
the finished parts (`sampling`).
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow.parquet as pq

from srft_prep.config import OUTCOMES, IngestConfig
from srft_prep.errors import ConfigError, FormatError
from srft_prep.exclusion import Exclusion, names_instance
from srft_prep.manifest import Manifest
from srft_prep.object_mirror import address_of
from srft_prep.outcomes import Outcomes, outcomes_in, read_outcomes, report_files
from srft_prep.progress import Progress, Silent
from srft_prep.readers import reader_of
from srft_prep.records import Record, discover, printable, records
from srft_prep.sampling import draw_sample
from srft_prep.schemas import REJECTED_FILE
from srft_prep.storage import StageWriter, write_rejected, write_table
from srft_prep.trajectories import trajectories_table
from srft_prep.types import Message, Trajectory

PART_ROWS: Final = 256
PART_BYTES: Final = 32 << 20
ROW_GROUP_ROWS: Final = 32


@dataclass(slots=True)
class _Batch:
    """The part being filled, and what happened while it was."""

    trajectories: list[Trajectory] = field(default_factory=list)
    joins: list[str | None] = field(default_factory=list)
    """What the reports said of each trajectory: the name of a count, or None for nothing."""
    places: dict[str, int] = field(default_factory=dict)
    """Where in the batch the first trajectory of a content hash is."""
    matched: set[str] = field(default_factory=set)
    """The exclusions that kept a run out."""
    num_bytes: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def is_full(self) -> bool:
        return (
            len(self.trajectories) >= PART_ROWS
            or self.num_bytes >= PART_BYTES
            or len(self.rejected) >= 16 * PART_ROWS
        )


@dataclass(slots=True)
class _Seen:
    """What decides whether a trajectory is taken, besides itself."""

    exclusion: Exclusion
    outcomes: dict[str, bool | None] = field(default_factory=dict)
    """The outcome of the first trajectory of every content hash."""
    ids: set[str] = field(default_factory=set)
    copies: Counter[str] = field(default_factory=Counter)
    """How many trajectories of an id are known to be taken."""
    per_instance: Counter[str] = field(default_factory=Counter)

    def add(
        self, *, trajectory_id: str, instance_id: str, content_hash: str, resolved: bool | None
    ) -> None:
        self.outcomes.setdefault(content_hash, resolved)
        self.ids.add(trajectory_id)
        self.per_instance[instance_id] += 1


def ingest(
    sources: Sequence[str],
    output: Path,
    config: IngestConfig,
    *,
    outcomes: Sequence[str] = (),
    overwrite: bool = False,
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the trajectories of raw runs to a stage directory and return its manifest.

    Records that are no trajectory go to `rejected.jsonl` with file, line and reason; the counts
    say how many were rejected, excluded, duplicates, and so on.

    Raises:
        ConfigError: a source or report does not exist, a source is the output of a stage, or the
            output cannot be written to.
    """
    files = _outside(output, discover(sources))
    found = read_outcomes(outcomes, sources=files)
    inputs = [_describe_sources(files, sources), *_describe_outcomes(outcomes)]
    with StageWriter.open(
        output, stage="ingest", config=asdict(config), inputs=inputs, overwrite=overwrite
    ) as writer:
        if writer.finished:
            return writer.finished
        folder = writer.progress / "unsampled" if config.sample else output
        folder.mkdir(exist_ok=True)
        entries = _convert(files, folder, config, writer, found, progress or Silent())
        counts = _total(entry["counts"] for entry in entries)
        counts["outcome_files_damaged"] = found.num_damaged_files
        if config.exclude:
            matched = {name for entry in entries for name in entry.get("matched", ())}
            counts["exclusions_without_run"] = len(set(config.exclude) - matched)
        names = [entry["name"] for entry in entries if entry["name"]]
        if config.sample:
            parts = [folder / name for name in names]
            names = draw_sample(parts, output, config, counts=counts, row_group_rows=ROW_GROUP_ROWS)
        counts |= _describe_parts([output / name for name in names])
        write_rejected(
            output,
            (
                line
                for number in range(len(entries))
                for line in (writer.entry(f"ingest-{number:05d}") or {})["rejected"]
            ),
        )
        return writer.finish(counts=counts, names=[*names, REJECTED_FILE], command=command or [])


def _outside(output: Path, files: list[Path]) -> list[Path]:
    """Return the files but those of the output: a rerun must not read what it wrote.

    Raises:
        ConfigError: all files are the output's own.
    """
    own = output.absolute()
    kept = [path for path in files if own not in path.absolute().parents]
    if not kept:
        raise ConfigError(
            f"{address_of(output)}: expected runs to read, but this is the directory to write"
        )
    return kept


def _convert(
    files: list[Path],
    folder: Path,
    config: IngestConfig,
    writer: StageWriter,
    outcomes: Outcomes,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Write all parts that are not there yet and return the journal's entries.

    The rejected records of an entry stay in the journal: a large folder may be full of them.
    """
    entries: list[dict[str, Any]] = []
    seen = _Seen(exclusion=Exclusion(config.exclude))
    cursor = (0, 0)
    while (entry := writer.entry(f"ingest-{len(entries):05d}")) is not None:
        entries.append(entry | {"rejected": None})
        cursor = (entry["next_file"], entry["next_record"])
        if entry["name"]:
            _remember(folder / entry["name"], seen)
            progress.advance(entry["rows"])
    if entries and entries[-1]["last"]:
        return entries
    batch = _Batch()
    taken = sum(entry["rows"] for entry in entries)
    reached = (len(files), 0)
    for position, record in _records_from(files, cursor):
        if config.limit is not None and config.sample is None and taken >= config.limit:
            break
        if batch.is_full():
            entries.append(_commit(batch, folder, writer, len(entries), position, last=False))
            batch = _Batch()
        before = len(batch.trajectories)
        _take(record, batch, seen, config, outcomes)
        taken += len(batch.trajectories) - before
        progress.advance(len(batch.trajectories) - before, str(record.origin.path.name))
    entries.append(_commit(batch, folder, writer, len(entries), reached, last=True))
    return entries


def _records_from(
    files: list[Path], cursor: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], Record]]:
    for file_index in range(cursor[0], len(files)):
        start = cursor[1] if file_index == cursor[0] else 0
        for record in records(files[file_index], start=start):
            yield (file_index, record.position), record


def _take(
    record: Record, batch: _Batch, seen: _Seen, config: IngestConfig, outcomes: Outcomes
) -> None:
    """Turn one record into a trajectory of the batch, or into a count with a reason."""
    if record.error is None and outcomes_in(record.value, path=record.origin.path) is not None:
        batch.counts["outcome_records"] += 1
        return
    try:
        if record.error is not None:
            raise FormatError(record.error)
        reader = reader_of(record.value, format_name=config.format)
        trajectory: Trajectory = reader.read(record.value, origin=record.origin)
    except FormatError as error:
        batch.counts["rejected"] += 1
        origin = record.origin
        file = address_of(origin.path)
        batch.rejected.append({"file": file, "line": origin.line, "reason": str(error)})
        return
    trajectory, join = _with_outcome(trajectory, record, outcomes)
    if config.system_prompt is not None:
        trajectory = _with_system_prompt(trajectory, config.system_prompt)
    instance = trajectory.instance_id
    if matched := seen.exclusion.matches_run(trajectory):
        batch.counts["excluded"] += 1
        batch.matched |= matched
    elif not config.keep_duplicates and trajectory.content_hash in seen.outcomes:
        _learn_from_copy(trajectory, join, batch, seen)
    elif (
        config.max_per_instance is not None
        and instance
        and seen.per_instance[instance] >= config.max_per_instance
    ):
        batch.counts["over_max_per_instance"] += 1
    else:
        if seen.exclusion and not names_instance(trajectory):
            batch.counts["not_checked_for_exclusion"] += 1
        trajectory = _with_unique_id(trajectory, seen)
        seen.add(
            trajectory_id=trajectory.trajectory_id,
            instance_id=instance,
            content_hash=trajectory.content_hash,
            resolved=trajectory.resolved,
        )
        batch.places.setdefault(trajectory.content_hash, len(batch.trajectories))
        batch.trajectories.append(trajectory)
        batch.joins.append(join)
        batch.num_bytes += _size(trajectory)


def _learn_from_copy(copy: Trajectory, join: str | None, batch: _Batch, seen: _Seen) -> None:
    """Count a copy of a trajectory that was taken; give that one its outcome while it can be."""
    batch.counts["duplicates"] += 1
    known = seen.outcomes[copy.content_hash]
    place = batch.places.get(copy.content_hash)
    if copy.resolved is None or copy.resolved == known:
        return
    if known is not None:
        batch.counts["duplicates_with_other_outcome"] += 1
    elif place is None:
        batch.counts["duplicates_with_outcome"] += 1
    else:
        batch.trajectories[place] = replace(batch.trajectories[place], resolved=copy.resolved)
        batch.joins[place] = join
        seen.outcomes[copy.content_hash] = copy.resolved


def _with_outcome(
    trajectory: Trajectory, record: Record, outcomes: Outcomes
) -> tuple[Trajectory, str | None]:
    """Return the trajectory with the reports' outcome, and the count that this adds to.

    The run's own word wins.
    """
    found = outcomes.find(
        instance_id=trajectory.instance_id,
        trajectory_id=trajectory.trajectory_id,
        path=record.origin.path,
    )
    if not found:
        return trajectory, None
    if trajectory.resolved is not None:
        agrees = trajectory.resolved in found
        return trajectory, "outcomes_confirmed" if agrees else "outcome_conflicts"
    if len(found) > 1:
        return trajectory, "outcomes_ambiguous"
    return replace(trajectory, resolved=found.pop()), "outcomes_joined"


def _with_system_prompt(trajectory: Trajectory, text: str) -> Trajectory:
    messages = trajectory.messages
    if messages and messages[0].role == "system":
        messages = (messages[0]._replace(content=text), *messages[1:])
    else:
        messages = (Message(role="system", kind="prompt", content=text), *messages)
    return replace(trajectory, messages=messages)


def _with_unique_id(trajectory: Trajectory, seen: _Seen) -> Trajectory:
    name = unique = trajectory.trajectory_id
    while unique in seen.ids:
        seen.copies[name] += 1
        unique = f"{name}~{seen.copies[name] + 1}"
    return replace(trajectory, trajectory_id=unique)


def _size(trajectory: Trajectory) -> int:
    texts = [trajectory.patch, trajectory.tools]
    for message in trajectory.messages:
        texts += [message.content, message.reasoning_content, message.tool_calls]
    return sum(len(text) for text in texts if text) + 64 * len(trajectory.messages)


def _commit(
    batch: _Batch,
    folder: Path,
    writer: StageWriter,
    number: int,
    position: tuple[int, int],
    *,
    last: bool,
) -> dict[str, Any]:
    name = f"part-{number:05d}.parquet" if batch.trajectories else None
    if name:
        table = trajectories_table(batch.trajectories)
        write_table(table, folder / name, row_group_rows=ROW_GROUP_ROWS)
    entry = {
        "name": name,
        "rows": len(batch.trajectories),
        "counts": dict(batch.counts + Counter(join for join in batch.joins if join)),
        "matched": sorted(batch.matched),
        "rejected": batch.rejected,
        "next_file": position[0],
        "next_record": position[1],
        "last": last,
    }
    writer.record(f"ingest-{number:05d}", entry, files=[folder / name] if name else [])
    return entry | {"rejected": None}


def _remember(part: Path, seen: _Seen) -> None:
    columns = ["trajectory_id", "instance_id", "content_hash", "resolved"]
    for row in pq.read_table(part, columns=columns).to_pylist():
        seen.add(**row)


def _describe_sources(files: list[Path], sources: Sequence[str]) -> dict[str, Any]:
    """Return how a manifest names raw files: by content, and by place below their common folder.

    The place counts because ids and outcomes depend on it; where the whole lies does not.
    """
    digest = hashlib.sha256()
    size = 0
    common = os.path.commonpath([path.absolute().parent for path in files])
    for path in files:
        digest.update(os.fsencode(path.absolute().relative_to(common)) + b"\0")
        try:
            if path.is_file():
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
                size += path.stat().st_size
        except OSError as error:  # `records` rejects the file
            digest.update(f"cannot be read: {error.strerror}\0".encode())
    return {
        "path": [printable(source) for source in sources],
        "files": len(files),
        "bytes": size,
        "sha256": digest.hexdigest(),
    }


def _describe_outcomes(paths: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": "outcomes", **_describe_sources(report_files(path), [path])} for path in paths]


def _total(counts: Iterable[dict[str, int]]) -> dict[str, Any]:
    total = Counter(
        rejected=0,
        excluded=0,
        duplicates=0,
        over_max_per_instance=0,
        outcomes_joined=0,
        outcomes_ambiguous=0,
        outcome_conflicts=0,
    )
    for each in counts:
        total.update(each)
    return dict(total)


def _describe_parts(parts: list[Path]) -> dict[str, Any]:
    """Return the counts of the written trajectories: steps, messages, outcomes, formats."""
    if not parts:
        return {"trajectories": 0, "steps": 0, "outcomes": {}, "formats": {}}
    rows = pl.read_parquet(parts, columns=["resolved", "format", "num_steps"])
    by_outcome = Counter(OUTCOMES[value] for value in rows["resolved"])
    return {
        "trajectories": rows.height,
        "steps": int(rows["num_steps"].sum()),
        "outcomes": dict(sorted(by_outcome.items())),
        "formats": dict(sorted(Counter(rows["format"]).items())),
    }
