"""Raw runs -> trajectories: read, join outcomes, exclude, drop duplicates, write parts.

Streams: memory holds one part (at most `PART_BYTES` of text or `PART_ROWS` trajectories), and of
everything read before only a hash, an id and a count of each. A part's journal entry says where
the next one begins, so that an interrupted run goes on there. A sample is drawn afterwards, from
the finished parts: every trajectory has a pseudo-random rank made of seed and content, and the
lowest ranks of each outcome win, whatever the order of the files.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import orjson
import polars as pl
import pyarrow.parquet as pq

from srft_prep.config import IngestConfig
from srft_prep.errors import ConfigError, FormatError
from srft_prep.exclusion import Exclusion
from srft_prep.outcomes import Outcomes, outcomes_in, read_outcomes, report_files
from srft_prep.progress import Progress, Silent
from srft_prep.readers import reader_of
from srft_prep.records import Record, discover, printable, records
from srft_prep.storage import Manifest, StageWriter, atomic_path, write_table
from srft_prep.trajectories import trajectories_table
from srft_prep.types import Message, Trajectory

PART_ROWS: Final = 256
PART_BYTES: Final = 32 << 20
ROW_GROUP_ROWS: Final = 32
REJECTED: Final = "rejected.jsonl"
OUTCOMES: Final = {True: "resolved", False: "unresolved", None: "unknown"}


@dataclass(slots=True)
class _Batch:
    """The part being filled, and what happened while it was."""

    trajectories: list[Trajectory] = field(default_factory=list)
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
    hashes: set[str] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    copies: Counter[str] = field(default_factory=Counter)
    """How many trajectories of an id are known to be taken."""
    per_instance: Counter[str] = field(default_factory=Counter)

    def add(self, *, trajectory_id: str, instance_id: str, content_hash: str) -> None:
        self.hashes.add(content_hash)
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
        ConfigError: a source or report does not exist, or the output cannot be written to.
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
        names = [entry["name"] for entry in entries if entry["name"]]
        if config.sample:
            names = _draw_sample(folder, names, output, config, counts)
        counts |= _describe_parts([output / name for name in names])
        with atomic_path(output / REJECTED) as temporary, temporary.open("wb") as file:
            for number in range(len(entries)):
                rejected = (writer.entry(f"ingest-{number:05d}") or {})["rejected"]
                file.writelines(orjson.dumps(line) + b"\n" for line in rejected)
        return writer.finish(counts=counts, names=[*names, REJECTED], command=command or [])


def _outside(output: Path, files: list[Path]) -> list[Path]:
    """Return the files but those of the output: a rerun must not read what it wrote.

    Raises:
        ConfigError: all files are the output's own.
    """
    own = output.absolute()
    kept = [path for path in files if own not in path.absolute().parents]
    if not kept:
        raise ConfigError(f"{output}: expected runs to read, but this is the directory to write")
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
        batch.rejected.append({"file": str(origin.path), "line": origin.line, "reason": str(error)})
        return
    trajectory = _with_outcome(trajectory, record, batch, outcomes)
    if config.system_prompt is not None:
        trajectory = _with_system_prompt(trajectory, config.system_prompt)
    instance = trajectory.instance_id
    if seen.exclusion.covers(instance):
        batch.counts["excluded"] += 1
    elif not config.keep_duplicates and trajectory.content_hash in seen.hashes:
        batch.counts["duplicates"] += 1
    elif (
        config.max_per_instance is not None
        and instance
        and seen.per_instance[instance] >= config.max_per_instance
    ):
        batch.counts["over_max_per_instance"] += 1
    else:
        trajectory = _with_unique_id(trajectory, seen)
        seen.add(
            trajectory_id=trajectory.trajectory_id,
            instance_id=instance,
            content_hash=trajectory.content_hash,
        )
        batch.trajectories.append(trajectory)
        batch.num_bytes += _size(trajectory)


def _with_outcome(
    trajectory: Trajectory, record: Record, batch: _Batch, outcomes: Outcomes
) -> Trajectory:
    """Join the outcome of the reports; the run's own word wins, a conflict is counted."""
    found = outcomes.find(
        instance_id=trajectory.instance_id,
        trajectory_id=trajectory.trajectory_id,
        path=record.origin.path,
    )
    if trajectory.resolved is not None:
        batch.counts["outcome_conflicts"] += found == {not trajectory.resolved}
        return trajectory
    batch.counts["outcomes_joined"] += len(found) == 1
    batch.counts["outcomes_ambiguous"] += len(found) > 1
    return replace(trajectory, resolved=found.pop()) if len(found) == 1 else trajectory


def _with_system_prompt(trajectory: Trajectory, text: str) -> Trajectory:
    messages = trajectory.messages
    if messages and messages[0].role == "system":
        messages = (replace(messages[0], content=text), *messages[1:])
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
    return sum(
        len(message.content or "") + len(message.tool_calls or "") + 64
        for message in trajectory.messages
    )


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
        "counts": dict(batch.counts),
        "rejected": batch.rejected,
        "next_file": position[0],
        "next_record": position[1],
        "last": last,
    }
    writer.record(f"ingest-{number:05d}", entry)
    return entry | {"rejected": None}


def _remember(part: Path, seen: _Seen) -> None:
    columns = ["trajectory_id", "instance_id", "content_hash"]
    for row in pq.read_table(part, columns=columns).to_pylist():
        seen.add(**row)


def _draw_sample(
    folder: Path, names: list[str], output: Path, config: IngestConfig, counts: dict[str, Any]
) -> list[str]:
    """Copy the sampled rows of the converted parts to the output; return the new parts' names."""
    wanted = config.sample or {}
    columns = {"trajectory_id": pl.String, "content_hash": pl.String, "resolved": pl.Boolean}
    parts = [folder / name for name in names]
    rows = pl.read_parquet(parts, columns=list(columns)) if parts else pl.DataFrame(schema=columns)
    chosen: set[str] = set()
    for outcome, word in OUTCOMES.items():
        of_outcome = rows.filter(pl.col("resolved").eq_missing(outcome))
        pairs = zip(of_outcome["content_hash"], of_outcome["trajectory_id"], strict=True)
        ranked = sorted(pairs, key=lambda pair: _rank(config.seed, *pair))
        kept = ranked[: wanted.get(word, 0)]
        counts[f"not_sampled_{word}"] = len(ranked) - len(kept)
        counts[f"missing_for_sample_{word}"] = wanted.get(word, 0) - len(kept)
        chosen.update(trajectory_id for _, trajectory_id in kept)
    if config.limit is not None:
        order = {key: rank for rank, key in enumerate(rows["trajectory_id"])}
        chosen = set(sorted(chosen, key=order.__getitem__)[: config.limit])
    written: list[str] = []
    for name in names:
        table = pq.read_table(folder / name)
        mask = [key.as_py() in chosen for key in table["trajectory_id"]]
        if any(mask):
            written.append(f"part-{len(written):05d}.parquet")
            write_table(table.filter(mask), output / written[-1], row_group_rows=ROW_GROUP_ROWS)
    return written


def _rank(seed: int, content_hash: str, trajectory_id: str) -> tuple[str, str]:
    key = f"{seed}:{content_hash}".encode()
    return hashlib.blake2b(key, digest_size=16).hexdigest(), trajectory_id


def _describe_sources(files: list[Path], sources: Sequence[str]) -> dict[str, Any]:
    """Return how a manifest names raw files: by content, and by place below their common folder.

    The place counts because ids and outcomes depend on it; where the whole lies does not.
    """
    digest = hashlib.sha256()
    size = 0
    common = os.path.commonpath([path.absolute().parent for path in files])
    for path in files:
        digest.update(os.fsencode(path.absolute().relative_to(common)) + b"\0")
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            size += path.stat().st_size
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
        rejected=0, excluded=0, duplicates=0, over_max_per_instance=0, outcomes_joined=0
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


def parse_sample(text: str) -> dict[str, int]:
    """Return the numbers of `resolved=5000,unresolved=5000`.

    Raises:
        ConfigError: another form, an unknown outcome, or a negative number.
    """
    sample: dict[str, int] = {}
    for item in text.split(","):
        word, _, number = item.strip().partition("=")
        if word not in OUTCOMES.values() or not number.isdecimal():
            raise ConfigError(
                f"--sample: expected resolved=N,unresolved=N[,unknown=N], got {item.strip()!r}"
            )
        sample[word] = int(number)
    return sample
