"""What a calibration or a baseline may look at: each step as a row of numbers, by name.

A feature's name says all there is to know of it, so that what was fitted is what is applied:

    position:index, log_index, fraction, first, last, log_steps   where the step stands
    outcome:resolved, unresolved                                  1 where that is known to be so
    rule:ID                                                       1 where the rule fired
    rules:harmful, unnecessary                                    1 where a rule of the kind fired
    critic[I]:harmful, unnecessary                                1 where member I says so
    critic[I]:log_odds_harmful, log_odds_unnecessary              of its probabilities
    critic[I]:share_harmful                                       mean P(harmful) of the trajectory
    NAME@-1, NAME@+1                                              of the step before, after; else 0

A label without probabilities counts as certain. All rows of a trajectory must be there, in any
order.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from srft_prep.critic.rules import RULES
from srft_prep.ensembles import shares
from srft_prep.types import LABELS

POSITION: Final = tuple(
    f"position:{name}" for name in ("index", "log_index", "fraction", "first", "last", "log_steps")
)
OUTCOME: Final = ("outcome:resolved", "outcome:unresolved")

_CERTAIN: Final = 1e-3
"""Probabilities are kept this far from 0 and 1 before their odds are taken."""
_RULES: Final = {rule.rule_id: rule.label for rule in RULES}
_GOOD, _UNNECESSARY, _HARMFUL = range(len(LABELS))

Floats = NDArray[np.float64]


def rule_names(*, neighbours: bool = True) -> tuple[str, ...]:
    """Return the names of rule evidence: that on a step, and on those beside it."""
    own = [f"rule:{rule_id}" for rule_id in _RULES]
    kinds = ["rules:harmful", "rules:unnecessary"]
    near = [f"{kind}@{shift}" for kind in kinds for shift in ("-1", "+1")] if neighbours else []
    return (*own, *kinds, *near)


def critic_names(member: int, *, probabilities: bool) -> tuple[str, ...]:
    """Return the names of what a member says: of the step, of those beside it, of all."""
    said = ["harmful", "unnecessary"]
    if probabilities:
        said += ["log_odds_harmful", "log_odds_unnecessary"]
    near = said[2] if probabilities else said[0]
    said += [f"{near}@-1", f"{near}@+1", "share_harmful"]
    return tuple(f"critic[{member}]:{name}" for name in said)


def feature_matrix(
    names: Sequence[str], steps: pl.DataFrame, members: Sequence[pl.DataFrame]
) -> Floats:
    """Return the features of steps, [N, F], in the order of `names`.

    Args:
        names: as `rule_names`, `critic_names`, `POSITION` and `OUTCOME` spell them.
        steps: trajectory_id, step_index, num_steps, resolved, rules.
        members: label, p_good, p_unnecessary, p_harmful of each member, row by row as `steps`.

    Raises:
        KeyError: no feature has this name.
    """
    columns = [_feature(name, steps, members) for name in names]
    return np.stack(columns, axis=1) if columns else np.zeros((steps.height, 0))


def _feature(name: str, steps: pl.DataFrame, members: Sequence[pl.DataFrame]) -> Floats:
    plain, _, shift = name.partition("@")
    owner, _, what = plain.partition(":")
    if shift:
        return _beside(_feature(plain, steps, members), steps, int(shift))
    if owner == "position":
        return _position(what, steps)
    if owner == "outcome":
        wanted = {"resolved": True, "unresolved": False}[what]
        return _numbers((steps["resolved"] == wanted).fill_null(value=False))
    if owner == "rule" and what in _RULES:
        return _numbers(steps["rules"].list.contains(what).fill_null(value=False))
    if owner == "rules" and what in _RULES.values():
        kind = [rule_id for rule_id, label in _RULES.items() if label == what]
        fired = steps["rules"].list.set_intersection(pl.Series([kind])).list.len() > 0
        return _numbers(fired.fill_null(value=False))
    if owner.startswith("critic[") and owner.endswith("]"):
        return _said(what, steps, members[int(owner[7:-1])])
    raise KeyError(name)


def _position(what: str, steps: pl.DataFrame) -> Floats:
    index, count = _numbers(steps["step_index"]), _numbers(steps["num_steps"])
    by_name: dict[str, Floats] = {
        "index": index / 10,
        "log_index": np.log1p(index),
        "fraction": (index + 0.5) / count,
        "first": (index == 0).astype(np.float64),
        "last": (index == count - 1).astype(np.float64),
        "log_steps": np.log(count),
    }
    return by_name[what]


def _said(what: str, steps: pl.DataFrame, member: pl.DataFrame) -> Floats:
    if what in LABELS:
        return _numbers(member["label"] == what)
    chances = shares(member)
    if what == "share_harmful":
        frame = steps.select("trajectory_id").with_columns(p=pl.Series(chances[:, _HARMFUL]))
        return _numbers(frame.select(pl.col("p").mean().over("trajectory_id"))["p"])
    kind = {"log_odds_harmful": _HARMFUL, "log_odds_unnecessary": _UNNECESSARY}[what]
    chance = np.clip(chances[:, kind], _CERTAIN, 1 - _CERTAIN)
    odds: Floats = np.log(chance) - np.log1p(-chance)
    return odds


def _beside(values: Floats, steps: pl.DataFrame, shift: int) -> Floats:
    """Return the values of the step `shift` away; 0 where there is none."""
    names, indices = steps["trajectory_id"].rank("dense").to_numpy(), steps["step_index"].to_numpy()
    order = np.lexsort((indices, names))
    keys = (names[order].astype(np.int64) << 32) | indices[order]
    wanted = (names.astype(np.int64) << 32) + indices.astype(np.int64) + shift
    places = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    if not len(keys):
        return values
    found = (keys[places] == wanted) & (indices + shift >= 0)
    return np.where(found, values[order][places], 0.0)


def _numbers(column: pl.Series) -> Floats:
    numbers: NDArray[Any] = column.cast(pl.Float64).to_numpy()
    return numbers
