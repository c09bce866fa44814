"""Weights that files give to steps, to their parts and to their characters, as columns."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from srft_prep.errors import LabelError
from srft_prep.token_columns import StepIndex, TokenColumns
from srft_prep.weight_files import (
    FIRST_FIELD,
    STEP_TARGET,
    FileRow,
    Growing,
    read_weight_rows,
    where,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Numbers that multiply weights, F of them, of one file."""

    path: Path
    lines: "NDArray[np.int32]"
    """Where each stands in the file, [F]."""
    spans: "NDArray[np.int64]"
    """Place of each one's step among all steps, [F]."""
    targets: "NDArray[np.int8]"
    """What of the step: see `weight_files`, [F]."""
    starts: "NDArray[np.int32]"
    ends: "NDArray[np.int32]"
    """Half-open ranges of a field's characters, [F]."""
    weights: "NDArray[np.float64]"
    """[F]"""

    def select(self, chosen: "NDArray[np.bool_]") -> "Factors":
        """Return some of the factors."""
        names = ("lines", "spans", "targets", "starts", "ends", "weights")
        return Factors(path=self.path, **{name: getattr(self, name)[chosen] for name in names})

    def of_steps(self) -> "Factors":
        """Return those of whole steps."""
        return self.select(self.targets == STEP_TARGET)

    def of_parts(self) -> "Factors":
        """Return those of parts."""
        return self.select((self.targets >= 0) & (self.targets < FIRST_FIELD))

    def of_characters(self) -> "Factors":
        """Return those of characters."""
        return self.select(self.targets >= FIRST_FIELD)


class FactorColumns:
    """The factors of a file's rows as they are read, before their steps are looked up."""

    def __init__(self) -> None:
        self._grown = Growing(
            lines="i", trajectories="i", steps="i", targets="b", starts="i", ends="i", weights="d"
        )

    def add(self, row: FileRow, trajectory: int) -> None:
        """Add what a row says."""
        for factor in row.factors:
            self._grown.add(
                lines=row.line,
                trajectories=trajectory,
                steps=row.step,
                targets=factor.target,
                starts=factor.start,
                ends=factor.end,
                weights=factor.weight,
            )

    def looked_up(self, path: Path, columns: TokenColumns, index: StepIndex) -> Factors:
        """Return the factors with the places of their steps.

        Raises:
            LabelError: a step that its trajectory does not have.
        """
        grown = self._grown
        arrays: dict[str, NDArray[Any]] = {
            name: np.array(grown[name])
            for name in ("lines", "targets", "starts", "ends", "weights")
        }
        trajectories, steps = np.array(grown["trajectories"]), np.array(grown["steps"])
        spans = index.find(trajectories, steps)
        if len(lost := np.flatnonzero(spans < 0)):
            first = lost[0]
            raise LabelError(
                f"{where(path, arrays['lines'][first])}: "
                + index.no_such_step("weight", trajectories[first], steps[first])
            )
        return Factors(path=path, spans=spans, **arrays)


def read_factors(
    path: Path, columns: TokenColumns, index: StepIndex, *, rejected: frozenset[str]
) -> Factors:
    """Return the factors of a weights file.

    Raises:
        LabelError: a row that is no weight, of a step that is not there, or one that is given
            twice; the error names file and line.
    """
    found = FactorColumns()
    for row, trajectory in with_trajectories(
        read_weight_rows(path), path, columns, what="weight", rejected=rejected
    ):
        found.add(row, trajectory)
    factors = found.looked_up(path, columns, index)
    whole = factors.select(factors.targets < FIRST_FIELD)
    keys = whole.spans * (FIRST_FIELD + 1) + whole.targets + 1
    if (second := first_repeated(keys)) is not None:
        raise LabelError(
            f"{where(path, whole.lines[second])}: a second weight for the same step or part; "
            "keep one"
        )
    return factors


def with_trajectories(
    rows: Iterable[FileRow],
    path: Path,
    columns: TokenColumns,
    *,
    what: str,
    rejected: frozenset[str],
) -> Iterator[tuple[FileRow, int]]:
    """Yield rows with the index of their trajectory; those of `rejected` ones are left out.

    Raises:
        LabelError: a trajectory that the tokens do not have.
    """
    index = {name: code for code, name in enumerate(columns.names)}
    for row in rows:
        trajectory = index.get(row.trajectory_id)
        if trajectory is not None:
            yield row, trajectory
        elif row.trajectory_id not in rejected:
            raise LabelError(
                f"{where(path, row.line)}: {no_such_trajectory(what, row.trajectory_id)}"
            )


def no_such_trajectory(what: str, trajectory_id: str) -> str:
    """Return what an error says of a label or weight of a trajectory without tokens."""
    return (
        f"a {what} for the trajectory {trajectory_id!r:.200}, which the tokens do not have; were "
        f"these {what}s made for other trajectories?"
    )


def first_repeated(keys: "NDArray[np.int64]") -> int | None:
    """Return the place of the first key that stood before, None where all differ."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    again = order[1:][ordered[1:] == ordered[:-1]]
    return int(again.min()) if len(again) else None


def multiplied(weights: "NDArray[np.float64]", factors: Sequence[Factors]) -> None:
    """Multiply the weights of steps, in place, by the factors of whole steps."""
    for each in factors:
        steps = each.of_steps()
        np.multiply.at(weights, steps.spans, steps.weights)
