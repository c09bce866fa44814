"""What a million and twelve million trajectories would take: a calculation, nothing is run.

    python benchmarks/scale_plan.py [--measured benchmarks/baselines/scale.json]

Rests on what `benchmarks/scale.py` measured of each stage (its last line, kept in `--measured`), on
the arithmetic of docs/MODELS.md for critics, and on the training step that was measured on an H200
(benchmarks/RESULTS.md). A stage's processor time and bytes are taken to grow with the tokens, its
memory with the trajectories, as they did between the two largest sizes measured (a rise that may be
noise counts, too). Prints the tables of docs/scale.md as Markdown; the last line is one JSON
document.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import orjson

from srft_prep.critic.models import COMPLETION_TOKENS, MFU, Row, load_rows
from srft_prep.ingest import PART_BYTES, PART_ROWS

BASELINE: Final = Path(__file__).resolve().parent / "baselines" / "scale.json"

QUESTION_TOKENS: Final = 1_000
"""The critic's instructions and the list of steps, beside the trajectory."""
UNRESOLVED: Final = 0.6
"""The share that is put to the critic; "often 60%" are thrown away, says the paper."""
CRITICS: Final = (
    ("H100 80GB HBM3", "Qwen/Qwen3-Coder-30B-A3B-Instruct-FP8"),
    ("H100 80GB HBM3", "openai/gpt-oss-120b"),
    ("H200", "Qwen/Qwen2.5-Coder-32B-Instruct"),
)
USD_PER_GPU_HOUR: Final = (2.0, 4.0)
USD_PER_CORE_HOUR: Final = 0.05
PAPER_USD: Final = 0.132
"""A trajectory labelled by Claude Sonnet 4 in the paper (section 4)."""
NODE_CORES: Final = 32
TRAINED: Final = {
    "7B": "Qwen/Qwen2.5-Coder-7B-Instruct-AWQ",
    "32B": "Qwen/Qwen2.5-Coder-32B-Instruct",
}
"""Whose shapes are taken, as models.toml has them; the first was measured."""
TRAIN_RATE: Final = 6_800
"""Tokens a second of a 7B model, forward and backward, on an H200 (benchmarks/RESULTS.md)."""
SEQ_LEN: Final = 32_768
LINE_BYTES: Final = 300
"""A ledger's line beside its labels."""
STEP_BYTES: Final = 45
"""A step's label and three probabilities in a ledger's line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is to be done."""

    name: str
    trajectories: float
    tokens: float
    """Of all trajectories together."""
    steps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What was measured of a stage."""

    name: str
    cpu_seconds: float
    """A token."""
    bytes: float
    """Written, a token."""
    base_mib: float
    mib: float
    """A trajectory, between the two largest sizes."""
    is_shared: bool
    """Whether array jobs or processes share its work."""


def stages_of(rows: list[dict[str, Any]]) -> tuple[list[Stage], dict[str, float]]:
    """Return the stages as measured at the largest size, and the size's tokens and steps each."""
    sizes = sorted({row["trajectories"] for row in rows})
    large = {row["stage"]: row for row in rows if row["trajectories"] == sizes[-1]}
    small = {row["stage"]: row for row in rows if row["trajectories"] == sizes[-2]}
    tokens = large["tokenize"]["counts"]["tokens"]
    steps = large["ingest"]["counts"]["steps"]
    found = []
    for name, row in large.items():
        slope = (row["peak_mib"] - small[name]["peak_mib"]) / (sizes[-1] - sizes[-2])
        found.append(
            Stage(
                name=name,
                cpu_seconds=row["cpu_seconds"] / tokens,
                bytes=row["bytes"] / tokens,
                base_mib=row["peak_mib"] - slope * sizes[-1],
                mib=slope,
                is_shared=name in ("label", "tokenize"),
            )
        )
    return found, {"tokens": tokens / sizes[-1], "steps": steps / sizes[-1]}


def stage_table(load: Load, stages: list[Stage]) -> list[dict[str, Any]]:
    """Return what each stage takes on processors."""
    rows = []
    for stage in stages:
        hours = stage.cpu_seconds * load.tokens / 3600
        rows.append(
            {
                "stage": stage.name,
                "core_hours": hours,
                "usd": hours * USD_PER_CORE_HOUR,
                "hours": hours / (NODE_CORES if stage.is_shared else 1),
                "gib": (stage.base_mib + stage.mib * load.trajectories) / 1024,
                "bytes": stage.bytes * load.tokens,
            }
        )
    return rows


def critic_table(load: Load) -> list[dict[str, Any]]:
    """Return what labelling the unresolved trajectories takes on GPUs."""
    asked = UNRESOLVED * load.trajectories
    prompt = round(load.tokens / load.trajectories) + QUESTION_TOKENS
    found = []
    for gpu, model in CRITICS:
        row = next(each for each in load_rows() if each.gpu == gpu and each.model == model)
        flops = asked * row.shape.flops(prompt_tokens=prompt, completion_tokens=COMPLETION_TOKENS)
        fast, slow = _gpu_hours(row, flops)
        found.append(
            {
                "gpu": gpu,
                "model": model,
                "gpu_hours": [fast, slow],
                "usd": [USD_PER_GPU_HOUR[0] * fast, USD_PER_GPU_HOUR[1] * slow],
                "nodes_for_a_day": [math.ceil(hours / 8 / 24) for hours in (fast, slow)],
            }
        )
    return found


def _gpu_hours(row: Row, flops: float) -> tuple[float, float]:
    low, high = MFU
    return row.gpu_hours(flops, high), row.gpu_hours(flops, low)


def train_table(load: Load) -> list[dict[str, Any]]:
    """Return what one epoch of training takes, by operations beside the model that was measured."""
    mean = round(load.tokens / load.trajectories)
    shapes = {row.model: row.shape for row in load_rows()}
    flops = {name: shapes[model].flops(prompt_tokens=mean) for name, model in TRAINED.items()}
    measured = next(iter(flops.values()))
    found = []
    for name in TRAINED:
        hours = load.tokens * flops[name] / measured / TRAIN_RATE / 3600
        usd = [rate * hours for rate in USD_PER_GPU_HOUR]
        found.append({"model": name, "gpu_hours": hours, "usd": usd})
    return found


def files_of(load: Load, stages: list[Stage]) -> dict[str, float]:
    """Return how many files and packed sequences there will be."""
    written = {stage.name: stage.bytes * load.tokens for stage in stages}
    text = 4 * load.tokens
    parts = max(load.trajectories / PART_ROWS, text / PART_BYTES)
    ledger = UNRESOLVED * (LINE_BYTES * load.trajectories + STEP_BYTES * load.steps)
    return {
        "parts": parts,
        "sequences": load.tokens / SEQ_LEN,
        "shard_bytes": written["pack"],
        "ledger_bytes": ledger,
    }


def show(load: Load, document: dict[str, Any]) -> None:
    """Print one load's tables."""
    click.echo(
        f"\n### {load.name}: {load.trajectories:,.0f} trajectories, {load.tokens / 1e9:,.1f}B "
        f"tokens, {load.steps / 1e6:,.0f}M steps\n"
    )
    click.echo(f"| stage | core hours | on one node of {NODE_CORES} cores | memory | written |")
    click.echo("|---|--:|--:|--:|--:|")
    for row in document["stages"]:
        click.echo(
            f"| {row['stage']} | {row['core_hours']:,.1f} | {_hours(row['hours'])} | "
            f"{row['gib']:,.1f} GiB | {_size(row['bytes'])} |"
        )
    click.echo("\n| critic | GPU hours | dollars | nodes of 8 GPUs for a day |")
    click.echo("|---|--:|--:|--:|")
    for row in document["critics"]:
        hours, usd, nodes = row["gpu_hours"], row["usd"], row["nodes_for_a_day"]
        click.echo(
            f"| {row['model']}, {row['gpu']} | {hours[0]:,.0f} to {hours[1]:,.0f} | "
            f"{usd[0]:,.0f} to {usd[1]:,.0f} | {nodes[0]:,} to {nodes[1]:,} |"
        )
    click.echo(f"| Claude Sonnet 4, at the paper's price | | {document['paper_usd']:,.0f} | |")
    click.echo("\n| one epoch of | H200 hours | dollars |")
    click.echo("|---|--:|--:|")
    for row in document["training"]:
        click.echo(
            f"| {row['model']} | {row['gpu_hours']:,.0f} | "
            f"{row['usd'][0]:,.0f} to {row['usd'][1]:,.0f} |"
        )
    files = document["files"]
    click.echo(
        f"\nFiles: {files['parts']:,.0f} trajectory parts and as many of tokens, "
        f"{files['sequences']:,.0f} packed sequences in {_size(files['shard_bytes'])} of shards, "
        f"{_size(files['ledger_bytes'])} of ledger."
    )


def _hours(hours: float) -> str:
    return f"{hours * 60:,.0f} min" if hours < 1 else f"{hours:,.1f} h"


def _size(number: float) -> str:
    if not number:
        return ""
    return f"{number / 1e12:,.1f} TB" if number >= 1e12 else f"{number / 1e9:,.1f} GB"


@click.command()
@click.option(
    "--measured",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=BASELINE,
    show_default=True,
    help="The last line of benchmarks/scale.py.",
)
def main(measured: Path) -> None:
    """Print the plans."""
    rows = orjson.loads(measured.read_bytes())["rows"]
    stages, mean = stages_of(rows)
    million, twelve = 1e6, 12e6
    loads = [
        Load(
            name="One million, as long as ours",
            trajectories=million,
            tokens=million * mean["tokens"],
            steps=million * mean["steps"],
        ),
        Load(
            name="SWE-ZERO",
            trajectories=twelve,
            tokens=112e9,
            steps=112e9 / mean["tokens"] * mean["steps"],
        ),
    ]
    documents = []
    for load in loads:
        document = {
            "name": load.name,
            "stages": stage_table(load, stages),
            "critics": critic_table(load),
            "paper_usd": UNRESOLVED * load.trajectories * PAPER_USD,
            "training": train_table(load),
            "files": files_of(load, stages),
        }
        show(load, document)
        documents.append(document)
    click.echo(orjson.dumps({"benchmark": "scale_plan", "loads": documents}))


if __name__ == "__main__":
    main()
