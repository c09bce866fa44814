"""Which trajectories the list shows: what a user may ask for, and the rows that fit."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

import polars as pl

from srft_prep.config import OUTCOMES
from srft_prep.errors import ConfigError
from srft_prep.types import LABELS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STATES: Final = ("unlabelled", "begun", "labelled", "disagreement")
_LONGEST: Final = 1_000
"""Characters of a filter's value; ids are shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What is asked for; an empty string asks for anything."""

    search: str = ""
    """Part of a trajectory's or a task's id, in any case."""
    outcome: str = ""
    format: str = ""
    model: str = ""
    state: str = ""
    """One of `STATES`: how far this annotator is, or that labels that may be seen differ."""
    label: str = ""
    """A label that some step has, of those that may be seen."""


def filter_of(query: Mapping[str, str]) -> Filter:
    """Return the filter that a request asks for.

    Raises:
        ConfigError: a value that no filter has.
    """
    given = {each.name: query.get(each.name, "") for each in fields(Filter)}
    allowed = {"outcome": tuple(OUTCOMES.values()), "state": STATES, "label": LABELS}
    for name, value in given.items():
        choices = allowed.get(name, (value,))
        if len(value) > _LONGEST or (value and value not in choices):
            raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value[:40]!r}")
    return Filter(**given)


def rows_that_fit(
    frame: pl.DataFrame,
    wanted: Filter,
    *,
    num_labelled: "NDArray[np.int64]",
    num_differing: "NDArray[np.int64]",
    num_with_label: "Mapping[str, NDArray[np.int64]]",
) -> "NDArray[np.int64]":
    """Return the numbers of the rows that fit, ascending.

    Args:
        frame: the catalogue's.
        wanted: the filter.
        num_labelled: steps that this annotator labelled, [R].
        num_differing: steps whose labels differ, as far as they may be seen, [R].
        num_with_label: steps that have a label that may be seen, by label, each [R].
    """
    keep = pl.lit(value=True)
    if wanted.search:
        keep &= pl.col("sought").str.contains(wanted.search.lower(), literal=True)
    if wanted.outcome:
        keep &= pl.col("outcome") == wanted.outcome
    if wanted.format:
        keep &= pl.col("format") == wanted.format
    if wanted.model:
        keep &= pl.col("model") == wanted.model
    if wanted.state == "unlabelled":
        keep &= pl.col("num_labelled") < pl.col("num_steps")
    elif wanted.state == "begun":
        keep &= pl.col("num_labelled").is_between(1, pl.col("num_steps") - 1)
    elif wanted.state == "labelled":
        keep &= (pl.col("num_labelled") == pl.col("num_steps")) & (pl.col("num_steps") > 0)
    elif wanted.state == "disagreement":
        keep &= pl.col("num_differing") > 0
    if wanted.label:
        keep &= pl.col("num_with_label") > 0
    found = frame.with_columns(
        num_labelled=pl.Series(num_labelled),
        num_differing=pl.Series(num_differing),
        num_with_label=pl.Series(num_with_label.get(wanted.label, num_labelled)),
    )
    return found.with_row_index("row").filter(keep)["row"].to_numpy().astype("int64")
