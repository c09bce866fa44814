"""Do time and memory grow as the data does? All stages on ever more synthetic trajectories.

    python benchmarks/scale.py [--sizes 1000,10000,100000] [--folder DIR] [--keep]

A synthetic trajectory has the tools, prompts and answers of a real one, a number of steps drawn
from the real ones of its format, and each step (the action with what came back) drawn from all
steps of that format: lengths, languages and tool calls are those of real runs, and no two are the
same. They are written as JSONL (zstd, 1,000 a file) and go through `ingest`, `label --critic rules
--only all`, `tokenize`, `pack --recipe srft` and `verify` by the command line.

`growth` is the time (of all processors, and by the clock) for a trajectory beside that at the size
before: 1 is linear, less means that a start-up is shared by more. Peak is the resident memory of
all processes of a command, added up. Steps repeat, so that a tokenizer's cache of words hits a
little more often than on real data. Files lie under --folder (a temporary one unless given) and
take about 75 kB a trajectory. The last line is one JSON document.
"""

import os
import platform
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import click
import orjson
import zstandard

from srft_prep.types import CHAT_ROLES, Message, Trajectory

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from data import SHARED, real_trajectories
from watched import watched

FILE_ROWS: Final = 1_000
ATTEMPTS: Final = 5
"""Trajectories of one task."""
STAGES: Final = ("ingest", "label", "tokenize", "pack", "verify")

Chunk = tuple[Message, ...]


def synthetic(real: Sequence[Trajectory], number: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield `number` rows of the `messages` format with the statistics of the real ones."""
    chance = random.Random(seed)
    prompts: dict[str, list[tuple[Trajectory, Chunk]]] = defaultdict(list)
    steps: dict[str, list[Chunk]] = defaultdict(list)
    counts: dict[str, list[int]] = defaultdict(list)
    for trajectory in real:
        spoken = [message for message in trajectory.messages if message.role in CHAT_ROLES]
        head = tuple(message for message in spoken if message.kind == "prompt")
        chunks = [(step.action, *step.observations) for step in trajectory.steps]
        if head and chunks:
            prompts[trajectory.format].append((trajectory, head))
            counts[trajectory.format].append(len(chunks))
            steps[trajectory.format] += chunks
    bases = [base for of_format in prompts.values() for base in of_format]
    for index in range(number):
        trajectory, head = chance.choice(bases)
        kind = trajectory.format
        drawn = chance.choices(steps[kind], k=chance.choice(counts[kind]))
        rows = [_row(message) for message in (*head, *(each for step in drawn for each in step))]
        first = next(row for row in rows if row["role"] == "user")
        first["content"] = f"Task {index // ATTEMPTS}, attempt {index}.\n{first['content']}"
        yield {
            "trajectory_id": f"synthetic-{index:08d}",
            "instance_id": f"synthetic__task-{index // ATTEMPTS}",
            "resolved": chance.random() < 0.39,  # of SWE-smith's runs, says the paper
            "tools": trajectory.tools and orjson.loads(trajectory.tools),
            "messages": rows,
        }


def write(rows: Iterator[dict[str, Any]], folder: Path) -> Path:
    """Write rows as files of JSONL, zstd; return the folder."""
    folder.mkdir(parents=True)
    for part, batch in enumerate(iter(lambda: list(islice(rows, FILE_ROWS)), [])):
        lines = (orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in batch)
        data = zstandard.compress(b"".join(lines), level=3)
        (folder / f"runs-{part:05d}.jsonl.zst").write_bytes(data)
    return folder


def _row(message: Message) -> dict[str, Any]:
    row = {name: value for name, value in message._asdict().items() if value is not None}
    del row["kind"]
    if "tool_calls" in row:
        row["tool_calls"] = orjson.loads(row["tool_calls"])
    row.setdefault("content", None)
    return row


def bytes_of(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(source: Path, folder: Path, tokenizer: str, number: int) -> list[dict[str, Any]]:
    """Run all stages on the rows in `source`; return a row a stage."""
    out = {stage: folder / stage for stage in STAGES[:-1]}
    commands = {
        "ingest": [str(source), "-o", str(out["ingest"])],
        "label": [str(out["ingest"]), "-o", str(out["label"]), "--critic", "rules"],
        "tokenize": [str(out["ingest"]), "-o", str(out["tokenize"]), "--tokenizer", tokenizer],
        "pack": [str(out["tokenize"]), "-o", str(out["pack"]), "--labels", str(out["label"])],
        "verify": [str(out["pack"])],
    }
    commands["label"] += ["--only", "all"]
    rows = []
    for stage, arguments in commands.items():
        took = watched([stage, *arguments, "--json"])
        size = bytes_of(out[stage]) if stage in out else 0
        rows.append({"stage": stage, "trajectories": number, "bytes": size, **took})
    return rows


def show(rows: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> None:
    """Print the table of one size, each stage beside itself at the size before."""
    earlier = {row["stage"]: row for row in before}
    for row in rows:
        growth = ""
        if old := earlier.get(row["stage"]):
            scale = row["trajectories"] / old["trajectories"]
            row["growth_cpu"] = row["cpu_seconds"] / old["cpu_seconds"] / scale
            row["growth"] = row["seconds"] / old["seconds"] / scale
            growth = f"{row['growth_cpu']:>11.2f}{row['growth']:>9.2f}"
        click.echo(
            f"{row['trajectories']:>12,}  {row['stage']:9}{row['seconds']:>9.1f}"
            f"{row['cpu_seconds']:>9.1f}{row['peak_mib']:>10,.0f}{row['bytes'] / 1e6:>10,.1f}"
            f"{growth}"
        )


@click.command()
@click.option("--sizes", default="1000,10000,100000", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where the files lie.")
@click.option("--keep", is_flag=True, help="Leave the files of the largest size there.")
@click.option("--seed", default=0, show_default=True)
def main(sizes: str, folder: Path | None, keep: bool, seed: int) -> None:
    """Measure all stages at each size."""
    tokenizer = str(SHARED / "tokenizers" / "qwen2.5-coder-instruct")
    tokenizer = tokenizer if SHARED.is_dir() else "example"
    scratch = Path(tempfile.mkdtemp(dir=folder))
    click.echo(
        f"{'trajectories':>12}  {'stage':9}{'seconds':>9}{'CPU s':>9}{'peak MiB':>10}{'MB':>10}"
        f"{'growth CPU':>11}{'clock':>9}"
    )
    found: list[dict[str, Any]] = []
    try:
        real = real_trajectories(scratch, None)
        last: list[dict[str, Any]] = []
        for number in map(int, sizes.split(",")):
            place = scratch / str(number)
            source = write(synthetic(real, number, seed), place / "runs")
            rows = measure(source, place, tokenizer, number)
            rows[0]["source_bytes"] = bytes_of(source)
            show(rows, last)
            found, last = [*found, *rows], rows
            if not keep:
                shutil.rmtree(place)
    finally:
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    document = {"benchmark": "scale", "tokenizer": tokenizer, "machine": machine, "rows": found}
    click.echo(orjson.dumps(document))


if __name__ == "__main__":
    main()
