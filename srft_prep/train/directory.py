"""A run's directory: whose it is, and when what stands there may be gone on with.

The rules are those of every stage (`storage`): the same settings and inputs go on or do nothing,
others are refused, `overwrite` begins anew. A run adds `resume`: others are said and taken, from
the last checkpoint. Checkpoints carry the hash of the plan that made them, so that no run ever goes
on from a state that another one left behind.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import orjson

from srft_prep import __version__
from srft_prep.errors import ConfigError
from srft_prep.manifest import MANIFEST, PROGRESS, hash_of
from srft_prep.storage import PLAN, StageWriter, write_bytes
from srft_prep.train.hf_export import ADAPTER, MODEL
from srft_prep.train.metrics import METRICS, TENSORBOARD
from srft_prep.train.settings import TrainConfig, changes

CHECKPOINTS: Final = "checkpoints"
_OWNER: Final = "plan.json"
_FIXED: Final = ("lora_rank",)
"""Settings without which a checkpoint's tensors have no place to go to."""


def open_directory(
    output: Path,
    config: TrainConfig,
    inputs: list[dict[str, Any]],
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None],
) -> StageWriter:
    """Lock a run's directory and bring it to a state to go on from.

    Args:
        output: the directory.
        config: the run's settings.
        inputs: what the manifest says of shards and model.
        resume: go on from the last checkpoint whatever changed.
        overwrite: begin anew if anything changed.
        say: tells the user what changed.

    Raises:
        ConfigError: the directory holds something else, another process writes there, settings
            changed and neither `resume` nor `overwrite` is set, or both are.
    """
    if resume and overwrite:
        raise ConfigError("--resume goes on and --overwrite begins anew: choose one")
    before = _plan_before(output) if resume else None
    changed = [] if before is None else _changes(before, config, inputs)
    with_changes = resume and bool(changed)
    writer = StageWriter.open(
        output,
        stage="train",
        config=asdict(config),
        inputs=inputs,
        overwrite=overwrite,
        accumulates=with_changes,
    )
    try:
        for line in changed:
            say(f"--resume: {line}")
        if with_changes:
            (output / MANIFEST).unlink(missing_ok=True)
        elif writer.finished is None:
            _clear_foreign(output, _plan_hash(writer.plan))
        if writer.finished is None:
            (output / CHECKPOINTS).mkdir(exist_ok=True)
            owner = {"plan": _plan_hash(writer.plan)}
            write_bytes(output / CHECKPOINTS / _OWNER, orjson.dumps(owner))
    except BaseException:
        writer.__exit__()
        raise
    return writer


def _plan_before(output: Path) -> dict[str, Any] | None:
    """Return what the last run here was about: the unfinished one, or the finished one."""
    for path in (output / PROGRESS / PLAN, output / MANIFEST):
        try:
            plan = orjson.loads(path.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            continue
        if isinstance(plan, dict) and plan.get("stage") == "train":
            return plan
    return None


def _changes(
    before: dict[str, Any], config: TrainConfig, inputs: list[dict[str, Any]]
) -> list[str]:
    """Return what differs between two runs' plans, a line each.

    Raises:
        ConfigError: something differs with which the checkpoint cannot be loaded.
    """
    for name in _FIXED:
        if before["config"].get(name) != getattr(config, name):
            raise ConfigError(
                f"--resume: {name} was {before['config'].get(name)}, got "
                f"{getattr(config, name)}: the checkpoint has other weights; give it as it was, or "
                "choose another -o"
            )
    lines = changes(before["config"], config)
    if before.get("package_version") != __version__:
        lines.append(f"srft-prep: {before.get('package_version')} before, {__version__} now")
    names = ("shards", "model")
    for name, old, new in zip(names, before["inputs"], inputs, strict=False):
        if _portable(old) != _portable(new):
            lines.append(f"{name}: {old.get('path')} before, {new.get('path')} now")
    return lines


def _clear_foreign(output: Path, plan_hash: str) -> None:
    """Remove what a run of another plan left; its checkpoints last, which tell whose it was."""
    try:
        owner = orjson.loads((output / CHECKPOINTS / _OWNER).read_bytes()).get("plan")
    except (OSError, orjson.JSONDecodeError):
        owner = None
    if owner == plan_hash:
        return
    (output / METRICS).unlink(missing_ok=True)
    for name in (TENSORBOARD, MODEL, ADAPTER, CHECKPOINTS):
        shutil.rmtree(output / name, ignore_errors=True)


def _plan_hash(plan: dict[str, Any]) -> str:
    return hash_of([plan["config"], [_portable(each) for each in plan["inputs"]]])


def _portable(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "path"}
