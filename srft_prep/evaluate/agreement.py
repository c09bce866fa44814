"""Where critics disagree: agreement beyond chance, and the steps that would tell them apart.

Over all steps that both labelled, gold or not: a step on which critics differ is the one to look at
next, or to label by hand.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from pathlib import Path
from typing import Any

import orjson
import polars as pl

from srft_prep.ensembles import label_numbers
from srft_prep.evaluate.critic_labels import KEY, CriticLabels
from srft_prep.gold import StepKey
from srft_prep.label_metrics import accuracy, cohen_kappa, confusion
from srft_prep.storage import atomic_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Two critics over the steps that both labelled."""

    first: str
    second: str
    steps: int
    disagreements: int
    agreement: float
    """Share of equal labels."""
    kappa: float
    """Cohen's; NaN where both give one label only."""


def agreements(critics: Sequence[CriticLabels]) -> list[Agreement]:
    """Return how each two critics agree."""
    found = []
    for one, other in combinations(critics, 2):
        both = one.rows.join(other.rows, on=KEY, how="inner", suffix="_other")
        matrix = confusion(label_numbers(both["label"]), label_numbers(both["label_other"]))
        share = float(accuracy(matrix))
        found.append(
            Agreement(
                first=one.name,
                second=other.name,
                steps=both.height,
                disagreements=both.filter(pl.col("label") != pl.col("label_other")).height,
                agreement=share,
                kappa=float(cohen_kappa(matrix)),
            )
        )
    return found


def disagreements(
    critics: Sequence[CriticLabels], gold: Mapping[StepKey, str]
) -> Iterator[dict[str, Any]]:
    """Yield the steps that critics label differently: trajectory_id, step_index, labels, gold.

    Sorted; a step that only some of them labelled is none. Where there is one critic, those that
    it labels otherwise than gold.
    """
    names = [f"label_{place}" for place in range(len(critics))]
    frames = [
        critic.rows.select(*KEY, pl.col("label").alias(name))
        for critic, name in zip(critics, names, strict=True)
    ]
    rows = reduce(lambda left, right: left.join(right, on=KEY, how="inner"), frames)
    if len(critics) > 1:
        rows = rows.filter(pl.any_horizontal(pl.col(names[0]) != pl.col(name) for name in names))
    for trajectory_id, step, *labels in rows.sort(KEY).iter_rows():
        marked = gold.get((trajectory_id, step))
        if len(critics) > 1 or marked not in (None, labels[0]):
            yield {
                "trajectory_id": trajectory_id,
                "step_index": step,
                "labels": {
                    critic.name: label for critic, label in zip(critics, labels, strict=True)
                },
                "gold": marked,
            }


def write_disagreements(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Write disagreements as JSONL, atomically; return how many."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for row in rows:
            file.write(orjson.dumps(row) + b"\n")
            count += 1
    return count
