"""Labels -> columns: what was said of which step, by a label directory or a file of one's own.

A label directory is read as columns, a file row by row (`weight_files`). Every label must be of a
step that the tokens have: one of an earlier version of a trajectory is stale and counts as missing,
any other is an error.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson
import polars as pl
import pyarrow.parquet as pq

from srft_prep.calibrated_columns import calibrated_columns
from srft_prep.calibration import Calibration
from srft_prep.ensembles import label_numbers
from srft_prep.errors import ConfigError, LabelError
from srft_prep.factors import (
    FactorColumns,
    Factors,
    first_repeated,
    no_such_trajectory,
    with_trajectories,
)
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.schemas import LABELS_FILE, PROBABILITIES, REJECTED_FILE
from srft_prep.token_columns import StepIndex, TokenColumns
from srft_prep.types import LABELS
from srft_prep.weight_files import Growing, file_input, names_nobody, read_label_rows, where

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH_ROWS: Final = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgements:
    """L labels of steps that the tokens have."""

    spans: "NDArray[np.int64]"
    """Place of each label's step among all steps, [L]."""
    labels: "NDArray[np.int8]"
    """Index in `LABELS`, [L]."""
    probabilities: "NDArray[np.float32]"
    """Of good, unnecessary, harmful, NaN where there are none, [L, 3]; [L, 0] without `soft`."""
    stale_trajectories: "NDArray[np.int32]"
    """Those that were labelled in another version than was tokenised."""
    factors: Factors | None = None
    """What a file's rows say beside their labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """Labels before their steps are looked up, or a batch of them."""

    path: Path
    trajectories: "NDArray[np.int32]"
    steps: "NDArray[np.int32]"
    labels: "NDArray[np.int8]"
    probabilities: "NDArray[np.float32]"
    stale: "NDArray[np.bool_]"
    lines: "NDArray[np.int32] | None" = None
    """Of a file's rows."""

    def where(self, place: int, columns: TokenColumns, *, step: bool = True) -> str:
        """Return how an error names a label."""
        if self.lines is not None:
            return where(self.path, int(self.lines[place]))
        name = columns.names[self.trajectories[place]]
        return f"{self.path}: {name}" + (f": step {self.steps[place]}" if step else "")


def are_distributions(probabilities: "NDArray[np.floating]") -> "NDArray[np.bool_]":
    """Return which rows of [N, 3] lie in [0, 1] and sum to 1 within 0.001 (they are float32)."""
    chances = probabilities.astype(np.float64)
    inside = ((chances >= 0) & (chances <= 1)).all(axis=1)
    result: NDArray[np.bool_] = inside & (np.abs(chances.sum(axis=1) - 1) <= 1e-3)
    return result


def labels_input(path: Path, annotator: str | None = None) -> dict[str, Any]:
    """Return how a manifest names a label directory or a labels file: by content, and checked.

    And by whose labels of a gold file are meant.

    Raises:
        ShardError: no finished output of `label`, or a damaged one.
        ConfigError: no such file, or one of another kind, or an annotator of a directory.
    """
    if path.is_dir():
        if annotator is not None:
            raise names_nobody(path, annotator)
        return read_manifest(path, stage="label").checked().as_input()
    named = {} if annotator is None else {"annotator": annotator}
    return file_input(path, "labels") | named


def read_judgements(
    path: Path,
    columns: TokenColumns,
    index: StepIndex,
    *,
    soft: bool,
    rejected: frozenset[str] = frozenset(),
    calibration: Calibration | None = None,
    annotator: str | None = None,
) -> Judgements:
    """Return the labels of a label directory or a labels file; probabilities only where `soft`.

    Args:
        path: the directory or file.
        columns: the token rows.
        index: their steps.
        soft: whether probabilities are wanted.
        rejected: trajectories that may have labels but, for a known reason, have no tokens.
        calibration: what the labels go through; those of trajectories that lack some are left out.
        annotator: whose labels of a gold file by several count (see `read_label_rows`).

    Raises:
        LabelError: an unknown label, two labels for a step, labels of two versions of a
            trajectory, a trajectory or step that is not there, or with `soft` probabilities that
            are no distribution.
        ConfigError: `soft`, and no step has probabilities; or it is not known whose labels count.
    """
    factors = None
    measured = soft or calibration is not None
    if path.is_dir():
        read = _directory(path, columns, soft=measured, rejected=rejected)
    else:
        read, factor_columns = _file(
            path, columns, soft=measured, rejected=rejected, annotator=annotator
        )
        factors = factor_columns.looked_up(path, columns, index)
    if (
        soft
        and not calibration
        and len(read.labels)
        and np.isnan(read.probabilities).any(axis=1).all()
    ):
        raise ConfigError(
            f"--soft: the labels of {path} carry no probabilities; leave --soft out, or "
            "label with a critic that measures them, or with --votes"
        )
    fresh = ~read.stale
    spans = index.find(read.trajectories, read.steps)
    if len(lost := np.flatnonzero((spans < 0) & fresh)):
        place = int(lost[0])
        raise LabelError(
            f"{read.where(place, columns, step=False)}: "
            + index.no_such_step("label", read.trajectories[place], read.steps[place])
        )
    keys = (read.trajectories.astype(np.int64) << 32) | read.steps
    if (again := first_repeated(keys)) is not None:
        if read.lines is None:
            raise LabelError(f"{read.where(again, columns)} has two labels; run label again")
        name = columns.names[read.trajectories[again]]
        raise LabelError(
            f"{read.where(again, columns)}: {name}: step {read.steps[again]} has two labels; "
            "keep one"
        )
    spans, labels, probabilities = spans[fresh], read.labels[fresh], read.probabilities[fresh]
    if calibration is not None:
        whole, labels, probabilities = calibrated_columns(
            calibration,
            columns,
            trajectories=read.trajectories[fresh],
            steps=read.steps[fresh],
            labels=labels,
            probabilities=probabilities,
        )
        spans, probabilities = spans[whole], probabilities[:, : 3 if soft else 0]
    return Judgements(
        spans=spans,
        labels=labels,
        probabilities=probabilities,
        stale_trajectories=np.unique(read.trajectories[read.stale]),
        factors=factors,
    )


def rejected_trajectories(tokens: Manifest) -> frozenset[str]:
    """Return the trajectories that `tokenize` could not take: their labels have no tokens."""
    path = tokens.path / REJECTED_FILE
    lines = path.read_bytes().splitlines() if path.exists() else []
    return frozenset(orjson.loads(line)["trajectory_id"] for line in lines)


def _directory(path: Path, columns: TokenColumns, *, soft: bool, rejected: frozenset[str]) -> _Read:
    """Return the labels of a directory, read as columns."""
    names = pl.DataFrame(
        {
            "trajectory_id": list(columns.names),
            "trajectory": np.arange(len(columns.names), dtype=np.int32),
            "tokenised": list(columns.content_hashes),
        },
        schema_overrides={"trajectory_id": pl.String, "tokenised": pl.String},
    )
    wanted = ["trajectory_id", "content_hash", "step_index", "label"]
    wanted += PROBABILITIES if soft else []
    read: list[dict[str, NDArray[Any]]] = []
    last = None
    with pq.ParquetFile(path / LABELS_FILE) as file:
        empty = pl.from_arrow(file.schema_arrow.empty_table().select(wanted))
        batches = file.iter_batches(batch_size=BATCH_ROWS, columns=wanted, use_threads=False)
        for batch in (empty, *map(pl.from_arrow, batches)):
            assert isinstance(batch, pl.DataFrame)
            _refuse_unsound(path, batch if last is None else pl.concat([last, batch]), soft=soft)
            last = batch.tail(1)
            joined = batch.join(names, on="trajectory_id", how="left", maintain_order="left")
            for name in joined.filter(pl.col("trajectory").is_null())["trajectory_id"].unique():
                if name not in rejected:
                    raise LabelError(f"{path}: {no_such_trajectory('label', name)}")
            read.append(_arrays(joined.drop_nulls("trajectory"), soft=soft))
    return _Read(
        path=path, **{name: np.concatenate([each[name] for each in read]) for name in read[0]}
    )


def _refuse_unsound(path: Path, rows: pl.DataFrame, *, soft: bool) -> None:
    """Check rows of a label directory, the last row before them included."""
    if unknown := set(rows["label"].unique()) - set(LABELS):
        raise LabelError(f"{path}: expected labels {', '.join(LABELS)}, got {sorted(unknown)[0]!r}")
    name, version = pl.col("trajectory_id"), pl.col("content_hash")
    mixed = rows.filter((name == name.shift(1)) & (version != version.shift(1)))
    if mixed.height:
        raise LabelError(
            f"{path}: {mixed['trajectory_id'][0]}: step {mixed['step_index'][0]} was labelled in "
            "another version than the steps before"
        )
    if soft:
        given = rows.drop_nulls(list(PROBABILITIES))
        unsound = given.filter(~are_distributions(given.select(PROBABILITIES).to_numpy()))
        for row in unsound.head(1).iter_rows(named=True):
            raise LabelError(
                f"{path}: {row['trajectory_id']}: step {row['step_index']}: expected probabilities "
                f"that sum to 1, got {[row[name] for name in PROBABILITIES]}"
            )


def _arrays(rows: pl.DataFrame, *, soft: bool) -> "dict[str, NDArray[Any]]":
    """Return rows of known trajectories as the columns of `_Read`."""
    chances = rows.select(PROBABILITIES if soft else []).fill_null(np.nan).to_numpy()
    return {
        "trajectories": rows["trajectory"].to_numpy(),
        "steps": rows["step_index"].to_numpy(),
        "labels": label_numbers(rows["label"]),
        "probabilities": chances.reshape(rows.height, 3 if soft else 0),
        "stale": (rows["content_hash"] != rows["tokenised"]).to_numpy(),
    }


def _file(
    path: Path,
    columns: TokenColumns,
    *,
    soft: bool,
    rejected: frozenset[str],
    annotator: str | None,
) -> tuple[_Read, FactorColumns]:
    """Return the labels of a file, and what its rows say beside them."""
    grown = Growing(
        trajectories="i", steps="i", labels="b", good="f", unnecessary="f", harmful="f", stale="b",
        lines="i",
    )  # fmt: skip
    factors = FactorColumns()
    for row, trajectory in with_trajectories(
        read_label_rows(path, annotator=annotator),
        path,
        columns,
        what="label",
        rejected=rejected,
    ):
        stale = row.content_hash not in (None, columns.content_hashes[trajectory])
        grown.add(
            trajectories=trajectory,
            steps=row.step,
            labels=row.label,
            stale=stale,
            lines=row.line,
            **dict(zip(LABELS, row.probabilities or (np.nan,) * len(LABELS), strict=True)),
        )
        if not stale:
            factors.add(row, trajectory)
    chances = np.stack([np.array(grown[label]) for label in LABELS], axis=1)
    read = _Read(
        path=path,
        trajectories=np.array(grown["trajectories"]),
        steps=np.array(grown["steps"]),
        labels=np.array(grown["labels"]),
        probabilities=chances if soft else chances[:, :0],
        stale=np.array(grown["stale"]).astype(np.bool_),
        lines=np.array(grown["lines"]),
    )
    return read, factors
