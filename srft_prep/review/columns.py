"""Who said what of which step, as columns: all questions about them are sums over arrays.

S is the number of steps of all trajectories. Ten thousand trajectories of sixty steps are 600 kB a
critic, and a question about all of them takes milliseconds; what critics wrote beside their labels
is read from their tables when a trajectory is opened.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl

from srft_prep.errors import LabelError, ShardError
from srft_prep.manifest import read_manifest
from srft_prep.review.catalogue import Catalogue
from srft_prep.schemas import LABELS_FILE, PROBABILITIES
from srft_prep.types import LABELS, Label

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Codes = NDArray[np.int8]

NOTHING: Final = -1
"""Code of a step without a label; others are indices in `LABELS`."""
CODES: Final[dict[str | None, int]] = {
    **{label: code for code, label in enumerate(LABELS)},
    None: NOTHING,
}
_WORDS: Final = ["rationale", *PROBABILITIES]


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """A critic's labels of the catalogue's steps."""

    name: str
    """What the user calls it."""
    critic_id: str
    folder: Path
    codes: "Codes"
    """Its label of each step, [S]."""
    num_stale: int
    """Labels of other versions of trajectories than the catalogue holds: not shown."""
    _table: Path
    _places: "NDArray[np.int32]"
    """Row of its table for each step, [S]."""
    _state: tuple[int, ...] | None
    """Of its table when it was read."""

    def check(self) -> None:
        """Refuse to go on where `label` ran again: its rows are of other steps then.

        Raises:
            ShardError: the table is not the one that was read.
        """
        if _state_of(self._table) != self._state:
            raise ShardError(f"{self._table}: changed since this server started; start it again")

    def details(self, start: int, end: int) -> list[dict[str, Any] | None]:
        """Return label, rationale and probabilities of the steps [start, end).

        Raises:
            ShardError: the table changed since it was read, or is damaged.
        """
        places = self._places[start:end]
        known = places[places >= 0]
        if not len(known):
            return [None] * (end - start)
        first, last = int(known.min()), int(known.max())
        frame = pl.scan_parquet(self._table).slice(first, last - first + 1)
        try:
            rows = frame.select("label", *_WORDS).collect().rows(named=True)
        except (OSError, pl.exceptions.PolarsError) as error:
            self.check()
            raise ShardError(f"{self._table}: damaged: {error}; run label again") from None
        self.check()
        return [rows[place - first] if place >= 0 else None for place in places]


def read_critic(folder: Path, name: str, catalogue: Catalogue) -> Critic:
    """Return a label directory's labels of the catalogue's steps.

    Raises:
        ShardError: no finished output of `label`, or a damaged one.
        LabelError: none of its labels belongs to these trajectories, or one names a step that its
            trajectory does not have.
    """
    source = read_manifest(folder, stage="label").checked()
    table = source.path / LABELS_FILE
    state = _state_of(table)
    columns = ["trajectory_id", "content_hash", "step_index", "label", "critic_id"]
    labels = pl.read_parquet(table, columns=columns).with_row_index("place")
    known = catalogue.frame.lazy().select(
        "trajectory_id", "content_hash", "num_steps", row=pl.int_range(pl.len())
    )
    joined = (
        labels.lazy()
        .join(known, on=["trajectory_id", "content_hash"], how="inner")
        .select("place", "step_index", "label", "row", "num_steps")
        .collect()
    )
    if labels.height and not joined.height:
        raise LabelError(f"{folder}: none of its labels belongs to these trajectories")
    beyond = joined.filter(pl.col("step_index") >= pl.col("num_steps"))
    if beyond.height:
        row, step = beyond["row"][0], beyond["step_index"][0]
        raise LabelError(
            f"{folder}: {catalogue.frame['trajectory_id'][row]!r} has no step {step}: were these "
            "labels made for these trajectories?"
        )
    steps = catalogue.offsets[joined["row"].to_numpy()] + joined["step_index"].to_numpy()
    codes = np.full(catalogue.num_steps, NOTHING, np.int8)
    codes[steps] = joined["label"].replace_strict(CODES, return_dtype=pl.Int8).to_numpy()
    places = np.full(catalogue.num_steps, -1, np.int32)
    places[steps] = joined["place"].to_numpy()
    ids = labels["critic_id"].unique().to_list()
    return Critic(
        name=name,
        critic_id=", ".join(sorted(ids)),
        folder=folder,
        codes=codes,
        num_stale=labels.height - joined.height,
        _table=table,
        _places=places,
        _state=state,
    )


def _state_of(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is replaced or written to; None where it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def label_of(code: int) -> Label | None:
    """Return the label of a code."""
    return None if code == NOTHING else LABELS[code]


def sums(values: "NDArray[Any]", offsets: "NDArray[np.int64]") -> "NDArray[np.int64]":
    """Return the sum of steps' values [S] over each trajectory, [R]."""
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    found: NDArray[np.int64] = totals[offsets[1:]] - totals[offsets[:-1]]
    return found
