"""Stretches of tokens: which step they are, what they weigh, and which label made it so.

A shard knows weights but no steps: a stretch of weight 0 may be context or a step that is masked.
The row of tokens that a document was cut from knows the steps; laid over each other they tell the
masked steps from context, which is what Figure 1 of the paper shows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from srft_prep.types import Label


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A half-open range of tokens, and what is known of it."""

    start: int
    end: int
    step: int | None = None
    weight: float | None = None
    label: Label | None = None
    parts: tuple[tuple[str, int, int], ...] = ()
    """(part, start, end): half-open ranges that cover it, in order."""

    @property
    def title(self) -> str:
        """What is known, in words."""
        words = []
        if self.step is not None:
            words.append(f"step {self.step}")
        if self.label is not None:
            words.append(self.label)
        if self.weight is not None:
            words.append(f"weight {self.weight:g}")
        if self.parts:
            words.append(", ".join(f"{part} {end - start}" for part, start, end in self.parts))
        return " | ".join(words)


def steps_of(row: dict[str, Any]) -> Iterator[Stretch]:
    """Yield the steps of a row of tokens, with their parts."""
    parts: dict[int, list[tuple[str, int, int]]] = {}
    for span in row["part_spans"]:
        parts.setdefault(span["step"], []).append((span["part"], span["start"], span["end"]))
    for span in row["step_spans"]:
        yield Stretch(
            start=span["start"],
            end=span["end"],
            step=span["step"],
            parts=tuple(parts.get(span["step"], ())),
        )


def weighted(run: dict[str, Any], offset: int) -> Stretch:
    """Return a run of a packed sequence as a stretch of a document that begins at `offset`."""
    start = run["start"] - offset
    return Stretch(start=start, end=start + run["length"], weight=run["weight"])


def placed_in(
    row: dict[str, Any],
    runs: Sequence[Stretch],
    first: int,
    length: int,
    *,
    labels: Mapping[int, Label],
) -> list[Stretch]:
    """Return a document cut at the bounds of its steps and of its weights.

    Args:
        row: the row of tokens that the document was cut from.
        runs: what weighs anything, relative to the document; sorted, disjoint.
        first: where in the row the document begins.
        length: of the document.
        labels: by step.

    Returns:
        Stretches of steps, each with its weight (0 where it has none), and what weighs anything
        outside of steps; sorted, disjoint.
    """
    found: list[Stretch] = []
    for span in row["step_spans"]:
        start, end = max(span["start"] - first, 0), min(span["end"] - first, length)
        if start < end:
            step = span["step"]
            found.append(Stretch(start=start, end=end, step=step, label=labels.get(step)))
    edges = sorted({edge for each in (*found, *runs) for edge in (each.start, each.end)})
    pieces: list[Stretch] = []
    steps, weights = _Cursor(found), _Cursor(runs)
    for start, end in pairwise(edges):
        step, run = steps.at(start), weights.at(start)
        if step is not None:
            weight = run.weight if run is not None else 0.0
            pieces.append(replace(step, start=start, end=end, weight=weight))
        elif run is not None:
            pieces.append(replace(run, start=start, end=end))
    return pieces


class _Cursor:
    """Finds which of sorted, disjoint stretches holds a token, for tokens in ascending order."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self._stretches = stretches
        self._next = 0

    def at(self, token: int) -> Stretch | None:
        while self._next < len(self._stretches) and self._stretches[self._next].end <= token:
            self._next += 1
        if self._next < len(self._stretches) and self._stretches[self._next].start <= token:
            return self._stretches[self._next]
        return None
