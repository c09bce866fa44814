"""What does a training step cost on a GPU, in time and memory? On sequences as `pack` made them.

    python benchmarks/train_gpu.py SHARDS [--shape 0.5b|1.5b|7b|tiny] [--steps 5] [--way ...]

A Qwen2.5 of the given shape with random weights, in bfloat16 with activation checkpointing, one
packed sequence a step: SHARDS' documents and weights, trimmed, in the order of training. Two kinds
of ways:

`trunk labels select ours`   forward and backward pass alone, weights in bfloat16: what does the
    loss cost? As in `train_step.py`, but that all share the packed attention: `labels` is
    transformers' own loss on all logits, which knows no weights, `trunk` the floor without a head.
`step lora`   the whole optimiser step of `train`: FSDP2 with float32 weights, clipping and AdamW;
    of all weights, or of adapters. `no-update` leaves out AdamW, for a model whose moments do not
    fit. Beside the measured peak stands what `srft_prep.train.memory` reckons.

All ways of a call take the same sequences in one process, after one step that warms up; times are
read behind a synchronised device, memory is the allocator's peak. MFU counts a forward pass three
times, attention by document, the head on loss-bearing tokens (`srft_prep.critic.flops`), of the
device's dense bf16 peak by its data sheet. The last line of stdout is one JSON document.
"""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import orjson
import torch
import transformers
from torch import Tensor
from train_step import STEPS
from transformers import AutoModelForCausalLM, Qwen2Config

from srft_prep.critic.flops import ModelShape, mfu, shape_of
from srft_prep.train.attention import ATTENTION, register
from srft_prep.train.batches import Batch
from srft_prep.train.data import ShardSet
from srft_prep.train.loader import Loader, StepBatches
from srft_prep.train.loop import Trainer
from srft_prep.train.memory import lora_params, memory_items
from srft_prep.train.metrics import device_peak, peak_memory, train_flops
from srft_prep.train.model import (
    WeightedModel,
    add_lora,
    causal_lm,
    checkpoint_activations,
    compile_layers,
)
from srft_prep.train.optim import make_optimizer
from srft_prep.train.parallel import World, deterministic, shard_model, started
from srft_prep.train.settings import TrainConfig

QWEN: dict[str, Any] = {"vocab_size": 151_936, "max_position_embeddings": 32_768}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    },
    "0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18_944,
    },
}
"""Of Qwen2.5-Coder's config.json, by the name of the model; tiny is for a look at this script."""
LORA_RANK = 32
LOSSES = ("trunk", "labels", "select", "ours")
UPDATES = ("step", "no-update", "lora")

Measured = Callable[[StepBatches], None]


def packed_labels(model: WeightedModel, batch: Batch) -> Tensor:
    """Return transformers' own loss on all logits: the mean over targets."""
    wanted = torch.full_like(batch.input_ids, -100)
    wanted[batch.positions + 1] = batch.targets
    inner = causal_lm(model.model)
    loss: Tensor = inner.loss_function(
        logits=model(batch, "logits")[None],
        labels=wanted[None],
        vocab_size=inner.config.vocab_size,
    )
    return loss


def build(shape: str, device: torch.device, dtype: torch.dtype) -> WeightedModel:
    """Return a model with random weights, made on the device."""
    register()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            Qwen2Config(**(QWEN | SHAPES[shape])), dtype=dtype, attn_implementation=ATTENTION
        )
    return WeightedModel(model).train()


def loss_way(name: str, model: WeightedModel, device: torch.device) -> Measured:
    """Return a forward and backward pass of one way."""
    way = packed_labels if name == "labels" else STEPS[name]

    def run(batches: StepBatches) -> None:
        model.zero_grad(set_to_none=True)
        for batch in batches.micro_batches:
            way(model, batch.to(device)).backward()  # type: ignore[no-untyped-call]

    return run


def update_way(name: str, model: WeightedModel, world: World, num_steps: int) -> Measured:
    """Return a whole step of training, or one without the update."""
    config = TrainConfig(batch_sequences=1, lora_rank=LORA_RANK if name == "lora" else 0)
    if name == "no-update":

        def run(batches: StepBatches) -> None:
            model.zero_grad(set_to_none=True)
            for batch in batches.micro_batches:
                (model(batch.to(world.device)) / batches.sum_weights).backward()

        return run
    trainer = Trainer(
        model=model,
        optimizer=make_optimizer(model, config),
        config=config,
        world=world,
        num_steps=num_steps,
        shape=shape_of(causal_lm(model.model).config.to_dict()),
    )
    return lambda batches: void(trainer.step(batches))


def void(_: object) -> None:
    """Return nothing."""


def reckoned(shape: ModelShape, name: str, width: int, tokens: int) -> float:
    """Return the bytes that `memory` reckons for a way of `UPDATES`."""
    adapters = lora_params(shape, intermediate_size=width, rank=LORA_RANK) if name == "lora" else 0
    items = memory_items(
        shape,
        intermediate_size=width,
        num_ranks=1,
        seq_len=tokens,
        micro_batches=1,
        lora_params=adapters,
    )
    moments = 8 * shape.total_params if name == "no-update" else 0
    return sum(item.num_bytes for item in items) - moments


def measure(
    name: str, shape: str, steps: list[StepBatches], world: World, *, compiled: bool
) -> dict[str, Any]:
    """Return the row of one way."""
    updates = name in UPDATES
    model = build(shape, world.device, torch.float32 if updates else torch.bfloat16)
    config = causal_lm(model.model).config
    sizes = shape_of(config.to_dict())
    assert isinstance(sizes, ModelShape)
    if name == "lora":
        add_lora(model, rank=LORA_RANK, alpha=2 * LORA_RANK)
    if compiled:
        compile_layers(model)
    checkpoint_activations(model)
    if updates:
        shard_model(model, world, param_dtype=torch.bfloat16)
        run = update_way(name, model, world, len(steps))
    else:
        run = loss_way(name, model, world.device)
    gc.collect()
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    rows = []
    for batches in [steps[0], *steps]:  # the first warms up
        (batch,) = batches.micro_batches
        start = time.perf_counter()
        run(batches)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        flops = train_flops(sizes, batch.lengths, batch.num_loss_tokens, frozen=name == "lora")
        if name == "trunk":
            flops = train_flops(sizes, batch.lengths, 0)
        rows.append((seconds, batch.num_tokens, flops, batch.num_loss_tokens))
    seconds_, tokens, flops_, loss_tokens = zip(*rows[1:], strict=True)
    peak = device_peak(world.device)
    row = {
        "shape": shape,
        "way": name + (" compiled" if compiled else ""),
        "seconds": statistics.median(seconds_),
        "seconds_each": [round(value, 4) for value in seconds_],
        "tokens": tokens,
        "loss_tokens": loss_tokens,
        "tokens_per_second": sum(tokens) / sum(seconds_),
        "mfu": mfu(sum(flops_), sum(seconds_), peak) if peak else None,
        "peak_gb": peak_memory(world.device) / 1e9,
        "weights_gb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9,
    }
    if updates:
        width = config.intermediate_size
        row["reckoned_gb"] = reckoned(sizes, name, width, max(tokens)) / 1e9
    return row


def show(row: dict[str, Any]) -> None:
    """Print a way's line."""
    spread = max(row["seconds_each"]) - min(row["seconds_each"])
    share = "" if row["mfu"] is None else f"{row['mfu']:7.1%} MFU"
    beside = f" (reckoned {row['reckoned_gb']:.1f})" if "reckoned_gb" in row else ""
    print(
        f"{row['shape']:>5} {row['way']:14}{row['seconds']:8.3f} s ({spread:.3f})"
        f"{row['tokens_per_second']:10,.0f} tok/s{share}{row['peak_gb']:8.1f} GB{beside}",
        flush=True,
    )


@click.command()
@click.argument("shards", type=click.Path(exists=True, path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1.5b", show_default=True)
@click.option("--way", "ways", multiple=True, type=click.Choice([*LOSSES, *UPDATES]))
@click.option("--steps", default=5, show_default=True, help="Sequences, the fullest.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the layers.")
@click.option("--deterministic", "fixed", is_flag=True, help="As train's option.")
def main(
    shards: Path, shape: str, ways: tuple[str, ...], steps: int, compiled: bool, fixed: bool
) -> None:
    """Measure training steps and print a table."""
    loader = Loader(ShardSet.open(shards), batch_sequences=1, micro_batch_sequences=1)
    chosen = sorted(loader, key=lambda step: -step.num_tokens)[:steps]
    rows, failed = [], {}
    if fixed:
        deterministic().__enter__()
    with started() as world:
        for name in ways or (*LOSSES, "step"):
            try:
                rows.append(measure(name, shape, chosen, world, compiled=compiled))
                show(rows[-1])
            except torch.OutOfMemoryError as error:
                failed[name] = str(error)[:200]
                print(f"{shape:>5} {name:14} out of memory", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
        document = {
            "benchmark": "train_gpu",
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "deterministic": fixed,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rows": rows,
            "out_of_memory": failed,
        }
        print(orjson.dumps(document).decode())


if __name__ == "__main__":
    main()
