"""Ledger -> `labels.parquet` and `requests.parquet`: a panel's labels, and what was asked for them.

The tables are rebuilt part by part from what the ledger holds (`ledger_labels`, `panel`); memory
holds the steps of a part and the rows of a row group. Only where a calibration looks at the rules'
evidence are messages read.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.cascade_report import CascadeTally
from srft_prep.ledger import Ledger, Subject
from srft_prep.ledger_labels import requests_in
from srft_prep.manifest import Manifest
from srft_prep.panel import Panel, Stage, Trajectories, judged, stages, trajectories_of
from srft_prep.row_runs import table_of
from srft_prep.schemas import LABELS, LABELS_FILE, REQUESTS, REQUESTS_FILE
from srft_prep.storage import PARQUET_OPTIONS, atomic_path
from srft_prep.types import LABELS as NAMES

ROW_GROUP_ROWS: Final = 1 << 15
SHOWN_FAILURES: Final = 3
"""How many failures the manifest spells out; all of them are in the table of requests."""
WENT_ON: Final = "went_on"
"""The count of failures in a cascade that cost no label: other critics labelled those steps."""


@dataclass(slots=True, kw_only=True)
class Tables:
    """What was written."""

    counts: Counter[str]
    """Of the manifest."""
    failures: list[str] = field(default_factory=list)
    """The first ones, in words."""
    cascade: CascadeTally | None = None
    """Who settled what; None for anything but a cascade."""


@dataclass(slots=True)
class LabelFiles:
    """Both files being written; their row groups end together, at a part's end."""

    labels_writer: pq.ParquetWriter
    requests_writer: pq.ParquetWriter
    labels: list[pa.RecordBatch] = field(default_factory=list)
    """Rows of the row group under way."""
    requests: list[pa.RecordBatch] = field(default_factory=list)

    def end_part(self) -> None:
        """Write a row group of each if there is enough for one."""
        if sum(map(len, self.labels)) >= ROW_GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write a row group of each, even if it is empty."""
        self.labels_writer.write_table(table_of(self.labels, LABELS))
        self.requests_writer.write_table(table_of(self.requests, REQUESTS))
        self.labels, self.requests = [], []


@contextmanager
def opened_files(output: Path) -> Iterator[LabelFiles]:
    """Give both files of a directory to write; whole they appear, at the end, or not at all."""
    with (
        atomic_path(output / LABELS_FILE) as labels_path,
        atomic_path(output / REQUESTS_FILE) as requests_path,
        pq.ParquetWriter(labels_path, LABELS, **PARQUET_OPTIONS) as labels_writer,
        pq.ParquetWriter(requests_path, REQUESTS, **PARQUET_OPTIONS) as requests_writer,
    ):
        files = LabelFiles(labels_writer, requests_writer)
        yield files
        files.flush()


def write_tables(
    source: Manifest, output: Path, panel: Panel, ledger: Ledger, *, unasked: str
) -> Tables:
    """Write both tables; `unasked` says why nobody was asked about some steps."""
    counts: Counter[str] = Counter(trajectories=0, steps=0, **dict.fromkeys(NAMES, 0))
    counts["failures"] = 0
    tables = Tables(counts=counts)
    if panel.is_cascade:
        tables.cascade = CascadeTally.of(panel)
        counts[WENT_ON] = 0
    paid: set[tuple[Subject, str]] = set()
    with opened_files(output) as files:
        for part in source.parts:
            labels, requests = _part(part, panel, ledger, tables, paid, unasked=unasked)
            files.labels += labels.to_batches()
            files.requests += pa.Table.from_pylist(requests, schema=REQUESTS).to_batches()
            files.end_part()
    return tables


def _part(
    part: Path,
    panel: Panel,
    ledger: Ledger,
    tables: Tables,
    paid: set[tuple[Subject, str]],
    *,
    unasked: str,
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Return the labels and the rows of the requests of a part, and count them."""
    found = trajectories_of(part, panel)
    taken = stages(panel, ledger, found)
    labels = judged(panel, found, taken)
    num_labels = dict(labels["trajectory_id"].value_counts().iter_rows())
    kept: list[str] = []
    requests: list[dict[str, Any]] = []
    for number, row in enumerate(found.rows[0]):
        given = num_labels.get(row.trajectory_id, 0)
        if len(panel.members) > 1 and not row.selected and given < row.num_steps:
            continue  # an earlier run asked some of these critics about it, and no more
        asked = _requests(panel, ledger, found, taken, number, paid, unasked=unasked)
        if panel.is_cascade and given == row.num_steps:
            failed = (each["failure"] is not None for of_critic in asked for each in of_critic)
            tables.counts[WENT_ON] += sum(failed)
        if any(asked):
            kept.append(row.trajectory_id)
            requests += [each for of_critic in asked for each in of_critic]
            if tables.cascade is not None:
                tables.cascade.add(found, taken, number, asked)
    labels = labels.filter(labels["trajectory_id"].is_in(kept))
    tables.counts.update(trajectories=len(kept), steps=labels.height)
    tables.counts.update(labels["label"].to_list())
    for each in requests:
        if each["failure"] is not None:
            tables.counts["failures"] += 1
            tables.failures.append(f"{each['trajectory_id']}: {each['failure']}")
    del tables.failures[SHOWN_FAILURES:]
    return labels.select(LABELS.names).to_arrow().cast(LABELS), requests


def _requests(
    panel: Panel,
    ledger: Ledger,
    found: Trajectories,
    taken: Sequence[Stage],
    number: int,
    paid: set[tuple[Subject, str]],
    *,
    unasked: str,
) -> list[list[dict[str, Any]]]:
    """Return the rows of the requests about a trajectory, by critic."""
    return [
        list(
            requests_in(
                ledger,
                rows[number],
                member,
                stage.labels[number],
                paid,
                unasked=unasked,
                steps=stage.needed[number],
            )
        )
        for rows, member, stage in zip(found.rows, panel.members, taken, strict=True)
    ]
