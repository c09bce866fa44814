"""How long does `stats` take over a large data set, and how much memory?

    python benchmarks/stats.py [--trajectories 100000] [--steps 60]

Made-up trajectories without messages (which `stats` does not read), with a label a step, a request
and a token row each, written by the stages' own writers into a temporary folder. Then
`srft-prep stats --labels --tokens --full --html` runs in a process of its own; its time and its
peak of resident memory are what is told. The last line of stdout is one JSON document.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import orjson
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.schemas import LABELS, LABELS_FILE, REQUESTS, REQUESTS_FILE, TOKENS, TRAJECTORIES
from srft_prep.storage import PARQUET_OPTIONS, StageWriter

PART_ROWS = 10_000
MODELS = ("gpt-4o", "claude-sonnet-4", "qwen3-coder", None)
FORMATS = ("swe-smith", "mini-swe-agent", "openhands")


@click.command()
@click.option("--trajectories", default=100_000, show_default=True)
@click.option("--steps", default=60, show_default=True, help="Steps of each trajectory.")
def main(trajectories: int, steps: int) -> None:
    """Write the data set, run the command, print what it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        # not here, since a child's peak is counted from what its parent has at the fork
        writer = get_context("spawn").Process(target=write_all, args=(folder, trajectories, steps))
        writer.start()
        writer.join()
        assert writer.exitcode == 0
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        print(
            f"{trajectories:,} trajectories, {trajectories * steps:,} labels: "
            f"{size / 1e6:,.0f} MB, written in {time.perf_counter() - began:.0f} s"
        )
        began = time.perf_counter()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "srft_prep", "stats", folder / "trajectories"),
                *("--labels", folder / "labels", "--tokens", folder / "tokens"),
                *("--full", "--html", folder / "stats.html"),
            ]
        )
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        seconds = time.perf_counter() - began
        peak = usage.ru_maxrss * 1024
        page = (folder / "stats.html").stat().st_size
    found = {
        "trajectories": trajectories,
        "labels": trajectories * steps,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "page_bytes": page,
        "cpus": len(os.sched_getaffinity(0)),
        "polars": pl.__version__,
        "machine": platform.machine(),
    }
    print(f"stats: {seconds:.1f} s, {peak / 1e9:.2f} GB at most, a page of {page / 1e3:,.0f} kB")
    print(orjson.dumps(found).decode())


def write_all(folder: Path, trajectories: int, steps: int) -> None:
    """Write what `stats` reads."""
    write_runs(folder / "trajectories", trajectories, steps)
    write_labels(folder / "labels", trajectories, steps)
    write_tokens(folder / "tokens", trajectories, steps)


def names(first: int, count: int) -> tuple[list[str], list[str]]:
    """Return ids and content hashes as long as real ones."""
    numbers = range(first, first + count)
    ids = [f"run-{number % 7}/owner__repository-{number}" for number in numbers]
    return ids, [f"{number:032x}" for number in numbers]


def columns(count: int, **values: Any) -> dict[str, Any]:
    """Return columns of one length: a value that is no list stands in each row."""
    return {
        key: value if isinstance(value, list) else [value] * count for key, value in values.items()
    }


def write_runs(path: Path, count: int, steps: int) -> None:
    """Write trajectories, as `ingest` does."""
    with StageWriter.open(path, stage="ingest", config={}, inputs=[]) as writer:
        parts = []
        for first in range(0, count, PART_ROWS):
            rows = min(PART_ROWS, count - first)
            ids, hashes = names(first, rows)
            table = columns(
                rows,
                trajectory_id=ids,
                instance_id=ids,
                format=[FORMATS[i % len(FORMATS)] for i in range(rows)],
                resolved=[(True, False, None)[i % 3] for i in range(rows)],
                model=[MODELS[i % len(MODELS)] for i in range(rows)],
                exit_status=None,
                patch=None,
                tools=None,
                messages=[[]] * rows,
                num_steps=steps,
                content_hash=hashes,
            )
            parts.append(f"part-{first // PART_ROWS:05}.parquet")
            write(path / parts[-1], [pa.Table.from_pydict(table, schema=TRAJECTORIES)])
        counts = {"trajectories": count, "steps": count * steps, "rejected": 0}
        writer.finish(counts=counts, names=parts, command=[])


def write_labels(path: Path, count: int, steps: int) -> None:
    """Write labels and requests, as `label` does."""
    random = np.random.default_rng(0)

    def labels() -> Iterator[pa.Table]:
        for first in range(0, count, 500):
            rows = min(500, count - first)
            ids, hashes = names(first, rows)
            total = rows * steps
            drawn = random.choice(["good", "unnecessary", "harmful"], total, p=[0.85, 0.1, 0.05])
            probability = random.random(total, np.float32)
            yield pa.Table.from_pydict(
                columns(
                    total,
                    trajectory_id=[each for each in ids for _ in range(steps)],
                    content_hash=[each for each in hashes for _ in range(steps)],
                    step_index=list(range(steps)) * rows,
                    label=drawn.tolist(),
                    p_good=probability.tolist(),
                    p_unnecessary=probability.tolist(),
                    p_harmful=probability.tolist(),
                    rationale=None,
                    critic_id="made up",
                    prompt_hash="0" * 64,
                ),
                schema=LABELS,
            )

    def requests() -> Iterator[pa.Table]:
        ids, _ = names(0, count)
        yield pa.Table.from_pydict(
            columns(
                count,
                trajectory_id=ids,
                part="all",
                prompt_tokens=20_000,
                cached_tokens=0,
                completion_tokens=800,
                seconds=random.random(count).tolist(),
                usd=random.random(count).tolist(),
                clipped_tokens=0,
                failure=None,
                critic_id="made up",
                prompt_hash="0" * 64,
            ),
            schema=REQUESTS,
        )

    with StageWriter.open(path, stage="label", config={}, inputs=[]) as writer:
        write(path / LABELS_FILE, labels())
        write(path / REQUESTS_FILE, requests())
        writer.finish(counts={"failures": 0}, names=[LABELS_FILE, REQUESTS_FILE], command=[])


def write_tokens(path: Path, count: int, steps: int) -> None:
    """Write lengths, as `tokenize` does, without the tokens."""
    random = np.random.default_rng(1)
    ids, hashes = names(0, count)
    empty: list[list[int]] = [[]] * count
    table = columns(
        count,
        trajectory_id=ids,
        resolved=None,
        content_hash=hashes,
        num_tokens=random.integers(1_000, 700 * steps, count).tolist(),
        instance_id=ids,
        **{field.name: empty for field in TOKENS if pa.types.is_list(field.type)},
    )
    table |= {name: [None] * count for name in set(TOKENS.names) - set(table)}
    tokenizer = {"source": "", "tokenizer_hash": "", "template_hash": ""}
    with StageWriter.open(path, stage="tokenize", config={}, inputs=[]) as writer:
        write(path / "part-00000.parquet", [pa.Table.from_pydict(table, schema=TOKENS)])
        writer.finish(
            counts={}, names=["part-00000.parquet"], command=[], extra={"tokenizer": tokenizer}
        )


def write(path: Path, tables: Any) -> None:
    """Write tables into one file, a row group each."""
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(path, first.schema, **PARQUET_OPTIONS) as writer:
        for table in (first, *tables):
            writer.write_table(table)


if __name__ == "__main__":
    main()
