"""Rollouts of a benchmark: which instances each one resolved, by arm and training run.

An arm is a way to train; it was trained once or more (training runs), and each trained model went
over the benchmark once or more (rollouts). Every rollout of a comparison must be over the same
instances. Nothing is skipped: a rollout left out in silence would bias what is compared.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from srft_prep.errors import ConfigError, FormatError
from srft_prep.object_mirror import address_of
from srft_prep.outcomes import truth

COLUMNS: Final = ("arm", "training_run", "rollout", "instance_id", "resolved")
_ID_LISTS: Final = (
    "resolved_ids",
    "unresolved_ids",
    "completed_ids",
    "submitted_ids",
    "incomplete_ids",
    "empty_patch_ids",
    "error_ids",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One pass of one trained model over the benchmark."""

    training_run: str
    name: str
    resolved: frozenset[str]
    instances: frozenset[str]
    """The instances whose ids are known."""
    num_instances: int
    """All instances, those whose ids are not known included."""
    num_submitted: int
    """Instances with an answer; the others count as not resolved, as in SWE-bench's own rate."""
    source: str
    """Where it was read, for messages."""

    @property
    def rate(self) -> float:
        """Resolved instances in percent of all."""
        return 100 * len(self.resolved) / self.num_instances


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """All rollouts of one way to train."""

    name: str
    runs: dict[str, tuple[Rollout, ...]]
    """Rollouts by training run, both in the order of their names."""

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """Return the rollouts of all training runs."""
        return tuple(rollout for rollouts in self.runs.values() for rollout in rollouts)


def read_arms(arms: Iterable[tuple[str, Path]]) -> list[Arm]:
    """Return the arms given as (name, path), all over the same instances.

    Args:
        arms: a path is a folder `<training run>/<rollout>.json` of SWE-bench run summaries, or a
            CSV file with the columns of `COLUMNS`, of which the arm's own rows are taken.

    Raises:
        ConfigError: an arm is given twice or has no rollouts, or rollouts are not over the same
            instances.
        FormatError: a file is not what it should be.
    """
    found: list[Arm] = []
    for name, path in arms:
        if any(arm.name == name for arm in found):
            raise ConfigError(f"--arm {name}: given twice; expected one path for each arm")
        rollouts = _csv_rollouts(path, name) if path.is_file() else _folder_rollouts(path)
        runs: dict[str, list[Rollout]] = defaultdict(list)
        for rollout in sorted(rollouts, key=lambda one: (one.training_run, one.name)):
            runs[rollout.training_run].append(rollout)
        found.append(Arm(name=name, runs={run: tuple(them) for run, them in runs.items()}))
    _check_same_instances([rollout for arm in found for rollout in arm.rollouts])
    return found


def _folder_rollouts(folder: Path) -> list[Rollout]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder <training run>/<rollout>.json or a CSV")
    if stray := sorted(folder.glob("*.json")):
        raise ConfigError(
            f"{stray[0]}: a rollout outside of a training run: expected "
            f"{folder}/<training run>/<rollout>.json; put the rollouts of each trained model into "
            "a folder of their own"
        )
    rollouts: list[Rollout] = []
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        if run.name.startswith("."):
            continue
        files = sorted(path for path in run.glob("*.json") if not path.name.startswith("."))
        if not files:
            raise ConfigError(
                f"{run}: no rollout (*.json) in this training run; add its run summaries or "
                "remove the folder"
            )
        rollouts.extend(read_summary(path) for path in files)
    if not rollouts:
        raise ConfigError(f"{folder}: no rollouts: expected <training run>/<rollout>.json")
    return rollouts


def read_summary(path: Path) -> Rollout:
    """Return the rollout of a SWE-bench run summary; its folder names the training run.

    Raises:
        FormatError: it is no run summary, or contradicts itself.
    """
    try:
        value = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise FormatError(
            f"{path}: not JSON ({error}); write this rollout's summary anew"
        ) from None
    if not isinstance(value, dict) or not isinstance(value.get("resolved_ids"), list):
        raise FormatError(f"{path}: expected a SWE-bench run summary with a list resolved_ids")
    ids = {key: _ids(path, key, value[key]) for key in _ID_LISTS if value.get(key) is not None}
    known = frozenset().union(*ids.values())
    resolved = ids["resolved_ids"]
    total = _count(path, value, "total_instances")
    if total is None:
        if len(ids) == 1:
            raise FormatError(
                f"{path}: only resolved_ids, so nobody knows of how many: add total_instances or "
                "the list submitted_ids"
            )
        total = len(known)
    if total < len(known) or total == 0:
        raise FormatError(
            f"{path}: total_instances is {total}, its lists name {len(known)} instances"
        )
    counted = _count(path, value, "resolved_instances")
    if counted not in (None, len(resolved)):
        raise FormatError(
            f"{path}: resolved_instances is {counted}, resolved_ids names {len(resolved)}"
        )
    for key in ("unresolved_ids", "empty_patch_ids", "error_ids", "incomplete_ids"):
        if both := resolved & ids.get(key, frozenset()):
            raise FormatError(f"{path}: {min(both)} stands in resolved_ids and in {key}")
    return Rollout(
        training_run=path.parent.name,
        name=path.stem,
        resolved=resolved,
        instances=known,
        num_instances=total,
        num_submitted=len(ids["submitted_ids"]) if "submitted_ids" in ids else total,
        source=address_of(path),
    )


def _ids(path: Path, key: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise FormatError(f"{path}: {key}: expected a list of instance ids")
    ids = frozenset(value)
    if len(ids) < len(value):
        twice = min(one for one in ids if value.count(one) > 1)
        raise FormatError(f"{path}: {key}: {twice} is there twice")
    return ids


def _count(path: Path, value: dict[str, Any], key: str) -> int | None:
    number = value.get(key)
    if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
        raise FormatError(f"{path}: {key}: expected a whole number, got {number!r:.40}")
    return number


def _csv_rollouts(path: Path, arm: str) -> list[Rollout]:
    outcomes: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    arms: set[str] = set()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, strict=True)
            if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                raise FormatError(
                    f"{path}: no column {missing[0]}: expected the header {','.join(COLUMNS)}"
                )
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if empty := [name for name in COLUMNS if not row[name]]:
                    raise FormatError(f"{where}: {empty[0]} is empty")
                arms.add(row["arm"])
                if row["arm"] != arm:
                    continue
                resolved, instance = truth(row["resolved"]), row["instance_id"]
                if resolved is None:
                    raise FormatError(
                        f"{where}: resolved: expected true or false, got {row['resolved']!r:.40}"
                    )
                rollout = outcomes[row["training_run"], row["rollout"]]
                if instance in rollout:
                    raise FormatError(f"{where}: {instance} is there twice in this rollout")
                rollout[instance] = resolved
    except (UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"{path}: expected CSV in UTF-8: {error}") from None
    if not outcomes:
        names = ", ".join(sorted(arms)) or "none"
        raise ConfigError(f"{path}: no rows of the arm {arm!r}; its arms: {names}")
    return [
        Rollout(
            training_run=run,
            name=name,
            resolved=frozenset(instance for instance, good in found.items() if good),
            instances=frozenset(found),
            num_instances=len(found),
            num_submitted=len(found),
            source=f"{path} (arm {arm}, training run {run}, rollout {name})",
        )
        for (run, name), found in outcomes.items()
    ]


def _check_same_instances(rollouts: Sequence[Rollout]) -> None:
    # the one whose ids are known best is what the others are held against
    first = max(rollouts, key=lambda one: len(one.instances))
    for rollout in rollouts:
        if rollout.num_instances != first.num_instances:
            raise ConfigError(
                f"{rollout.source}: {rollout.num_instances} instances, but "
                f"{first.num_instances} in {first.source}; all rollouts must be over the same "
                "instances: run what is missing, or cut all to those in common"
            )
        strange = rollout.instances - first.instances
        if strange and len(first.instances) == first.num_instances:
            raise ConfigError(
                f"{rollout.source}: {min(strange)} is not among the instances of "
                f"{first.source}; all rollouts must be over the same instances"
            )
    named = frozenset[str]().union(*(rollout.instances for rollout in rollouts))
    if len(named) > first.num_instances:
        raise ConfigError(
            f"{first.source}: {first.num_instances} instances, but the rollouts together name "
            f"{len(named)}; all rollouts must be over the same instances"
        )
