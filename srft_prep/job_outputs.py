"""The directories of N array jobs, and why they are not those of one array.

What is merged must be whole, and be what one run would have made: every index of the array once,
all of one stage, version, source and settings, and every file with the bytes that were written.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import orjson

from srft_prep.array_jobs import ArrayJob
from srft_prep.errors import ConfigError, ShardError
from srft_prep.manifest import LEDGERS, PROGRESS, Manifest, names_in, portable, read_manifest
from srft_prep.object_mirror import is_mirrored, place_of

STAGES: Final = ("label", "tokenize")
"""Stages that array jobs share."""

_SHOWN: Final = 8
_COMMON: Final = ("schema_version", "package_version", "inputs", "config", "tried")
"""What the manifests of an array's jobs have in common; of the configuration all but `array`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutput:
    """What one array job wrote."""

    array: ArrayJob
    manifest: Manifest

    @property
    def path(self) -> Path:
        """The directory."""
        return self.manifest.path

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration without the job: that of one run for all."""
        config: dict[str, Any] = self.manifest.data["config"]
        return {key: value for key, value in config.items() if key != "array"}

    def rejected(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the lines of a file of rejected trajectories, by trajectory."""
        lines = (self.path / name).read_bytes().splitlines()
        rows = [orjson.loads(line) for line in lines]
        return {row["trajectory_id"]: row for row in rows}


def read_jobs(directories: Sequence[Path]) -> list[JobOutput]:
    """Return the outputs of all jobs of an array, in the order of their indices.

    Raises:
        ShardError: a directory is unfinished, damaged, or not the output of an array job.
        ConfigError: they are not the directories of one array, each once.
    """
    outputs = [_read(directory) for directory in directories]
    outputs.sort(key=lambda output: output.array.shard_index)
    _refuse_other_number(outputs)
    for output in outputs[1:]:
        _refuse_difference(outputs[0], output)
    for output in outputs:
        _refuse_damage(output)
    return outputs


def source_of(outputs: Sequence[JobOutput], trajectories: Path | None) -> Manifest:
    """Return the trajectories that the jobs shared, by default from where they read them.

    Raises:
        ShardError: there is no finished `ingest` output there.
        ConfigError: it holds other trajectories.
    """
    inputs = outputs[0].manifest.data["inputs"]
    named = next(each for each in inputs if each["stage"] == "ingest")
    path = trajectories or place_of(named["path"])
    if trajectories is None and not is_mirrored(path) and not path.exists():
        raise ConfigError(
            f"{path}: expected the trajectories that the jobs read, got no such directory (give "
            "the place where it is now as --trajectories)"
        )
    source = read_manifest(path, stage="ingest")
    if source.as_input()["sha256"] != named["sha256"]:
        raise ConfigError(
            f"{path}: expected the trajectories that {outputs[0].path} was made of, got others "
            "(give the right ones as --trajectories, or run the jobs again)"
        )
    return source


def summed(outputs: Sequence[JobOutput]) -> dict[str, Any]:
    """Return the sums of the jobs' counts."""
    total: Counter[str] = Counter()
    for output in outputs:
        total.update(output.manifest.counts)
    return dict(total)


def _read(directory: Path) -> JobOutput:
    manifest = read_manifest(directory)
    if manifest.stage not in STAGES:
        raise ConfigError(
            f"{directory}: expected the output of {' or '.join(STAGES)}, this is one of "
            f"{manifest.stage}"
        )
    array = manifest.data["config"].get("array")
    try:
        return JobOutput(array=ArrayJob(**array), manifest=manifest)
    except TypeError:
        raise ConfigError(
            f"{directory}: expected the output of an array job ({manifest.stage} with "
            "--shard-index and --num-shards), got that of a run for all trajectories"
        ) from None


def _refuse_other_number(outputs: Sequence[JobOutput]) -> None:
    number = outputs[0].array.num_shards
    for output in outputs:
        if output.array.num_shards != number:
            raise ConfigError(
                f"{output.path}: one of {output.array.num_shards} jobs, but {outputs[0].path} is "
                f"one of {number}; give the directories of one array"
            )
    by_index: dict[int, list[Path]] = {}
    for output in outputs:
        by_index.setdefault(output.array.shard_index, []).append(output.path)
    for index, paths in by_index.items():
        if len(paths) > 1:
            raise ConfigError(
                f"--shard-index {index} comes twice: {paths[0]} and {paths[1]}; give one of them"
            )
    if missing := sorted(set(range(number)) - by_index.keys()):
        named = ", ".join(map(str, missing[:_SHOWN]))
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ConfigError(
            f"expected the directories of {number} jobs, got {len(outputs)}; missing: "
            f"--shard-index {named}{more}; run those jobs, and give their directories, too"
        )


def _refuse_difference(first: JobOutput, other: JobOutput) -> None:
    if other.manifest.stage != first.manifest.stage:
        raise ConfigError(
            f"{other.path}: expected the output of {first.manifest.stage}, as {first.path} is, got "
            f"one of {other.manifest.stage}"
        )
    for key in _COMMON:
        ours, theirs = (
            output.settings if key == "config" else output.manifest.data.get(key)
            for output in (first, other)
        )
        if portable(ours) != portable(theirs):
            raise ConfigError(
                f"{other.path}: made with other {key} than {first.path}: "
                f"{_difference(portable(theirs), portable(ours))}; run it again as the others were"
            )
    ours, theirs = (output.manifest.data.get("certificate", {}) for output in (first, other))
    if ours.get("engine") != theirs.get("engine"):
        raise ConfigError(
            f"{other.path}: encoded by {theirs['engine']} ({theirs['reason']}), but {first.path} "
            f"by {ours['engine']} ({ours['reason']}); delete what {first.manifest.stage} made by "
            f"fastokens and run those jobs again with --tokenizer-engine {ours['reference']}"
        )


def _difference(got: Any, expected: Any) -> str:
    """Return the first thing that differs, in words."""
    if isinstance(got, dict) and isinstance(expected, dict):
        for key in {**expected, **got}:
            if got.get(key) != expected.get(key):
                return f"{key} is {got.get(key)}, not {expected.get(key)}"
    return f"{got}, not {expected}"


def _refuse_damage(output: JobOutput) -> None:
    """Hash every file; a ledger that the manifest does not name is a later run's, unfinished."""
    manifest, path = output.manifest, output.path
    named = {file["name"] for file in manifest.files}
    for name, what in manifest.problems(ledgers=True).items():
        advice = (
            f"give the command of {manifest.stage} again, or restore it"
            if fnmatch(name, LEDGERS)
            else f"restore it, or delete {path} and run {manifest.stage} again"
        )
        raise ShardError(f"{path / name}: {what}; {advice}")
    there = names_in(path)
    if PROGRESS in there or {each for each in there if fnmatch(each, LEDGERS)} - named:
        raise ShardError(
            f"{path}: a later run there was interrupted; give its command again to continue"
        )
