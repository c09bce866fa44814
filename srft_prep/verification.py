"""Checks of a finished stage directory: files against the manifest, rows against the laws.

Reading goes through the page checksums, so that a flipped byte is named as damage even where the
manifest was written anew over it; every check of rows and totals holds without the checksums too.
Cost: one pass over the bytes for SHA-256 and one over the rows.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.config import OUTCOMES
from srft_prep.errors import in_one_line
from srft_prep.hashes import sha256_of
from srft_prep.judgements import are_distributions
from srft_prep.manifest import Manifest, names_in, read_manifest
from srft_prep.object_mirror import is_mirrored
from srft_prep.schemas import (
    HELD_OUT_FILE,
    LABELS_FILE,
    PROBABILITIES,
    REQUESTS,
    REQUESTS_FILE,
    SHARDS,
    TOKENS,
    TRAJECTORIES,
)
from srft_prep.schemas import LABELS as LABELS_SCHEMA
from srft_prep.shard_checks import ShardSums, check_held_out
from srft_prep.shard_files import IGNORED
from srft_prep.token_checks import check_columns
from srft_prep.trajectories import trajectory_of
from srft_prep.types import KINDS, LABELS

MAX_PROBLEMS: Final = 100
"""After this many problems of one file its remaining rows are not reported."""

_CRITIC: Final = ("critic_id", "prompt_hash")

_SCHEMAS: Final = {"ingest": TRAJECTORIES, "tokenize": TOKENS, "pack": SHARDS}

_TOTALS: Final = {
    "ingest": ("trajectories", "steps"),
    "label": ("trajectories", "steps", *LABELS, "failures"),
    "tokenize": ("sequences", "tokens", "step_tokens"),
    "pack": ("num_sequences", "num_documents", "num_tokens", "num_loss_tokens"),
}
"""Counts of the manifests that rows add up to; of an export the bytes alone are checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `verify` found."""

    stage: str
    num_files: int
    num_rows: int
    """Rows that could be read."""
    problems: tuple[str, ...]
    """One line a problem, each naming its file; empty for a sound directory."""


@dataclass(slots=True, kw_only=True)
class _Seen:
    """What is remembered of the rows read so far, for what no single row can show."""

    num_rows: int = 0
    totals: Counter[str] = field(default_factory=Counter)
    """What the rows add up to, under the names of the manifest's counts."""
    by_value: dict[str, Counter[str]] = field(default_factory=dict)
    """Rows by a column's value, under the names of the manifest's counts."""
    keys: set[Hashable] = field(default_factory=set)
    """What must not come a second time."""
    ids: set[str] = field(default_factory=set)
    """Trajectories."""
    last_step: tuple[str, int] = ("", -1)
    """Trajectory and step of the label before this one."""
    gaps: dict[str, str] = field(default_factory=dict)
    """By trajectory the first step that comes where another was due."""
    answered: set[str] = field(default_factory=set)
    """Trajectories of which a request did not fail."""
    labelled: set[str] = field(default_factory=set)
    """Those of which one did not fail whose labels count, whatever the votes and the context."""
    failed: dict[str, str] = field(default_factory=dict)
    """Trajectories of which a request failed, with the first reason."""
    sums: ShardSums = field(default_factory=ShardSums)
    """Sums of weights."""

    def is_new(self, key: Hashable) -> bool:
        """Return whether a key comes for the first time, and remember it."""
        known = key in self.keys
        self.keys.add(key)
        return not known


def verify(directory: Path) -> Report:
    """Check a finished stage directory.

    Raises:
        ShardError: the directory has no readable manifest.
    """
    manifest = read_manifest(directory)
    seen = _Seen()
    problems: list[str] = []
    in_store = manifest.problems(ledgers=True, anew=True) if is_mirrored(directory) else {}
    for file in manifest.files:
        path = directory / file["name"]
        if lost := in_store.get(file["name"], "" if path.is_file() else "missing"):
            problems.append(f"{path}: {lost}")
            continue
        problems += [f"{path}: {problem}" for problem in _check_bytes(path, file)]
        found = _check_lines(path, manifest) if path.suffix == ".jsonl" else iter(())
        if path.suffix == ".parquet" and manifest.stage in _TOTALS:
            found = _check_parquet(manifest, path, file.get("rows"), seen)
        for number, problem in enumerate(found):
            if number == MAX_PROBLEMS:
                problems.append(f"{path}: more problems")
                break
            problems.append(f"{path}: {problem}")
    named = {file["name"] for file in manifest.files}
    for pattern in ("part-*.parquet", "shard-*.parquet"):
        strangers = sorted(each for each in names_in(directory) - named if fnmatch(each, pattern))
        problems += [
            f"{directory / each}: the manifest does not name this file" for each in strangers
        ]
    problems += _check_steps(directory, seen)
    problems += [f"{directory}: {problem}" for problem in _check_totals(manifest, seen)]
    return Report(
        stage=manifest.stage,
        num_files=len(manifest.files),
        num_rows=seen.num_rows,
        problems=tuple(problems),
    )


def _check_bytes(path: Path, file: dict[str, Any]) -> Iterator[str]:
    size = path.stat().st_size
    if size != file.get("bytes"):
        yield f"expected {file.get('bytes')} bytes, got {size}"
        return
    if sha256_of(path) != file["sha256"]:
        yield "its bytes are not those that were written (SHA-256 differs)"


def _check_lines(path: Path, manifest: Manifest) -> Iterator[str]:
    """Check the rejected records; a ledger may hold torn lines, which `label` counts."""
    if path.name.startswith("ledger-") or path.name == HELD_OUT_FILE:
        return
    lines = path.read_bytes().splitlines()
    if len(lines) != manifest.counts.get("rejected"):
        yield f"expected {manifest.counts.get('rejected')} lines, got {len(lines)}"
    for number, line in enumerate(lines, start=1):
        try:
            reason = orjson.loads(line)["reason"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            reason = None
        if not isinstance(reason, str):
            yield f"line {number} is no rejected record with a reason"


def _check_parquet(
    manifest: Manifest, path: Path, num_rows: int | None, seen: _Seen
) -> Iterator[str]:
    schema = _SCHEMAS.get(manifest.stage)
    if schema is None:
        schema = LABELS_SCHEMA if path.name == LABELS_FILE else REQUESTS
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(schema):
                yield f"expected the columns {_columns(schema)}; got {_columns(file.schema_arrow)}"
                return
            if file.metadata.num_rows != num_rows:
                yield f"expected {num_rows} rows, got {file.metadata.num_rows}"
            for group in range(file.num_row_groups):
                for row in _rows(file.read_row_group(group)):
                    seen.num_rows += 1
                    yield from _check_row(manifest, path, row, seen)
            if manifest.stage == "pack":
                yield from seen.sums.check_file(path.name, file.metadata.metadata or {})
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield f"cannot be read: {in_one_line(error, limit=300)}"


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{column.name} {column.type}" for column in schema)


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield rows as Python values, but lists of integers as arrays: token ids are many."""
    columns = []
    for column in table.columns:
        if pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type):
            columns.append([value.values.to_numpy() for value in column])
        else:
            columns.append(column.to_pylist())
    for values in zip(*columns, strict=True):
        yield dict(zip(table.column_names, values, strict=True))


def _check_row(manifest: Manifest, path: Path, row: dict[str, Any], seen: _Seen) -> Iterator[str]:
    if manifest.stage == "ingest":
        yield from _check_trajectory(row, seen)
    elif manifest.stage == "tokenize":
        yield from _check_tokens(row, seen)
    elif manifest.stage == "pack":
        yield from _check_packed(path.name, row, seen, seq_len=manifest.data["seq_len"])
    elif path.name == LABELS_FILE:
        yield from _check_label(row, seen, config=manifest.data["config"])
    else:
        yield from _check_request(row, seen)


def _check_trajectory(row: dict[str, Any], seen: _Seen) -> Iterator[str]:
    name = row["trajectory_id"]
    seen.totals.update(trajectories=1, steps=row["num_steps"])
    seen.by_value.setdefault("outcomes", Counter())[OUTCOMES[row["resolved"]]] += 1
    seen.by_value.setdefault("formats", Counter())[row["format"]] += 1
    if not seen.is_new(name):
        yield f"{name}: the id occurs twice"
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
    if trajectory.tools is not None and not _is_json_list(trajectory.tools):
        yield f"{name}: tools is no JSON list"


def _check_label(row: dict[str, Any], seen: _Seen, *, config: dict[str, Any]) -> Iterator[str]:
    trajectory_id, step = row["trajectory_id"], row["step_index"]
    name = f"{trajectory_id}: step {step}"
    seen.totals.update(["steps", row["label"]])
    last_id, last_step = seen.last_step
    due = last_step + 1 if trajectory_id == last_id else 0
    if not seen.is_new((trajectory_id, step)):
        yield f"{name}: has two labels"
    elif step < due or (trajectory_id != last_id and trajectory_id in seen.ids):
        yield f"{name}: out of order, expected step {due}"
    elif step > due:
        seen.gaps.setdefault(trajectory_id, f"{name}: out of order, expected step {due}")
    seen.ids.add(trajectory_id)
    seen.last_step = (trajectory_id, step)
    if row["label"] not in LABELS:
        yield f"{name}: expected a label of {', '.join(LABELS)}, got {row['label']!r}"
    if config.get("together") == "cascade":  # a label is of the critic that settled the step
        critics = [[member.get(key) for key in _CRITIC] for member in config.get("members", ())]
        if [row[key] for key in _CRITIC] not in critics:
            got = " with prompt ".join(row[key] for key in _CRITIC)
            yield f"{name}: expected a critic of the cascade, got {got}"
    else:
        for key in _CRITIC:
            if row[key] != config.get(key):
                yield f"{name}: expected {key} {config.get(key)}, got {row[key]}"
    probabilities = [row[name] for name in PROBABILITIES]
    given = [p for p in probabilities if p is not None]
    if given and (len(given) < len(LABELS) or not are_distributions(np.array([given])).all()):
        yield f"{name}: expected three probabilities that sum to 1, got {probabilities}"


def _check_request(row: dict[str, Any], seen: _Seen) -> Iterator[str]:
    name, failure = row["trajectory_id"], row["failure"]
    is_first = name not in seen.answered and name not in seen.failed
    seen.totals.update(trajectories=is_first, failures=failure is not None)
    if failure is None:
        seen.answered.add(name)
        if "+" not in row["part"]:
            seen.labelled.add(name)
    else:
        seen.failed.setdefault(name, failure)
    if not seen.is_new((name, row["part"], *(row[key] for key in _CRITIC))):
        yield f"{name}: part {row['part']} occurs twice"
    costs = [value for value in row.values() if isinstance(value, int | float)]
    if not all(math.isfinite(cost) and cost >= 0 for cost in costs):
        yield f"{name}: expected counts, seconds and usd >= 0"


def _check_steps(directory: Path, seen: _Seen) -> Iterator[str]:
    """Check labels against requests: steps lack a label only where one of theirs failed."""
    failed = seen.failed
    gaps = [problem for name, problem in seen.gaps.items() if name not in failed]
    others = [
        *(f"{name}: has no labels" for name in seen.labelled - seen.ids - failed.keys()),
        *(
            f"{name}: has labels, but failed: {failure}"
            for name, failure in failed.items()
            if name in seen.ids and name not in seen.answered
        ),
    ]
    for file, problems in ((LABELS_FILE, gaps), (REQUESTS_FILE, sorted(others))):
        yield from (f"{directory / file}: {problem}" for problem in problems[:MAX_PROBLEMS])
        if len(problems) > MAX_PROBLEMS:
            yield f"{directory / file}: more problems"


def _check_tokens(row: dict[str, Any], seen: _Seen) -> Iterator[str]:
    name, ids = row["trajectory_id"], row["input_ids"]
    spans = row["step_spans"]
    seen.totals.update(sequences=1, tokens=len(ids))
    seen.totals["step_tokens"] += sum(span["end"] - span["start"] for span in spans)
    if row["num_tokens"] != len(ids):
        yield f"{name}: num_tokens is {row['num_tokens']}, there are {len(ids)}"
    if len(ids) and ids.min() < 0:
        yield f"{name}: a negative token id"
    if not spans and not seen.is_new(name):
        yield f"{name}: occurs twice"
    position, last_step = 0, -1
    for span in spans:
        step, start, end = span["step"], span["start"], span["end"]
        if not position <= start <= end <= len(ids):
            yield f"{name}: step {step}: span {start}-{end} is out of order or bounds"
        if step <= last_step:
            yield f"{name}: step {step} comes after step {last_step}"
        if not seen.is_new((name, step)):
            yield f"{name}: step {step} occurs twice"
        position, last_step = end, step
    yield from (f"{name}: {problem}" for problem in check_columns(row))


def _check_packed(file: str, row: dict[str, Any], seen: _Seen, *, seq_len: int) -> Iterator[str]:
    ids, labels, lengths = row["input_ids"], row["labels"], row["seq_lengths"]
    owners = row["trajectory_ids"]
    name = f"sequence with {owners[0] if owners else 'nothing'}"
    seen.totals.update(num_sequences=1, num_documents=len(lengths), num_tokens=len(ids))
    seen.totals["num_loss_tokens"] += int((labels != IGNORED).sum())
    seen.ids.update(owners)
    if not len(ids) == len(labels) == lengths.sum() <= seq_len:
        yield f"{name}: ids, labels and seq_lengths disagree, or exceed seq_len {seq_len}"
        return
    if len(lengths) != len(owners) or not len(lengths) or lengths.min() < 1:
        yield f"{name}: expected one trajectory id and a length >= 1 for each document"
        return
    bounds = np.cumsum([0, *lengths])
    for owner, start, end in zip(owners, bounds, bounds[1:], strict=False):
        digest = hashlib.blake2b(ids[start:end].tobytes(), digest_size=16).digest()
        if not seen.is_new((owner, digest)):
            yield f"{name}: the document of {owner} at {start} occurs twice"
    expected = np.full(len(ids), IGNORED, np.int32)
    position = 0
    for run in row["loss_weights"]:
        start, end, weight = run["start"], run["start"] + run["length"], run["weight"]
        if not 0 < weight < math.inf:
            yield f"{name}: run {start}-{end} has weight {weight}, expected a finite one > 0"
        if not position <= start < end <= len(ids):
            yield f"{name}: run {start}-{end} is empty, out of order or out of bounds"
        elif end > bounds[np.searchsorted(bounds, start, side="right")]:
            yield f"{name}: run {start}-{end} crosses from one document into the next"
        elif start in bounds:
            yield f"{name}: run {start}-{end} weights a document's first token: nothing predicts it"
        expected[max(start, 0) : max(end, 0)] = ids[max(start, 0) : max(end, 0)]
        position = end
    if not np.array_equal(expected, labels):
        yield f"{name}: labels are not the ids where the weight is > 0 and {IGNORED} elsewhere"
    yield from (f"{name}: {problem}" for problem in seen.sums.add(file, row))


def _check_totals(manifest: Manifest, seen: _Seen) -> Iterator[str]:
    """Compare what the rows add up to with the manifest's counts, and its copies of them.

    `sum_weights` is the exact sum, rounded once (see `shards`), and so compares exactly too.
    """
    totals: dict[str, Any] = {name: seen.totals[name] for name in _TOTALS.get(manifest.stage, ())}
    totals |= {name: dict(values) for name, values in seen.by_value.items()}
    if manifest.stage == "pack":
        room = totals["num_sequences"] * manifest.data["seq_len"]
        totals["num_trajectories"] = len(seen.ids)
        totals["sum_weights"] = seen.sums.sum_weights()
        totals["fill"] = totals["num_tokens"] / room if room else None
        yield from seen.sums.check_trajectories()
        yield from seen.sums.check_manifest(manifest)
        yield from check_held_out(manifest, seen.ids)
    for name, found in totals.items():
        lines = [
            f"the manifest counts {place[name]} {name}, the files hold {found}"
            for place in (manifest.counts, manifest.data)
            if name in place and place[name] != found
        ]
        yield from dict.fromkeys(lines)  # a count and its copy are mostly wrong alike


def _is_json_list(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), list)
    except orjson.JSONDecodeError:
        return False
