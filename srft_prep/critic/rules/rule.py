"""What a rule is: a pure function from a run to the steps that it flags, each with its evidence."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from srft_prep.critic.rules.evidence import Run, StepEvidence
from srft_prep.types import Label

Findings = Iterator[tuple[int, str]]
"""Pairs of a step index and the evidence: a quoted piece of the observation, or other steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule over observable evidence."""

    rule_id: str
    """Its name, the start of the rationales that it writes."""
    version: int
    """Raised with every change of what it flags; a part of the critic's `prompt_hash`."""
    label: Label
    """What a flagged step is: harmful or unnecessary."""
    summary: str
    """One line on what it flags."""
    find: Callable[[Run], Findings]
    """Yields the flagged steps of a run; never raises."""


def each_step(look: Callable[[StepEvidence], str | None]) -> Callable[[Run], Findings]:
    """Return the `find` of a rule that looks at one step at a time and returns its evidence."""

    def find(run: Run) -> Findings:
        for step in run.steps:
            evidence = look(step)
            if evidence is not None:
                yield step.index, evidence

    return find
