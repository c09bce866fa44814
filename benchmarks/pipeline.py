"""Each stage's time beside a named ceiling: the bare library call that it cannot do without.

    stage      ceiling
    ingest     orjson.loads of the same files
    label      reading the same trajectories back from Parquet (what any critic must do first)
    tokenize   tokenizers' encode_batch of the same rendered texts, same cores
    pack       pyarrow reading the same token parts and writing one table of the same ids, zstd

Ceiling and stage take turns within one run of this script, since the machine is shared; the ratio
is what counts, an absolute time is only for orientation. Uses ../shared/data where it is there,
else the runs that come with the package. The last line is one JSON document.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import orjson
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.chat import load_spec
from srft_prep.config import IngestConfig, LabelConfig, PackConfig
from srft_prep.critic import open_critic
from srft_prep.ingest import ingest
from srft_prep.labeling import label
from srft_prep.records import discover
from srft_prep.shards import pack
from srft_prep.tokens import tokenize
from srft_prep.trajectories import read_trajectories
from srft_prep.weights import DEFAULT_WEIGHTS

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
EXAMPLES = REPOSITORY / "srft_prep" / "examples" / "runs"


@contextmanager
def fresh() -> Iterator[Path]:
    """Give an empty directory that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "out"


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(
    stage: Callable[[Path], object], ceiling: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Return the times of stage and ceiling, taken in turns after one warm-up of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        with fresh() as output:
            took = seconds_of(lambda output=output: stage(output))  # type: ignore[misc]  # a default
        bare = seconds_of(ceiling)
        if repeat:
            times[0].append(took)
            times[1].append(bare)
    return times


@click.command()
@click.option("--repeats", default=5, show_default=True, help="Measured rounds after one warm-up.")
def main(repeats: int) -> None:
    """Measure all stages and print a table."""
    source = SHARED / "trajectories" if SHARED.is_dir() else EXAMPLES
    tokenizer = (
        str(SHARED / "tokenizers" / "qwen2.5-coder-instruct") if SHARED.is_dir() else "example"
    )
    files = [str(path) for path in discover([str(source)])]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        critic = open_critic("rules")
        config = LabelConfig(
            critic="rules",
            critic_id=critic.critic_id,
            prompt_hash=critic.prompt_hash,
            only="all",
        )
        weights = {str(name): weight for name, weight in DEFAULT_WEIGHTS.items()}
        packing = PackConfig(recipe="srft", weights=weights)
        parts = ingest(files, base / "trajectories", IngestConfig()).parts
        label(base / "trajectories", base / "labels", critic, config)
        tokens = tokenize(base / "trajectories", base / "tokens", tokenizer=tokenizer)
        loaded = load_spec(tokenizer).load()
        texts = [
            loaded.conversations(each, history="full")[0].rendering.text
            for each in read_trajectories(parts)
        ]
        num_bytes = sum(Path(file).stat().st_size for file in files)
        num_tokens = tokens.counts["tokens"]
        num_steps = int(pl.read_parquet(parts, columns=["num_steps"])["num_steps"].sum())
        rows = [
            ("ingest", num_bytes / 1e6, "MB", lambda out: ingest(files, out, IngestConfig()),
             lambda: _parse(files)),
            ("label", num_steps / 1e3, "k steps",
             lambda out: label(base / "trajectories", out, critic, config),
             lambda: sum(1 for _ in read_trajectories(parts))),
            ("tokenize", num_tokens / 1e6, "Mtok",
             lambda out: tokenize(base / "trajectories", out, tokenizer=tokenizer),
             lambda: loaded.backend.encode_batch(texts, add_special_tokens=False)),
            ("pack", num_tokens / 1e6, "Mtok",
             lambda out: pack(base / "tokens", out, packing, labels=base / "labels"),
             lambda: _copy_ids(tokens.parts, base / "copy.parquet")),
        ]  # fmt: skip
        click.echo(f"{len(files)} files, {num_bytes / 1e6:.1f} MB, {num_tokens:,} tokens")
        click.echo(
            f"{'stage':10}{'rate/s':>16}{'median s':>10}{'spread':>8}{'ceiling s':>11}{'x':>7}"
        )
        results = {}
        for name, amount, unit, stage, ceiling in rows:
            took, bare = alternate(stage, ceiling, repeats)
            median, floor = statistics.median(took), statistics.median(bare)
            spread = (max(took) - min(took)) / median
            rate = f"{amount / median:.2f} {unit}"
            click.echo(
                f"{name:10}{rate:>16}{median:10.3f}{spread:8.0%}{floor:11.3f}{median / floor:7.2f}"
            )
            results[name] = {
                "seconds": median,
                "ceiling_seconds": floor,
                "times_ceiling": median / floor,
                "rate": amount / median,
                "unit": unit,
                "spread": spread,
            }
        click.echo(orjson.dumps({"benchmark": "pipeline", "repeats": repeats, **results}))


def _parse(files: list[str]) -> int:
    """Parse every JSON and JSONL file; return the number of values."""
    count = 0
    for file in files:
        data = Path(file).read_bytes()
        documents = data.splitlines() if file.endswith("l") and "jsonl" in file else [data]
        for document in documents:
            orjson.loads(document)
            count += 1
    return count


def _copy_ids(parts: list[Path], target: Path) -> None:
    tables = [pq.read_table(part, columns=["input_ids"]) for part in parts]
    pq.write_table(pa.concat_tables(tables), target, compression="zstd", use_dictionary=False)


if __name__ == "__main__":
    main()
