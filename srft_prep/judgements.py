"""The labels of a label directory, by trajectory and step, as far as weights need them."""

from dataclasses import dataclass
from typing import Final

import polars as pl

from srft_prep.errors import ConfigError, LabelError
from srft_prep.manifest import Manifest
from srft_prep.schemas import LABELS_FILE
from srft_prep.types import LABELS
from srft_prep.weights import StepJudgement, is_distribution

_WITHOUT_PROBABILITIES: Final = {label: StepJudgement(label=label) for label in LABELS}


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedTrajectory:
    """The labels of one trajectory."""

    content_hash: str
    """Of the version that was labelled."""
    by_step: dict[int, StepJudgement]


def read_judgements(source: Manifest, *, soft: bool) -> dict[str, JudgedTrajectory]:
    """Return the labels of a directory by trajectory id; probabilities only where `soft`.

    Raises:
        LabelError: an unknown label, two labels for a step, labels of two versions of a
            trajectory, or with `soft` probabilities that are no distribution.
        ConfigError: `soft`, and no step has probabilities.
    """
    probabilities = ["p_good", "p_unnecessary", "p_harmful"] if soft else []
    columns = ["trajectory_id", "content_hash", "step_index", "label", *probabilities]
    rows = pl.read_parquet(source.path / LABELS_FILE, columns=columns)
    if unknown := set(rows["label"].unique()) - set(LABELS):
        raise LabelError(
            f"{source.path}: expected labels {', '.join(LABELS)}, got {sorted(unknown)[0]!r}"
        )
    if soft and rows.height and not rows.drop_nulls(probabilities).height:
        raise ConfigError(
            f"--soft: the labels of {source.path} carry no probabilities; leave --soft out, or "
            "label with a critic that measures them, or with --votes"
        )
    judged: dict[str, JudgedTrajectory] = {}
    for trajectory_id, content_hash, step, label, *measured in rows.iter_rows():
        of_trajectory = judged.setdefault(
            trajectory_id, JudgedTrajectory(content_hash=content_hash, by_step={})
        )
        where = f"{source.path}: {trajectory_id}: step {step}"
        if step in of_trajectory.by_step:
            raise LabelError(f"{where} has two labels; run label again")
        if of_trajectory.content_hash != content_hash:
            raise LabelError(f"{where} was labelled in another version than the steps before")
        if not measured or None in measured:
            of_trajectory.by_step[step] = _WITHOUT_PROBABILITIES[label]
            continue
        if not is_distribution(measured):
            raise LabelError(f"{where}: expected probabilities that sum to 1, got {measured}")
        of_trajectory.by_step[step] = StepJudgement(label=label, probabilities=tuple(measured))
    return judged
