"""How fast do batches come from shards? Beside bare Parquet, `datasets` and a DataLoader.

    python benchmarks/loader.py [SHARDS] [--mtok 100] [--rounds 5] [--epochs 10]

The files of SHARDS, an output of `pack` (left out: of the shared runs, labelled by the rules), are
copied under new names until there are `--mtok` million tokens: more than the loader keeps decoded,
so that nothing comes from memory twice. They lie in the page cache. A round takes every way once,
in turns, since the machine is shared; the ratios are what counts. Delivered is what the consumer
holds: int64 tensors of ids and positions.

`ceiling`     the column of ids alone, file by file, two files at a time; Arrow's buffers, int32
`ours`        `Loader`, one sequence a micro-batch, trimmed, shuffled
`untrimmed`   the same without the trim
`by fours`    four sequences a micro-batch
`rank of 8`   the first of 8 ranks: each decodes all row groups that its sequences lie in
`datasets`    `load_dataset` to Arrow files (not timed), shuffled; DataLoader, in this process
`2 workers`   the same with two worker processes
`streaming`   `load_dataset(streaming=True)` from the Parquet, unshuffled; DataLoader

Before a time is believed, ways that drop nothing must deliver the same sum of ids. Then memory: the
most that is resident in each of `--epochs` epochs of a process of its own. The last line of stdout
is one JSON document.
"""

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from srft_prep.config import IngestConfig, LabelConfig, PackConfig
from srft_prep.critic import open_critic
from srft_prep.examples.record import RUNS_DIR
from srft_prep.ingest import ingest
from srft_prep.labeling import label
from srft_prep.manifest import read_manifest
from srft_prep.shards import pack
from srft_prep.tokens import tokenize
from srft_prep.train.data import ShardSet
from srft_prep.train.loader import DECODERS, Loader
from srft_prep.weights import DEFAULT_WEIGHTS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BATCH_SEQUENCES = 32
"""Of an optimiser step, as the paper trains."""

Delivered = tuple[int, int]
"""(tokens, sum of their ids)."""


def packed(folder: Path) -> Path:
    """Return shards of the shared runs, or of the example runs where there are none."""
    source = SHARED / "trajectories" if SHARED.is_dir() else RUNS_DIR
    tokenizer = SHARED / "tokenizers" / "qwen2.5-coder-instruct" if SHARED.is_dir() else "example"
    critic = open_critic("rules")
    labelling = LabelConfig(
        critic="rules", critic_id=critic.critic_id, prompt_hash=critic.prompt_hash
    )
    weights = {str(name): weight for name, weight in DEFAULT_WEIGHTS.items()}
    ingest([str(source)], folder / "trajectories", IngestConfig())
    label(folder / "trajectories", folder / "labels", critic, labelling)
    tokenize(folder / "trajectories", folder / "tokens", tokenizer=str(tokenizer))
    config = PackConfig(recipe="srft", weights=weights)
    return pack(folder / "tokens", folder / "packed", config, labels=folder / "labels").path


def grown(source: Path, folder: Path, tokens: int) -> Path:
    """Copy the shards of a directory to a larger one of at least so many tokens."""
    manifest = read_manifest(source, stage="pack").checked()
    shards = [file for file in manifest.files if file["name"].startswith("shard-")]
    copies = -(-tokens // manifest.counts["num_tokens"])
    files = []
    folder.mkdir()
    for copy in range(copies):
        for file in shards:
            name = f"shard-{copy:03d}-{file['name'][6:]}"
            shutil.copyfile(source / file["name"], folder / name)
            files.append({**file, "name": name})
    data = {**manifest.data, "files": files}
    (folder / "manifest.json").write_bytes(orjson.dumps(data))
    return folder


def ceiling(shards: ShardSet) -> Delivered:
    """Read the ids, and nothing else."""

    def read(path: Path) -> Delivered:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            column = file.read(columns=["input_ids"], use_threads=False)["input_ids"]
        lists = [chunk.values.to_numpy() for chunk in column.chunks]
        return sum(map(len, lists)), int(sum(each.sum(dtype=np.int64) for each in lists))

    with ThreadPoolExecutor(DECODERS) as pool:
        found = list(pool.map(read, [path for path, _ in shards.files]))
    return sum(tokens for tokens, _ in found), sum(total for _, total in found)


def ours(shards: ShardSet, **settings: Any) -> Delivered:
    """Iterate over an epoch of the loader."""
    tokens = total = 0
    for step in Loader(shards, batch_sequences=BATCH_SEQUENCES, **settings):
        for batch in step.micro_batches:
            if batch.num_loss_tokens:
                tokens += batch.num_tokens
                total += int(batch.input_ids.sum())
    return tokens, total


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return one packed sequence as a trainer gets it: ids, labels, positions, all int64."""
    (row,) = rows
    lengths = np.asarray(row["seq_lengths"])
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return {
        "input_ids": torch.from_numpy(np.asarray(row["input_ids"]).astype(np.int64)),
        "labels": torch.from_numpy(np.asarray(row["labels"]).astype(np.int64)),
        "position_ids": torch.from_numpy(np.arange(len(starts)) - starts),
    }


def iterated(batches: Iterator[dict[str, Tensor]]) -> Delivered:
    """Add up what a DataLoader delivers."""
    tokens = total = 0
    for batch in batches:
        tokens += batch["input_ids"].numel()
        total += int(batch["input_ids"].sum())
    return tokens, total


def peers(shards: ShardSet, cache: Path) -> dict[str, Callable[[], Delivered]]:
    """Return the ways of `datasets`, its Arrow files being made."""
    import datasets  # type: ignore[import-untyped]

    datasets.disable_progress_bars()
    names = {"train": [str(path) for path, _ in shards.files]}
    columns = ["input_ids", "labels", "seq_lengths"]
    arrow = datasets.load_dataset(
        "parquet", data_files=names, split="train", columns=columns, cache_dir=str(cache)
    ).with_format("numpy")
    streamed = datasets.load_dataset(
        "parquet", data_files=names, split="train", columns=columns, streaming=True
    ).with_format("numpy")

    def load(dataset: Any, **settings: Any) -> Delivered:
        return iterated(iter(DataLoader(dataset, batch_size=1, collate_fn=collate, **settings)))

    return {
        "datasets": lambda: load(arrow, shuffle=True),
        "2 workers": lambda: load(arrow, shuffle=True, num_workers=2),
        "streaming": lambda: load(streamed),
    }


def measure(ways: dict[str, Callable[[], Delivered]], rounds: int) -> dict[str, dict[str, Any]]:
    """Return every way's rate: median and range over the rounds, one before them warming up."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, Delivered] = {}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            delivered = way()
            seconds = time.perf_counter() - started
            if first.setdefault(name, delivered) != delivered:
                raise SystemExit(f"{name}: another round delivered other tokens")
            if number:
                rates[name].append(delivered[0] / seconds / 1e6)
    for name in first.keys() - {"ours", "rank of 8"}:
        if first[name] != first["ceiling"]:
            raise SystemExit(f"{name}: {first[name]} are not the ids in the shards")
    return {
        name: {
            "mtok": first[name][0] / 1e6,
            "mtok_per_second": statistics.median(found),
            "range": [min(found), max(found)],
        }
        for name, found in rates.items()
    }


def memory(folder: Path, epochs: int) -> list[float]:
    """Return the most MB that are resident in each epoch of the loader."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder), "--epochs", str(epochs), "--resident"],
        check=True,
        capture_output=True,
        text=True,
    )
    found: list[float] = orjson.loads(done.stdout)
    return found


def resident(folder: Path, epochs: int) -> list[float]:
    """Iterate over epochs and return the most MB that are resident in each."""
    shards = ShardSet.open(folder)
    peaks = [0.0] * epochs
    for step in Loader(shards, batch_sequences=BATCH_SEQUENCES, epochs=epochs):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        epoch = min(int(step.epoch), epochs - 1)
        peaks[epoch] = max(peaks[epoch], pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
    return peaks


@click.command()
@click.argument(
    "source", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--mtok", default=100.0, show_default=True, help="Million tokens, at least.")
@click.option("--rounds", default=5, show_default=True, help="Measured rounds.")
@click.option("--epochs", default=10, show_default=True, help="Of the memory's measurement.")
@click.option("--resident", "only_resident", is_flag=True, hidden=True)
def main(source: Path | None, mtok: float, rounds: int, epochs: int, only_resident: bool) -> None:
    """Measure the loader on SOURCE, an output of `pack`, and print a table."""
    if only_resident and source:
        print(orjson.dumps(resident(source, epochs)).decode())
        return
    torch.set_num_threads(1)  # the consumer's sums would wait for a core that the loader has
    with tempfile.TemporaryDirectory() as scratch:
        source = source or packed(Path(scratch))
        folder = grown(source, Path(scratch) / "shards", int(mtok * 1e6))
        started = time.perf_counter()
        shards = ShardSet.open(folder)
        opened = time.perf_counter() - started
        trimmed = 1 - int(shards.kept_tokens.sum()) / shards.num_tokens
        print(
            f"{shards.num_tokens:,} tokens, {shards.num_sequences:,} sequences in "
            f"{len(shards.files)} files; opened in {opened:.2f} s; trim {trimmed:.2%}"
        )
        ways = {
            "ceiling": lambda: ceiling(shards),
            "ours": lambda: ours(shards),
            "untrimmed": lambda: ours(shards, trim=False),
            "by fours": lambda: ours(shards, trim=False, micro_batch_sequences=4),
            "rank of 8": lambda: ours(shards, rank=0, world_size=8),
            **peers(shards, Path(scratch) / "cache"),
        }
        rows = measure(ways, rounds)
        print(f"{'way':12}{'Mtok/s':>8}{'range':>16}{'of the ceiling':>16}")
        for name, row in rows.items():
            share = row["mtok_per_second"] / rows["ceiling"]["mtok_per_second"]
            low, high = row["range"]
            print(f"{name:12}{row['mtok_per_second']:>8.1f}{low:>9.1f}-{high:<6.1f}{share:>16.0%}")
        peaks = memory(folder, epochs)
        print("resident MB by epoch: " + " ".join(f"{peak:.0f}" for peak in peaks))
    document = {"benchmark": "loader", "rounds": rounds, "cores": len(os.sched_getaffinity(0))}
    document |= {"python": platform.python_version(), "torch": torch.__version__}
    document |= {"pyarrow": pa.__version__, "seq_len": shards.seq_len, "open_seconds": opened}
    print(orjson.dumps({**document, "ways": rows, "resident_mb": peaks}).decode())


if __name__ == "__main__":
    main()
