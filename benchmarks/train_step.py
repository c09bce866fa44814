"""What does the loss cost? A training step beside transformers' own and beside the trunk alone.

    python benchmarks/train_step.py [--steps 3] [--rounds 2] [--long]

A small Qwen2 (hidden 256, 4 layers, the vocabulary of Qwen2.5: 151,936), one document of 4,096
tokens of which 15% carry weight, in runs as steps of a trajectory are; forward and backward pass in
float32. `--long` adds 8 documents in 32,768 tokens with activation checkpointing, where only what
fits takes part. The ways:

`trunk`    no head at all: the floor
`labels`   `model(input_ids, labels=labels)`, as everyone begins; it knows no weights
`full`     all logits, then the weighted sum: the formula as it stands
`select`   the hidden states of loss-bearing tokens, then head and `cross_entropy`, unchunked
`linear`   the same with torch's `linear_cross_entropy`, 128 tokens at a time
`ours`     `WeightedModel`

Each way runs in a process of its own, ways in turns within a round; a step before those measured
warms up. `peak` is the most resident memory during a step, less that of weights and gradients.
Gradients are compared with `full`'s before a number is believed. The last line of stdout is one
JSON document.
"""

import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import orjson
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from srft_prep.train.batches import Batch, PackedSequence, assemble
from srft_prep.train.model import WeightedModel, causal_lm, checkpoint_activations, tiny_model

VOCABULARY = 151_936
"""Rows of Qwen2.5's embedding."""
SHARE = 0.15
"""Of tokens that carry weight."""
RUN_TOKENS = 80
"""Tokens of a run of weight: an action."""
LIMIT = 1e-5
"""Largest difference of a gradient that is believed, relative to the parameter's largest."""

Step = Callable[[WeightedModel, Batch], Tensor]


def trunk(model: WeightedModel, batch: Batch) -> Tensor:
    """Return something to run backward from, without a head."""
    hidden: Tensor = model(batch, "hidden")
    return hidden.square().mean()


def labels(model: WeightedModel, batch: Batch) -> Tensor:
    """Return transformers' own loss, which is the mean over targets."""
    inner = causal_lm(model.model)
    wanted = torch.full_like(batch.input_ids, -100)
    wanted[batch.positions + 1] = batch.targets
    loss: Tensor = inner(input_ids=batch.input_ids[None], labels=wanted[None]).loss
    return loss


def full(model: WeightedModel, batch: Batch) -> Tensor:
    """Return the weighted sum, from all logits."""
    nll = F.cross_entropy(model(batch, "logits")[:-1], batch.input_ids[1:], reduction="none")
    return (nll[batch.positions] * batch.weights).sum()


def select(model: WeightedModel, batch: Batch) -> Tensor:
    """Return the weighted sum, from the logits of loss-bearing tokens."""
    logits = head(model)(model(batch, "hidden")[batch.positions])
    return (F.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()


def linear(model: WeightedModel, batch: Batch) -> Tensor:
    """Return the weighted sum by torch's fused head and loss."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=128, chunking_method=None)
    nll: Tensor = F.linear_cross_entropy(
        model(batch, "hidden")[batch.positions],
        head(model).weight,
        batch.targets,
        reduction="none",
        options=options,
    )
    return (nll * batch.weights).sum()


def ours(model: WeightedModel, batch: Batch) -> Tensor:
    """Return the package's loss."""
    loss: Tensor = model(batch)
    return loss


STEPS: dict[str, Step] = {
    "trunk": trunk,
    "labels": labels,
    "full": full,
    "select": select,
    "linear": linear,
    "ours": ours,
}
LONG = ("trunk", "select", "ours")
"""Ways that fit at 32k."""


def head(model: WeightedModel) -> nn.Linear:
    """Return the output layer."""
    layer = causal_lm(model.model).get_output_embeddings()  # type: ignore[no-untyped-call]
    assert isinstance(layer, nn.Linear)
    return layer


def make_batch(num_tokens: int, num_documents: int) -> Batch:
    """Return random documents with runs of weight in each."""
    rng = np.random.default_rng(0)
    length = num_tokens // num_documents
    ends = np.linspace(0, length, round(length * SHARE / RUN_TOKENS) + 1, dtype=np.int32)[1:]
    starts = np.concatenate([d * length + ends - RUN_TOKENS for d in range(num_documents)])
    sequence = PackedSequence(
        ids=rng.integers(VOCABULARY, size=num_tokens, dtype=np.int32),
        lengths=np.full(num_documents, length, np.int32),
        run_starts=starts.astype(np.int32),
        run_lengths=np.full(len(starts), RUN_TOKENS, np.int32),
        run_weights=rng.choice([0.5, 1.0], len(starts)).astype(np.float32),
    )
    return assemble([sequence], trim=False)


def memory_mb(field: str) -> float:
    """Return a line of this process's status: `VmRSS`, or `VmHWM`, the peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1e3
    raise AssertionError(field)


def run_one(name: str, *, long: bool, steps: int, gradients: Path) -> dict[str, Any]:
    """Return the times and the peak of one way, in this process."""
    model = tiny_model(VOCABULARY, hidden_size=256, num_layers=4, num_heads=8)
    if long:
        checkpoint_activations(model)
    if name == "labels":
        causal_lm(model.model).set_attn_implementation("sdpa")
    batch = make_batch(32_768, 8) if long else make_batch(4_096, 1)
    seconds, peaks = [], []
    gc.collect()
    base = memory_mb("VmRSS")
    for _ in range(steps + 1):
        model.zero_grad(set_to_none=True)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        start = time.perf_counter()
        STEPS[name](model, batch).backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - start)
        peaks.append(memory_mb("VmHWM") - base)
    gradient_mb = sum(4e-6 * p.numel() for p in model.parameters() if p.grad is not None)
    difference = None
    if name not in ("trunk", "labels"):
        difference = compare(model, gradients)
    return {
        "seconds": seconds[1:],
        "peak_mb": max(peaks) - gradient_mb,
        "loss_tokens": batch.num_loss_tokens,
        "difference": difference,
    }


def compare(model: nn.Module, path: Path) -> float:
    """Return the largest difference from gradients in a file; the first to come writes it."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if not path.exists():
        torch.save(found, path)
    expected: dict[str, Tensor] = torch.load(path, mmap=True)
    return max(
        float((found[name] - grad).abs().max() / grad.abs().max())
        for name, grad in expected.items()
    )


def measure(*, long: bool, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each way: each round runs all of them, one process after another."""
    names = LONG if long else ("full", *(name for name in STEPS if name != "full"))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name in names:
                command = [sys.executable, __file__, "--one", name, "--steps", str(steps)]
                command += ["--gradients", f"{folder}/gradients.pt", *(["--long"] * long)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                results[name].append(orjson.loads(output.splitlines()[-1]))
    rows = []
    for name, runs in results.items():
        seconds = [second for run in runs for second in run["seconds"]]
        difference = max((run["difference"] or 0.0) for run in runs)
        assert difference < LIMIT, f"{name}: gradients differ by {difference}"
        rows.append(
            {
                "tokens": 32_768 if long else 4_096,
                "way": name,
                "seconds": statistics.median(seconds),
                "seconds_spread": max(seconds) - min(seconds),
                "peak_mb": statistics.median(run["peak_mb"] for run in runs),
                "gradient_difference": difference,
            }
        )
    return rows


def show(rows: list[dict[str, Any]], beside: str) -> None:
    """Print a table, with each way's time and peak beside another's."""
    base = next(row for row in rows if row["way"] == beside)
    print(f"{'tokens':>7} {'way':8}{'s':>8}{'spread':>8}{'peak MB':>9}  of {beside}: time, peak")
    for row in rows:
        print(
            f"{row['tokens']:>7,} {row['way']:8}{row['seconds']:>8.2f}{row['seconds_spread']:>8.2f}"
            f"{row['peak_mb']:>9,.0f}{row['seconds'] / base['seconds']:>17.3f}"
            f"{row['peak_mb'] / base['peak_mb']:>7.3f}"
        )


@click.command()
@click.option("--steps", default=3, show_default=True, help="Measured steps of each process.")
@click.option("--rounds", default=2, show_default=True, help="Processes of each way.")
@click.option("--long", is_flag=True, help="Measure 32k tokens with checkpointing too.")
@click.option("--one", type=click.Choice(list(STEPS)), hidden=True)
@click.option("--gradients", type=click.Path(path_type=Path), hidden=True)
def main(steps: int, rounds: int, long: bool, one: str | None, gradients: Path | None) -> None:
    """Measure training steps and print a table."""
    if one:
        assert gradients is not None
        print(orjson.dumps(run_one(one, long=long, steps=steps, gradients=gradients)).decode())
        return
    rows = measure(long=False, steps=steps, rounds=rounds)
    show(rows, "labels")
    if long:
        long_rows = measure(long=True, steps=1, rounds=rounds)
        show(long_rows, "trunk")
        rows += long_rows
    document = {
        "benchmark": "train_step",
        "steps": steps,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    print(orjson.dumps(document).decode())


if __name__ == "__main__":
    main()
