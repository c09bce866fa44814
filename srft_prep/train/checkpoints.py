"""Distributed checkpoints that are whole or not there, written while training goes on.

    checkpoints/step-00000200/__0_0.distcp ...   what each rank wrote (torch.distributed.checkpoint)
    checkpoints/step-00000200/.metadata          which tensor lies where
    checkpoints/step-00000200/complete.json      written last: every file's size and SHA-256
    checkpoints/.step-00000200.tmp/              being written, or left by a killed run

`save` copies weights and optimiser state to host memory, which is all that training waits for; a
thread writes them, flushes them to the disk, hashes what it wrote, and names the folder by rename.
So kill -9 leaves whole checkpoints only. `load` believes no folder before it has compared sizes and
hashes with complete.json (each rank those of a share of the files), and takes the newest sound one.
Tensors are stored by name and place, not by rank: another number of ranks loads them as well.
Nothing but tensors is stored: AdamW's settings are those of the run that goes on. So a checkpoint
of someone else's can run no code: names of classes that `.metadata` has no use for are refused, and
what is no tensor is never read.

The group of a checkpoint's own collectives is apart from training's, so that the two never mix.
"""

import pickle
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import orjson
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from srft_prep.errors import ConfigError, ShardError, TrainError
from srft_prep.hashes import sha256_of
from srft_prep.manifest import describe_file
from srft_prep.storage import flush, write_bytes
from srft_prep.train.agreement import agreed

CHECKPOINTS: Final = "checkpoints"
"""The folder in a run's directory."""
COMPLETE: Final = "complete.json"
_NAME: Final = re.compile(r"step-(\d{8})")
_OPTIONS: Final = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Frozen weights (a LoRA run's model) are those of the model that was loaded."""
_METADATA: Final = ".metadata"
_CLASSES: Final = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
            *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
}
"""What `.metadata` is made of, torch's dtypes aside."""


class Kept:
    """The checkpoints on the disk: the newest stay, and one that is being read meanwhile."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        """How many stay."""
        self.assure: Callable[[], None] = lambda: None
        """Raises where this run may write no more."""
        self._held: int | None = None
        self._lock = threading.Lock()

    @contextmanager
    def newest(self) -> Iterator[int | None]:
        """Give the step of the newest one that is complete, and keep it until the block ends."""
        with self._lock:
            steps = (
                each for each in steps_in(self.folder) if (self.path(each) / COMPLETE).exists()
            )
            self._held = max(steps, default=None)
        try:
            yield self._held
        finally:
            self._held = None

    def path(self, step: int) -> Path:
        """Return a checkpoint's folder."""
        return self.folder / name_of(step)

    def prune(self) -> None:
        """Drop all but the newest."""
        with self._lock:
            for step in sorted(steps_in(self.folder))[: -self.keep]:
                if step != self._held:
                    leaving = self.folder / f".{name_of(step)}.tmp"
                    self.path(step).rename(leaving)
                    shutil.rmtree(leaving)


class Checkpoints:
    """A run's checkpoints; all ranks make one and call its methods together.

    Use as a context manager: leaving it waits for what is being written.
    """

    def __init__(self, kept: Kept, *, say: Callable[[str], None]) -> None:
        self.folder = kept.folder
        self.kept = kept
        self.say = say
        self._group = dist.new_group(backend="gloo")
        self._rank = dist.get_rank()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._writer.shutdown()

    def save(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Begin to write the state after `step` steps; the state may change once this returns.

        Waits for the checkpoint before, whose failure it raises; raises, too, where another run
        took the directory over.
        """
        self.wait()
        temporary = self.folder / f".{name_of(step)}.tmp"
        agreed(partial(self._make_empty, temporary), self._group)
        written = async_save(
            _tensors_of(*_state_of(model, optimizer)),
            storage_writer=FileSystemWriter(temporary, single_file_per_rank=True),
            process_group=self._group,
        )
        assert isinstance(written, Future)
        self._under_way = self._writer.submit(self._complete, written, temporary, step)

    def wait(self) -> None:
        """Wait until nothing is being written; raise what went wrong."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def load(self, model: nn.Module, optimizer: Optimizer) -> int | None:
        """Load the newest sound checkpoint and return its number of steps; None without any.

        Damaged ones that are newer are said and moved aside (`.damaged`). The optimiser's settings
        (weight decay, betas, ...) stay what they are.

        Raises:
            ShardError: there are checkpoints, and none is sound.
            ConfigError: the newest sound one is of another model: nothing was loaded.
        """
        steps = agreed(self._steps, self._group)
        for step in steps:
            path = self.kept.path(step)
            if problem := self._problem(path):
                self.say(f"{path}: {problem}; trying the checkpoint before it")
                agreed(partial(_set_aside, path), self._group)
                continue
            weights, moments = _state_of(model, optimizer)
            tensors = _tensors_of(weights, moments)
            _require_same_tensors(path, tensors)
            try:
                load(tensors, storage_reader=FileSystemReader(path), process_group=self._group)
            except CheckpointException as error:  # no Exception: nothing else would catch it
                raise ShardError(f"{path}: cannot be loaded: {error}") from None
            set_state_dict(
                model,
                optimizer,
                model_state_dict=weights,
                optim_state_dict=moments,
                options=_OPTIONS,
            )
            return step
        if steps:
            raise ShardError(
                f"{self.folder}: no checkpoint is whole; delete the folder to begin again"
            )
        return None

    def _steps(self) -> list[int]:
        """Return the steps of all checkpoints, newest first; drop what a killed run left."""
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
        return sorted(steps_in(self.folder), reverse=True)

    def _problem(self, path: Path) -> str | None:
        """Return what is wrong with a checkpoint, in all ranks alike; each looks at its share."""
        try:
            files = orjson.loads((path / COMPLETE).read_bytes())["files"]
            found = None
        except (OSError, ValueError, KeyError, TypeError) as error:
            files, found = [], f"{COMPLETE} cannot be read ({error})"
        for file in files[self._rank :: dist.get_world_size()]:
            if found := _difference(path / file["name"], file):
                break
        told: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, found, group=self._group)
        return next(filter(None, told), None)

    def _complete(self, written: "Future[Any]", temporary: Path, step: int) -> None:
        """Name a checkpoint, all of it being on the disk; drop the oldest ones.

        Raises:
            TrainError: it cannot be written: the disk is full, say.
        """
        try:
            written.result()
        except (CheckpointException, RuntimeError, OSError) as error:  # torch has no OSError of it
            free = shutil.disk_usage(self.folder).free
            reason = str(error).partition("\n")[0]
            raise TrainError(
                f"{temporary}: cannot be written, with {free:,} bytes free there: {reason}; make "
                "room, and the same command goes on"
            ) from None
        mine = sorted(temporary.glob(f"__{self._rank}_*"))
        described: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(described, [describe_file(path) for path in mine], self._group)
        if self._rank == 0:
            files = [file for part in described for file in part]
            files.append(describe_file(temporary / _METADATA))
            about = {"step": step, "world_size": len(described), "files": files}
            write_bytes(temporary / COMPLETE, orjson.dumps(about, option=orjson.OPT_INDENT_2))
            final = self.kept.path(step)
            if final.exists():
                _set_aside(final)
            temporary.rename(final)
            flush(self.folder)
            self.kept.prune()
        dist.barrier(self._group)

    def _make_empty(self, folder: Path) -> None:
        self.kept.assure()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _state_of(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a run's weights and its optimiser's state, the tensors being those in use."""
    weights, moments = get_state_dict(model, optimizer, options=_OPTIONS)
    # A frozen weight with two names (tied embeddings) keeps the second: torch looks at one only.
    for name, weight in model.named_parameters(remove_duplicate=False):
        if not weight.requires_grad:
            weights.pop(name, None)
    return weights, moments


def _tensors_of(weights: dict[str, Any], moments: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint holds: every tensor by its name."""
    return {f"model.{name}": weight for name, weight in weights.items()} | {
        f"optimizer.{name}.{key}": value
        for name, entry in moments["state"].items()
        for key, value in entry.items()
    }


def _require_same_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise for a checkpoint whose tensors are not, by name and shape, those of the run."""
    stored = {
        name: tuple(each.size) if isinstance(each, TensorStorageMetadata) else None
        for name, each in _read_metadata(path / _METADATA).state_dict_metadata.items()
    }
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(stored.keys() | wanted.keys()):
        there, here = stored.get(name, "no tensor"), wanted.get(name, "no tensor")
        if there != here:
            raise ConfigError(
                f"{path}: {name}: the checkpoint has {there}, the model {here}: it is of another "
                "model; give the one that the run was begun with, or choose another -o"
            )


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata` and calls nothing that does not belong there."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the known classes, or a dtype."""
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def _read_metadata(path: Path) -> Metadata:
    """Return a checkpoint's metadata.

    Raises:
        ShardError: something else is in the file.
    """
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except pickle.UnpicklingError as error:
        raise ShardError(f"{path}: is not what a checkpoint's metadata are: {error}") from None
    if not isinstance(metadata, Metadata):
        raise ShardError(f"{path}: is not what a checkpoint's metadata are")
    return metadata


def steps_in(folder: Path) -> list[int]:
    """Return the steps whose checkpoints lie in a folder, in no order."""
    steps = (step_of(path.name) for path in folder.glob("step-*"))
    return [step for step in steps if step is not None]


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint of this name; None where it is none's."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


def _difference(path: Path, file: dict[str, Any]) -> str | None:
    """Return how a file differs from what was written, or None."""
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return f"{path.name} is missing"
    if size != file["bytes"]:
        return f"{path.name} is cut short: {file['bytes']} bytes were written, {size} are there"
    if sha256_of(path) != file["sha256"]:
        return f"{path.name} was changed since it was written"
    return None


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
