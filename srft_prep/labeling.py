"""Trajectories -> labels: put every step to a critic, once, and keep every answer.

Requests stream to the critic and replies into the ledger. The tables `labels.parquet` and
`requests.parquet` are rebuilt from the ledger at the end, for the trajectories of this run and
this critic; memory holds one batch of rows and the ledger's index.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.config import LabelConfig, Only
from srft_prep.critic import Critic, CriticReply, CriticRequest
from srft_prep.ledger import USAGE, Ledger, key_of, labels_of, ledger_files
from srft_prep.progress import Progress, Silent
from srft_prep.schemas import LABELS, REQUESTS
from srft_prep.storage import (
    MANIFEST,
    PARQUET_OPTIONS,
    Manifest,
    StageWriter,
    atomic_path,
    read_manifest,
)
from srft_prep.trajectories import read_trajectories
from srft_prep.types import LABELS as LABEL_NAMES
from srft_prep.types import Trajectory

LABELS_FILE: Final = "labels.parquet"
REQUESTS_FILE: Final = "requests.parquet"
ROW_GROUP_ROWS: Final = 1 << 15
WHOLE: Final = "all"
"""The part of a request that asks for all steps of a trajectory at once."""


def label(
    trajectories: Path,
    output: Path,
    critic: Critic,
    config: LabelConfig,
    *,
    retry_failed: bool = False,
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Label the steps of a trajectory directory and return the label directory's manifest.

    A directory accumulates: another run with more trajectories, another critic or another
    question adds to its ledger, and the tables then hold this run's critic.

    Raises:
        ShardError: `trajectories` is no finished `ingest` output.
        ConfigError: the output cannot be written to.
        BackendError: the critic cannot work at all.
    """
    source = read_manifest(trajectories, stage="ingest").checked()
    progress = progress or Silent()
    with (
        StageWriter.open(
            output,
            stage="label",
            config=asdict(config),
            inputs=[source.as_input()],
            accumulates=True,
        ) as writer,
        Ledger(output) as ledger,
    ):
        counts: Counter[str] = Counter()
        requests = _missing(source, config, ledger, counts, progress, retry_failed=retry_failed)
        for reply in critic.label(requests):
            checked = _checked(reply)
            key = key_of(
                checked.request, critic_id=config.critic_id, prompt_hash=config.prompt_hash
            )
            ledger.append(key, checked)
            counts["asked"] += 1
            progress.advance()
        (output / MANIFEST).unlink(missing_ok=True)
        counts.update(_write_tables(source, output, config, ledger))
        if ledger.num_damaged:
            counts["damaged_ledger_lines"] = ledger.num_damaged
        names = [LABELS_FILE, REQUESTS_FILE, *(path.name for path in ledger_files(output))]
        return writer.finish(counts=dict(counts), names=names, command=command or [])


def count_trajectories(trajectories: Path, config: LabelConfig) -> int:
    """Return how many trajectories a run would look at, for a progress bar's total."""
    source = read_manifest(trajectories, stage="ingest").checked()
    return sum(1 for _ in _selected_keys(source, config))


def wanted(resolved: bool | None, only: Only) -> bool:
    """Return whether a trajectory of an outcome is labelled; unknown counts as unresolved."""
    return only == "all" or (resolved is True) == (only == "resolved")


def _selected_keys(source: Manifest, config: LabelConfig) -> Iterator[tuple[str, str]]:
    """Yield (trajectory_id, content_hash) of the trajectories of a run, in order."""
    columns = ["trajectory_id", "content_hash", "resolved", "num_steps"]
    for part in source.parts:
        for name, content_hash, resolved, steps in pl.read_parquet(part, columns=columns).rows():
            if steps and wanted(resolved, config.only):
                yield name, content_hash


def _request(trajectory: Trajectory) -> CriticRequest:
    return CriticRequest(
        trajectory=trajectory, part=WHOLE, steps=tuple(range(trajectory.num_steps))
    )


def _missing(
    source: Manifest,
    config: LabelConfig,
    ledger: Ledger,
    counts: Counter[str],
    progress: Progress,
    *,
    retry_failed: bool,
) -> Iterator[CriticRequest]:
    """Yield the requests that the ledger has no answer to, each key once."""
    sent = set()
    names = {name for name, _ in _selected_keys(source, config)}
    for trajectory in read_trajectories(source.parts):
        if trajectory.trajectory_id not in names:
            continue
        request = _request(trajectory)
        key = key_of(request, critic_id=config.critic_id, prompt_hash=config.prompt_hash)
        if key in sent or ledger.has(key, failed=not retry_failed):
            counts["reused"] += 1
            progress.advance()
        else:
            sent.add(key)
            yield request


def _checked(reply: CriticReply) -> CriticReply:
    """Return the reply, or a failure where its labels are not exactly those asked for."""
    if reply.failure is not None:
        return replace(reply, labels=())
    got = [step_label.step_index for step_label in reply.labels]
    unknown = {step_label.label for step_label in reply.labels}.difference(LABEL_NAMES)
    if sorted(got) != sorted(reply.request.steps):
        reason = f"expected one label for each of {len(reply.request.steps)} steps, got {got}"
    elif unknown:
        reason = f"expected labels {', '.join(LABEL_NAMES)}, got {', '.join(sorted(unknown))}"
    else:
        return reply
    return replace(reply, labels=(), failure=reason)


def _write_tables(
    source: Manifest, output: Path, config: LabelConfig, ledger: Ledger
) -> Counter[str]:
    counts: Counter[str] = Counter(trajectories=0, steps=0, good=0, unnecessary=0, harmful=0)
    counts["failures"] = 0
    with (
        atomic_path(output / LABELS_FILE) as labels_path,
        atomic_path(output / REQUESTS_FILE) as requests_path,
        pq.ParquetWriter(labels_path, LABELS, **PARQUET_OPTIONS) as labels_writer,
        pq.ParquetWriter(requests_path, REQUESTS, **PARQUET_OPTIONS) as requests_writer,
    ):
        label_rows: list[dict[str, Any]] = []
        request_rows: list[dict[str, Any]] = []
        for trajectory_id, entry in _entries(source, config, ledger):
            rows = list(_label_rows(trajectory_id, entry))
            label_rows += rows
            request_rows.append(_request_row(trajectory_id, entry))
            counts["trajectories"] += 1
            counts["steps"] += len(rows)
            counts["failures"] += entry["failure"] is not None
            counts.update(row["label"] for row in rows)
            if len(label_rows) >= ROW_GROUP_ROWS:
                labels_writer.write_table(pa.Table.from_pylist(label_rows, schema=LABELS))
                requests_writer.write_table(pa.Table.from_pylist(request_rows, schema=REQUESTS))
                label_rows, request_rows = [], []
        labels_writer.write_table(pa.Table.from_pylist(label_rows, schema=LABELS))
        requests_writer.write_table(pa.Table.from_pylist(request_rows, schema=REQUESTS))
    return counts


def _entries(
    source: Manifest, config: LabelConfig, ledger: Ledger
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (trajectory_id, ledger entry) of the trajectories of a run, in order.

    A copy of an earlier trajectory has its labels, at no cost: nothing was asked for it. One that
    the critic gave no reply to has a failure that is not in the ledger.
    """
    paid = set()
    for name, content_hash in _selected_keys(source, config):
        key = (content_hash, config.critic_id, config.prompt_hash, WHOLE)
        entry = ledger.get(key)
        if entry is None:
            unanswered = {"part": WHOLE, "labels": [], "failure": "the critic gave no reply"}
            yield name, {**unanswered, **dict.fromkeys(USAGE, 0)}
        elif content_hash in paid:
            yield name, {**entry, **dict.fromkeys(USAGE, 0)}
        else:
            paid.add(content_hash)
            yield name, {**entry, **ledger.spent(key)}


def _label_rows(trajectory_id: str, entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for step_label in sorted(labels_of(entry), key=lambda row: row.step_index):
        yield {
            "trajectory_id": trajectory_id,
            "content_hash": entry["content_hash"],
            "critic_id": entry["critic_id"],
            "prompt_hash": entry["prompt_hash"],
            **asdict(step_label),
        }


def _request_row(trajectory_id: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "trajectory_id": trajectory_id,
        "part": entry["part"],
        "failure": entry["failure"],
        **{name: entry[name] for name in USAGE},
    }
