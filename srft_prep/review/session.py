"""One annotator at work: what they may see, what they say, and where they are.

What others said of a step (critics, and other annotators) is hidden in a blind session until this
annotator has labelled the step; counts, filters and the queue of disagreements are made of what may
be seen alone, so that nothing can be read off them either. Every label is a line in the gold file
before it counts; what other processes append there is read at the next request.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from srft_prep.errors import ConfigError
from srft_prep.gold import GoldFile, GoldLabel, StepKey
from srft_prep.review.catalogue import Catalogue
from srft_prep.review.columns import NOTHING, Critic, label_of, sums
from srft_prep.review.filters import Filter, rows_that_fit
from srft_prep.review.view import blocks_of, messages_of, piece_of
from srft_prep.review.voices import Said, Voices, shown_name
from srft_prep.types import LABELS, Label
from srft_prep.weights import DEFAULT_WEIGHTS, RECIPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_ROWS: Final = 500
"""The most rows that a request for a list is given."""
FACETS: Final = 200
"""The most models or formats that a filter offers."""
LISTED: Final = ("trajectory_id", "instance_id", "format", "model", "outcome", "num_steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an annotator works."""

    annotator: str
    gold: Path | None
    """The file that labels go to; None where there is none to show."""
    read_only: bool = False
    blind: bool = True
    adjudicates: bool = False
    """Whether the labels settle what others disagree about; such a session is never blind."""

    @property
    def hides(self) -> bool:
        """Whether others' labels of a step wait for this annotator's."""
        return self.blind and not self.read_only and not self.adjudicates


class Session:
    """The state behind the page; its methods may be called from several threads."""

    def __init__(self, catalogue: Catalogue, critics: Sequence[Critic], settings: Settings) -> None:
        self.catalogue = catalogue
        self.critics = tuple(critics)
        self.settings = settings
        self._gold = GoldFile(settings.gold) if settings.gold else None
        self._lock = RLock()
        self._row_of_step = np.repeat(
            np.arange(catalogue.num_trajectories), np.diff(catalogue.offsets)
        )
        self._num_resets = 0
        self._voices = self._no_voices()
        self._refresh()

    def describe(self) -> dict[str, Any]:
        """Return what the page must know before it shows anything."""
        with self._lock:
            self._refresh()
            frame = self.catalogue.frame
            return {
                "name": self.catalogue.name,
                "annotator": shown_name(self.settings.annotator),
                "read_only": self.settings.read_only,
                "blind": self.settings.hides,
                "adjudicates": self.settings.adjudicates,
                "gold": str(self.settings.gold) if self.settings.gold else None,
                "critics": [
                    {"name": each.name, "critic_id": each.critic_id, "stale": each.num_stale}
                    for each in self.critics
                ],
                "facets": {
                    name: frame[name].drop_nulls().value_counts(sort=True).head(FACETS).rows()
                    for name in ("outcome", "format", "model")
                },
                "num_trajectories": self.catalogue.num_trajectories,
                "progress": self._progress(),
            }

    def rows(self, wanted: Filter, *, offset: int, limit: int) -> dict[str, Any]:
        """Return rows of the list that fit a filter, from the `offset`-th on."""
        with self._lock:
            self._refresh()
            found = self._fitting(wanted)
            page = found[offset : offset + min(limit, PAGE_ROWS)]
            values = self.catalogue.frame[page.tolist()].select(LISTED).iter_rows(named=True)
            labelled = self._voices.labelled()
            differing = self._differing_counts()
            counts = np.stack(list(self._voices.label_counts().values()), axis=1)
            rows = [
                {
                    "row": row,
                    **named,
                    "labelled": int(labelled[row]),
                    "differing": int(differing[row]),
                    "labels": counts[row].tolist(),
                }
                for row, named in zip(page.tolist(), values, strict=True)
            ]
            return {"total": len(found), "offset": offset, "rows": rows}

    def trajectory(self, row: int, wanted: Filter) -> dict[str, Any]:
        """Return a trajectory to show, and its neighbours in the filtered list.

        Raises:
            ConfigError: there is no such row.
            ShardError: its part is damaged.
        """
        with self._lock:
            self._check(row)
            self._refresh()
            found = self._fitting(wanted)
            before, after = found[found < row], found[found > row]
            trajectory = self.catalogue.read(row)
            return {
                "row": row,
                "trajectory_id": trajectory.trajectory_id,
                "instance_id": trajectory.instance_id,
                "format": trajectory.format,
                "model": trajectory.model,
                "outcome": self.catalogue.frame["outcome"][row],
                "exit_status": trajectory.exit_status,
                "num_steps": trajectory.num_steps,
                "weighted_by_label": self._is_weighted(row),
                "messages": messages_of(trajectory),
                "patch": piece_of(trajectory.patch, 0) if trajectory.patch else None,
                "said": self._said(row, 0, trajectory.num_steps),
                "place": len(before) + 1,
                "total": len(found),
                "previous": int(before[-1]) if len(before) else None,
                "next": int(after[0]) if len(after) else None,
            }

    def text(self, row: int, *, message: int, block: int, start: int) -> dict[str, Any]:
        """Return more of a long text; message -1 is the patch.

        Raises:
            ConfigError: there is no such text.
        """
        with self._lock:
            self._check(row)
            trajectory = self.catalogue.read(row)
        if message == -1:
            return piece_of(trajectory.patch or "", start)
        if not 0 <= message < len(trajectory.messages):
            raise ConfigError(f"row {row}: there is no message {message}")
        blocks = blocks_of(trajectory.messages[message])
        if not 0 <= block < len(blocks):
            raise ConfigError(f"row {row}: message {message} has no block {block}")
        return piece_of(blocks[block].text, start)

    def label(self, row: int, step: int, label: Label) -> dict[str, Any]:
        """Write a label down; it is on the disk when this returns.

        Raises:
            ConfigError: there is no such step, or nothing may be written.
            ShardError: a critic's labels changed under this server.
        """
        with self._lock:
            self._check(row, step)
            self._refresh()
            own = self._voices.own_of(int(self.catalogue.offsets[row]) + step)
            # the same again takes no adjudication back, whatever the session is
            if own.label != label or (self.settings.adjudicates and not own.adjudicates):
                key = self.catalogue.frame["trajectory_id"][row], step
                blind = self.settings.hides and not self._voices.has_said(key)
                new = Said(label=label, adjudicates=self.settings.adjudicates, blind=blind)
                self._write(key, new)
            return self._after(row, step)

    def undo(self) -> dict[str, Any]:
        """Take this annotator's last label back, whichever process wrote it.

        Returns:
            The step that it was of; an empty object where there is nothing to take back.

        Raises:
            ConfigError: nothing may be written.
            ShardError: a critic's labels changed under this server.
        """
        with self._lock:
            self._refresh()
            if not self._voices.history:
                return {}
            key = self._voices.history[-1]
            self._write(key, self._voices.before_last(key), undoes=True)
            return self._after(self.catalogue.rows[key[0]], key[1])

    def next_step(self, kind: str, wanted: Filter, *, row: int, step: int) -> dict[str, Any]:
        """Return the next step that is `unlabelled` or a `disagreement`, after one, going round.

        Returns:
            `row` and `step`; an empty object where there is none.
        """
        with self._lock:
            self._refresh()
            differ = kind == "disagreement"
            sought = self._voices.differing() if differ else self._voices.own == NOTHING
            fits = np.zeros(self.catalogue.num_trajectories, np.bool_)
            fits[self._fitting(wanted)] = True
            found = np.flatnonzero(sought & fits[self._row_of_step])
            if not len(found):
                return {}
            here = -1
            if 0 <= row < self.catalogue.num_trajectories:
                here = int(self.catalogue.offsets[row]) + step
            place = int(np.searchsorted(found, here, side="right"))
            return self._place(int(found[place % len(found)]))

    def disagreements(self, *, offset: int, limit: int) -> dict[str, Any]:
        """Return steps whose labels differ and that nobody adjudicated, with who says what."""
        with self._lock:
            self._refresh()
            found = np.flatnonzero(self._voices.differing())
            rows = []
            for step in found[offset : offset + min(limit, PAGE_ROWS)].tolist():
                said = [
                    [voice.name, label_of(voice.codes[step])]
                    for voice in self._voices.everybody()
                    if voice.codes[step] != NOTHING
                ]
                place = self._place(step)
                trajectory_id = self.catalogue.frame["trajectory_id"][place["row"]]
                rows.append({**place, "trajectory_id": trajectory_id, "said": said})
            return {"total": len(found), "offset": offset, "rows": rows}

    def agreement(self) -> dict[str, Any]:
        """Return how far each two agree, and the command that measures the critics."""
        with self._lock:
            self._refresh()
            command = self.eval_command() if self._voices.num_lines else None
            return {
                "pairs": self._voices.agreement(),
                "labels": list(LABELS),
                "command": command,
                "num_foreign": self._voices.num_foreign,
            }

    def eval_command(self) -> str | None:
        """Return the command that measures the critics by the gold file; None without one."""
        if self.settings.gold is None:
            return None
        given = [f"{each.name}={each.folder}" for each in self.critics] or ["DIR"]
        labels = [word for each in given for word in ("--labels", each)]
        gold = ["--gold", str(self.settings.gold)]
        return shlex.join(["srft-prep", "critic-eval", *labels, *gold])

    def num_labelled(self) -> int:
        """Return how many steps this annotator has labelled."""
        with self._lock:
            self._refresh()
            return int(self._voices.labelled().sum())

    def _fitting(self, wanted: Filter) -> "NDArray[np.int64]":
        return rows_that_fit(
            self.catalogue.frame,
            wanted,
            num_labelled=self._voices.labelled(),
            num_differing=self._differing_counts(),
            num_with_label=self._voices.label_counts(),
        )

    def _differing_counts(self) -> "NDArray[np.int64]":
        return sums(self._voices.differing(), self.catalogue.offsets)

    def _said(self, row: int, start: int, end: int) -> list[dict[str, Any]]:
        """Return what may be seen of everybody's labels of a trajectory's steps [start, end)."""
        first = int(self.catalogue.offsets[row])
        places = range(first + start, first + end)
        details = [each.details(places.start, places.stop) for each in self.critics]
        return [
            self._said_of(row, place, [each[index] for each in details])
            for index, place in enumerate(places)
        ]

    def _said_of(
        self, row: int, place: int, details: Sequence[dict[str, Any] | None]
    ) -> dict[str, Any]:
        own = label_of(self._voices.own[place])
        if self.settings.hides and own is None:
            return {"label": None, "hidden": True, "critics": [], "others": []}
        return {
            "label": own,
            "hidden": False,
            "adjudicated": bool(self._voices.adjudicated()[place]),
            "weight": self._weight(row, own),
            "critics": [
                {"name": critic.name, **each, "weight": self._weight(row, each["label"])}
                for critic, each in zip(self.critics, details, strict=True)
                if each is not None
            ],
            "others": [
                {"name": voice.name, "label": label_of(voice.codes[place])}
                for voice in self._voices.others.values()
                if voice.codes[place] != NOTHING
            ],
        }

    def _is_weighted(self, row: int) -> bool:
        resolved = self.catalogue.frame["resolved"][row]
        return RECIPES["srft"].treatment(resolved) == "by label"

    def _weight(self, row: int, label: Label | None) -> float | None:
        """Return a step's weight under srft, by a label."""
        if label is None:
            return None
        return DEFAULT_WEIGHTS[label] if self._is_weighted(row) else 1.0

    def _no_voices(self) -> Voices:
        annotator = None if self.settings.read_only else self.settings.annotator
        hides = self.settings.hides
        return Voices(self.catalogue, self.critics, annotator=annotator, hides=hides)

    def _refresh(self) -> None:
        """Take in what was appended to the gold file, by whomever."""
        if self._gold is None:
            return
        lines = self._gold.refresh()
        if self._gold.num_resets != self._num_resets:
            self._num_resets = self._gold.num_resets
            self._voices = self._no_voices()
        if lines:
            self._voices.take(lines)

    def _write(self, key: StepKey, said: Said, *, undoes: bool = False) -> None:
        if self._gold is None or self.settings.read_only:
            raise ConfigError("this page is for reading: start review without --read-only")
        for critic in self.critics:  # the answer shows their labels: fail before writing, not after
            critic.check()
        content_hash = self.catalogue.frame["content_hash"][self.catalogue.rows[key[0]]]
        line = GoldLabel(
            trajectory_id=key[0],
            step_index=key[1],
            label=said.label,
            annotator=self.settings.annotator,
            content_hash=content_hash,
            adjudicates=said.adjudicates,
            blind=said.blind,
            undoes=undoes,
        )
        self._gold.append(line)
        self._refresh()

    def _after(self, row: int, step: int) -> dict[str, Any]:
        (said,) = self._said(row, step, step + 1)
        return {"row": row, "step": step, "said": said, "progress": self._progress()}

    def _progress(self) -> dict[str, Any]:
        labelled = self._voices.labelled()
        return {
            "labelled_steps": int(labelled.sum()),
            "labelled_trajectories": int((labelled > 0).sum()),
            "steps": self.catalogue.num_steps,
            "disagreements": int(self._voices.differing().sum()),
        }

    def _place(self, step: int) -> dict[str, int]:
        row = int(self._row_of_step[step])
        return {"row": row, "step": step - int(self.catalogue.offsets[row])}

    def _check(self, row: int, step: int | None = None) -> None:
        if not 0 <= row < self.catalogue.num_trajectories:
            raise ConfigError(f"there is no trajectory in row {row}")
        if step is not None and not 0 <= step < np.diff(self.catalogue.offsets)[row]:
            raise ConfigError(f"row {row}: there is no step {step}")
