"""Shards and a model in, a trained model out: sets everything up, runs the loop, writes the result.

    OUT/checkpoints/step-00000100/          to go on from (checkpoints)
    OUT/metrics.jsonl  OUT/tensorboard/     what happened (metrics)
    OUT/model/  OUT/adapter/                the result, for transformers and vLLM (hf_export)
    OUT/manifest.json                       written last: a directory without it is unfinished

Every rank of torchrun calls `train` with the same job. The first one holds the directory's lock and
writes; what it finds wrong there, all ranks raise.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from srft_prep.critic.flops import NoShape, shape_of
from srft_prep.errors import ConfigError, SrftError
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.progress import Progress, Silent
from srft_prep.storage import StageWriter
from srft_prep.train.checkpoints import Checkpoints
from srft_prep.train.data import ShardSet
from srft_prep.train.directory import CHECKPOINTS, open_directory
from srft_prep.train.heldout import HeldOut, evaluate
from srft_prep.train.hf_export import export_model
from srft_prep.train.leaks import check_leaks
from srft_prep.train.loader import Loader
from srft_prep.train.loop import Trainer, interruptible, run_steps
from srft_prep.train.loss import CHUNK_POSITIONS
from srft_prep.train.metrics import Recorder, device_peak, read_metrics
from srft_prep.train.model import (
    WeightedModel,
    add_lora,
    causal_lm,
    checkpoint_activations,
    compile_layers,
    load_model,
    tiny_model,
)
from srft_prep.train.optim import make_optimizer
from srft_prep.train.parallel import World, shard_model, started
from srft_prep.train.settings import RunOptions, TrainConfig
from srft_prep.train.sources import TINY, choose_tokenizer, model_input, num_ids, saved_tokenizer

DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_MULTIPLE: Final = 64
"""Rows of a tiny model's embedding are a multiple of it."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to train on what, and where."""

    shards: Path
    """Output of `pack`."""
    output: Path
    """Directory to write."""
    model: str | None
    """Folder or hub id of the model; None for a tiny random one."""
    config: TrainConfig
    """What decides the weights."""
    options: RunOptions
    """How to get there."""
    held_out: Path | None = None
    """Output of `tokenize` to evaluate on what the shards hold out; None for no evaluation."""
    labels: Path | None = None
    """Output of `label`, or a labels file, for the evaluation."""
    resume: bool = False
    """Go on from the last checkpoint even if settings or inputs changed."""
    overwrite: bool = False
    """Begin anew if settings or inputs changed."""
    command: tuple[str, ...] = ()
    """The command line, for the manifest."""


def train(job: Job, *, progress: Progress | None = None) -> Manifest:
    """Train, from the last checkpoint if there is one, and return the run's manifest.

    Raises:
        ConfigError: a setting or a path is wrong, or `output` holds something else.
        ShardError: the shards are damaged or unfinished, or no checkpoint is whole.
        TrainError: the model cannot be trained exactly, or a loss is no number.
        KeyboardInterrupt: asked to stop; a checkpoint was written and the same command continues.
    """
    with started(sequence_parallel=job.options.sequence_parallel) as world, ExitStack() as stack:
        shown = (progress if world.rank == 0 else None) or Silent()
        writers: list[StageWriter] = []

        def open_writer() -> tuple[Manifest | None, str | None]:
            shards = read_manifest(job.shards, stage="pack").checked()
            tokenizer, remark = choose_tokenizer(job.model, shards)
            inputs = [shards.as_input(), model_input(job.model)]
            writer = open_directory(
                job.output,
                job.config,
                inputs,
                resume=job.resume,
                overwrite=job.overwrite,
                say=shown.say,
            )
            writers.append(stack.enter_context(writer))
            if remark:
                shown.say(remark)
            return writer.finished, tokenizer

        finished, tokenizer = agreed(open_writer, world)
        if finished:
            return finished
        counts, names = _train(job, world, tokenizer, shown)

        def finish() -> Manifest:
            (writer,) = writers
            about = {"tokenizer": tokenizer, "world_size": world.world_size}
            return writer.finish(counts=counts, names=names, command=list(job.command), extra=about)

        return agreed(finish, world)


def agreed(call: Callable[[], Result], world: World) -> Result:
    """Return, in all ranks, what a call returns in the first; what it raises there, all raise."""
    box: list[Any] = [None, None]
    if world.rank == 0:
        try:
            box[0] = call()
        except SrftError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    result: Result = box[0]
    return result


def _train(
    job: Job, world: World, tokenizer: str | None, progress: Progress
) -> tuple[dict[str, Any], list[str]]:
    """Run the loop and export the model; return the manifest's counts and files."""
    config, options = job.config, job.options
    shards = ShardSet.open(job.shards, check=False)
    model = _build(job, world, num_ids(tokenizer))
    optimizer = make_optimizer(model, config)
    measure = _evaluation(job, shards, model, world)
    with Checkpoints(
        job.output / CHECKPOINTS, keep=options.keep_checkpoints, say=progress.say
    ) as checkpoints:
        first = checkpoints.load(model, optimizer) or 0
        loader = _loader(shards, config, options, world, first_step=first)
        trainer = Trainer(
            model=model,
            optimizer=optimizer,
            config=config,
            world=world,
            num_steps=loader.num_steps,
            shape=shape_of(causal_lm(model.model).config.to_dict()),
        )
        check_leaks(model, device=world.device)
        _introduce(trainer, loader, shards, progress)
        with ExitStack() as stack:
            recorder = None
            if world.rank == 0:
                recorder = stack.enter_context(_recorder(job.output, trainer, first, progress))
            stack.enter_context(interruptible(trainer.interrupt))
            ended = run_steps(
                trainer, loader, checkpoints, options, recorder=recorder, evaluate=measure
            )
    if not ended:
        raise KeyboardInterrupt
    names = export_model(
        model,
        job.output,
        dtype=DTYPES[config.precision],
        tokenizer=saved_tokenizer(tokenizer),
    )
    return _counts(job.output), names


def _build(job: Job, world: World, ids: int) -> WeightedModel:
    """Return the model, ready to train, on this rank's device.

    Raises:
        ConfigError: there is no such model, or its embedding has too few rows.
    """
    config, options = job.config, job.options
    chunk = options.loss_chunk or CHUNK_POSITIONS
    if job.model is None:
        rows = -(-ids // _MULTIPLE) * _MULTIPLE
        if not ids:
            raise ConfigError("--tiny needs the shards' tokenizer, for the size of its vocabulary")
        model = tiny_model(rows, seed=config.seed, chunk=chunk, **TINY)
    else:
        model = load_model(job.model, chunk=chunk, weights=world.rank == 0)
    embedding = causal_lm(model.model).get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    if (rows := embedding.num_embeddings) < ids:
        raise ConfigError(
            f"--model {job.model}: its embedding has {rows} rows, the shards' tokenizer needs {ids}"
        )
    if config.lora_rank:
        torch.manual_seed(config.seed)
        add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha)
    if options.compile:
        compile_layers(model)
    if options.activation_checkpointing:
        checkpoint_activations(model)
    return shard_model(model, world, param_dtype=DTYPES[config.precision])


def _loader(
    shards: ShardSet, config: TrainConfig, options: RunOptions, world: World, *, first_step: int
) -> Loader:
    settings: dict[str, Any] = {
        "batch_sequences": config.batch_sequences,
        "micro_batch_sequences": options.micro_batch_sequences,
        "rank": world.data_rank,
        "world_size": world.data_size,
        "seed": config.seed,
        "first_step": first_step,
        "epochs": config.epochs,
        "trim": config.trim,
        "prefetch": options.prefetch,
        "pin_memory": world.device.type == "cuda",
    }
    loader = Loader(shards, **settings)
    if config.max_steps is not None and config.max_steps < loader.num_steps:
        loader = Loader(shards, num_steps=config.max_steps, **settings)
    return loader


def _evaluation(
    job: Job, shards: ShardSet, model: WeightedModel, world: World
) -> Callable[[], Mapping[str, float]] | None:
    """Return what measures the model on held-out trajectories, or None where none are given."""
    if job.held_out is None:
        return None
    limit = job.options.evaluate_trajectories
    held_out = HeldOut.open(job.held_out, job.labels, shards.manifest, limit=limit)

    def measure() -> Mapping[str, float]:
        model.eval()
        values = evaluate(
            held_out,
            model.token_nll,
            rank=world.data_rank,
            world_size=world.data_size,
            device=world.device,
        )
        model.train()
        return values

    return measure


def _introduce(trainer: Trainer, loader: Loader, shards: ShardSet, progress: Progress) -> None:
    """Say what is trained on what, and what the trim saves."""
    weights = list(trainer.model.parameters())
    total = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    saved = 1 - int(shards.kept_tokens.sum()) / shards.num_tokens
    progress.say(
        f"{total:,} parameters, {trained:,} of them trained, in "
        f"{trainer.config.precision} on {trainer.world.world_size} x {trainer.world.device.type}; "
        "documents are apart (self-test passed)"
    )
    progress.say(
        f"{loader.num_sequences:,} packed sequences, {shards.num_tokens:,} tokens, "
        f"{int(shards.loss_tokens.sum()):,} of them in the loss"
        + (f"; the trim leaves out {saved:.1%}" if trainer.config.trim else "")
    )
    ending = f"; goes on after step {loader.first_step}" if loader.first_step else ""
    progress.say(
        f"{trainer.num_steps:,} steps of {loader.batch_sequences} packed sequences{ending}"
    )
    if isinstance(trainer.shape, NoShape) and trainer.world.device.type == "cuda":
        progress.say(f"no MFU: {trainer.shape.reason}")


def _recorder(output: Path, trainer: Trainer, first_step: int, progress: Progress) -> Recorder:
    peak = device_peak(trainer.world.device)
    return Recorder(
        output,
        first_step=first_step,
        num_steps=trainer.num_steps,
        peak=None if peak is None else peak * trainer.world.world_size,
        device=trainer.world.device,
        progress=progress,
    )


def _counts(output: Path) -> dict[str, Any]:
    """Return what the whole run, over all its restarts, did: the manifest's counts."""
    lines = read_metrics(output)
    steps = [line for line in lines if line["kind"] == "step"]
    held_out = [line for line in lines if line["kind"] == "held_out"]
    counts: dict[str, Any] = {
        "steps": len(steps),
        "sequences": sum(step["num_sequences"] for step in steps),
        "tokens": sum(step["num_tokens"] for step in steps),
        "loss_tokens": sum(step["num_loss_tokens"] for step in steps),
        "trimmed_tokens": sum(step["num_trimmed"] for step in steps),
    }
    if steps:
        counts["loss"] = steps[-1]["loss"]
    if held_out:
        counts["held_out"] = {
            name: value for name, value in held_out[-1].items() if name not in ("kind", "step")
        }
    return counts
