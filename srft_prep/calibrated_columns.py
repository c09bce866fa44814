"""Columns of labels through a calibration, where there are tokens and no trajectories: in `pack`.

What a calibration may look at here is what the critic said, where a step stands and what came of
the run. Which rules fired is known to `label` alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from srft_prep.calibration import Calibration, calibrated, needs_rules, read_calibration
from srft_prep.config import is_calibrated
from srft_prep.ensembles import label_names, label_numbers
from srft_prep.errors import ConfigError
from srft_prep.manifest import read_manifest
from srft_prep.schemas import PROBABILITIES
from srft_prep.token_columns import OUTCOME_CODES, TokenColumns

if TYPE_CHECKING:
    from numpy.typing import NDArray


def calibration_for(file: Path, labels: Path) -> Calibration:
    """Return the calibration of a file, found to be for the labels of a directory or file.

    A labels file does not say whose labels it holds: that is not checked.

    Raises:
        ConfigError: it is no calibration, or one of other labels, or one that `pack` cannot apply,
            or the labels went through one before.
    """
    calibration = read_calibration(file)
    if needs_rules(calibration):
        raise ConfigError(
            f"--calibration {file}: looks at which rules fired, which labels and tokens do not "
            "tell; apply it where the trajectories are: label --calibration"
        )
    if len(calibration.members) > 1:
        raise ConfigError(
            f"--calibration {file}: was fitted on {len(calibration.members)} critics together; "
            "apply it where they are: label --critics ... --ensemble head --calibration"
        )
    if labels.is_dir():
        config = read_manifest(labels, stage="label").data["config"]
        if is_calibrated(config):
            raise ConfigError(
                f"--calibration {file}: the labels of {labels} went through a calibration when "
                "they were made; leave this one out"
            )
        (fitted,) = calibration.members
        if (fitted.critic_id, fitted.prompt_hash) != (config["critic_id"], config["prompt_hash"]):
            raise ConfigError(
                f"--calibration {file}: was fitted on the labels of {fitted.critic_id} (prompt "
                f"{fitted.prompt_hash}); {labels} holds those of {config['critic_id']} (prompt "
                f"{config['prompt_hash']})"
            )
    return calibration


def calibrated_columns(
    calibration: Calibration,
    columns: TokenColumns,
    *,
    trajectories: "NDArray[np.int32]",
    steps: "NDArray[np.int32]",
    labels: "NDArray[np.int8]",
    probabilities: "NDArray[np.float32]",
) -> "tuple[NDArray[np.bool_], NDArray[np.int8], NDArray[np.float32]]":
    """Return which of L labels stay, and those calibrated, with their probabilities.

    A calibration looks at all steps of a trajectory: the labels of one that lacks some go.

    Args:
        calibration: what to apply.
        columns: the token rows.
        trajectories: of each label, [L].
        steps: of each label, [L]; each step of a trajectory once at most.
        labels: indices in `LABELS`, [L].
        probabilities: NaN where there are none, [L, 3].
    """
    num_steps = np.bincount(columns.trajectories[columns.span_rows()], minlength=len(columns.names))
    given = np.bincount(trajectories, minlength=len(columns.names))
    whole = (given == num_steps)[trajectories]
    outcomes = np.zeros(len(columns.names), np.int8)
    outcomes[columns.trajectories] = columns.outcomes
    owners = trajectories[whole]
    by_code: dict[int, Any] = {code: outcome for outcome, code in OUTCOME_CODES.items()}
    asked = pl.DataFrame(
        {
            "trajectory_id": owners.astype(np.int64),
            "step_index": steps[whole],
            "num_steps": num_steps[owners].astype(np.int32),
            "resolved": [by_code[code] for code in outcomes[owners].tolist()],
            "rules": [None] * len(owners),
        },
        schema_overrides={
            "trajectory_id": pl.String,
            "resolved": pl.Boolean,
            "rules": pl.List(pl.String),
        },
    )
    said = pl.DataFrame(
        {
            "label": label_names(labels[whole]),
            **{
                name: pl.Series(column, dtype=pl.Float32).fill_nan(None)
                for name, column in zip(PROBABILITIES, probabilities[whole].T, strict=True)
            },
            "rationale": pl.Series([None] * len(owners), dtype=pl.String),
        }
    )
    found = calibrated(calibration, asked, [said])
    chances = found.select(PROBABILITIES).to_numpy().astype(np.float32)
    return whole, label_numbers(found["label"]), chances
