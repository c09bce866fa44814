"""Checks of a finished stage directory: files against the manifest, rows against the laws.

Reading goes through the page checksums, so that a flipped byte is named as damage even where the
manifest was written anew over it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.schemas import LABELS as LABELS_SCHEMA
from srft_prep.schemas import REQUESTS, SHARDS, TOKENS, TRAJECTORIES
from srft_prep.shards import IGNORED
from srft_prep.storage import Manifest, describe_file, read_manifest
from srft_prep.trajectories import trajectory_of
from srft_prep.types import KINDS, LABELS

MAX_PROBLEMS: Final = 100
"""After this many problems of one file its remaining rows are not reported."""

_SCHEMAS: Final = {"ingest": TRAJECTORIES, "tokenize": TOKENS, "pack": SHARDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `verify` found."""

    stage: str
    num_files: int
    num_rows: int
    problems: tuple[str, ...]
    """One line a problem, each naming its file; empty for a sound directory."""


def verify(directory: Path) -> Report:
    """Check a finished stage directory.

    Raises:
        ShardError: the directory has no readable manifest.
    """
    manifest = read_manifest(directory)
    problems: list[str] = []
    seen: dict[str, Any] = {"ids": set(), "totals": {}}
    num_rows = 0
    for file in manifest.files:
        path = directory / file["name"]
        if not path.exists():
            problems.append(f"{path}: missing")
            continue
        if path.suffix == ".parquet":
            found = _check_parquet(manifest, path, seen)
            num_rows += file.get("rows", 0)
            for number, problem in enumerate(found):
                if number == MAX_PROBLEMS:
                    problems.append(f"{path}: more problems")
                    break
                problems.append(f"{path}: {problem}")
        if describe_digest(path) != file["sha256"]:
            problems.append(f"{path}: its bytes are not those that were written (SHA-256 differs)")
    problems += [f"{directory}: {problem}" for problem in _check_counts(manifest, seen)]
    return Report(
        stage=manifest.stage,
        num_files=len(manifest.files),
        num_rows=num_rows,
        problems=tuple(problems),
    )


def describe_digest(path: Path) -> str:
    """Return a file's SHA-256 in hex, also where it is no readable Parquet."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_parquet(manifest: Manifest, path: Path, seen: dict[str, Any]) -> Iterator[str]:
    schema = _SCHEMAS.get(manifest.stage)
    if schema is None:
        schema = LABELS_SCHEMA if path.name == "labels.parquet" else REQUESTS
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if file.schema_arrow.names != schema.names:
                yield f"expected the columns {schema.names}, got {file.schema_arrow.names}"
                return
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group).to_pylist():
                    yield from _check_row(manifest, path, row, seen)
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        yield f"cannot be read: {str(error).splitlines()[0]}"


def _check_row(
    manifest: Manifest, path: Path, row: dict[str, Any], seen: dict[str, Any]
) -> Iterator[str]:
    if manifest.stage == "ingest":
        yield from _check_trajectory(row, seen)
    elif manifest.stage == "tokenize":
        yield from _check_tokens(row, seen)
    elif manifest.stage == "pack":
        yield from _check_packed(row, seen, seq_len=manifest.data["seq_len"])
    elif path.name == "labels.parquet":
        yield from _check_label(row, seen)


def _check_trajectory(row: dict[str, Any], seen: dict[str, Any]) -> Iterator[str]:
    name = row["trajectory_id"]
    _add(seen, trajectories=1, steps=row["num_steps"])
    if name in seen["ids"]:
        yield f"{name}: the id occurs twice"
    seen["ids"].add(name)
    trajectory = trajectory_of(row)
    if kinds := {message.kind for message in trajectory.messages} - set(KINDS):
        yield f"{name}: expected kinds {', '.join(KINDS)}, got {', '.join(sorted(kinds))}"
    if trajectory.num_steps != row["num_steps"]:
        yield f"{name}: num_steps is {row['num_steps']}, its actions are {trajectory.num_steps}"
    if trajectory.content_hash != row["content_hash"]:
        yield f"{name}: content_hash does not belong to its messages"
    for index, message in enumerate(trajectory.messages):
        if message.tool_calls is not None and not _is_json_list(message.tool_calls):
            yield f"{name}: message {index}: tool_calls is no JSON list"


def _check_label(row: dict[str, Any], seen: dict[str, Any]) -> Iterator[str]:
    name = f"{row['trajectory_id']}: step {row['step_index']}"
    _add(seen, steps=1)
    if name in seen["ids"]:
        yield f"{name}: has two labels"
    seen["ids"].add(name)
    if row["label"] not in LABELS:
        yield f"{name}: expected a label of {', '.join(LABELS)}, got {row['label']!r}"
    probabilities = [row[f"p_{label}"] for label in LABELS]
    given = [p for p in probabilities if p is not None]
    if given and (len(given) < len(LABELS) or abs(sum(given) - 1) > 1e-3 or min(given) < 0):
        yield f"{name}: expected three probabilities that sum to 1, got {probabilities}"


def _check_tokens(row: dict[str, Any], seen: dict[str, Any]) -> Iterator[str]:
    name = row["trajectory_id"]
    length = len(row["input_ids"])
    _add(seen, sequences=1, tokens=length)
    if row["num_tokens"] != length:
        yield f"{name}: num_tokens is {row['num_tokens']}, there are {length}"
    if length and min(row["input_ids"]) < 0:
        yield f"{name}: a negative token id"
    position = 0
    for span in row["step_spans"]:
        if not position <= span["start"] <= span["end"] <= length:
            yield f"{name}: step {span['step']}: span {span['start']}-{span['end']} is out of order"
        position = span["end"]


def _check_packed(row: dict[str, Any], seen: dict[str, Any], *, seq_len: int) -> Iterator[str]:
    ids = np.array(row["input_ids"], np.int32)
    labels = np.array(row["labels"], np.int32)
    name = f"sequence with {row['trajectory_ids'][0] if row['trajectory_ids'] else 'nothing'}"
    if not len(ids) == len(labels) == sum(row["seq_lengths"]) <= seq_len:
        yield f"{name}: ids, labels and seq_lengths disagree, or exceed seq_len {seq_len}"
        return
    if len(row["seq_lengths"]) != len(row["trajectory_ids"]) or min(row["seq_lengths"]) < 1:
        yield f"{name}: expected one trajectory id and a length >= 1 for each document"
    expected = np.full(len(ids), IGNORED, np.int32)
    bounds = np.cumsum([0, *row["seq_lengths"]])
    position = 0
    weight_sum = 0.0
    for run in row["loss_weights"]:
        start, end, weight = run["start"], run["start"] + run["length"], run["weight"]
        next_bound = np.searchsorted(bounds, start, side="right")
        in_document = start < len(ids) and end <= bounds[next_bound]
        if not (position <= start < end and in_document and 0 < weight < np.inf):
            yield f"{name}: run {start}-{end} of weight {weight}: out of order or over a boundary"
        expected[start:end] = ids[start:end]
        weight_sum += weight * run["length"]
        position = end
    if not np.array_equal(expected, labels):
        yield f"{name}: labels are not the ids where the weight is > 0 and {IGNORED} elsewhere"
    _add(
        seen,
        num_sequences=1,
        num_documents=len(row["seq_lengths"]),
        num_tokens=len(ids),
        num_loss_tokens=int((labels != IGNORED).sum()),
    )


def _check_counts(manifest: Manifest, seen: dict[str, Any]) -> Iterator[str]:
    for name, found in seen["totals"].items():
        if name in manifest.counts and manifest.counts[name] != found:
            yield f"the manifest counts {manifest.counts[name]} {name}, the files hold {found}"
    for file in manifest.files:
        path = manifest.path / file["name"]
        if "rows" in file and path.exists():
            try:
                rows = describe_file(path)["rows"]
            except (pa.ArrowException, OSError):
                continue  # reported when it was read
            if rows != file["rows"]:
                yield f"{path.name}: expected {file['rows']} rows, got {rows}"


def _add(seen: dict[str, Any], **numbers: int) -> None:
    for name, number in numbers.items():
        seen["totals"][name] = seen["totals"].get(name, 0) + number


def _is_json_list(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), list)
    except orjson.JSONDecodeError:
        return False
