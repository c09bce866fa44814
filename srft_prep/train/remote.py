"""A run's directory in a store: what its checkpoints and metrics are to a run on another machine.

The local folder is the run's, as that of every output is (`object_outputs`), and all ranks write
into it; the first one alone speaks to the store.

- *Beginning.* The newest checkpoint that the store has whole comes here, if none is here that is as
  new and undamaged, and the metrics with it: those of the same plan, since only they are left here.
- *While it runs.* The newest checkpoint follows: its files, the metrics as far as it goes, and last
  `complete.json`, without which it counts for nothing. It stays here until it is there; those that
  were made meanwhile are passed over. Then what is too old goes there, as it does here.
- *End.* All of the metrics, before the manifest.
"""

import hashlib
import shutil
import socket
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import torch.distributed as dist

from srft_prep.errors import ConfigError, ShardError, StorageError
from srft_prep.hashes import sha256_of
from srft_prep.manifest import MANIFEST, Manifest
from srft_prep.object_mirror import CACHE, address_of, fetch, fetch_object
from srft_prep.object_outputs import RemoteOutput
from srft_prep.object_storage import parts_of, patience_seconds, patiently, read_object
from srft_prep.storage import write_bytes
from srft_prep.train.agreement import agreed, together
from srft_prep.train.checkpoints import CHECKPOINTS, COMPLETE, Kept, name_of, step_of
from srft_prep.train.hf_export import ADAPTER, MODEL
from srft_prep.train.metrics import METRICS, TENSORBOARD, read_metrics

OWNER: Final = f"{CHECKPOINTS}/plan.json"
"""File that says of which plan the checkpoints are."""


class RemoteRun:
    """The store's side of a run's directory; the first rank's."""

    def __init__(self, output: RemoteOutput, kept: Kept, *, say: Callable[[str], None]) -> None:
        """Bring what says whose the checkpoints are; nothing is written yet.

        Args:
            output: the store's side of the directory.
            kept: the checkpoints here.
            say: tells the user what is wrong with those in the store.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        self.owner: bytes | None = None
        """What the store says of which plan its checkpoints are."""
        self._output, self._uploads = output, output.uploads
        self._folder = output.folder
        self._kept, self._say = kept, say
        self._whole: dict[int, bytes] = {}
        """What `complete.json` holds of the checkpoints that the store has whole, by step."""
        self._is_over = False
        kept.assure = output.assure
        if OWNER in self._uploads.objects:
            self.owner = self._read(OWNER)
        if self.owner is not None and not (self._folder / OWNER).exists():
            (self._folder / CHECKPOINTS).mkdir(exist_ok=True)
            write_bytes(self._folder / OWNER, self.owner)

    @property
    def steps(self) -> dict[int, list[str]]:
        """The names of the objects of each step's checkpoint; what counts for a whole one first."""
        names: dict[int, list[str]] = defaultdict(list)
        for name in self._uploads.objects:
            above, _, rest = name.partition("/")
            folder, _, file = rest.partition("/")
            if above == CHECKPOINTS and file and (step := step_of(folder)) is not None:
                names[step].append(name)
        return {step: sorted(names[step], key=_is_part) for step in names}

    def clear(self) -> None:
        """Remove what a run of another plan left; its checkpoints last, which tell whose it was.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        folders = (f"{TENSORBOARD}/", f"{MODEL}/", f"{ADAPTER}/")
        self._uploads.remove([name for name in self._uploads.objects if name.startswith(folders)])
        self._uploads.remove([METRICS])
        for names in self.steps.values():
            self._remove_checkpoint(names)
        self._uploads.remove([OWNER])

    def put_plan(self) -> None:
        """Make the plan that lies here the store's.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        self._output.put_plan()

    def put_owner(self) -> None:
        """Let the store say of the checkpoints what is said here.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        self._uploads.write(OWNER, (self._folder / OWNER).read_bytes())

    def remove_manifest(self) -> None:
        """Let the run count as unfinished.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        self._uploads.remove([MANIFEST])

    def bring_checkpoint(self) -> None:
        """Fetch the newest sound checkpoint if none is here that is newer, with its metrics.

        Of one that is here, too, what was damaged here is fetched.

        Raises:
            ShardError: the store has checkpoints, none of them is sound, and none is here.
            StorageError: the store does not answer, or refuses.
        """
        stored = self._look()
        with self._kept.newest() as here:
            newer = [one for one in stored if here is None or one.step > here]
            same = None if here is None else self._whole.get(here)
            if not newer and here is not None and same == self._complete_of(here):
                fetch(self._folder, next(one.files for one in stored if one.step == here))
                return
        for one in newer:
            problem = one.problem or self._fetch(one)
            if problem is None:
                return
            folder = f"{address_of(self._folder)}/{_folder_of(one.step)}"
            self._say(f"{folder}: {problem}; trying the checkpoint before it")
            self._whole.pop(one.step, None)
        if newer and here is None:
            raise ShardError(
                f"{address_of(self._folder)}/{CHECKPOINTS}: no checkpoint is whole; delete the "
                "folder to begin again"
            )

    def send_newest(self) -> None:
        """Let the store have the newest checkpoint that is here, under the plan that it is of.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        self._uploads.also = self._send
        self._uploads.persist(patience_seconds())

    def follow(self) -> None:
        """Let the newest checkpoint follow into the store from now on."""
        self._uploads.also = self._send
        self._uploads.start()

    def end_steps(self) -> None:
        """Say that no step follows: all of the metrics go into the store, and no leftover stays."""
        self._is_over = True

    def leave(self) -> None:
        """Bring the newest checkpoint away, however long it takes; a store that is away is said."""
        self._output.leave()

    def complete(self, manifest: Manifest) -> None:
        """Make the store have all of a run that was finished here or there.

        Raises:
            StorageError: the store does not answer for too long, or refuses.
        """
        if self._read(MANIFEST) != (self._folder / MANIFEST).read_bytes():  # its end is only here
            self._look()
            self.end_steps()
            self._uploads.also = self._send
        self._output.finish(manifest)

    def _look(self) -> "list[_Stored]":
        """Return the store's checkpoints that claim to be whole, newest first."""
        found = []
        for step, names in sorted(self.steps.items(), reverse=True):
            if names[0] == f"{_folder_of(step)}/{COMPLETE}":  # else its machine was lost
                found.append(self._stored(step, self._read(names[0]) or b""))
        self._whole = {one.step: one.content for one in found if one.problem is None}
        return found

    def _stored(self, step: int, content: bytes) -> "_Stored":
        try:
            files = _files_in(step, content)
        except (ValueError, KeyError, TypeError) as error:
            unreadable = f"{COMPLETE} cannot be read ({error})"
            return _Stored(step=step, content=content, files=[], problem=unreadable)
        lacking = [file["name"] for file in files if not self._output.has(file)]
        problem = f"{Path(lacking[0]).name}: missing, or cut short" if lacking else None
        return _Stored(step=step, content=content, files=files, problem=problem)

    def _fetch(self, one: "_Stored") -> str | None:
        """Bring a checkpoint here, with the metrics, and return None, or what is wrong with it."""
        path, objects = self._kept.path(one.step), self._uploads.objects
        metrics = [name for name in objects if name.startswith((METRICS, f"{TENSORBOARD}/"))]
        for name in (*(file["name"] for file in one.files), *metrics):
            parts_of(self._uploads.at(name))  # no way out of the folder
        for name, what in fetch(self._folder, one.files).items():
            shutil.rmtree(path, ignore_errors=True)
            return f"{name.rpartition('/')[2]}: {what}"
        for name in metrics:
            fetch_object(self._uploads.at(name), self._folder / name, objects[name])
        write_bytes(path / COMPLETE, one.content)
        return None

    def _send(self) -> None:
        """Upload what the store lacks; raises as `Uploads.send` does."""
        with self._kept.newest() as step:
            if step is not None and self._whole.get(step) != self._complete_of(step):
                self._send_checkpoint(step)
        self._kept.prune()  # it may have been kept for this alone
        if self._is_over:
            self._send_metrics()
        self._drop()

    def _send_checkpoint(self, step: int) -> None:
        uploads, complete = self._uploads, f"{_folder_of(step)}/{COMPLETE}"
        content = self._complete_of(step)
        files = {file["name"]: file["sha256"] for file in _files_in(step, content)}
        self._whole.pop(step, None)
        uploads.remove([complete], patience=0)
        for name, sha256 in files.items():
            if name in uploads.objects and uploads.is_noted(name, sha256):
                uploads.same[name] = sha256
        uploads.send(files)
        self._send_metrics(step)
        if missing := [name for name in files if uploads.same.get(name) != files[name]]:
            raise StorageError(f"{self._folder / missing[0]}: is gone", is_final=True)
        uploads.send({complete: sha256_of(self._folder / complete) or ""})
        self._whole[step] = content

    def _send_metrics(self, last: int | None = None) -> None:
        """Upload the metrics up to a step, or all of them, and TensorBoard's files."""
        lines = (
            orjson.dumps(line) + b"\n"
            for line in read_metrics(self._folder)
            if last is None or line["step"] <= last
        )
        self._write(METRICS, b"".join(lines))
        for path in sorted((self._folder / TENSORBOARD).glob("*")):
            self._write(f"{TENSORBOARD}/{path.name}", path.read_bytes())

    def _write(self, name: str, content: bytes) -> None:
        sha256 = hashlib.sha256(content).hexdigest()
        if self._uploads.same.get(name) != sha256:
            self._uploads.write(name, content, patience=0)
            self._uploads.same[name] = sha256

    def _drop(self) -> None:
        """Remove checkpoints that are too old, or were never whole, once a newer one is."""
        stay = sorted(self._whole)[-self._kept.keep :]
        for step, names in self.steps.items():
            if stay and step not in stay and (step < stay[-1] or self._is_over):
                self._whole.pop(step, None)
                self._remove_checkpoint(names, patience=0)

    def _remove_checkpoint(self, names: list[str], *, patience: float | None = None) -> None:
        """Remove a checkpoint's objects; that by which it counts for a whole one first."""
        self._uploads.remove(names[:1], patience=patience)
        self._uploads.remove(names[1:], patience=patience)

    def _complete_of(self, step: int) -> bytes:
        return (self._kept.path(step) / COMPLETE).read_bytes()

    def _read(self, name: str) -> bytes | None:
        return patiently(lambda: read_object(self._uploads.at(name)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """A checkpoint in the store that has `complete.json`."""

    step: int
    content: bytes
    """What `complete.json` holds."""
    files: list[dict[str, Any]]
    """`name` (in the run's directory), `bytes` and `sha256` of each that it names."""
    problem: str | None
    """What the list of objects shows to be wrong with it."""


def require_shared(folder: Path) -> None:
    """Raise, in all ranks, where one does not see what the first one writes into a folder.

    Raises:
        ConfigError: their machines do not share it.
    """
    name = agreed(lambda: _mark(folder))
    try:
        together(lambda: _require(folder / name))
    finally:
        if not dist.get_rank():
            (folder / name).unlink(missing_ok=True)


def _mark(folder: Path) -> str:
    """Write a file of a name that no machine ever looked for."""
    name = f".{uuid.uuid4().hex}.tmp"
    (folder / name).touch()
    return name


def _require(mark: Path) -> None:
    if not mark.exists():
        raise ConfigError(
            f"{address_of(mark.parent)}: all ranks write this run's checkpoints, and rank "
            f"{dist.get_rank()} on {socket.gethostname()} does not see what the first one writes: "
            f"give a folder that all machines share as {CACHE}"
        )


def _files_in(step: int, content: bytes) -> list[dict[str, Any]]:
    """Return what `complete.json` says of a checkpoint's files, named as in the run's directory."""
    return [
        {
            "name": f"{_folder_of(step)}/{Path(file['name']).name}",
            "bytes": int(file["bytes"]),
            "sha256": file["sha256"],
        }
        for file in orjson.loads(content)["files"]
    ]


def _folder_of(step: int) -> str:
    return f"{CHECKPOINTS}/{name_of(step)}"


def _is_part(name: str) -> tuple[bool, str]:
    return not name.endswith(f"/{COMPLETE}"), name
