"""What a reader of an evaluation should know: of the gold labels, the critics, the intervals."""

from collections.abc import Sequence
from typing import Final

from srft_prep.evaluate.critic_labels import CriticLabels
from srft_prep.evaluate.gold_steps import GoldSteps
from srft_prep.evaluate.resampling import FEW_CLUSTERS

_PLURALS: Final = {
    "task": "tasks",
    "trajectory": "trajectories",
    "task, or trajectory whose task is unknown": "tasks, or trajectories whose task is unknown",
}


def caveats(gold: GoldSteps, critics: Sequence[CriticLabels], *, samples: int) -> list[str]:
    """Return the sentences that an evaluation must not be read without.

    Args:
        gold: the judged steps.
        critics: whose labels are judged.
        samples: bootstrap samples.
    """
    found = [
        f"{critic.name} went through a calibration: if that was fitted on these gold labels, its "
        "numbers flatter it, and the calibration's file has the out-of-fold ones"
        for critic in critics
        if critic.calibrated
    ]
    if not gold.marks_unnecessary:
        found.append(
            "no gold label is unnecessary: only harmful or not is judged, and a step that a critic "
            "calls unnecessary counts as not harmful"
        )
    if count := gold.counts["gold_in_view"]:
        found.append(
            f"{count:,} of {gold.counts['gold_steps']:,} gold labels were given with others' "
            "labels in view (--blind-only leaves them out)"
        )
    if gold.num_groups < 2:
        found.append(
            "no critic: needs gold labels of two tasks, got 1: label steps of another task"
        )
    if gold.harmful.all():
        found.append("every gold label is harmful: no critic can do better than flag all")
    if not gold.harmful.any():
        found.append("no gold label is harmful: there is nothing to find")
    if gold.num_clusters < FEW_CLUSTERS:
        found.append(
            f"{gold.num_clusters} {_PLURALS[gold.drawn_by]}: below {FEW_CLUSTERS}, intervals are "
            "somewhat too narrow"
        )
    if gold.cluster == "task" and gold.num_groups < 2 and gold.num_trajectories > 1:
        found.append(
            "all trajectories try one task: intervals are drawn by trajectory, and speak of that "
            "task alone"
        )
    if not gold.has_facts:
        found.append(
            "the trajectories were not found (--trajectories): the no-critic row knows positions "
            "alone, and lengths from the labels"
        )
    if samples < 1000:
        found.append(f"{samples} bootstrap samples: the ends of intervals are rough")
    return found
