"""One critic's labels as `critic-eval` takes them: a label directory, or a file of one's own."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import polars as pl

from srft_prep.config import is_calibrated
from srft_prep.errors import ConfigError, LabelError, StorageError
from srft_prep.manifest import Manifest, manifest_bytes, read_manifest
from srft_prep.object_mirror import place_of
from srft_prep.schemas import LABELS_FILE, PROBABILITIES, REQUESTS_FILE
from srft_prep.types import LABELS
from srft_prep.weight_files import (
    AGREED,
    annotators_of,
    file_input,
    read_label_rows,
    say_whose,
)

KEY: Final = ["trajectory_id", "step_index"]

_COLUMNS: Final[dict[str, pl.DataType]] = {
    "trajectory_id": pl.String(),
    "step_index": pl.Int32(),
    "content_hash": pl.String(),
    "label": pl.String(),
    **dict.fromkeys(PROBABILITIES, pl.Float32()),
}
_HASH_CHARS: Final = 8
_TAKEN: Final = re.compile(
    r"no critic|flag (all|nothing|last)|(any|majority|mean) of \d+|calibrated|threshold|head: .*"
)
"""What reports call rows that are no critic's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a critic's labels took."""

    trajectories: int
    requests: int
    failed: int
    tokens: int
    seconds: float
    usd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticLabels:
    """What one critic says of steps."""

    name: str
    """What its rows are called."""
    path: Path
    critic_id: str
    """Empty of a file, which does not say."""
    prompt_hash: str
    rows: pl.DataFrame
    """trajectory_id, step_index, content_hash (null where not known), label, p_good, ... ."""
    cost: Cost | None = None
    """None of a file."""
    source: dict[str, Any] | None = None
    """How the directory names the trajectories that were labelled."""
    calibrated: bool = False
    """Whether the labels went through a calibration."""
    together: bool = False
    """Whether several critics gave them: an ensemble, or a cascade."""
    annotator: str | None = None
    """Who gave them, where a gold file says so; empty of a gold file's lines that name nobody."""

    @property
    def is_file(self) -> bool:
        """Whether the labels come from a file of one's own, which does not say whose they are."""
        return self.path.is_file()

    @property
    def has_probabilities(self) -> bool:
        """Whether any label has them."""
        return self.rows["p_harmful"].null_count() < self.rows.height


def read_critics(given: Sequence[tuple[str | None, Path]]) -> list[CriticLabels]:
    """Return the labels of critics, each under a name of its own.

    One that is given no name has its critic's id, with the start of its question's hash where
    another has the same id. Of a gold file by several people the name says whose labels are meant.

    Raises:
        ConfigError: two critics have the same name or path, one has the name of another row of
            the report, a path leads to no labels, or it is not said whose are meant.
        ShardError: a directory is no finished output of `label`, or damaged.
        LabelError: a step has two labels, a row of a file is no label, or labels are of different
            versions of a trajectory.
    """
    critics = [_read(path, name) for name, path in given]
    _refuse_twice(critics)
    ids = [critic.critic_id for critic in critics]
    named = []
    for (name, _), critic in zip(given, critics, strict=True):
        own = critic.critic_id or critic.annotator or critic.path.name
        if critic.critic_id and ids.count(critic.critic_id) > 1:
            own = f"{critic.critic_id} {critic.prompt_hash[:_HASH_CHARS]}"
        named.append(replace(critic, name=name or own))
    names = [critic.name for critic in named]
    for name in names:
        if _TAKEN.fullmatch(name):
            raise ConfigError(
                f"--labels: a critic is called {name!r}, as is another row of the report; name it "
                "otherwise: --labels NAME=DIR"
            )
        if names.count(name) > 1:
            raise ConfigError(
                f"--labels: two critics are called {name!r}; name them: --labels NAME=DIR"
            )
    _refuse_versions(named)
    return named


def trajectories_of(critics: Sequence[CriticLabels]) -> Manifest | None:
    """Return the trajectories that the first of the directories was made of, if they are there.

    They are looked for where they were, and beside the labels, and are believed if their hash is
    the one that the labels' manifest names.
    """
    for critic in critics:
        if critic.source is not None:
            named = place_of(critic.source["path"])
            for path in (named, critic.path.parent / named.name):
                if _is_stage(path):
                    manifest = read_manifest(path)
                    if manifest.as_input()["sha256"] == critic.source["sha256"]:
                        return manifest.checked()
    return None


def _is_stage(path: Path) -> bool:
    """Return whether a stage directory is there; one in a store that is out of reach is not."""
    try:
        return manifest_bytes(path) is not None
    except (ConfigError, StorageError):
        return False


def refuse_own_gold(
    critics: Sequence[CriticLabels], gold_files: Iterable[Path], *, annotator: str | None
) -> None:
    """Refuse labels of an annotator that are among the gold that they are held against.

    Args:
        critics: whose labels are judged.
        gold_files: what they are held against.
        annotator: whose gold alone counts; None: everybody's.

    Raises:
        ConfigError: with what to say instead.
    """
    gold = {path.resolve() for path in gold_files}
    for critic in critics:
        # what all agree on holds everybody's
        own = annotator in (None, critic.annotator) or critic.annotator == AGREED
        if own and critic.is_file and critic.path.resolve() in gold:
            whose = "these" if critic.annotator is None else f"{critic.annotator or '(unnamed)'}'s"
            raise ConfigError(
                f"{critic.path}: {whose} labels are among the gold that they are held against; say "
                "whose gold counts, another's: --annotator NAME"
            )


def _refuse_twice(critics: Sequence[CriticLabels]) -> None:
    seen: set[tuple[Path, str | None]] = set()
    for critic in critics:
        given = critic.path.resolve(), critic.annotator
        if given in seen:
            raise ConfigError(
                f"--labels: {critic.path} is given twice; a critic agrees with itself"
            )
        seen.add(given)


def _refuse_versions(critics: Sequence[CriticLabels]) -> None:
    """Refuse labels of different versions of a trajectory: they are not about the same steps."""
    versions = pl.concat(
        critic.rows.select(*KEY, "content_hash", place=pl.lit(place))
        for place, critic in enumerate(critics)
    ).drop_nulls("content_hash")
    first = pl.col("content_hash").first().over("trajectory_id", order_by="place")
    other = versions.filter(pl.col("content_hash") != first).sort(*KEY)
    for name, step, _, place in other.head(1).iter_rows():
        raise LabelError(
            f"{critics[place].path}: {name}: step {step} was labelled in another version of the "
            "trajectory than other labels of it; label one version with every critic"
        )


def _read(path: Path, name: str | None) -> CriticLabels:
    critic = _read_directory(path) if path.is_dir() else _read_file(path, name)
    again = critic.rows.filter(pl.struct(KEY).is_duplicated())
    for name, step in again.select(KEY).head(1).iter_rows():
        raise LabelError(f"{path}: {name}: step {step} has two labels; keep one")
    return critic


def _read_directory(path: Path) -> CriticLabels:
    manifest = read_manifest(path, stage="label").checked()
    rows = pl.read_parquet(path / LABELS_FILE, columns=list(_COLUMNS))
    if unknown := set(rows["label"].unique()) - set(LABELS):
        raise LabelError(
            f"{path}: expected labels {', '.join(LABELS)}, got {min(map(str, unknown))!r:.80}"
        )
    config = manifest.data["config"]
    return CriticLabels(
        name="",
        path=path,
        critic_id=str(config.get("critic_id", "")),
        prompt_hash=str(config.get("prompt_hash", "")),
        rows=rows.cast(pl.Schema(_COLUMNS)),
        cost=_cost(path),
        source=next((one for one in manifest.data["inputs"] if one.get("stage") == "ingest"), None),
        calibrated=is_calibrated(config),
        together=bool(config.get("together")),
    )


def _read_file(path: Path, name: str | None) -> CriticLabels:
    file_input(path, "labels")
    annotator = _annotator(path, name)
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for row in read_label_rows(path, annotator=annotator):
        chances = row.probabilities or (None,) * len(LABELS)
        values = (row.trajectory_id, row.step, row.content_hash, LABELS[row.label], *chances)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    rows = pl.DataFrame(columns, schema=_COLUMNS)
    return CriticLabels(
        name="", path=path, critic_id="", prompt_hash="", rows=rows, annotator=annotator
    )


def _annotator(path: Path, name: str | None) -> str | None:
    """Return whose labels of a gold file are meant; None where the file names nobody at all."""
    people = annotators_of(path)
    if len(people) < 2:
        return people[0] if people else None
    if name not in (*people, AGREED):
        example = next(filter(None, people))
        raise ConfigError(f"{path}: {say_whose(people)}: --labels {example}={path}")
    return name


def _cost(path: Path) -> Cost:
    requests = pl.read_parquet(path / REQUESTS_FILE)
    return Cost(
        trajectories=requests["trajectory_id"].n_unique(),
        requests=requests.height,
        failed=requests.height - requests["failure"].null_count(),
        tokens=int(requests["prompt_tokens"].sum()) + int(requests["completion_tokens"].sum()),
        seconds=float(requests["seconds"].sum()),
        usd=float(requests["usd"].sum()),
    )
