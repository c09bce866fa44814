"""Ledger -> `labels.parquet` and `requests.parquet`: which answers are a trajectory's labels.

A trajectory's labels come from one request about all of it, or from the windows of one limit; of
several limits the first that covers every step counts, the least clipped one before others. With
votes, a step's probabilities are the mean over its answers (an answer without probabilities counts
as certain), its label is the likeliest, and of equals the more severe one: on published labels a
minority that sees harm is right more often than not (reference/CRITIC.md, section 3).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.config import LabelConfig, Only
from srft_prep.critic import WHOLE, StepLabel
from srft_prep.critic.parts import Part, context_hash
from srft_prep.ledger import USAGE, Ledger, Subject, labels_of
from srft_prep.manifest import Manifest
from srft_prep.schemas import LABELS, LABELS_FILE, REQUESTS, REQUESTS_FILE
from srft_prep.storage import PARQUET_OPTIONS, atomic_path
from srft_prep.types import LABELS as NAMES
from srft_prep.types import Label

ROW_GROUP_ROWS: Final = 1 << 15
SHOWN_FAILURES: Final = 3
"""How many failures the manifest spells out; all of them are in the table of requests."""
SCALES: Final = (1.0, 0.75, 0.5, 0.3)
"""Parts of the limit that are tried in turn where a model finds a request over-long."""

_SEVERITY: Final[tuple[Label, ...]] = ("harmful", "unnecessary", "good")


class Row(NamedTuple):
    """What the columns say of a trajectory that has steps."""

    trajectory_id: str
    subject: Subject
    num_steps: int
    context: str | None
    """Hash of what the critic is told beside the trajectory."""
    selected: bool
    """Whether this run labels it."""


def rows_of(parts: Iterable[Path], config: LabelConfig) -> Iterator[Row]:
    """Yield the trajectories of parts that have steps, in order, without their messages."""
    columns = ["trajectory_id", "content_hash", "resolved", "num_steps"]
    if config.context == "patch":
        columns.append("patch")
    for part in parts:
        for name, content_hash, resolved, num_steps, *patch in pl.read_parquet(
            part, columns=columns
        ).rows():
            if num_steps:
                yield Row(
                    trajectory_id=name,
                    subject=(content_hash, config.critic_id, config.prompt_hash),
                    num_steps=num_steps,
                    context=context_hash(config.context, resolved, *patch),
                    selected=wanted(resolved, config.only),
                )


def wanted(resolved: bool | None, only: Only) -> bool:
    """Return whether a trajectory of an outcome is labelled; unknown counts as unresolved."""
    return only == "all" or (resolved is True) == (only == "resolved")


def limits_of(config: LabelConfig) -> list[int | None]:
    """Return the limits whose answers can settle a trajectory in this run, the best first."""
    if config.max_input_tokens is None:
        return [None]
    return [None, *(int(config.max_input_tokens * scale) for scale in SCALES)]


def is_labelled(ledger: Ledger, row: Row, config: LabelConfig) -> bool:
    """Return whether the ledger has all the labels that this run would ask for."""
    limits = _tried_limits(ledger, row, config)
    return all(
        any(_covers(parts.get(limit, ()), row.num_steps) for limit in limits)
        for parts in _answers(ledger, row, config)
    )


def _tried_limits(ledger: Ledger, row: Row, config: LabelConfig) -> list[int | None]:
    """Return the limits whose answers settle a trajectory: a smaller one only after an over-long.

    Half of this run's limit may be the whole one of an earlier run, which left out more.
    """
    over_long: set[int | None] = set()
    for text in ledger.parts(row.subject):
        part, failure = Part.parse(text), ledger.failure((*row.subject, text))
        if part and part.context == row.context and (failure or "").startswith("over-long"):
            over_long.add(part.limit)
    tried: list[int | None] = []
    for limit in limits_of(config):
        tried.append(limit)
        if limit is not None and over_long.isdisjoint((None, limit)):
            break
    return tried


def write_tables(
    source: Manifest, output: Path, config: LabelConfig, ledger: Ledger, *, unasked: str
) -> tuple[Counter[str], list[str]]:
    """Return the counts of the tables' rows and the first failures; `unasked` says why of some."""
    failures: list[str] = []
    counts: Counter[str] = Counter(trajectories=0, steps=0, good=0, unnecessary=0, harmful=0)
    counts["failures"] = 0
    paid: set[tuple[Subject, str]] = set()
    with (
        atomic_path(output / LABELS_FILE) as labels_path,
        atomic_path(output / REQUESTS_FILE) as requests_path,
        pq.ParquetWriter(labels_path, LABELS, **PARQUET_OPTIONS) as labels_writer,
        pq.ParquetWriter(requests_path, REQUESTS, **PARQUET_OPTIONS) as requests_writer,
    ):
        label_rows: list[dict[str, Any]] = []
        request_rows: list[dict[str, Any]] = []
        for row in rows_of(source.parts, config):
            labels = _labels(ledger, row, config)
            requests = list(_requests(ledger, row, config, labels, paid, unasked=unasked))
            if not requests:
                continue
            label_rows += [_label_row(row, label) for label in labels]
            request_rows += requests
            counts.update(["trajectories", *(label.label for label in labels)])
            counts["steps"] += len(labels)
            for request in requests:
                if request["failure"] is not None:
                    counts["failures"] += 1
                    failures += [f"{row.trajectory_id}: {request['failure']}"]
            del failures[SHOWN_FAILURES:]
            if len(label_rows) >= ROW_GROUP_ROWS:
                labels_writer.write_table(pa.Table.from_pylist(label_rows, schema=LABELS))
                requests_writer.write_table(pa.Table.from_pylist(request_rows, schema=REQUESTS))
                label_rows, request_rows = [], []
        labels_writer.write_table(pa.Table.from_pylist(label_rows, schema=LABELS))
        requests_writer.write_table(pa.Table.from_pylist(request_rows, schema=REQUESTS))
    return counts, failures


def merged(answers: Sequence[StepLabel]) -> StepLabel:
    """Return one label for a step of which there are several; one by itself stays as it is."""
    if len(answers) == 1:
        return answers[0]
    sums: dict[Label, float] = dict.fromkeys(NAMES, 0.0)
    for answer in answers:
        for name, share in _shares(answer).items():
            sums[name] += share
    label = max(_SEVERITY, key=lambda name: round(sums[name], 9))
    total = sum(sums.values())
    return StepLabel(
        step_index=answers[0].step_index,
        label=label,
        p_good=sums["good"] / total,
        p_unnecessary=sums["unnecessary"] / total,
        p_harmful=sums["harmful"] / total,
        rationale=next((answer.rationale for answer in answers if answer.label == label), None),
    )


def _shares(answer: StepLabel) -> dict[Label, float]:
    good, unnecessary, harmful = answer.p_good, answer.p_unnecessary, answer.p_harmful
    if good is None or unnecessary is None or harmful is None:
        return {answer.label: 1.0}
    return {"good": good, "unnecessary": unnecessary, "harmful": harmful}


def _answers(
    ledger: Ledger, row: Row, config: LabelConfig
) -> list[dict[int | None, list[tuple[Part, str]]]]:
    """Return, for each vote, the parts that were answered, by their limit."""
    found: list[dict[int | None, list[tuple[Part, str]]]] = [{} for _ in range(config.votes)]
    for text in ledger.parts(row.subject):
        part = Part.parse(text)
        if part is None or part.vote >= config.votes or part.context != row.context:
            continue
        if ledger.failure((*row.subject, text)) is None:
            found[part.vote].setdefault(part.limit, []).append((part, text))
    return found


def _covers(parts: Sequence[tuple[Part, str]], num_steps: int) -> bool:
    """Return whether parts of one limit ask for every step."""
    return _num_asked(parts, num_steps) == num_steps


def _num_asked(parts: Sequence[tuple[Part, str]], num_steps: int) -> int:
    """Return how many steps parts ask for; windows of two context sizes may overlap."""
    return len({step for part, _ in parts for step in part.steps(num_steps)})


def _chosen(
    parts: dict[int | None, list[tuple[Part, str]]], row: Row, config: LabelConfig
) -> list[str]:
    """Return the parts of one vote that a trajectory's labels come from."""
    known = limits_of(config)
    others = sorted((limit or 0 for limit in parts if limit not in known), reverse=True)
    order = [limit for limit in (*known, *others) if limit in parts]
    best = max(
        order,
        key=lambda limit: _num_asked(parts[limit], row.num_steps),
        default=None,
    )
    return [text for _, text in parts.get(best, ())]


def _labels(ledger: Ledger, row: Row, config: LabelConfig) -> list[StepLabel]:
    """Return a trajectory's labels in the order of its steps."""
    by_step: dict[int, list[StepLabel]] = {}
    for parts in _answers(ledger, row, config):
        for text in _chosen(parts, row, config):
            entry = ledger.get((*row.subject, text))
            assert entry is not None
            for label in labels_of(entry):
                by_step.setdefault(label.step_index, []).append(label)
    return [merged(by_step[step]) for step in sorted(by_step)]


def _requests(
    ledger: Ledger,
    row: Row,
    config: LabelConfig,
    labels: Sequence[StepLabel],
    paid: set[tuple[Subject, str]],
    *,
    unasked: str,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a trajectory's requests.

    A copy of an earlier trajectory has its labels at no cost: nothing was asked for it. Failures
    are left out where every step has its answer nonetheless, since other requests took their place;
    what they cost is added to the first that was answered. What nobody was asked in this run is a
    failure that is in no ledger.
    """
    answered = {
        vote
        for vote, parts in enumerate(_answers(ledger, row, config))
        if any(_covers(asked, row.num_steps) for asked in parts.values())
    }
    failed = False
    rows: list[dict[str, Any]] = []
    replaced: Counter[str] = Counter()
    for text in ledger.parts(row.subject):
        key = (*row.subject, text)
        entry = ledger.get(key)
        assert entry is not None
        usage = {**{name: entry[name] for name in USAGE}, **ledger.spent(key)}
        if (row.subject, text) in paid:
            usage = dict.fromkeys(USAGE, 0)
        paid.add((row.subject, text))
        part = Part.parse(text)
        settled = part and (part.vote in answered or part.vote >= config.votes)
        if entry["failure"] is not None and answered and settled:
            replaced.update(usage)
            continue
        failed |= entry["failure"] is not None
        named = {"trajectory_id": row.trajectory_id, "part": text, "failure": entry["failure"]}
        rows.append({**named, **usage})
    for name, value in replaced.items():
        if name != "clipped_tokens":
            rows[0][name] += value
    yield from rows
    lacking = config.votes - len(answered)
    if row.selected and lacking and not failed:
        missing = row.num_steps - len(labels)
        what = f"{missing} of {row.num_steps} steps"
        if not missing:
            what = f"{lacking} of {config.votes} answers"
        yield {
            "trajectory_id": row.trajectory_id,
            "part": "unasked" if ledger.parts(row.subject) else WHOLE,
            "failure": f"unasked: {what}: {unasked}",
            **dict.fromkeys(USAGE, 0),
        }


def _label_row(row: Row, label: StepLabel) -> dict[str, Any]:
    content_hash, critic_id, prompt_hash = row.subject
    return {
        "trajectory_id": row.trajectory_id,
        "content_hash": content_hash,
        "critic_id": critic_id,
        "prompt_hash": prompt_hash,
        **asdict(label),
    }
