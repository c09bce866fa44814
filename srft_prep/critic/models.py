"""Open-weight critics for a GPU's memory: what fits, how fast it can be, what that costs.

The table is `models.toml`. All that is computed from it follows from the models' public
configurations, the GPUs' data sheets and the range of peak use that others have measured; nothing
was measured on a GPU by this project. `python -m srft_prep.critic.models` prints it as Markdown, as
docs/MODELS.md carries it.
"""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import click

from srft_prep.critic.flops import ModelShape, shape_of
from srft_prep.critic.hardware import PEAK_FLOPS

MODELS_FILE: Final = Path(__file__).parent / "models.toml"

WEIGHT_BYTES: Final[dict[str, tuple[float, float]]] = {
    "bf16": (2, 2),
    "fp8": (1 + 4 / 128**2, 1 + 4 / 128**2),
    "awq": (0.5 + 2.5 / 128, 0.5 + 2.5 / 128),
    "mxfp4": (2, 0.5 + 1 / 32),
}
"""Format -> bytes a weight of the dense layers and of the experts; embeddings, head and norms stay
in 2 bytes. FP8 has a 4-byte scale for 128 x 128 weights, AWQ a 2-byte scale and a 4-bit zero for
128, MXFP4 a 1-byte scale for 32."""

USABLE: Final = 0.92
"""The share of a GPU's memory that vLLM takes (its `gpu_memory_utilization`)."""
WORK_BYTES: Final = 2e9
"""Set aside a GPU for activations and CUDA graphs: an assumption, on the large side."""
MEMORY_SLACK: Final = 0.95
"""The least that a GPU may report of the memory it is sold with: error correction takes some."""

REACHED: Final = 790 / 989.4
"""The share of an H100's data-sheet peak that large matrix products reach."""
MFU: Final = (0.22, 0.55)
"""Lowest and highest share of that which public runs of vLLM on H100 and H200 reached, with 3B to
32B active parameters. They counted the weights only; attention counted, it is a cautious range."""

LONG_TOKENS: Final = 32_768
"""A long request, for which memory and speed are computed."""
PROMPT_TOKENS: Final = 22_000
"""A median trajectory of 21,000 tokens and the critic's instructions."""
COMPLETION_TOKENS: Final = 400
"""A label for each of about 35 steps, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A model on a kind of machine."""

    memory_gb: int
    """What each GPU is sold with, in 10^9 bytes."""
    gpu: str
    """A GPU of that size, as PEAK_FLOPS names it."""
    gpus: int
    """How many share one copy of the model."""
    model: str
    """Hub id."""
    weights: str
    """Format of the weights, as WEIGHT_BYTES names it."""
    shape: ModelShape
    recommended: bool
    engine_args: dict[str, str]
    """Arguments of the vLLM engine, by their Python names."""

    @property
    def machine(self) -> str:
        """The GPUs of one copy, in words."""
        return f"{self.gpus} x {self.memory_gb} GB"

    @property
    def peak_flops(self) -> float:
        """Of the GPUs of one copy together, in dense bf16 operations a second."""
        return self.gpus * PEAK_FLOPS[self.gpu]

    @property
    def weight_bytes(self) -> int:
        """Of all weights together."""
        dense, expert = WEIGHT_BYTES[self.weights]
        shape = self.shape
        return round(
            dense * shape.dense_params
            + expert * shape.expert_params
            + 2 * (shape.embedding_params + shape.expert_biases + shape.other_params)
        )

    @property
    def long_requests(self) -> int:
        """How many requests of LONG_TOKENS the remaining memory holds the keys and values of."""
        usable = self.gpus * (USABLE * self.memory_gb * 1e9 - WORK_BYTES)
        return int((usable - self.weight_bytes) // self.shape.kv_bytes(LONG_TOKENS))

    def tokens_per_second(self, mfu: float) -> float:
        """Return the prompt tokens a second of one copy, reading requests of LONG_TOKENS."""
        flops = self.shape.flops(prompt_tokens=LONG_TOKENS)
        return mfu * REACHED * self.peak_flops * LONG_TOKENS / flops

    def gpu_hours(self, flops: float, mfu: float) -> float:
        """Return the GPU hours that some operations take."""
        return flops / (mfu * REACHED * self.peak_flops) / 3600 * self.gpus


@cache
def load_rows() -> tuple[Row, ...]:
    """Return the table, from the smallest machine to the largest."""
    data = tomllib.loads(MODELS_FILE.read_text(encoding="utf-8"))
    return tuple(_row(entry, data["models"]) for entry in data["rows"])


def recommended_critic(memory_bytes: int, count: int) -> tuple[str, dict[str, str]] | None:
    """Return the hub id of the critic for a machine, and the engine's arguments for one copy of it.

    Args:
        memory_bytes: of the smallest GPU.
        count: how many GPUs.

    Returns:
        None where no model of the table fits.
    """
    fitting = [
        row
        for row in load_rows()
        if row.recommended
        and row.gpus <= count
        and memory_bytes >= MEMORY_SLACK * row.memory_gb * 1e9
    ]
    return (fitting[-1].model, dict(fitting[-1].engine_args)) if fitting else None


def markdown() -> str:
    """Return the tables of docs/MODELS.md."""
    return f"{_markdown_table(_memory_cells())}\n\n{_markdown_table(_speed_cells())}\n"


def _row(entry: dict[str, object], models: dict[str, dict[str, object]]) -> Row:
    model = models[str(entry["model"])]
    config = model["config"]
    assert isinstance(config, dict)
    shape = shape_of(config)
    assert isinstance(shape, ModelShape), shape
    fields = {"gpus": 1, "recommended": False, **entry, "weights": model["weights"]}
    return Row(**fields, shape=shape)  # type: ignore[arg-type]  # the file is our own, and tested


def _memory_cells() -> Iterator[tuple[str, ...]]:
    yield (
        "GPU memory", "critic", "parameters", "active", "weights", "KV cache a token",
        "... of a 32k request", "32k requests at once", "",
    )  # fmt: skip
    for row in load_rows():
        long_bytes = row.shape.kv_bytes(LONG_TOKENS)
        yield (
            row.machine,
            f"{row.model} ({row.weights})",
            f"{row.shape.total_params / 1e9:.1f}B",
            f"{row.shape.active_params / 1e9:.1f}B",
            f"{row.weight_bytes / 1e9:.1f} GB",
            f"{long_bytes / LONG_TOKENS / 1e3:.0f} kB",
            f"{long_bytes / 1e9:.2f} GB",
            f"{row.long_requests}",
            "recommended" if row.recommended else "to try",
        )


def _speed_cells() -> Iterator[tuple[str, ...]]:
    yield (
        "GPU", "critic", "operations a token at 32k (attention's part)", "prompt tokens/s",
        "GPU hours for 1,000 trajectories", "at $2 to $4 a GPU hour",
    )  # fmt: skip
    for row in load_rows():
        flops = row.shape.flops(prompt_tokens=LONG_TOKENS)
        attention = flops - LONG_TOKENS * row.shape.flops(prompt_tokens=1)
        low, high = (row.tokens_per_second(mfu) for mfu in MFU)
        trajectory = row.shape.flops(
            prompt_tokens=PROMPT_TOKENS, completion_tokens=COMPLETION_TOKENS
        )
        slow, fast = (row.gpu_hours(1000 * trajectory, mfu) for mfu in MFU)
        yield (
            f"{row.gpus} x {row.gpu}",
            row.model,
            f"{flops / LONG_TOKENS / 1e9:.1f} GFLOP ({attention / flops:.0%})",
            f"{_round(low)} to {_round(high)}",
            f"{fast:.2f} to {slow:.2f}",
            f"${2 * fast:.2f} to ${4 * slow:.2f}",
        )


def _round(rate: float) -> str:
    return f"{float(f'{rate:.2g}'):,.0f}"


def _markdown_table(cells: Iterator[Sequence[str]]) -> str:
    head, *rows = cells
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    click.echo(markdown(), nl=False)
