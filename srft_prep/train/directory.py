"""A run's directory: whose it is, and when what stands there may be gone on with.

The rules are those of every stage (`storage`): the same settings and inputs go on or do nothing,
others are refused, `overwrite` begins anew. A run adds `resume`: others are said and taken, from
the last checkpoint, unless the checkpoint or its place in the data means nothing with them.

A directory is locked at once, and stays what it was while the run is prepared: `begin` clears what
an earlier run left, `adopt` takes other settings when a checkpoint was loaded with them. So a run
that cannot begin (no such model, held-out tokens of other shards, documents that leak) harms none.

A directory in a store changes hands there as it does here, in the same order (`remote`).

Checkpoints carry the hash of the plan that made them, so that no run ever goes on from a state that
another one left behind; what does not tell whose it is is never deleted.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import orjson

from srft_prep import __version__
from srft_prep.errors import ConfigError
from srft_prep.hashes import hash_of
from srft_prep.manifest import MANIFEST, PLAN, PROGRESS, Manifest, portable
from srft_prep.object_mirror import address_of
from srft_prep.storage import StageWriter, write_bytes
from srft_prep.train.checkpoints import CHECKPOINTS, Kept, name_of
from srft_prep.train.hf_export import ADAPTER, MODEL
from srft_prep.train.metrics import METRICS, TENSORBOARD
from srft_prep.train.remote import OWNER, RemoteRun
from srft_prep.train.settings import TrainConfig, changes

STAGE: Final = "train"
_FIXED: Final = {
    "lora_rank": "the checkpoint has other weights",
    "batch_sequences": "a step's place in the data follows from it: some would be left out or seen "
    "twice",
    "seed": "the order of the data follows from it: some would be left out or seen twice",
}
"""Settings without which a checkpoint means nothing, and why."""
_INPUTS: Final = ("shards", "model")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What a run wants of a directory."""

    output: Path
    """The directory."""
    config: TrainConfig
    """The run's settings."""
    inputs: list[dict[str, Any]]
    """What the manifest says of shards and model."""
    resume: bool = False
    """Go on from the last checkpoint although something changed."""
    overwrite: bool = False
    """Begin anew if anything changed."""


class RunDirectory:
    """A locked directory; use as a context manager."""

    def __init__(self, claim: Claim, *, kept: Kept, say: Callable[[str], None]) -> None:
        """Lock the directory; what stands there stays.

        Args:
            claim: what the run wants of it.
            kept: its checkpoints.
            say: tells the user what changed.

        Raises:
            ConfigError: the directory holds something else, another process writes there, settings
                changed and neither `resume` nor `overwrite` is set, or both are, or `resume`
                cannot go on with these.
            StorageError: it lies in a store that does not answer, or refuses.
        """
        self.claim = claim
        self._existed = claim.output.exists()
        self._begun = False
        self._remote: RemoteRun | None = None
        self._lock = ExitStack()
        self._writer = self._lock.enter_context(StageWriter(claim.output, stage=STAGE))
        self._fresh = not any((claim.output / name).exists() for name in (MANIFEST, PROGRESS))
        try:
            if self._writer.remote:
                self._remote = RemoteRun(self._writer.remote, kept, say=say)
            self._before = _plan_before(claim.output)
            self._changes = () if self._before is None else _changes(self._before, claim)
            self._refuse()
            for line in self._changes if claim.resume else ():
                say(f"--resume: {line}")
            stood = (claim.output / MANIFEST).exists()
            self._take()
            if self._remote and stood and self._writer.finished is None:
                self._remote.put_plan()  # files are missing, so the manifest went there, too
            self.finished: Manifest | None = None if self._changes else self._writer.finished
            """Set where this very run was finished before: there is nothing to do."""
            if self.finished and self._remote:
                self._remote.complete(self.finished)
                self._writer.drop_journal()
        except BaseException:
            self._leave_as_found()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Let the lock go; a directory where nothing began is left as it was found."""
        self._leave_as_found()

    def begin(self) -> None:
        """Clear what an earlier run left, unless this one goes on from it; nothing else can fail.

        Of a directory in a store the checkpoint to go on from comes here.

        Raises:
            ShardError: no checkpoint in the store is whole.
            StorageError: the store does not answer, or refuses.
        """
        self._begun = True
        claim = self.claim
        if self._changes and claim.overwrite:
            self._writer.take(config=asdict(claim.config), inputs=claim.inputs, overwrite=True)
        if self._writer.finished is None:
            plan_hash = _plan_hash(self._writer.plan)
            if self._remote and plan_hash not in (_plans_in(self._remote.owner) or ()):
                self._remote.clear()
            _clear_foreign(claim.output, plan_hash)
            if self._remote and not (self._changes and claim.resume):  # else `adopt` does it
                self._remote.put_plan()
            self._own(self._writer.plan)
        if self._remote:
            self._remote.bring_checkpoint()

    def adopt(self) -> None:
        """Make the run's settings those of the directory, if they changed and it goes on.

        A kill at any time leaves the plan of before or the new one, with checkpoints that are its.
        From now on checkpoints follow into a store.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        if self._changes and self.claim.resume:
            self._change_plan()
        if self._remote:
            self._remote.follow()

    def _change_plan(self) -> None:
        if self._remote:  # a checkpoint that is only here counts there by the plan that it is of
            self._remote.send_newest()
        writer, output = self._writer, self.claim.output
        new = {"config": asdict(self.claim.config), "inputs": self.claim.inputs}
        old, new = writer.plan, {**writer.plan, **orjson.loads(orjson.dumps(new))}
        writer.progress.mkdir(exist_ok=True)
        self._write_plan(old)
        (output / MANIFEST).unlink(missing_ok=True)
        if self._remote:
            self._remote.remove_manifest()
        self._own(old, new)
        self._write_plan(new)
        self._own(new)
        writer.plan, writer.finished = new, None

    def leave(self) -> None:
        """Bring the last checkpoint into a store before an interrupted run ends."""
        if self._remote:
            self._remote.leave()

    def finish(self, **result: Any) -> Manifest:
        """Write the manifest: `StageWriter.finish`."""
        if self._remote:
            self._remote.end_steps()
        return self._writer.finish(**result)

    def _take(self) -> None:
        """Take the plan that the directory has, or has not yet."""
        config, inputs = asdict(self.claim.config), self.claim.inputs
        accumulates = False
        if self._before is not None and self._changes:
            config, inputs = self._before["config"], self._before["inputs"]
            # another version's unfinished run would be refused, whatever its settings
            accumulates = not (self.claim.output / MANIFEST).exists()
        plan = self._writer.progress / PLAN
        content = plan.read_bytes() if self._remote and accumulates else None
        self._writer.take(config=config, inputs=inputs, accumulates=accumulates)
        if content is not None:  # of another version: until `adopt` the store has it, too
            write_bytes(plan, content)

    def _leave_as_found(self) -> None:
        if self._fresh and not self._begun:
            shutil.rmtree(self._writer.progress, ignore_errors=True)
            if not self._existed:
                with suppress(OSError):
                    self.claim.output.rmdir()
        self._lock.close()

    def _write_plan(self, plan: dict[str, Any]) -> None:
        write_bytes(self._writer.progress / PLAN, orjson.dumps(plan))
        if self._remote:
            self._remote.put_plan()

    def _own(self, *plans: dict[str, Any]) -> None:
        owner = {"plans": [_plan_hash(plan) for plan in plans]}
        (self.claim.output / CHECKPOINTS).mkdir(exist_ok=True)
        write_bytes(self.claim.output / OWNER, orjson.dumps(owner))
        if self._remote:
            self._remote.put_owner()

    def _refuse(self) -> None:
        """Raise for what the directory cannot be used for."""
        claim = self.claim
        if claim.resume and claim.overwrite:
            raise ConfigError("--resume goes on and --overwrite begins anew: choose one")
        names: set[str] = set()
        if _owners(claim.output) is None:
            names |= {path.name for path in (claim.output / CHECKPOINTS).glob("step-*")}
        if self._remote and _plans_in(self._remote.owner) is None:
            names |= {name_of(step) for step in self._remote.steps}
        if names:
            raise ConfigError(
                f"{address_of(claim.output)}/{CHECKPOINTS}: holds {min(names)}, but no "
                f"{Path(OWNER).name} that says of which run: restore it, move the checkpoints "
                "away, or choose another -o"
            )
        if self._before is None and self._remote and not claim.overwrite:
            owners = _plans_in(self._remote.owner) or ()
            mine = _plan_hash({"config": asdict(claim.config), "inputs": claim.inputs})
            if self._remote.steps and mine not in owners:
                raise ConfigError(
                    f"{address_of(claim.output)}/{CHECKPOINTS}: holds checkpoints of a run with "
                    "other settings or inputs, and nothing that says which: give that run's, "
                    "choose another -o, or say --overwrite to begin anew"
                )
        if self._before is None or not self._changes:
            return
        fixed = list(_reasons(self._before, claim))
        if claim.resume and fixed:
            raise ConfigError(
                f"--resume: {'; '.join(fixed)}; give it as it was, or choose another -o"
            )
        if not (claim.resume or claim.overwrite):
            state = "a finished" if (claim.output / MANIFEST).exists() else "an unfinished"
            resume = "" if fixed else "say --resume to go on from its last checkpoint, "
            raise ConfigError(
                f"{address_of(claim.output)}: holds {state} train with other settings or inputs "
                f"({'; '.join(self._changes)}); {resume}choose another -o, or say --overwrite to "
                "begin anew"
            )


def _plan_before(output: Path) -> dict[str, Any] | None:
    """Return what the last run here was about: the finished one, or the unfinished one."""
    for path in (output / MANIFEST, output / PROGRESS / PLAN):
        try:
            plan = orjson.loads(path.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            continue
        if isinstance(plan, dict) and plan.get("stage") == STAGE:
            return plan
    return None


def _changes(before: dict[str, Any], claim: Claim) -> tuple[str, ...]:
    """Return what differs between two runs' plans, a line each."""
    lines = changes(before["config"], claim.config)
    unfinished = not (claim.output / MANIFEST).exists()
    if unfinished and before.get("package_version") != __version__:
        lines.append(f"srft-prep: {before.get('package_version')} before, {__version__} now")
    for name, old, new in zip(_INPUTS, before["inputs"], claim.inputs, strict=True):
        if portable(old) != portable(new):
            same = " (its content changed)" if old.get("path") == new.get("path") else ""
            lines.append(f"{name}: {old.get('path')} before, {new.get('path')} now{same}")
    return tuple(lines)


def _reasons(before: dict[str, Any], claim: Claim) -> list[str]:
    """Return why a run's checkpoints cannot be gone on from, a reason each."""
    pairs = {
        name: (before["config"].get(name), getattr(claim.config, name), reason)
        for name, reason in _FIXED.items()
    }
    reasons = [
        f"{name} was {old}, got {new}: {reason}"
        for name, (old, new, reason) in pairs.items()
        if old != new
    ]
    old, new = before["inputs"][0], claim.inputs[0]
    if portable(old) != portable(new):
        reasons.append(
            f"the shards were {old.get('path')}, got {new.get('path')}, with other contents: a "
            "step's place in the data means nothing there"
        )
    return reasons


def _owners(output: Path) -> list[str] | None:
    """Return the hashes of the plans that the checkpoints may be of; None if nothing tells."""
    try:
        return _plans_in((output / OWNER).read_bytes())
    except OSError:
        return None


def _plans_in(content: bytes | None) -> list[str] | None:
    try:
        plans: list[str] = orjson.loads(content or b"")["plans"]
    except (ValueError, KeyError, TypeError):
        return None
    return plans


def _clear_foreign(output: Path, plan_hash: str) -> None:
    """Remove what a run of another plan left; its checkpoints last, which tell whose it was."""
    if plan_hash in (_owners(output) or ()):
        return
    (output / METRICS).unlink(missing_ok=True)
    for name in (TENSORBOARD, MODEL, ADAPTER):
        shutil.rmtree(output / name, ignore_errors=True)
    checkpoints = output / CHECKPOINTS
    for path in checkpoints.glob("step-*"):  # before the file that tells whose they are
        shutil.rmtree(path)
    shutil.rmtree(checkpoints, ignore_errors=True)


def _plan_hash(plan: dict[str, Any]) -> str:
    return hash_of([plan["config"], portable(plan["inputs"])])
