"""Label distribution, steps, tokens and cost by outcome: the paper's Table 1 for one's own data."""

from pathlib import Path
from typing import Any, Final

import polars as pl

from srft_prep.config import OUTCOMES
from srft_prep.errors import LabelError, ShardError
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.schemas import LABELS_FILE, REQUESTS_FILE
from srft_prep.types import LABELS

COLUMNS: Final = (*OUTCOMES.values(), "all")

_KEY: Final = {"trajectory_id": pl.String, "content_hash": pl.String}
_TRAJECTORIES: Final = {**_KEY, "resolved": pl.Boolean, "num_steps": pl.Int32}
_TOKENS: Final = {**_KEY, "num_tokens": pl.Int32}


def collect(
    trajectories: Path, *, labels: Path | None = None, tokens: Path | None = None
) -> dict[str, Any]:
    """Return the numbers of a data set by outcome and for all, as JSON values.

    Shares are fractions of the labelled steps; `productive` is good and unnecessary together.

    Raises:
        ShardError: a directory is no finished output of its stage, or no token row belongs to
            these trajectories.
        LabelError: no label belongs to these trajectories.
    """
    source = read_manifest(trajectories, stage="ingest").checked()
    outcome = (
        pl.when(pl.col("resolved").is_null())
        .then(pl.lit("unknown"))
        .when(pl.col("resolved"))
        .then(pl.lit("resolved"))
        .otherwise(pl.lit("unresolved"))
    )
    rows = _rows(source, _TRAJECTORIES).with_columns(outcome=outcome)
    numbers: dict[str, Any] = {name: _lengths(_of(rows, name)) for name in COLUMNS}
    if labels is not None:
        _add_labels(numbers, rows, labels)
    if tokens is not None:
        _add_tokens(numbers, rows, tokens)
    return numbers


def _rows(source: Manifest, schema: dict[str, Any]) -> pl.DataFrame:
    parts = [pl.read_parquet(part, columns=list(schema)) for part in source.parts]
    return pl.concat(parts) if parts else pl.DataFrame(schema=schema)


def _of(rows: pl.DataFrame, column: str) -> pl.DataFrame:
    return rows if column == "all" else rows.filter(pl.col("outcome") == column)


def _lengths(rows: pl.DataFrame) -> dict[str, Any]:
    return {
        "trajectories": rows.height,
        "steps": int(rows["num_steps"].sum()),
        "median_steps": rows["num_steps"].median(),
    }


def _add_labels(numbers: dict[str, Any], rows: pl.DataFrame, folder: Path) -> None:
    source = read_manifest(folder, stage="label").checked()
    labels = pl.read_parquet(
        source.path / LABELS_FILE, columns=["trajectory_id", "content_hash", "label"]
    )
    joined = labels.join(rows, on=["trajectory_id", "content_hash"], how="inner")
    if labels.height and not joined.height:
        raise LabelError(f"{folder}: none of its labels belongs to these trajectories")
    requests = pl.read_parquet(source.path / REQUESTS_FILE)
    costs = requests.join(rows, on="trajectory_id", how="inner")
    for name in COLUMNS:
        found = dict(_of(joined, name)["label"].value_counts().iter_rows())
        total = sum(found.values())
        numbers[name] |= {
            "labelled_steps": total,
            "labels": {label: found.get(label, 0) for label in LABELS},
            "productive_share": _share(total - found.get("harmful", 0), total),
            **{f"{label}_share": _share(found.get(label, 0), total) for label in LABELS},
        }
        cost = _of(costs, name)
        numbers[name] |= {
            "requests": cost.height,
            "failed_requests": cost.height - cost["failure"].null_count(),
            "critic_tokens": int(cost["prompt_tokens"].sum())
            + int(cost["completion_tokens"].sum()),
            "usd": float(cost["usd"].sum()),
        }


def _add_tokens(numbers: dict[str, Any], rows: pl.DataFrame, folder: Path) -> None:
    source = read_manifest(folder, stage="tokenize").checked()
    tokens = _rows(source, _TOKENS)
    joined = tokens.join(rows, on=["trajectory_id", "content_hash"], how="inner")
    if tokens.height and not joined.height:
        raise ShardError(f"{folder}: none of its tokens belongs to these trajectories")
    for name in COLUMNS:
        lengths = _of(joined, name)["num_tokens"]
        numbers[name] |= {
            "tokens": int(lengths.sum()),
            "median_tokens": lengths.median(),
            "max_tokens": lengths.max(),
        }


def _share(part: int, total: int) -> float | None:
    return part / total if total else None


LINES: Final = (
    ("trajectories", "trajectories"),
    ("steps", "steps"),
    ("steps in a trajectory, median", "median_steps"),
    ("tokens", "tokens"),
    ("tokens in a sequence, median", "median_tokens"),
    ("tokens in a sequence, longest", "max_tokens"),
    ("labelled steps", "labelled_steps"),
    ("productive steps", "productive_share"),
    ("  good", "good_share"),
    ("  unnecessary", "unnecessary_share"),
    ("harmful steps", "harmful_share"),
    ("critic requests", "requests"),
    ("  failed", "failed_requests"),
    ("critic tokens", "critic_tokens"),
    ("critic cost, USD", "usd"),
)


def table(numbers: dict[str, Any]) -> str:
    """Return the numbers as a text table, one column an outcome; absent numbers have no line."""
    lines = [f"{'':33}" + "".join(f"{name:>14}" for name in COLUMNS)]
    for title, key in LINES:
        if key in numbers["all"]:
            cells = "".join(f"{_cell(key, numbers[name][key]):>14}" for name in COLUMNS)
            lines.append(f"{title:33}{cells}")
    return "\n".join(lines)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key.endswith("_share"):
        return f"{value:.1%}"
    return f"{value:,.2f}" if key == "usd" else f"{value:,.0f}"
