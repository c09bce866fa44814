"""What critics said of trajectories -> one label a step: alone, together, or one after the other.

A panel is a critic, an ensemble or a cascade. Its critics' answers are read from the ledger for
some trajectories at a time, laid beside each other as columns, a row a step, and combined. Nothing
here asks anything: the same ledger and settings give the same labels.

In an ensemble every critic sees every trajectory. In a cascade a critic settles the steps that it
is sure of, and the next is asked about what is left:

- with a calibration it is sure where P(harmful) or its complement is at least `sure`;
- else where its likeliest label's probability is; one that measures none is sure of everything;
- the rules, uncalibrated, are sure where one of them fired: that none did says little;
- the last critic settles all that it has labelled.

A calibration looks at a step's neighbours, so it needs all steps of its trajectory: a critic that
has one is asked about whole trajectories. A step that a critic failed on is left to the next.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson
import polars as pl

from srft_prep.calibration import Calibration, calibrated, needs_rules, rules_fired
from srft_prep.config import LabelConfig, Together
from srft_prep.critic import StepLabel
from srft_prep.ensembles import JUDGEMENT, combine
from srft_prep.errors import ConfigError
from srft_prep.ledger import Ledger
from srft_prep.ledger_labels import Needed, Row, labels_in, rows_of
from srft_prep.schemas import PROBABILITIES
from srft_prep.trajectories import named, read_trajectories

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROUNDED: Final = 2**-24
"""How far a probability in float32, or what is left of it to 1, may lie from what was meant."""
_FIELDS: Final = ("label", *PROBABILITIES, "rationale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Critics whose labels make those of a directory."""

    config: LabelConfig
    """Of the directory."""
    members: tuple[LabelConfig, ...]
    """Of each critic, in order; of a single one the directory's."""
    calibrations: tuple[Calibration | None, ...]
    """Of each critic by itself."""
    head: Calibration | None = None
    """Of an ensemble that a calibration combines."""

    @classmethod
    def of(cls, config: LabelConfig, calibration: Calibration | None = None) -> "Panel":
        """Return the panel of a single critic."""
        return cls(config=config, members=(config,), calibrations=(calibration,))

    @property
    def is_cascade(self) -> bool:
        """Whether critics are asked one after the other about what is left."""
        return self.config.together == "cascade"

    @property
    def needs_rules(self) -> bool:
        """Whether a calibration looks at which rules fired, for which messages must be read."""
        found = (*self.calibrations, self.head)
        return any(each is not None and needs_rules(each) for each in found)


def config_of(
    together: Together,
    members: Sequence[LabelConfig],
    *,
    calibration: str | None = None,
    sure: float | None = None,
    audit: float | None = None,
) -> LabelConfig:
    """Return the settings of critics that work together.

    Their name tells the rule and the critics; the hash of their question tells all that shapes the
    labels: each critic's own, the calibrations, and from what probability it is sure.

    Raises:
        ConfigError: two of them are the same critic and question.
    """
    asked = [[each.critic_id, each.prompt_hash] for each in members]
    for number, pair in enumerate(asked):
        if pair in asked[:number]:
            raise ConfigError(
                f"{pair[0]}, prompt {pair[1]}: expected critics that differ, got this one twice"
            )
    shaping = [*asked, [each.calibration for each in members], [each.votes for each in members]]
    named = " > " if together == "cascade" else " + "
    return replace(
        members[0],  # all are shown the same trajectories
        critic=together,
        critic_id=f"{together}({named.join(each.critic_id for each in members)})",
        prompt_hash=hashlib.blake2b(orjson.dumps([*shaping, sure]), digest_size=8).hexdigest(),
        votes=1,
        context="none",
        max_input_tokens=None,
        calibration=calibration,
        together=together,
        members=tuple(members),
        sure=sure,
        audit=audit,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Some trajectories as every critic of a panel knows them, and their N steps."""

    rows: tuple[tuple[Row, ...], ...]
    """Of each critic, its T rows in the same order."""
    steps: pl.DataFrame
    """trajectory_id, content_hash, step_index, num_steps, resolved, rules; N rows."""
    ends: tuple[int, ...]
    """Where each trajectory's steps end among all, [T]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one critic has to do with some trajectories, and what it said."""

    needed: tuple[Needed, ...]
    """What it is to label, by trajectory."""
    said: pl.DataFrame
    """Columns of `JUDGEMENT`, a row a step; null where it said nothing."""
    labels: tuple[tuple[StepLabel, ...], ...]
    """Its answers as they came, by trajectory."""
    settled: "NDArray[np.bool_]"
    """Which steps get their label from it; in an ensemble those that it has labelled, [N]."""


def trajectories_of(part: Path, panel: Panel, *, selected: bool = False) -> Trajectories:
    """Return the trajectories of a part, or those that this run labels."""
    by_critic = [
        tuple(row for row in rows_of([part], member) if row.selected or not selected)
        for member in panel.members
    ]
    rows = by_critic[0]
    counts = [row.num_steps for row in rows]
    steps = pl.DataFrame(
        {
            # not by numpy, whose arrays of text drop NUL at the end of an id
            "trajectory_id": [row.trajectory_id for row in rows for _ in range(row.num_steps)],
            "content_hash": [row.subject[0] for row in rows for _ in range(row.num_steps)],
            "step_index": [step for count in counts for step in range(count)],
            "num_steps": np.repeat(counts, counts).tolist(),
            "resolved": [row.resolved for row in rows for _ in range(row.num_steps)],
        },
        schema={
            "trajectory_id": pl.String,
            "content_hash": pl.String,
            "step_index": pl.Int32,
            "num_steps": pl.Int32,
            "resolved": pl.Boolean,
        },
    )
    return Trajectories(
        rows=tuple(by_critic),
        steps=_with_rules(part, steps, known=panel.needs_rules),
        ends=tuple(np.cumsum(counts).tolist()),
    )


def _with_rules(part: Path, steps: pl.DataFrame, *, known: bool) -> pl.DataFrame:
    if not known:
        return steps.with_columns(rules=pl.lit(None, dtype=pl.List(pl.String)))
    wanted = named(steps["trajectory_id"].unique())
    fired = rules_fired(read_trajectories([part], where=wanted))
    keys = ["trajectory_id", "step_index"]
    return steps.join(fired, on=keys, how="left", maintain_order="left")


def stages(
    panel: Panel, ledger: Ledger, found: Trajectories, *, number: int | None = None
) -> list[Stage]:
    """Return what every critic, or the first `number`, said of trajectories."""
    taken: list[Stage] = []
    for place in range(len(panel.members) if number is None else number):
        needed = needed_of(panel, found, taken, place)
        labels = tuple(
            tuple(labels_in(ledger, row, panel.members[place], steps))
            for row, steps in zip(found.rows[place], needed, strict=True)
        )
        said = _calibrated(panel.calibrations[place], found, _columns(found, labels))
        settled = said["label"].is_not_null().to_numpy()
        if panel.is_cascade:
            if place < len(panel.members) - 1:
                settled = settled & is_sure(panel, place, said)
            settled = settled & ~_settled_before(found, taken)
        taken.append(Stage(needed=needed, said=said, labels=labels, settled=settled))
    return taken


def needed_of(
    panel: Panel, found: Trajectories, before: Sequence[Stage], place: int
) -> tuple[Needed, ...]:
    """Return what the critic at a place is to label, by trajectory: what those before left."""
    if not panel.is_cascade or not place:
        return (None,) * len(found.ends)
    settled = _settled_before(found, before)
    is_last = place == len(panel.members) - 1
    needed: list[Needed] = []
    start = 0
    for end, row in zip(found.ends, found.rows[place], strict=True):
        left = np.flatnonzero(~settled[start:end])
        audited = is_last and is_audited(row.subject[0], panel.config.audit or 0.0)
        whole = len(left) == end - start or (len(left) and panel.calibrations[place] is not None)
        needed.append(None if audited or whole else frozenset(left.tolist()))
        start = end
    return tuple(needed)


def is_audited(content_hash: str, share: float) -> bool:
    """Return whether a trajectory is in a sample of that share, drawn by its content."""
    digest = hashlib.blake2b(f"audit:{content_hash}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def judged(panel: Panel, found: Trajectories, taken: Sequence[Stage]) -> pl.DataFrame:
    """Return the panel's labels, as in `labels.parquet`; steps without one are left out."""
    said = [stage.said for stage in taken]
    config = panel.config
    names = {"critic_id": [config.critic_id], "prompt_hash": [config.prompt_hash]}
    owners = np.zeros(found.steps.height, np.int64)
    if panel.is_cascade:
        names = {
            "critic_id": [member.critic_id for member in panel.members],
            "prompt_hash": [member.prompt_hash for member in panel.members],
        }
        owners = np.argmax([stage.settled for stage in taken], axis=0)
        settled = np.any([stage.settled for stage in taken], axis=0)
        together = _picked(said, owners).with_columns(
            label=pl.when(pl.Series(settled)).then("label")
        )
    elif panel.head is not None:
        together = _calibrated(panel.head, found, *said)
    elif config.together in ("any", "majority", "mean"):
        together = combine(said, config.together)
    else:
        (together,) = said
    return pl.concat(
        [
            found.steps.select("trajectory_id", "content_hash", "step_index"),
            together.select(_FIELDS),
            pl.DataFrame(
                {name: np.array(values)[owners].tolist() for name, values in names.items()}
            ),
        ],
        how="horizontal",
    ).filter(pl.col("label").is_not_null())


def _columns(found: Trajectories, labels: Sequence[Sequence[StepLabel]]) -> pl.DataFrame:
    """Return a critic's answers as columns, a row a step."""
    columns: dict[str, list[Any]] = {name: [None] * found.steps.height for name in _FIELDS}
    start = 0
    for end, of_trajectory in zip(found.ends, labels, strict=True):
        for name, column in columns.items():
            for label in of_trajectory:
                column[start + label.step_index] = getattr(label, name)
        start = end
    return pl.DataFrame(columns, schema=JUDGEMENT)


def _calibrated(
    calibration: Calibration | None, found: Trajectories, *said: pl.DataFrame
) -> pl.DataFrame:
    """Return calibrated labels of the trajectories of which every critic labelled every step."""
    if calibration is None:
        (alone,) = said
        return alone
    given = np.logical_and.reduce([each["label"].is_not_null().to_numpy() for each in said])
    whole = np.concatenate(
        [
            np.full(end - start, given[start:end].all())
            for start, end in zip((0, *found.ends), found.ends, strict=False)
        ]
        or [np.empty(0, np.bool_)]
    )
    mask = pl.Series(whole)
    results = calibrated(
        calibration, found.steps.filter(mask), [each.filter(mask) for each in said]
    )
    places = pl.Series(np.flatnonzero(whole), dtype=pl.UInt32)
    numbered = pl.DataFrame({"place": pl.arange(found.steps.height, eager=True, dtype=pl.UInt32)})
    return numbered.join(
        results.with_columns(place=places), on="place", how="left", maintain_order="left"
    ).select(pl.col(name).cast(kind) for name, kind in JUDGEMENT.items())


def is_sure(panel: Panel, place: int, said: pl.DataFrame) -> "NDArray[np.bool_]":
    """Return which steps a critic of a cascade is sure of, [N]."""
    sure = (panel.config.sure or 0.0) - _ROUNDED
    if panel.calibrations[place] is not None:
        harmful = said["p_harmful"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        result: NDArray[np.bool_] = np.maximum(harmful, 1 - harmful) >= sure
        return result
    if panel.members[place].critic == "rules":
        return said["rationale"].is_not_null().to_numpy()
    likeliest = pl.max_horizontal(PROBABILITIES).cast(pl.Float64)
    unmeasured = pl.any_horizontal(pl.col(name).is_null() for name in PROBABILITIES)
    return said.select(sure=unmeasured | (likeliest >= sure))["sure"].to_numpy()


def _settled_before(found: Trajectories, taken: Iterable[Stage]) -> "NDArray[np.bool_]":
    settled = np.zeros(found.steps.height, np.bool_)
    for stage in taken:
        settled |= stage.settled
    return settled


def _picked(frames: Sequence[pl.DataFrame], owners: "NDArray[np.int64]") -> pl.DataFrame:
    """Return the row of the frame that owns it, for every row."""
    columns = {
        name: pl.select(
            pl.coalesce(
                pl.when(pl.Series(owners == number)).then(frame[name].cast(kind))
                for number, frame in enumerate(frames)
            )
        ).to_series()
        for name, kind in JUDGEMENT.items()
    }
    return pl.DataFrame(columns, schema=JUDGEMENT)
