"""Everybody who said something of the steps, critics and people, and what of it may be seen.

S steps of R trajectories. A blind annotator sees what others said of a step once there is a label
of their own; whatever is counted here is counted over the steps that may be seen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from srft_prep.gold import UNNAMED, GoldLabel, StepKey
from srft_prep.label_metrics import accuracy, cohen_kappa, confusion
from srft_prep.review.catalogue import Catalogue
from srft_prep.review.columns import CODES, NOTHING, Critic, label_of, sums
from srft_prep.types import LABELS, Label

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from srft_prep.review.columns import Codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """What one annotator or critic says of the steps."""

    name: str
    """To show; that of a critic may be an annotator's, too."""
    codes: "Codes"
    """Its label of each step, [S]."""
    adjudicates: "NDArray[np.bool_]"
    """Which of its labels settle a disagreement of others, [S]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What an annotator says of a step at a time."""

    label: Label | None = None
    adjudicates: bool = False
    blind: bool | None = None
    """As in the gold file, where it is known."""


class Voices:
    """The labels of critics and of the lines of a gold file, as far as they fit the catalogue."""

    def __init__(
        self, catalogue: Catalogue, critics: Sequence[Critic], *, annotator: str | None, hides: bool
    ) -> None:
        self.catalogue = catalogue
        self.critics = critics
        self.annotator = annotator
        """Whose labels are `own`; None where nobody's are."""
        self.hides = hides
        """Whether others' labels of a step wait for this annotator's."""
        self.own: Codes = self._nothing()
        """This annotator's label of each step, [S]."""
        self.others: dict[str, Voice] = {}
        """Each other annotator, by the name in the gold file."""
        self.num_lines = 0
        """Lines of the gold file."""
        self.num_foreign = 0
        """Those of other trajectories, or of other versions of them: not shown."""
        self.history: list[StepKey] = []
        """The steps that this annotator labelled, in order, without what was undone."""
        self._own = self._voice(shown_name(annotator or UNNAMED), self.own)
        self._critics = [self._voice(f"critic {each.name}", each.codes) for each in critics]
        self._said: dict[StepKey, list[Said]] = {}
        self._settled: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None
        self._label_counts: dict[str, NDArray[np.int64]] | None = None

    def take(self, lines: Iterable[GoldLabel]) -> None:
        """Take in lines of the gold file, in order."""
        hashes = self.catalogue.frame["content_hash"]
        for line in lines:
            self.num_lines += 1
            step = self.catalogue.step_of(line.key)
            row = self.catalogue.rows.get(line.trajectory_id, 0)
            if step is None or line.content_hash not in (None, hashes[row]):
                self.num_foreign += 1
                continue
            if line.annotator == self.annotator:
                self._remember(line)
                voice = self._own
            else:
                if line.annotator not in self.others:
                    made = self._voice(shown_name(line.annotator), self._nothing())
                    self.others[line.annotator] = made
                voice = self.others[line.annotator]
            voice.codes[step] = CODES[line.label]
            voice.adjudicates[step] = line.adjudicates and line.label is not None
        self._settled = self._label_counts = None

    def has_said(self, key: StepKey) -> bool:
        """Return whether this annotator ever labelled a step, and may have seen others' labels."""
        return key in self._said

    def own_of(self, step: int) -> Said:
        """Return what this annotator says of a step, by its place among all."""
        adjudicates = bool(self._own.adjudicates[step])
        return Said(label=label_of(self.own[step]), adjudicates=adjudicates)

    def before_last(self, key: StepKey) -> Said:
        """Return what this annotator said of a step before the last label of it."""
        said = self._said.get(key, [])
        return said[-2] if len(said) > 1 else Said()

    def seen(self) -> "NDArray[np.bool_]":
        """Return of which steps others' labels may be seen, [S]."""
        return self.own != NOTHING if self.hides else np.ones(len(self.own), np.bool_)

    def labelled(self) -> "NDArray[np.int64]":
        """Return how many steps of each trajectory this annotator labelled, [R]."""
        return sums(self.own != NOTHING, self.catalogue.offsets)

    def everybody(self) -> list[Voice]:
        """Return this annotator, the others and the critics."""
        own = [] if self.annotator is None else [self._own]
        return [*own, *self.others.values(), *self._critics]

    def differing(self) -> "NDArray[np.bool_]":
        """Return which steps have labels that may be seen, differ and are not adjudicated, [S].

        As `read_gold` has it: where labels adjudicate, they are the ones that count.
        """
        return self._settle()[0]

    def adjudicated(self) -> "NDArray[np.bool_]":
        """Return which steps have labels that adjudicate and agree, [S]."""
        return self._settle()[1]

    def label_counts(self) -> "dict[str, NDArray[np.int64]]":
        """Return how many steps anybody gave each label, of those that may be seen, [R] each."""
        if self._label_counts is None:
            seen = self.seen()
            self._label_counts = {}
            for label in LABELS:
                has = np.zeros(len(seen), np.bool_)
                for voice in self.everybody():
                    has |= voice.codes == CODES[label]
                self._label_counts[label] = sums(has & seen, self.catalogue.offsets)
        return self._label_counts

    def agreement(self) -> list[dict[str, Any]]:
        """Return how far each two agree on the steps that both labelled, of those that may be seen.

        Kappa is None where it means nothing: no step in common, or one label only.
        """
        seen = self.seen()
        everybody = self.everybody()
        pairs = []
        for index, one in enumerate(everybody):
            for other in everybody[index + 1 :]:
                both = seen & (one.codes != NOTHING) & (other.codes != NOTHING)
                matrix = confusion(one.codes[both], other.codes[both])
                kappa = float(cohen_kappa(matrix))
                pairs.append(
                    {
                        "one": one.name,
                        "other": other.name,
                        "steps": int(both.sum()),
                        "agreement": float(accuracy(matrix)) if both.any() else None,
                        "kappa": None if np.isnan(kappa) else kappa,
                        "confusion": matrix.tolist(),
                    }
                )
        return pairs

    def _settle(self) -> "tuple[NDArray[np.bool_], NDArray[np.bool_]]":
        if self._settled is None:
            voices = self.everybody()
            differ = _differ((voice.codes for voice in voices), len(self.own))
            deciding = [
                np.where(voice.adjudicates, voice.codes, np.int8(NOTHING))
                for voice in voices
                if voice.adjudicates.any()
            ]
            decided = np.zeros(len(self.own), np.bool_)
            for codes in deciding:
                decided |= codes != NOTHING
            undecided = _differ(deciding, len(self.own))
            differing = np.where(decided, undecided, differ) & self.seen()
            self._settled = differing, decided & ~undecided
        return self._settled

    def _nothing(self) -> "Codes":
        return np.full(self.catalogue.num_steps, NOTHING, np.int8)

    def _voice(self, name: str, codes: "Codes") -> Voice:
        adjudicates = np.zeros(self.catalogue.num_steps, np.bool_)
        return Voice(name=name, codes=codes, adjudicates=adjudicates)

    def _remember(self, line: GoldLabel) -> None:
        """Keep the order of this annotator's labels, so that a new process can undo them, too."""
        said = self._said.setdefault(line.key, [])
        if not line.undoes:
            self.history.append(line.key)
            said.append(Said(label=line.label, adjudicates=line.adjudicates, blind=line.blind))
        elif said:
            said.pop()
            place = len(self.history) - 1 - self.history[::-1].index(line.key)
            del self.history[place]


def _differ(labels: "Iterable[Codes]", num_steps: int) -> "NDArray[np.bool_]":
    """Return which steps some of the labels [S] differ on, [S]."""
    low = np.full(num_steps, len(LABELS), np.int8)
    high = np.full(num_steps, NOTHING, np.int8)
    for codes in labels:
        np.minimum(low, codes, out=low, where=codes != NOTHING)
        np.maximum(high, codes, out=high)
    differ: NDArray[np.bool_] = high > low
    return differ


def shown_name(annotator: str) -> str:
    """Return how an annotator is called on the page."""
    return "unnamed" if annotator == UNNAMED else annotator
