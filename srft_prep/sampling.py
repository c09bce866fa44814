"""A sample of finished parts: so many trajectories an outcome, whatever the order of the files.

Every trajectory has a pseudo-random rank made of seed and content; the lowest ranks of each
outcome win. So a smaller sample is a part of a larger one with the same seed.
"""

import hashlib
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from srft_prep.config import OUTCOMES, IngestConfig
from srft_prep.storage import write_table


def draw_sample(
    parts: list[Path],
    output: Path,
    config: IngestConfig,
    *,
    counts: dict[str, Any],
    row_group_rows: int,
) -> list[str]:
    """Copy the sampled rows of the parts to the output; return the new parts' names.

    `counts` gets what was left out and what lacks, by outcome.
    """
    wanted = config.sample or {}
    columns = {"trajectory_id": pl.String, "content_hash": pl.String, "resolved": pl.Boolean}
    rows = pl.read_parquet(parts, columns=list(columns)) if parts else pl.DataFrame(schema=columns)
    chosen: set[str] = set()
    for outcome, word in OUTCOMES.items():
        of_outcome = rows.filter(pl.col("resolved").eq_missing(outcome))
        pairs = zip(of_outcome["content_hash"], of_outcome["trajectory_id"], strict=True)
        ranked = sorted(pairs, key=lambda pair: _rank(config.seed, *pair))
        kept = ranked[: wanted.get(word, 0)]
        counts[f"not_sampled_{word}"] = len(ranked) - len(kept)
        counts[f"missing_for_sample_{word}"] = wanted.get(word, 0) - len(kept)
        chosen.update(trajectory_id for _, trajectory_id in kept)
    if config.limit is not None:
        order = {key: rank for rank, key in enumerate(rows["trajectory_id"])}
        chosen = set(sorted(chosen, key=order.__getitem__)[: config.limit])
    written: list[str] = []
    for part in parts:
        table = pq.read_table(part)
        mask = [key.as_py() in chosen for key in table["trajectory_id"]]
        if any(mask):
            written.append(f"part-{len(written):05d}.parquet")
            write_table(table.filter(mask), output / written[-1], row_group_rows=row_group_rows)
    return written


def _rank(seed: int, content_hash: str, trajectory_id: str) -> tuple[str, str]:
    key = f"{seed}:{content_hash}".encode()
    return hashlib.blake2b(key, digest_size=16).hexdigest(), trajectory_id
