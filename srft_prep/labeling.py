"""Trajectories -> labels: put every step to a critic, once, and keep every answer.

Requests stream to the critic and replies into the ledger. The tables `labels.parquet` and
`requests.parquet` are rebuilt from the ledger at the end, with all that it holds of this critic and
these trajectories, whichever of them this run asked about; memory holds one batch of rows and the
ledger's index. A run with nothing to ask reads no message.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.config import LabelConfig, Only
from srft_prep.critic import Critic, CriticReply, CriticRequest
from srft_prep.errors import ConfigError
from srft_prep.ledger import USAGE, Key, Ledger, key_of, labels_of, ledger_files
from srft_prep.manifest import MANIFEST, Manifest, read_manifest
from srft_prep.progress import Progress, Silent
from srft_prep.schemas import LABELS, LABELS_FILE, REQUESTS, REQUESTS_FILE
from srft_prep.storage import PARQUET_OPTIONS, StageWriter, atomic_path
from srft_prep.trajectories import read_trajectories
from srft_prep.types import LABELS as LABEL_NAMES
from srft_prep.types import Trajectory

ROW_GROUP_ROWS: Final = 1 << 15
SHOWN_FAILURES: Final = 3
"""How many failures the manifest spells out; all of them are in the table of requests."""
WHOLE: Final = "all"
"""The part of a request that asks for all steps of a trajectory at once."""


def label(
    trajectories: Path,
    output: Path,
    critic: Critic,
    config: LabelConfig,
    *,
    retry_failed: bool = False,
    overwrite: bool = False,
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Label the steps of a trajectory directory and return the label directory's manifest.

    A directory accumulates: another run with more trajectories adds to its ledger and its tables.
    So does one of another critic or question with `overwrite`: the tables are then its own, and
    the ledger keeps both. The manifest describes what the directory holds; its `run` counts what
    this run `asked` and `reused`, and `damaged_ledger_lines`.

    Raises:
        ShardError: `trajectories` is no finished `ingest` output.
        ConfigError: the output cannot be written to, or its tables hold the labels of another
            critic or question and `overwrite` is not set.
        BackendError: the critic cannot work at all.
    """
    source = read_manifest(trajectories, stage="ingest").checked()
    progress = progress or Silent()
    if not overwrite:
        _refuse_other_critic(output, config)
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
        for row in _rows(source.parts, config):
            ledger.drop_unless_complete(row.key, num_steps=row.num_steps)
        run: Counter[str] = Counter()
        requests = _missing(source, config, ledger, run, progress, retry_failed=retry_failed)
        for reply in critic.label(requests):
            checked = _checked(reply)
            key = key_of(
                checked.request, critic_id=config.critic_id, prompt_hash=config.prompt_hash
            )
            ledger.append(key, checked)
            run["asked"] += 1
            progress.advance()
        (output / MANIFEST).unlink(missing_ok=True)
        counts, failures = _write_tables(source, output, config, ledger)
        if ledger.num_damaged:
            run["damaged_ledger_lines"] = ledger.num_damaged
        return writer.finish(
            counts=dict(counts),
            names=[LABELS_FILE, REQUESTS_FILE, *(path.name for path in ledger_files(output))],
            command=command or [],
            extra={"first_failures": failures},
            run=dict(run),
        )


def count_trajectories(trajectories: Path, config: LabelConfig) -> int:
    """Return how many trajectories a run would look at, for a progress bar's total.

    The parts are not hashed for it: `label` does that.

    Raises:
        ShardError: `trajectories` is no finished `ingest` output, or a part cannot be read.
    """
    source = read_manifest(trajectories, stage="ingest")
    try:
        return sum(row.selected for row in _rows(source.parts, config))
    except (OSError, pl.exceptions.PolarsError):
        source.checked()
        raise


def wanted(resolved: bool | None, only: Only) -> bool:
    """Return whether a trajectory of an outcome is labelled; unknown counts as unresolved."""
    return only == "all" or (resolved is True) == (only == "resolved")


def _refuse_other_critic(output: Path, config: LabelConfig) -> None:
    if not (output / MANIFEST).exists():
        return
    held = read_manifest(output).data["config"]
    old = held.get("critic_id"), held.get("prompt_hash")
    new = config.critic_id, config.prompt_hash
    if None in old or old == new:
        return
    old_name, new_name = (
        f"{critic} (prompt {prompt})" if old[0] == new[0] else critic
        for critic, prompt in (old, new)
    )
    raise ConfigError(
        f"{output}: holds labels of {old_name}; choose another -o, or say --overwrite to write "
        f"the tables of {new_name} anew; the ledger keeps both"
    )


class _Row(NamedTuple):
    """What the columns say of a trajectory that has steps."""

    trajectory_id: str
    key: Key
    num_steps: int
    selected: bool
    """Whether this run labels it."""


def _rows(parts: Iterable[Path], config: LabelConfig) -> Iterator[_Row]:
    """Yield the trajectories of parts that have steps, in order, without their messages."""
    columns = ["trajectory_id", "content_hash", "resolved", "num_steps"]
    for part in parts:
        for name, content_hash, resolved, steps in pl.read_parquet(part, columns=columns).rows():
            if steps:
                key = (content_hash, config.critic_id, config.prompt_hash, WHOLE)
                yield _Row(name, key, steps, wanted(resolved, config.only))


def _request(trajectory: Trajectory) -> CriticRequest:
    return CriticRequest(
        trajectory=trajectory, part=WHOLE, steps=tuple(range(trajectory.num_steps))
    )


def _missing(
    source: Manifest,
    config: LabelConfig,
    ledger: Ledger,
    run: Counter[str],
    progress: Progress,
    *,
    retry_failed: bool,
) -> Iterator[CriticRequest]:
    """Yield the requests that the ledger has no answer to, each key once."""
    sent: set[Key] = set()
    for part in source.parts:
        names = set()
        for row in _rows([part], config):
            if not row.selected:
                continue
            if row.key in sent or ledger.has(row.key, failed=not retry_failed):
                run["reused"] += 1
                progress.advance()
            else:
                sent.add(row.key)
                names.add(row.trajectory_id)
        for trajectory in read_trajectories([part]) if names else ():
            if trajectory.trajectory_id in names:
                yield _request(trajectory)


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
) -> tuple[Counter[str], list[str]]:
    """Return the counts of the tables' rows and the first failures."""
    failures: list[str] = []
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
            if entry["failure"] is not None:
                counts["failures"] += 1
                if len(failures) < SHOWN_FAILURES:
                    failures.append(f"{trajectory_id}: {entry['failure']}")
            counts.update(row["label"] for row in rows)
            if len(label_rows) >= ROW_GROUP_ROWS:
                labels_writer.write_table(pa.Table.from_pylist(label_rows, schema=LABELS))
                requests_writer.write_table(pa.Table.from_pylist(request_rows, schema=REQUESTS))
                label_rows, request_rows = [], []
        labels_writer.write_table(pa.Table.from_pylist(label_rows, schema=LABELS))
        requests_writer.write_table(pa.Table.from_pylist(request_rows, schema=REQUESTS))
    return counts, failures


def _entries(
    source: Manifest, config: LabelConfig, ledger: Ledger
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (trajectory_id, ledger entry) of the trajectories that have one, in order.

    A copy of an earlier trajectory has its labels, at no cost: nothing was asked for it. One of
    this run that the critic gave no reply to has a failure that is not in the ledger.
    """
    paid = set()
    for row in _rows(source.parts, config):
        entry = ledger.get(row.key)
        if entry is None:
            if row.selected:
                unanswered = {"part": WHOLE, "labels": [], "failure": "the critic gave no reply"}
                yield row.trajectory_id, {**unanswered, **dict.fromkeys(USAGE, 0)}
        elif row.key in paid:
            yield row.trajectory_id, {**entry, **dict.fromkeys(USAGE, 0)}
        else:
            paid.add(row.key)
            yield row.trajectory_id, {**entry, **ledger.spent(row.key)}


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
