"""The command from shards to a trained model: train.

Nothing heavy is imported before the command runs, so that `--help` and usage errors answer at once.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from srft_prep.config import MAX_INTEGER
from srft_prep.errors import ConfigError, SrftError
from srft_prep.options import (
    FOLDER,
    FOLDER_OR_FILE,
    OUTPUT,
    command_line,
    finish,
    json_option,
    overwrite_option,
)

_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "full": {"learning_rate": 1e-5, "batch_sequences": 32, "epochs": 1},
    "lora": {"learning_rate": 1e-4, "batch_sequences": 32, "epochs": 1},
    "tiny": {"learning_rate": 1e-2, "batch_sequences": 2, "epochs": 8},
}
"""Settings that depend on what is trained, where the user gives none."""


def _steps(
    name: str, help_text: str, *, default: int | None = None, least: int = 0
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return an option that takes a number of things."""
    return click.option(
        name,
        type=click.IntRange(least, MAX_INTEGER),
        default=default,
        show_default=default is not None,
        metavar="N",
        help=help_text,
    )


@click.command()
@click.argument("shards", type=FOLDER)
@click.option(
    "-o",
    "--output",
    type=OUTPUT,
    required=True,
    help="Directory to write: one that all machines share, or s3:// or gs://; made if need be.",
)
@click.option("--model", metavar="PATH_OR_ID", help="The model to train: a folder, or a hub id.")
@click.option("--tiny", is_flag=True, help="Train a small random Qwen2 instead: see it work.")
@click.option(
    "--lora", is_flag=True, help="Train adapters of all linear layers; also saved merged."
)
@click.option("--lora-rank", type=click.IntRange(1, 4096), help="Of the adapters.  [default: 32]")
@click.option(
    "--lora-alpha",
    type=click.IntRange(min=1),
    help="Adapters count alpha / rank.  [default: 64]",
)
@_steps("--epochs", "Passes over the shards.  [default: 1; with --tiny 8]", least=1)
@_steps("--max-steps", "Optimiser steps, at most; the schedule ends there.", least=1)
@_steps(
    "--batch-sequences",
    "Packed sequences of an optimiser step, over all ranks.  [default: 32; with --tiny 2]",
    least=1,
)
@_steps(
    "--micro-batch-sequences",
    "Packed sequences that one rank computes at once.",
    default=1,
    least=1,
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    help="The peak.  [default: 1e-5; with --lora 1e-4, with --tiny 1e-2]",
)
@click.option(
    "--schedule",
    type=click.Choice(["cosine", "constant"]),
    default="cosine",
    show_default=True,
    help="How the learning rate goes on after the warm-up.",
)
@_steps("--warmup-steps", "Steps of linear warm-up.  [default: 5% of all]")
@click.option(
    "--min-learning-rate",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Where the cosine ends, as a share of the peak.",
)
@click.option(
    "--weight-decay",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="AdamW's, of matrices only.",
)
@click.option(
    "--max-grad-norm",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Global norm that gradients are clipped to; 0 for none.",
)
@click.option(
    "--precision",
    type=click.Choice(["bfloat16", "float32"]),
    show_default="bfloat16 on a GPU, else float32",
    help="Of the forward and backward pass; weights and AdamW's state are float32.",
)
@click.option("--no-trim", is_flag=True, help="Compute tokens that no loss sees, too.")
@click.option(
    "--seed",
    type=click.IntRange(0, MAX_INTEGER),
    default=0,
    show_default=True,
    help="Seed of the order of the data and of what is drawn anew.",
)
@click.option(
    "--activation-checkpointing",
    is_flag=True,
    help="Keep each layer's input only and compute it again in the backward pass.",
)
@click.option("--compile", is_flag=True, help="Compile the layers.")
@click.option(
    "--deterministic",
    is_flag=True,
    help="Add in a fixed order on a GPU, too: a killed run goes on to the same bits.",
)
@click.option(
    "--sequence-parallel",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    metavar="N",
    help="Ranks that share each sequence.",
)
@_steps("--loss-chunk", "Loss-bearing tokens that go through the output head at once.", least=1)
@_steps(
    "--checkpoint-every", "Steps between checkpoints; 0: one, at the end.", default=100, least=0
)
@_steps("--keep-checkpoints", "Checkpoints that stay, the newest.", default=2, least=1)
@click.option(
    "--held-out",
    type=FOLDER,
    metavar="TOKENS",
    help="Output of tokenize: measure NLL on the trajectories that pack --hold-out left out.",
)
@click.option(
    "--labels",
    type=FOLDER_OR_FILE,
    metavar="DIR|FILE",
    help="Output of label: the held-out NLL by label.",
)
@_steps(
    "--evaluate-every", "Steps between evaluations; 0: at start and end only.", default=100, least=0
)
@_steps("--evaluate-trajectories", "Held-out trajectories, at most.", least=1)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the last checkpoint although settings changed (the same ones go on anyway).",
)
@overwrite_option
@json_option
def train(
    shards: Path,
    output: Path,
    model: str | None,
    tiny: bool,
    held_out: Path | None,
    labels: Path | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a model on SHARDS by the weighted loss; alone, or on many GPUs under torchrun.

    The result is in DIR/model, for transformers and vLLM. Killed, the same command goes on from the
    last checkpoint.
    """
    if tiny == (model is not None):
        raise ConfigError("give --model PATH_OR_ID, or --tiny for a small random model")
    if labels is not None and held_out is None:
        raise ConfigError("--labels is for the evaluation of --held-out TOKENS: give both")
    _require_torch()
    from srft_prep.progress import shown
    from srft_prep.train.agreement import TOLD
    from srft_prep.train.settings import RunOptions, TrainConfig
    from srft_prep.train.training import Job
    from srft_prep.train.training import train as run

    rank = int(os.environ.get("RANK", "0"))
    options, config = _split(settings, tiny=tiny)
    job = Job(
        shards=shards,
        output=output,
        model=model,
        config=TrainConfig(**config),
        options=RunOptions(**options),
        held_out=held_out,
        labels=labels,
        resume=resume,
        overwrite=overwrite,
        command=tuple(command_line()),
    )
    try:
        with shown("train", total=None, unit="steps") as progress:
            manifest = run(job, progress=progress)
    except KeyboardInterrupt:
        if rank:
            raise click.exceptions.Exit(130) from None
        raise
    except SrftError as error:
        if not rank:
            raise
        if TOLD not in getattr(error, "__notes__", ()):
            click.echo(f"Error: rank {rank}: {error}", err=True)
        raise click.exceptions.Exit(2) from None
    if not rank:
        finish(manifest, as_json, failed=False)


def _require_torch() -> None:
    """Raise where the extra is not installed."""
    from importlib.util import find_spec

    if missing := [name for name in ("torch", "safetensors") if find_spec(name) is None]:
        raise ConfigError(f"train needs {' and '.join(missing)}: pip install 'srft-prep[train]'")


def _split(settings: dict[str, Any], *, tiny: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the run and the settings of the training."""
    import torch

    lora = settings.pop("lora")
    options = {name: settings.pop(name) for name in _OPTIONS}
    settings["trim"] = not settings.pop("no_trim")
    adapters = {name: settings.pop(name) for name in _ADAPTERS}
    given = {name: value for name, value in adapters.items() if value is not None}
    if given and not lora:
        option = "--" + next(iter(given)).replace("_", "-")
        raise ConfigError(f"{option} is for adapters: give --lora, too")
    settings |= {**_ADAPTERS, **given} if lora else {"lora_rank": 0}
    for name, value in _DEFAULTS["tiny" if tiny else "lora" if lora else "full"].items():
        if settings[name] is None:
            settings[name] = value
    if settings["precision"] is None:
        settings["precision"] = "bfloat16" if torch.cuda.is_available() else "float32"
    return options, settings


_ADAPTERS: Final = {"lora_rank": 32, "lora_alpha": 64}

_OPTIONS: Final = (
    "micro_batch_sequences",
    "activation_checkpointing",
    "compile",
    "deterministic",
    "sequence_parallel",
    "loss_chunk",
    "checkpoint_every",
    "keep_checkpoints",
    "evaluate_every",
    "evaluate_trajectories",
)
"""Options that decide no weight: those of `RunOptions`."""
