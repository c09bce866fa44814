"""The numbers of a data set: the paper's Table 1 for one's own, and where labels and money go.

Labels are counted batch by batch: what stays in memory is one row a trajectory (ids, counts, costs)
and one row a distinct (group, place, label). 100,000 trajectories with 60 labelled steps each take
11 s and 0.5 GB on two cores (`benchmarks/stats.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import polars as pl

from srft_prep.config import DEFAULT_SEQ_LEN, OUTCOMES
from srft_prep.errors import LabelError, ShardError
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.schemas import LABELS_FILE, REQUESTS_FILE
from srft_prep.types import LABELS

COLUMNS: Final = (*OUTCOMES.values(), "all")
NOT_RECORDED: Final = "(not recorded)"
"""Stands for the model of a run that does not name it."""

NUM_PLACES: Final = 10
"""Parts that a trajectory is cut into, to tell where labels stand."""
STEP_EDGES: Final = (10, 20, 30, 40, 60, 80, 100, 150, 200)
"""Bins of trajectories by their number of steps: up to the first edge, above it to the next, ..."""
TOKEN_EDGES: Final = tuple(DEFAULT_SEQ_LEN // 32 * 2**power for power in range(9))
"""Likewise sequences by their length; one edge is the paper's sequence length."""
QUANTILES: Final = {"median": 0.5, "p90": 0.9, "max": 1.0}

BATCH_LABELS: Final = 1 << 18

_KEY: Final = {"trajectory_id": pl.String, "content_hash": pl.String}
_TRAJECTORIES: Final = {
    **_KEY,
    "format": pl.String,
    "model": pl.String,
    "resolved": pl.Boolean,
    "num_steps": pl.Int32,
}
_TOKENS: Final = {**_KEY, "num_tokens": pl.Int32}
_GROUPS: Final = ("outcome", "format", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """What numbers are made of, for all trajectories or some."""

    rows: pl.DataFrame
    """A row a trajectory: groups, num_steps, size (the bin of num_steps)."""
    labels: pl.DataFrame | None = None
    """A row a distinct (groups, place, size, label): count."""
    costs: pl.DataFrame | None = None
    """A row a trajectory that was asked about: groups, requests, failed, tokens, usd, seconds."""
    tokens: pl.DataFrame | None = None
    """A row a sequence: groups, num_tokens."""
    left_out: dict[str, int] | None = None
    """Labels that are not counted: `stale`, of other versions of these trajectories, and
    `elsewhere`, of other trajectories."""

    def of(self, group: str, value: str) -> "_Data":
        """Return what belongs to one outcome, format or model."""

        def some(frame: pl.DataFrame | None) -> pl.DataFrame | None:
            return None if frame is None else frame.filter(pl.col(group) == value)

        return replace(
            self,
            rows=self.rows.filter(pl.col(group) == value),
            labels=some(self.labels),
            costs=some(self.costs),
            tokens=some(self.tokens),
        )


def collect(
    trajectories: Path, *, labels: Path | None = None, tokens: Path | None = None
) -> dict[str, Any]:
    """Return the numbers of a data set as JSON values.

    Under `resolved`, `unresolved`, `unknown` and `all` stands Table 1; under `format` and `model`
    the same four for each of those that occur, most trajectories first. Shares are fractions of the
    labelled steps; `productive` is good and unnecessary together. `labels_left_out` counts those of
    other versions of the trajectories (`stale`) and of others (`elsewhere`).

    Raises:
        ShardError: a directory is no finished output of its stage, or no token row belongs to
            these trajectories.
        LabelError: no label belongs to these trajectories, or one is unknown.
    """
    source = read_manifest(trajectories, stage="ingest").checked()
    data = _Data(rows=_trajectories(source))
    if labels is not None:
        data = _with_labels(data, labels)
    if tokens is not None:
        data = _with_tokens(data, tokens)
    numbers = _by_outcome(data)
    for group in ("format", "model"):
        counts = (
            data.rows[group]
            .value_counts(sort=False)
            .sort(["count", group], descending=[True, False])
        )
        numbers[group] = {
            name: _by_outcome(data.of(group, name)) for name in counts[group].to_list()
        }
    if data.left_out is not None:
        numbers["labels_left_out"] = data.left_out
    return numbers


def _trajectories(source: Manifest) -> pl.DataFrame:
    outcome = pl.col("resolved").replace_strict(OUTCOMES, return_dtype=pl.String)
    return _rows(source, _TRAJECTORIES).select(
        *_KEY,
        outcome.alias("outcome"),
        "format",
        pl.col("model").fill_null(NOT_RECORDED),
        "num_steps",
        size=_bin(pl.col("num_steps"), STEP_EDGES),
    )


def _rows(source: Manifest, schema: dict[str, Any]) -> pl.DataFrame:
    parts = [pl.read_parquet(part, columns=list(schema)) for part in source.parts]
    return pl.concat(parts) if parts else pl.DataFrame(schema=schema)


def _bin(value: pl.Expr, edges: Sequence[int]) -> pl.Expr:
    """Return the index of a value's bin: how many edges lie below it."""
    return pl.sum_horizontal((value > edge).cast(pl.Int32) for edge in edges)


def _with_labels(data: _Data, folder: Path) -> _Data:
    source = read_manifest(folder, stage="label").checked()
    counts, left_out = _label_rows(source.path / LABELS_FILE, data.rows)
    if any(left_out.values()) and not counts.height:
        raise LabelError(f"{folder}: none of its labels belongs to these trajectories")
    costs = (
        pl.scan_parquet(source.path / REQUESTS_FILE)
        .group_by("trajectory_id")
        .agg(
            requests=pl.len(),
            failed=pl.col("failure").count(),
            tokens=pl.col("prompt_tokens").sum() + pl.col("completion_tokens").sum(),
            usd=pl.col("usd").sum(),
            seconds=pl.col("seconds").sum(),
        )
        .join(data.rows.lazy(), on="trajectory_id", how="inner")
        .collect(engine="streaming")
    )
    return replace(data, labels=counts, costs=costs, left_out=left_out)


def _label_rows(file: Path, rows: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the counts of labels, and how many are of other versions or other trajectories.

    Joined batch by batch: given the whole file, Polars' join holds all of it.

    Raises:
        LabelError: a label is unknown.
    """
    # the middle of step t of n lies at (t + 1/2) / n of the trajectory
    place = (NUM_PLACES * (2 * pl.col("step_index") + 1)) // (2 * pl.col("num_steps"))
    keys = [*_GROUPS, "place", "size", "label"]
    empty = rows.select(*_GROUPS, "size").clear()
    found = [empty.with_columns(place=pl.lit(0), label=pl.lit(""), count=pl.lit(0, pl.UInt32))]
    left_out = {"stale": 0, "elsewhere": 0}
    names = rows.select("trajectory_id")
    scan = pl.scan_parquet(file).select(*_KEY, "step_index", "label")
    for labels in scan.collect_batches(chunk_size=BATCH_LABELS):
        known = pl.col("label").is_in(LABELS).fill_null(value=False)
        for label in labels.filter(~known)["label"].head(1):
            raise LabelError(
                f"{file.parent}: expected labels {', '.join(LABELS)}, got {label!a:.80}; run label "
                "again"
            )
        joined = labels.join(rows, on=list(_KEY), how="inner")
        if lacking := labels.height - joined.height:
            elsewhere = labels.join(names, on="trajectory_id", how="anti").height
            left_out["elsewhere"] += elsewhere
            left_out["stale"] += lacking - elsewhere
        placed = joined.with_columns(place=place.clip(0, NUM_PLACES - 1))
        found.append(placed.group_by(keys).len("count").select(found[0].columns))
    counts = pl.concat(found, how="vertical_relaxed").group_by(keys).agg(pl.col("count").sum())
    return counts, left_out


def _with_tokens(data: _Data, folder: Path) -> _Data:
    source = read_manifest(folder, stage="tokenize").checked()
    tokens = _rows(source, _TOKENS)
    joined = tokens.join(data.rows, on=list(_KEY), how="inner")
    if tokens.height and not joined.height:
        raise ShardError(f"{folder}: none of its tokens belongs to these trajectories")
    return replace(data, tokens=joined.select(*_GROUPS, "num_tokens"))


def _by_outcome(data: _Data) -> dict[str, Any]:
    parts = {name: data if name == "all" else data.of("outcome", name) for name in COLUMNS}
    return {name: _measures(part) for name, part in parts.items()}


def _measures(data: _Data) -> dict[str, Any]:
    found: dict[str, Any] = {
        "trajectories": data.rows.height,
        "steps": int(data.rows["num_steps"].sum()),
        "median_steps": data.rows["num_steps"].median(),
    }
    if data.labels is not None:
        found |= _label_measures(data.labels)
        found["by_steps"] = [
            {"trajectories": number, "labels": labels}
            for number, labels in zip(
                _counts(data.rows.group_by("size").len("count"), "size", len(STEP_EDGES) + 1),
                _labels_by(data.labels, "size", len(STEP_EDGES) + 1),
                strict=True,
            )
        ]
    if data.costs is not None:
        found |= _cost_measures(data.costs)
    if data.tokens is not None:
        found |= _token_measures(data.tokens)
    return found


def _label_measures(labels: pl.DataFrame) -> dict[str, Any]:
    counts = _label_counts(labels)
    total = sum(counts.values())
    return {
        "labelled_steps": total,
        "labels": counts,
        "productive_share": _share(total - counts["harmful"], total),
        **{f"{label}_share": _share(counts[label], total) for label in LABELS},
        "by_place": _labels_by(labels, "place", NUM_PLACES),
    }


def _labels_by(labels: pl.DataFrame, column: str, number: int) -> list[dict[str, int]]:
    """Return the counts of labels for each value of a column from 0 on."""
    return [_label_counts(labels.filter(pl.col(column) == value)) for value in range(number)]


def _label_counts(labels: pl.DataFrame) -> dict[str, int]:
    found = dict(labels.group_by("label").agg(pl.col("count").sum()).iter_rows())
    return {label: found.get(label, 0) for label in LABELS}


def _cost_measures(costs: pl.DataFrame) -> dict[str, Any]:
    return {
        "requests": int(costs["requests"].sum()),
        "failed_requests": int(costs["failed"].sum()),
        "critic_tokens": int(costs["tokens"].sum()),
        "usd": float(costs["usd"].sum()),
        "seconds": float(costs["seconds"].sum()),
        "per_trajectory": {
            name: {
                "mean": costs[name].mean(),
                **{
                    word: costs[name].quantile(share, "linear") for word, share in QUANTILES.items()
                },
            }
            for name in ("usd", "tokens", "seconds")
        },
    }


def _token_measures(tokens: pl.DataFrame) -> dict[str, Any]:
    lengths = tokens["num_tokens"]
    bins = tokens.group_by(_bin(pl.col("num_tokens"), TOKEN_EDGES).alias("bin")).len("count")
    overlong = int((lengths > DEFAULT_SEQ_LEN).sum())
    return {
        "tokens": int(lengths.cast(pl.Int64).sum()),
        "median_tokens": lengths.median(),
        "max_tokens": lengths.max(),
        "overlong": overlong,
        "overlong_share": _share(overlong, lengths.len()),
        "by_tokens": _counts(bins, "bin", len(TOKEN_EDGES) + 1),
    }


def _counts(frame: pl.DataFrame, column: str, number: int) -> list[int]:
    found = dict(frame.select(column, "count").iter_rows())
    return [found.get(value, 0) for value in range(number)]


def _share(part: int, total: int) -> float | None:
    return part / total if total else None


def bin_names(edges: Sequence[int]) -> list[str]:
    """Return how bins are called: `0-10`, `11-20`, ..., `> 200`."""
    starts = [0, *(edge + 1 for edge in edges)]
    inner = [f"{start:,}-{edge:,}" for start, edge in zip(starts, edges, strict=False)]
    return [*inner, f"> {edges[-1]:,}"]
