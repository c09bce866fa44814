"""Labels of several critics -> one label a step.

    any        the most severe label that a member gives: harmful if one of them says so
    majority   harmful where more than half of the members say so; else the more frequent of the
               other two, of equals unnecessary. Probabilities are the shares of the votes
    mean       the likeliest label by the mean of the members' probabilities, of equals the more
               severe; a member that measures none counts as certain of its label

A step that a member has no label for has none. An ensemble of one is its member as it is. `any`
measures no probabilities: a maximum is none. The order of members decides only whose rationale
stands beside the label: the first's of those who gave it. Cost: a few passes over columns.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, get_args

import numpy as np
import polars as pl

from srft_prep.schemas import PROBABILITIES
from srft_prep.types import LABELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

How = Literal["any", "majority", "mean"]
HOWS: Final[tuple[How, ...]] = get_args(How)

JUDGEMENT: Final[dict[str, pl.DataType]] = {
    "label": pl.String(),
    **dict.fromkeys(PROBABILITIES, pl.Float32()),
    "rationale": pl.String(),
}
"""What a critic, or several together, say of a step: the columns of members and results."""
_GOOD, _UNNECESSARY, _HARMFUL = range(len(LABELS))
_EQUAL_DECIMALS: Final = 6
"""Means that agree to so many places are equal: probabilities are float32."""


def combine(members: Sequence[pl.DataFrame], how: How) -> pl.DataFrame:
    """Return what the members say together, one row a step: the columns of `JUDGEMENT`.

    Args:
        members: what each critic says of the same N steps, in the same order; further columns
            are passed over. A label is null where the critic gave none.
        how: the rule.

    Raises:
        ValueError: no member, members of different lengths, or an unknown rule.
    """
    if how not in HOWS:
        raise ValueError(f"expected one of {', '.join(HOWS)}, got {how!r}")
    heights = [member.height for member in members]
    if len(set(heights)) != 1:
        raise ValueError(f"expected members of equal length, got {heights}")
    if len(members) == 1:
        return members[0].select(pl.col(name).cast(kind) for name, kind in JUDGEMENT.items())
    labels_mn = np.stack([label_numbers(member["label"]) for member in members])
    given = (labels_mn >= 0).all(axis=0)
    if how == "any":
        chosen = labels_mn.max(axis=0)
        chances = np.full((3, len(chosen)), np.nan)
    elif how == "majority":
        chances = np.stack([(labels_mn == number).mean(axis=0) for number in range(3)])
        others = chances[_UNNECESSARY] >= chances[_GOOD]
        chosen = np.where(chances[_HARMFUL] > 0.5, _HARMFUL, others.astype(np.int8))
    else:
        chances = np.mean([shares(member) for member in members], axis=0).T
        severe_first = chances[::-1].round(_EQUAL_DECIMALS)
        chosen = _HARMFUL - severe_first.argmax(axis=0)
    chances[:, ~given] = np.nan
    chosen = np.where(given, chosen, -1)
    return pl.DataFrame(
        {
            "label": label_names(chosen),
            **{
                name: pl.Series(column.astype(np.float32)).fill_nan(None)
                for name, column in zip(PROBABILITIES, chances, strict=True)
            },
            "rationale": _rationales(members, label_names(chosen)),
        },
        schema=JUDGEMENT,
    )


def shares(member: pl.DataFrame) -> "NDArray[np.float64]":
    """Return P(good), P(unnecessary), P(harmful), [N, 3]; a label without them is certain."""
    certain = np.vstack([np.eye(len(LABELS)), np.zeros(len(LABELS))])[
        label_numbers(member["label"])
    ]
    measured = member.select(
        pl.col(name).cast(pl.Float64).fill_null(np.nan) for name in PROBABILITIES
    ).to_numpy()
    return np.where(np.isnan(measured).any(axis=1, keepdims=True), certain, measured)


def label_numbers(labels: pl.Series) -> "NDArray[np.int8]":
    """Return labels as indices in `LABELS`, which rise with severity; -1 for null."""
    numbers = labels.cast(pl.Enum(LABELS)).to_physical().cast(pl.Int8).fill_null(-1)
    return numbers.to_numpy()


def label_names(numbers: "NDArray[np.integer]") -> pl.Series:
    """Return the labels of indices in `LABELS`; null for -1."""
    names = np.array([*LABELS, None], dtype=object)[numbers]
    return pl.Series("label", names.tolist(), dtype=pl.String)


def _rationales(members: Sequence[pl.DataFrame], labels: pl.Series) -> pl.Series:
    """Return for each step the first rationale given for the label that was chosen."""
    told = pl.DataFrame({"chosen": labels}).with_columns(
        column
        for number, member in enumerate(members)
        for column in (
            member["label"].cast(pl.String).alias(f"label_{number}"),
            member["rationale"].cast(pl.String).alias(f"rationale_{number}"),
        )
    )
    agreeing = [
        pl.when(pl.col(f"label_{number}") == pl.col("chosen")).then(f"rationale_{number}")
        for number in range(len(members))
    ]
    return told.select(pl.coalesce(agreeing).alias("rationale"))["rationale"]
