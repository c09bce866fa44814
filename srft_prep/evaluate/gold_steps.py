"""Gold labels joined with what critics said and what is known of the steps: what can be judged.

A step is judged where people labelled it and every critic did, so that all rows of a report are
over the same steps. Steps without gold of the same trajectories stay in the table, since what
stands beside a step is evidence on it. Whatever is left out is counted.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from srft_prep.calibration import rules_fired
from srft_prep.ensembles import label_numbers
from srft_prep.errors import LabelError
from srft_prep.evaluate.critic_labels import KEY, CriticLabels
from srft_prep.gold import Gold, StepKey
from srft_prep.label_metrics import HARMFUL
from srft_prep.manifest import Manifest
from srft_prep.schemas import PROBABILITIES
from srft_prep.trajectories import named, read_trajectories
from srft_prep.types import LABELS

Cluster = Literal["task", "trajectory"]
"""What bootstrap samples draw whole."""

_FACTS: Final = pl.Schema(
    {
        "trajectory_id": pl.String,
        "instance_id": pl.String,
        "resolved": pl.Boolean,
        "num_steps": pl.Int32,
        "current": pl.String,
    }
)


@dataclass(frozen=True, kw_only=True)
class GoldSteps:
    """All steps, N, that every critic labelled in trajectories with gold; J of them are judged."""

    steps: pl.DataFrame
    """trajectory_id, step_index, num_steps, resolved, rules, group; sorted by the first two."""
    members: tuple[pl.DataFrame, ...]
    """label, p_good, p_unnecessary, p_harmful, rationale (null) of each critic, row by row."""
    judged: NDArray[np.bool_]
    """[N]."""
    gold: NDArray[np.int8]
    """Index in `LABELS` of each judged step's gold label, [J]."""
    has_facts: bool
    """Whether trajectories were there: outcome, tasks and true lengths."""
    counts: dict[str, int]
    """Of what was left out, and of what is known."""
    cluster: Cluster = "task"
    """What bootstrap samples draw whole, where it is known."""

    @cached_property
    def harmful(self) -> NDArray[np.bool_]:
        """Which judged steps are harmful by gold, [J]."""
        marked: NDArray[np.bool_] = self.gold == HARMFUL
        return marked

    @cached_property
    def groups(self) -> list[str]:
        """The task of each judged step, or its trajectory where no task is known, [J]."""
        return self.steps["group"].filter(self.judged).to_list()

    @property
    def num_groups(self) -> int:
        """How many tasks, or trajectories without one, have judged steps."""
        return len(set(self.groups))

    @cached_property
    def folds(self) -> str:
        """What folds by `groups` are made of, in words."""
        kinds = {name.partition(" ")[0] for name in self.groups}
        if kinds == {"task"}:
            return "tasks"
        known = "tasks, and of trajectories whose task is not known"
        return "trajectories" if kinds == {"run"} else known

    @cached_property
    def clusters(self) -> NDArray[np.int64]:
        """The number of what each judged step is drawn with, in the order of trajectories, [J].

        Attempts at a task are alike, as steps of a trajectory are, so that they are drawn together;
        but where all are at one task, nothing could be drawn.
        """
        names = self.groups if self._by_task else self._trajectories
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)

    @property
    def num_clusters(self) -> int:
        """How many of what is drawn there are."""
        return int(self.clusters.max()) + 1

    @property
    def drawn_by(self) -> str:
        """What is drawn, in words."""
        kinds = {name.partition(" ")[0] for name in self.groups}
        if not self._by_task or kinds == {"run"}:
            return "trajectory"
        return "task" if kinds == {"task"} else "task, or trajectory whose task is unknown"

    @property
    def _by_task(self) -> bool:
        return self.cluster == "task" and self.num_groups > 1

    @cached_property
    def _trajectories(self) -> list[str]:
        """The trajectory of each judged step, [J]."""
        return self.steps["trajectory_id"].filter(self.judged).to_list()

    @property
    def num_trajectories(self) -> int:
        """How many trajectories have judged steps."""
        return len(set(self._trajectories))

    @cached_property
    def marks_unnecessary(self) -> bool:
        """Whether any step is unnecessary by gold: else three labels cannot be judged."""
        return bool((self.gold == LABELS.index("unnecessary")).any())

    def codes(self, labels: pl.Series) -> NDArray[np.int8]:
        """Return labels of the N steps as indices in `LABELS` of the judged ones, [J]."""
        return label_numbers(labels)[self.judged]


def join_gold(
    gold: Gold,
    critics: Sequence[CriticLabels],
    trajectories: Manifest | None,
    *,
    rules: bool,
    cluster: Cluster = "task",
) -> GoldSteps:
    """Return what can be judged.

    Args:
        gold: people's labels.
        critics: at least one.
        trajectories: those that were labelled, where they are at hand.
        rules: whether to look which rules fired, which reads the trajectories' text.
        cluster: what bootstrap samples draw whole.

    Raises:
        LabelError: no step has gold and labels, gold or labels are of another version of a
            trajectory, or of a step or trajectory that is not there.
    """
    marked = pl.DataFrame(
        [(name, step, label) for (name, step), label in gold.labels.items()],
        schema={"trajectory_id": pl.String, "step_index": pl.Int32, "gold": pl.String},
        orient="row",
    )
    hashes = pl.DataFrame(
        [(name, step, value) for (name, step), value in gold.content_hashes.items()],
        schema={"trajectory_id": pl.String, "step_index": pl.Int32, "seen": pl.String},
        orient="row",
    )
    marked = marked.join(hashes, on=KEY, how="left")
    names = marked.select(pl.col("trajectory_id").unique())
    given = [critic.rows.join(names, on="trajectory_id", how="semi") for critic in critics]
    facts = _facts(trajectories, names)
    for critic, rows in zip(critics, given, strict=True):
        _refuse_stale(critic, rows, marked, facts)
    steps = given[0].select(KEY)
    for rows in given[1:]:
        steps = steps.join(rows.select(KEY), on=KEY, how="semi")
    steps = steps.sort(KEY).join(
        marked.select(*KEY, "gold"), on=KEY, how="left", maintain_order="left"
    )
    judged = steps["gold"].is_not_null().to_numpy()
    if not judged.any():
        _refuse_nothing_judged(marked, critics)
    counts = {
        "gold_steps": marked.height,
        "judged_steps": int(judged.sum()),
        "annotators_disagree": len(gold.disagreements),
        "labels_without_gold": int((~judged).sum()) - _num_among(steps, gold.disagreements),
        "gold_in_view": len(gold.in_view),
        "gold_not_blind": gold.num_not_blind,
    }
    for critic, rows in zip(critics, given, strict=True):
        lacking = marked.join(rows, on=KEY, how="anti").height
        counts[f"without_label_of {critic.name}"] = lacking
    marks = steps["gold"]
    steps = steps.drop("gold")
    return GoldSteps(
        steps=_with_facts(steps, facts, marked, given, trajectories if rules else None),
        members=tuple(
            steps.join(rows, on=KEY, how="left", maintain_order="left").select(
                "label", *PROBABILITIES, rationale=pl.lit(None, pl.String)
            )
            for rows in given
        ),
        judged=judged,
        gold=label_numbers(marks)[judged],
        has_facts=facts is not None,
        counts=counts,
        cluster=cluster,
    )


def _num_among(steps: pl.DataFrame, keys: Collection[StepKey]) -> int:
    """Return how many of the steps are among these."""
    return sum(key in keys for key in steps.select(KEY).iter_rows())


def _facts(trajectories: Manifest | None, names: pl.DataFrame) -> pl.DataFrame | None:
    if trajectories is None:
        return None
    columns = ["trajectory_id", "instance_id", "resolved", "num_steps", "content_hash"]
    parts = [
        pl.read_parquet(part, columns=columns).join(names, on="trajectory_id", how="semi")
        for part in trajectories.parts
    ]
    facts = pl.concat(parts).rename({"content_hash": "current"}) if parts else None
    return pl.DataFrame(schema=_FACTS) if facts is None else facts.cast(_FACTS)


def _with_facts(
    steps: pl.DataFrame,
    facts: pl.DataFrame | None,
    marked: pl.DataFrame,
    given: Sequence[pl.DataFrame],
    source: Manifest | None,
) -> pl.DataFrame:
    """Return steps with what is known of them; lengths are those seen where nobody knows."""
    if facts is None:
        seen = pl.concat([rows.select(KEY) for rows in (marked, *given)])
        facts = seen.group_by("trajectory_id").agg(
            num_steps=(pl.col("step_index").max() + 1).cast(pl.Int32),
            instance_id=pl.lit(""),
            resolved=pl.lit(None, pl.Boolean),
        )
    task = pl.col("instance_id")
    known = facts.select(
        "trajectory_id",
        "num_steps",
        "resolved",
        group=pl.when(task != "").then("task " + task).otherwise("run " + pl.col("trajectory_id")),
    )
    steps = steps.join(known, on="trajectory_id", how="left", maintain_order="left")
    if source is None:
        return steps.with_columns(rules=pl.lit(None, pl.List(pl.String)))
    wanted = named(steps["trajectory_id"].unique())
    fired = rules_fired(read_trajectories(source.parts, where=wanted))
    return steps.join(fired, on=KEY, how="left", maintain_order="left")


def _refuse_stale(
    critic: CriticLabels, rows: pl.DataFrame, marked: pl.DataFrame, facts: pl.DataFrame | None
) -> None:
    """Refuse labels and gold that are not of the same version of a trajectory."""
    version, seen, current = pl.col("content_hash"), pl.col("seen"), pl.col("current")
    other = rows.join(marked, on=KEY, how="inner").filter(version != seen)
    for name, step in other.select(KEY).sort(KEY).head(1).iter_rows():
        raise LabelError(
            f"{critic.path}: {name}: step {step} was labelled in another version of the "
            "trajectory than the gold label was given for; label the version that people saw"
        )
    if facts is None:
        return
    for name in rows.join(facts, on="trajectory_id", how="anti")["trajectory_id"].sort().head(1):
        raise LabelError(
            f"{critic.path}: {name} has labels, and is not among the trajectories; give "
            "--trajectories the directory that was labelled"
        )
    joined = rows.join(facts, on="trajectory_id", how="inner")
    strange = joined.filter((version != current) | (pl.col("step_index") >= pl.col("num_steps")))
    for name, step in strange.select(KEY).sort(KEY).head(1).iter_rows():
        raise LabelError(
            f"{critic.path}: {name}: step {step} was labelled in another version than the "
            "trajectories hold; label them again"
        )
    lost = marked.join(facts, on="trajectory_id", how="inner").filter(
        (seen != current) | (pl.col("step_index") >= pl.col("num_steps"))
    )
    for name, step in lost.select(KEY).sort(KEY).head(1).iter_rows():
        raise LabelError(
            f"gold label of {name}: step {step}: of another version than the trajectories hold; "
            "label it again, or give the --trajectories that people saw"
        )


def _refuse_nothing_judged(marked: pl.DataFrame, critics: Sequence[CriticLabels]) -> None:
    if not marked.height:
        raise LabelError("the gold files hold no label: review writes some")
    for critic in critics:
        if not critic.rows.join(marked, on=KEY, how="semi").height:
            gold_name, step = marked.select(KEY).row(0)
            labelled = critic.rows["trajectory_id"].head(1).to_list()
            raise LabelError(
                f"{critic.path}: none of the {marked.height} gold steps has a label: gold has "
                f"{gold_name} step {step}, the labels have "
                f"{labelled[0] if labelled else 'nothing'}; label with --only all, or give the "
                "gold labels of these trajectories"
            )
    raise LabelError(
        "no gold step has a label by every critic; compare fewer of them, or label the rest"
    )
