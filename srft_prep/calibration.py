"""A critic's labels set right by a little hand-labelling: what was fitted, and its application.

A calibration is a small JSON file: a threshold on a critic's own P(harmful), or a head, which is a
logistic regression over what `step_features` names. `critic-eval --calibrate` fits it, `label
--calibration` and `pack --calibration` apply it. Applying takes a matrix product; nothing of the
libraries that fitted it is needed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, get_args

import numpy as np
import orjson
import polars as pl

from srft_prep.critic.rules import RulesCritic
from srft_prep.ensembles import shares
from srft_prep.errors import ConfigError
from srft_prep.schemas import PROBABILITIES
from srft_prep.step_features import feature_matrix
from srft_prep.storage import write_bytes
from srft_prep.types import LABELS, Trajectory

SCHEMA: Final = 1
"""Version of the file; a reader refuses another."""

Kind = Literal["threshold", "head"]

_HARMFUL: Final = LABELS.index("harmful")
_MOST: Final = 1_000_000
"""Log-odds beyond this are no regression's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A critic and the question it was asked: whose labels a calibration may be given."""

    critic_id: str
    prompt_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedOn:
    """The gold labels that a calibration was fitted on."""

    gold: tuple[str, ...]
    """SHA-256 of the files."""
    trajectories: int
    steps: int
    harmful: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A threshold, or a head and its threshold."""

    kind: Kind
    members: tuple[Member, ...]
    """In the order in which their labels are to be given."""
    threshold: float
    """A step is harmful where P(harmful) is at least this."""
    features: tuple[str, ...] = ()
    """Names (`step_features`) of what the head looks at; none of a threshold."""
    coefficients: tuple[float, ...] = ()
    """Of the features, in log-odds of harmful."""
    intercept: float = 0.0
    rules: str | None = None
    """Hash of the rules whose evidence is among the features."""
    fitted_on: FittedOn
    scores: Mapping[str, Any] = field(default_factory=dict)
    """Cross-validated scores of this calibration and of what it was held against."""
    package_version: str


def read_calibration(path: Path) -> Calibration:
    """Return the calibration of a file.

    Raises:
        ConfigError: there is no such file, or it is no calibration, or one of another version.
    """
    try:
        data = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such calibration; critic-eval --calibrate -o FILE makes one"
        ) from None
    except (orjson.JSONDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as a calibration: {error}") from None
    return calibration_of(data, where=str(path))


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration atomically, as JSON that a person can read."""
    data = {"schema": SCHEMA, **asdict(calibration)}
    write_bytes(path, orjson.dumps(data, option=orjson.OPT_INDENT_2) + b"\n")


def calibration_of(data: Any, *, where: str) -> Calibration:
    """Return the calibration that a JSON value holds; `where` is how an error names it.

    Raises:
        ConfigError: the value holds none, or one of another version.
    """

    def refuse(expected: str, got: Any) -> NoReturn:
        raise ConfigError(f"{where}: expected {expected}, got {got!r:.80}; fit it again")

    if not isinstance(data, dict) or "schema" not in data:
        refuse("a calibration: a JSON object with schema, kind, members, ...", data)
    if data["schema"] != SCHEMA:
        raise ConfigError(
            f"{where}: calibration schema {data['schema']!r:.40}, this program reads {SCHEMA}; use "
            f"the srft-prep version {data.get('package_version')!r:.40}, or fit it again"
        )
    names = {each.name for each in fields(Calibration)}
    if data.keys() - {"schema"} != names:
        refuse(f"the keys schema, {', '.join(sorted(names))}", sorted(data))
    if data["kind"] not in get_args(Kind):
        refuse(f"kind as one of {', '.join(get_args(Kind))}", data["kind"])
    for name in ("threshold", "intercept"):
        if not _is_number(data[name]):
            refuse(f"{name} as a finite number", data[name])
    for name, sound in (("coefficients", _is_number), ("features", _is_text)):
        if not isinstance(data[name], list) or not all(map(sound, data[name])):
            refuse(f"{name} as a list", data[name])
    if not 0 <= data["threshold"] <= 1:
        refuse("threshold as a probability from 0 to 1", data["threshold"])
    for number in (data["intercept"], *data["coefficients"]):
        if abs(number) > _MOST:
            refuse(f"intercept and coefficients from -{_MOST:,} to {_MOST:,}", number)
    if again := [name for name in data["features"] if data["features"].count(name) > 1]:
        refuse("each feature once", again[0])
    if len(data["features"]) != len(data["coefficients"]):
        refuse("a coefficient for each feature", f"{len(data['coefficients'])} coefficients")
    try:
        members = tuple(Member(**member) for member in data["members"])
        fitted_on = FittedOn(**{**data["fitted_on"], "gold": tuple(data["fitted_on"]["gold"])})
    except (TypeError, KeyError) as error:
        refuse("members and fitted_on as critic-eval writes them", error)
    sound_members = all(_is_text(each.critic_id) and _is_text(each.prompt_hash) for each in members)
    if not members or not sound_members or (data["kind"] == "threshold" and len(members) > 1):
        refuse("members as [{critic_id, prompt_hash}], one of them for a threshold", members)
    if not isinstance(data["scores"], dict) or not _is_text(data["package_version"]):
        refuse("scores as an object and package_version as text", data["scores"])
    if data["rules"] is not None and not _is_hash(data["rules"]):
        refuse("rules as a hash (lower-case hexadecimal) or null", data["rules"])
    values = {name: data[name] for name in names}
    values |= {"members": members, "fitted_on": fitted_on}
    values |= {name: tuple(data[name]) for name in ("features", "coefficients")}
    calibration = Calibration(**values)
    _refuse_unknown_features(calibration, where)
    if needs_rules(calibration) != (calibration.rules is not None):
        refuse("rules as a hash where features look at them, else null", calibration.rules)
    return calibration


def needs_rules(calibration: Calibration) -> bool:
    """Return whether it looks at which rules fired."""
    return any(name.startswith(("rule:", "rules:")) for name in calibration.features)


def needs_outcome(calibration: Calibration) -> bool:
    """Return whether it looks at whether a trajectory is known to be resolved."""
    return any(name.startswith("outcome:") for name in calibration.features)


def calibrated(
    calibration: Calibration, steps: pl.DataFrame, members: Sequence[pl.DataFrame]
) -> pl.DataFrame:
    """Return the calibrated labels of steps, row by row.

    A step is harmful where P(harmful), as float32, is at least the threshold. Another keeps its
    likeliest other label: the critic's own where that is not harmful, else the likelier by its
    probabilities, else good. P(good) and P(unnecessary) keep their proportion to each other.

    Args:
        calibration: what to apply.
        steps: trajectory_id, step_index, num_steps, resolved (null: unknown), rules (list of the
            ids of those that fired; null: not known). All steps of each of its trajectories.
        members: label, p_good, p_unnecessary, p_harmful, rationale of each member, row-aligned.

    Returns:
        label, p_good, p_unnecessary, p_harmful (float32), rationale.

    Raises:
        ConfigError: another number of members than it was fitted with, or it needs the evidence
            of rules and that is not there, or is of other rules than it was fitted with.
    """
    if len(members) != len(calibration.members):
        raise ConfigError(
            f"the calibration was fitted with {len(calibration.members)} critics, got the labels "
            f"of {len(members)}"
        )
    if needs_rules(calibration):
        _refuse_other_rules(calibration, steps)
    chances = np.mean([shares(member) for member in members], axis=0)
    harmful = chances[:, _HARMFUL]
    if calibration.kind == "head":
        matrix = feature_matrix(calibration.features, steps, members)
        odds = matrix @ np.asarray(calibration.coefficients) + calibration.intercept
        harmful = 0.5 * (1 + np.tanh(odds / 2))
    probability = harmful.astype(np.float32)
    flagged = probability >= calibration.threshold
    rest = _rest(chances, members)
    other = np.where(rest[:, 1] > rest[:, 0], "unnecessary", "good")
    if len(members) == 1:
        own = members[0]["label"].to_numpy()
        other = np.where(own == "harmful", other, own)
    label = pl.Series("label", np.where(flagged, "harmful", other), dtype=pl.String)
    split = rest * (1 - probability.astype(np.float64))[:, None]
    return pl.DataFrame(
        {
            "label": label,
            "p_good": split[:, 0].astype(np.float32),
            "p_unnecessary": split[:, 1].astype(np.float32),
            "p_harmful": probability,
            "rationale": _rationales(label, probability, calibration.threshold, members),
        },
        schema_overrides={"rationale": pl.String},
    )


def rules_fired(trajectories: Iterable[Trajectory]) -> pl.DataFrame:
    """Return which rules fired on every step: trajectory_id, step_index, rules.

    One row a step, in order; a step on which none fired has an empty list. The rule that reads the
    outcome is not among them: a calibration has the outcome itself.
    """
    critic = RulesCritic()
    names: list[str] = []
    indices: list[int] = []
    rules: list[list[str]] = []
    for trajectory in trajectories:
        fired: list[list[str]] = [[] for _ in range(trajectory.num_steps)]
        for finding in critic.findings(trajectory):
            fired[finding.step_index].append(finding.rule_id)
        names += [trajectory.trajectory_id] * len(fired)
        indices += range(len(fired))
        rules += fired
    return pl.DataFrame(
        {"trajectory_id": names, "step_index": indices, "rules": rules},
        schema={
            "trajectory_id": pl.String,
            "step_index": pl.Int32,
            "rules": pl.List(pl.String),
        },
    )


def _rest(chances: np.ndarray[Any, Any], members: Sequence[pl.DataFrame]) -> Any:
    """Return the shares of good and unnecessary among what is not harmful, [N, 2].

    Where the critics left nothing for either, all of it is good's.
    """
    rest = chances[:, :_HARMFUL]
    total = rest.sum(axis=1, keepdims=True)
    all_good = np.broadcast_to(np.array([1.0, 0.0]), rest.shape)
    return np.where(total > 0, rest / np.where(total > 0, total, 1.0), all_good)


def _rationales(
    label: pl.Series, probability: Any, threshold: float, members: Sequence[pl.DataFrame]
) -> pl.Series:
    """Return the words of the first member that said the same, else what changed the label."""
    same = [
        pl.when(member["label"] == label).then(member["rationale"].cast(pl.String))
        for member in members
    ]
    agreed = pl.lit(value=False)
    for member in members:
        agreed = agreed | (member["label"] == label)
    numbers = pl.Series(probability).cast(pl.Float64).round(3).cast(pl.String)
    why = pl.lit("calibrated: P(harmful) ") + numbers + pl.lit(f", threshold {threshold:.3f}")
    frame = label.to_frame()
    return frame.select(rationale=pl.when(agreed).then(pl.coalesce(*same)).otherwise(why))[
        "rationale"
    ]


def _refuse_other_rules(calibration: Calibration, steps: pl.DataFrame) -> None:
    if steps["rules"].null_count():
        raise ConfigError(
            "the calibration looks at which rules fired, and that is not known of these labels; "
            "apply it where the trajectories are: label --calibration"
        )
    here = RulesCritic().prompt_hash
    if calibration.rules != here:
        raise ConfigError(
            f"the calibration was fitted with the rules {calibration.rules}, this program has "
            f"{here}; fit it again"
        )


def _refuse_unknown_features(calibration: Calibration, where: str) -> None:
    steps = pl.DataFrame(
        schema={
            "trajectory_id": pl.String,
            "step_index": pl.Int32,
            "num_steps": pl.Int32,
            "resolved": pl.Boolean,
            "rules": pl.List(pl.String),
        }
    )
    member = pl.DataFrame(schema={"label": pl.String, **dict.fromkeys(PROBABILITIES, pl.Float32)})
    for name in calibration.features:
        try:
            feature_matrix([name], steps, [member] * len(calibration.members))
        except (KeyError, ValueError, IndexError):
            raise ConfigError(
                f"{where}: this program knows no feature {name!r:.80}; use the srft-prep version "
                f"{calibration.package_version!r:.40}, or fit it again"
            ) from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{8,128}", value) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
