"""Which tasks no shard holds, so that a training run can be measured on them.

A task is held out by a hash of its instance id and by nothing else: all attempts at it together,
whatever the recipe, the seed or the other tasks, and with a larger fraction what a smaller one held
out, too. So the training sets of one token directory have one held-out set.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import orjson
import pyarrow.parquet as pq

from srft_prep.errors import ShardError
from srft_prep.schemas import HELD_OUT_FILE
from srft_prep.storage import atomic_path
from srft_prep.token_columns import OUTCOME_CODES, TokenColumns

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OUTCOMES: Final = {code: outcome for outcome, code in OUTCOME_CODES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutTrajectory:
    """One trajectory that is in no shard; a line of `held_out.jsonl`."""

    trajectory_id: str
    instance_id: str
    """Its task; empty where the source names none: then it is held out by its own id."""
    resolved: bool | None


def is_held_out(instance_id: str, fraction: float) -> bool:
    """Return whether a task is among the held-out fraction of all tasks."""
    digest = hashlib.blake2b(instance_id.encode(), digest_size=8, person=b"srft-hold-out").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def choose_held_out(
    columns: TokenColumns, fraction: float
) -> "tuple[list[HeldOutTrajectory], NDArray[np.bool_]]":
    """Return the held-out trajectories in the order of the tokens, and whether each row is one's.

    Raises:
        ShardError: the tokens were written by a version that did not note their tasks.
    """
    chosen = np.zeros(len(columns.names), np.bool_)
    if not fraction:
        return [], chosen[columns.trajectories]
    instances = _instances(columns)
    outcomes = np.zeros(len(columns.names), np.int8)
    outcomes[columns.trajectories] = columns.outcomes
    for place, (name, instance) in enumerate(zip(columns.names, instances, strict=True)):
        chosen[place] = is_held_out(instance or name, fraction)
    held_out = [
        HeldOutTrajectory(
            trajectory_id=columns.names[place],
            instance_id=instances[place],
            resolved=_OUTCOMES[int(outcomes[place])],
        )
        for place in np.flatnonzero(chosen).tolist()
    ]
    return held_out, chosen[columns.trajectories]


def _instances(columns: TokenColumns) -> list[str]:
    """Return the instance id of each trajectory."""
    instances = [""] * len(columns.names)
    row = 0
    for part in columns.parts:
        if "instance_id" not in pq.read_schema(part).names:
            raise ShardError(
                f"{part}: no column instance_id: written by an older version, which did not note "
                "the tasks that --hold-out chooses by; run tokenize again"
            )
        for instance in pq.read_table(part, columns=["instance_id"])["instance_id"].to_pylist():
            instances[columns.trajectories[row]] = instance
            row += 1
    return instances


def write_held_out(folder: Path, held_out: list[HeldOutTrajectory]) -> None:
    """Write `held_out.jsonl`: one line for each held-out trajectory."""
    with atomic_path(folder / HELD_OUT_FILE) as temporary, temporary.open("wb") as file:
        file.writelines(orjson.dumps(each) + b"\n" for each in held_out)


def read_held_out(folder: Path) -> list[HeldOutTrajectory]:
    """Return the trajectories that the shards of a directory do not hold.

    Raises:
        ShardError: there is no such list, or it is damaged.
    """
    path = folder / HELD_OUT_FILE
    if not path.is_file():
        raise ShardError(f"{path}: missing: nothing was held out; run pack with --hold-out 0.02")
    held_out = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            held_out.append(HeldOutTrajectory(**orjson.loads(line)))
        except (orjson.JSONDecodeError, TypeError):
            raise ShardError(
                f"{path}:{number}: expected trajectory_id, instance_id and resolved, got "
                f"{line[:60]!r}; run pack again"
            ) from None
    return held_out
