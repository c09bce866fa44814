"""Label directories and gold files for critic-eval, made by the real stages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from srft_prep.config import IngestConfig, LabelConfig
from srft_prep.critic.rules import RulesCritic
from srft_prep.evaluate.critic_labels import CriticLabels, read_critics, trajectories_of
from srft_prep.evaluate.gold_steps import Cluster, GoldSteps, join_gold
from srft_prep.gold import read_gold
from srft_prep.ingest import ingest
from srft_prep.labeling import label
from srft_prep.types import LABELS, Trajectory
from tests.stages import label_row, trajectory, write_labels, write_trajectories

SETS = ("trail_swe", "trail_gaia", "who_and_when")


def label_by_rules(folder: Path, source: Path) -> Path:
    """Ingest a set of human labels and label it with the rules; return the labels."""
    ingest([str(source / "trajectories.jsonl")], folder / "trajectories", IngestConfig())
    critic = RulesCritic()
    config = LabelConfig(
        critic="rules",
        critic_id=critic.critic_id,
        prompt_hash=critic.prompt_hash,
        only="all",
    )
    label(folder / "trajectories", folder / "labels", critic, config)
    return folder / "labels"


def write_gold(path: Path, labels: Mapping[tuple[str, int], str], **more: Any) -> Path:
    """Write a gold file."""
    rows = [
        {"trajectory_id": name, "step_index": step, "label": given, **more}
        for (name, step), given in labels.items()
    ]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def opened(
    gold: Path, *paths: Path, rules: bool = False, cluster: Cluster = "task"
) -> tuple[GoldSteps, list[CriticLabels]]:
    """Return what can be judged of label directories or files."""
    critics = read_critics([(path.name, path) for path in paths])
    source = trajectories_of(critics)
    return join_gold(read_gold([gold]), critics, source, rules=rules, cluster=cluster), critics


class Planted:
    """A made-up study: what is harmful, and a critic whose probabilities know something of it."""

    def __init__(
        self,
        root: Path,
        *,
        tasks: int = 16,
        steps: int = 8,
        skill: float = 3.0,
        offset: float = -3.0,
        unnecessary: bool = False,
        seed: int = 0,
    ) -> None:
        """Write trajectories, gold and labels.

        Args:
            root: the folder.
            tasks: number of trajectories.
            steps: of each.
            skill: how far the critic's log-odds move with the truth.
            offset: of the critic's log-odds: far below 0 it finds next to nothing.
            unnecessary: whether gold knows that label.
            seed: of all chance.
        """
        random = np.random.default_rng(seed)
        self.trajectories: Sequence[Trajectory] = [
            trajectory(f"run-{number:02d}", num_steps=steps, resolved=bool(number % 2))
            for number in range(tasks)
        ]
        write_trajectories(root / "trajectories", self.trajectories)
        self.gold: dict[tuple[str, int], str] = {}
        rows = []
        for owner in self.trajectories:
            for step in range(steps):
                harmful = random.random() < 0.35
                good = "unnecessary" if unnecessary and random.random() < 0.2 else "good"
                self.gold[owner.trajectory_id, step] = "harmful" if harmful else good
                odds = offset + skill * harmful + random.normal()
                chance = 1 / (1 + np.exp(-odds))
                rest = random.random() * (1 - chance)
                chances = (1 - chance - rest, rest, chance)
                rows.append(
                    label_row(
                        owner,
                        step,
                        LABELS[int(np.argmax(chances))],
                        p_good=chances[0],
                        p_unnecessary=chances[1],
                        p_harmful=chances[2],
                    )
                )
        self.gold_file = write_gold(root / "gold.jsonl", self.gold)
        self.labels = write_labels(root / "labels", rows)
        self.root = root

    @property
    def words(self) -> tuple[object, ...]:
        """The command line's first words."""
        return (
            *("critic-eval", "--labels", self.labels, "--gold", self.gold_file),
            *("--trajectories", self.root / "trajectories"),
        )
