"""Shards and a model in, a trained model out: sets everything up, runs the loop, writes the result.

    OUT/checkpoints/step-00000100/          to go on from (checkpoints)
    OUT/metrics.jsonl  OUT/tensorboard/     what happened (metrics)
    OUT/model/  OUT/adapter/                the result, for transformers and vLLM (hf_export)
    OUT/manifest.json                       written last: a directory without it is unfinished

Every rank of torchrun calls `train` with the same job. The first one holds the directory's lock and
writes; what it finds wrong there, all ranks raise. All that can be wrong with a job (its model, its
held-out tokens, documents that leak) is found before anything in the directory changes.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from srft_prep.critic.flops import NoShape, shape_of
from srft_prep.errors import ConfigError
from srft_prep.judgements import labels_input
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.object_mirror import is_mirrored
from srft_prep.progress import Progress, Silent
from srft_prep.train.agreement import agreed_at_length, together
from srft_prep.train.checkpoints import CHECKPOINTS, Checkpoints, Kept
from srft_prep.train.data import ShardSet
from srft_prep.train.directory import Claim, RunDirectory
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
from srft_prep.train.parallel import World, deterministic, shard_model, started
from srft_prep.train.remote import require_shared
from srft_prep.train.settings import RunOptions, TrainConfig
from srft_prep.train.sources import TINY, choose_tokenizer, model_input, num_ids, saved_tokenizer

DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_MULTIPLE: Final = 64
"""Rows of a tiny model's embedding are a multiple of it."""


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
    with ExitStack() as stack:
        if job.options.deterministic:
            stack.enter_context(deterministic())
        world = stack.enter_context(started(sequence_parallel=job.options.sequence_parallel))
        shown = (progress if world.rank == 0 else None) or Silent()
        kept = Kept(job.output / CHECKPOINTS, keep=job.options.keep_checkpoints)
        directories: list[RunDirectory] = []

        def open_directory() -> tuple[Manifest | None, str | None, int, dict[str, Any]]:
            shards = read_manifest(job.shards, stage="pack").checked()
            tokenizer, remark = choose_tokenizer(job.model, shards)
            claim = Claim(
                output=job.output,
                config=job.config,
                inputs=[shards.as_input(), model_input(job.model)],
                resume=job.resume,
                overwrite=job.overwrite,
            )
            directory = stack.enter_context(RunDirectory(claim, kept=kept, say=shown.say))
            directories.append(directory)
            if directory.finished:
                return directory.finished, tokenizer, 0, {}
            if remark:
                shown.say(remark)
            return None, tokenizer, num_ids(tokenizer), _about(job)

        finished, tokenizer, ids, about = agreed_at_length(open_directory)
        if finished:
            return finished
        if is_mirrored(job.output):
            require_shared(job.output)
        prepared = _prepare(job, world, ids, shown)
        agreed_at_length(lambda: directories[0].begin())
        _run(
            *(job, prepared, kept, shown),
            loaded=lambda: directories[0].adopt(),
            stopped=lambda: directories[0].leave(),
        )
        names = export_model(
            prepared.trainer.model,
            job.output,
            dtype=DTYPES[job.config.precision],
            tokenizer=saved_tokenizer(tokenizer),
        )
        about = {"tokenizer": tokenizer, "world_size": world.world_size, **about}
        return agreed_at_length(
            lambda: directories[0].finish(
                counts=_counts(job.output), names=names, command=list(job.command), extra=about
            )
        )


def _about(job: Job) -> dict[str, Any]:
    """Return what a manifest says of a run beside its plan: none of it decides the weights.

    Raises:
        ShardError: `held_out` or `labels` is no finished directory of its stage.
    """
    evaluated: dict[str, Any] | None = None
    if job.held_out is not None:
        labels = None if job.labels is None else labels_input(job.labels)
        tokens = read_manifest(job.held_out, stage="tokenize").as_input()
        evaluated = {"tokens": tokens, "labels": labels}
    return {"options": asdict(job.options), "held_out": evaluated}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """A run that can begin."""

    trainer: Trainer
    shards: ShardSet
    measure: Callable[[], Mapping[str, float]] | None
    """What looks at held-out trajectories."""


def _prepare(job: Job, world: World, ids: int, progress: Progress) -> _Prepared:
    """Make all that a run needs, and look for what could be wrong with it."""
    shards = ShardSet.open(job.shards, check=False)
    num_steps = _loader(shards, job.config, job.options, world, first_step=0).num_steps
    model = _build(job, world, ids)
    measure = _evaluation(job, shards, model, world, progress)
    trainer = Trainer(
        model=model,
        optimizer=make_optimizer(model, job.config),
        config=job.config,
        world=world,
        num_steps=num_steps,
        shape=shape_of(causal_lm(model.model).config.to_dict()),
    )
    check_leaks(model, device=world.device)
    return _Prepared(trainer=trainer, shards=shards, measure=measure)


def _run(
    job: Job,
    prepared: _Prepared,
    kept: Kept,
    progress: Progress,
    *,
    loaded: Callable[[], None],
    stopped: Callable[[], None],
) -> None:
    """Do the steps that are left.

    Args:
        job: what to train on what.
        prepared: the model and all that takes it further.
        kept: the run's checkpoints.
        progress: where to say what goes on.
        loaded: called in the first rank once the last checkpoint is in the model.
        stopped: called there once the run was asked to stop and its checkpoint is written.

    Raises:
        ConfigError: the checkpoint is of another model, or beyond the run's last step.
        KeyboardInterrupt: asked to stop.
    """
    with interruptible(prepared.trainer.interrupt):  # the last checkpoint is being written, too
        with Checkpoints(kept, say=progress.say) as checkpoints:
            ended = _go_on(job, prepared, checkpoints, progress, loaded=loaded)
        if not ended:
            agreed_at_length(stopped)
    if not ended:
        raise KeyboardInterrupt


def _go_on(
    job: Job,
    prepared: _Prepared,
    checkpoints: Checkpoints,
    progress: Progress,
    *,
    loaded: Callable[[], None],
) -> bool:
    """Do the steps that are left; return whether the run came to its end."""
    trainer, options, world = prepared.trainer, job.options, prepared.trainer.world
    first = checkpoints.load(trainer.model, trainer.optimizer) or 0
    if first > trainer.num_steps:
        given = job.config.max_steps
        raise ConfigError(
            f"--resume goes on after step {first}, but "
            + ("the run now ends" if given is None else f"--max-steps is {given}: it ends")
            + f" after step {trainer.num_steps}; give a larger --max-steps or --epochs"
        )
    agreed_at_length(loaded)  # it may send a checkpoint into a store
    loader = _loader(prepared.shards, job.config, options, world, first_step=first)
    _introduce(trainer, loader, prepared.shards, progress)
    with ExitStack() as stack:
        recorder = None
        if world.rank == 0:
            recorder = stack.enter_context(_recorder(job.output, trainer, first, progress))
        return run_steps(
            trainer, loader, checkpoints, options, recorder=recorder, evaluate=prepared.measure
        )


def _build(job: Job, world: World, ids: int) -> WeightedModel:
    """Return the model, ready to train, on this rank's device.

    Raises:
        ConfigError: there is no such model, or its embedding has too few rows.
    """
    model = together(lambda: _assemble(job, ids, weights=world.rank == 0))
    return shard_model(model, world, param_dtype=DTYPES[job.config.precision])


def _assemble(job: Job, ids: int, *, weights: bool) -> WeightedModel:
    """Return the whole model, with adapters and the like; with `weights`, also their values."""
    config, options = job.config, job.options
    chunk = options.loss_chunk or CHUNK_POSITIONS
    if job.model is None:
        rows = -(-ids // _MULTIPLE) * _MULTIPLE
        if not ids:
            raise ConfigError("--tiny needs the shards' tokenizer, for the size of its vocabulary")
        model = tiny_model(rows, seed=config.seed, chunk=chunk, **TINY)
    else:
        model = load_model(job.model, chunk=chunk, weights=weights)
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
    return model


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
    job: Job, shards: ShardSet, model: WeightedModel, world: World, progress: Progress
) -> Callable[[], Mapping[str, float]] | None:
    """Return what measures the model on held-out trajectories, or None where none are given."""
    if job.held_out is None:
        return None
    limit = job.options.evaluate_trajectories
    tokens, labels = job.held_out, job.labels
    held_out = together(lambda: HeldOut.open(tokens, labels, shards.manifest, limit=limit))
    for remark in held_out.remarks():
        progress.say(remark)

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
    if steps and held_out and held_out[-1]["step"] == steps[-1]["step"]:
        counts["held_out"] = {name: held_out[-1][name] for name in held_out[-1] if name != "kind"}
    return counts
