"""How full and how fast is packing? Beside a lower bound and what other trainers do.

    python benchmarks/packing.py [--repeats 3] [--capacity 32768] [--tokens DIR]

Lengths are drawn from lognormals fitted to agent runs (a median of 15.6k or 21k tokens, one in ten
above the capacity, which are clipped to it), or with --tokens from the rows of a `tokenize` output:
as they are (few distinct lengths, each often) and with 2% of noise (all distinct, same shape).

`bound` is Martello and Toth's L2, which no packing can beat; `over` is how many more packs each way
needs. The peers are their ideas written anew in plain Python, without their file handling:
`global`     best-fit decreasing over all lengths, by bisection in sorted rooms (TRL's algorithm)
`per 1,000`  the same for every 1,000 rows apart, as TRL ships it
`multipack`  first fit in the given order, every 100,000 rows apart (axolotl)
`next-fit`   one pack open, closed by the first that does not fit (torchtune)
All take turns within one run, since the machine is shared; the ratios are what counts. What takes
long is measured once at 1,000,000 (`--repeats` holds below). Results are checked before a time is
believed: every document once, no pack overfull. The last line of stdout is one JSON document.
"""

import math
import platform
import statistics
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import orjson
import polars as pl

from srft_prep.config import DEFAULT_SEQ_LEN
from srft_prep.manifest import read_manifest
from srft_prep.packing import lower_bound, pack_documents

SHARE_ABOVE = 0.1
"""Share of the drawn lengths above the capacity."""
BATCH_ROWS = 1_000
"""Rows that TRL packs apart from the others."""
GROUP_ROWS = 100_000
"""Rows that axolotl's multipack packs apart from the others."""

Packer = Callable[[Sequence[int], int], list[list[int]]]


def ours(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the package's packs."""
    return [pack.tolist() for pack in pack_documents(lengths, capacity)]


def global_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return best-fit-decreasing packs by bisection in a sorted list of rooms."""
    rooms: list[tuple[int, int]] = []
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[index], 0))
        if place < len(rooms):
            room, pack = rooms.pop(place)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        if room > lengths[index]:
            insort(rooms, (room - lengths[index], pack))
    return packs


def best_fit_by_batch(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return best-fit-decreasing packs of each batch of rows."""
    return [
        [start + index for index in pack]
        for start in range(0, len(lengths), BATCH_ROWS)
        for pack in global_best_fit(lengths[start : start + BATCH_ROWS], capacity)
    ]


def multipack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return first-fit packs of each group of rows as they come."""
    packs: list[list[int]] = []
    for start in range(0, len(lengths), GROUP_ROWS):
        group = range(start, min(start + GROUP_ROWS, len(lengths)))
        width = 1 << (len(group) - 1).bit_length()
        most_room = [capacity] * (2 * width)  # a tree: of packs 2i and 2i + 1 together, at i
        members: list[list[int]] = [[] for _ in group]
        for index in group:
            node = 1
            while node < width:
                node = 2 * node + (most_room[2 * node] < lengths[index])
            members[node - width].append(index)
            most_room[node] -= lengths[index]
            while node > 1:
                node //= 2
                most_room[node] = max(most_room[2 * node], most_room[2 * node + 1])
        packs += filter(None, members)
    return packs


def next_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return packs that are closed by the first row that does not fit."""
    packs: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not packs or room < length:
            packs.append([])
            room = capacity
        packs[-1].append(index)
        room -= length
    return packs


PACKERS: dict[str, Packer] = {
    "ours": ours,
    "global": global_best_fit,
    "per 1,000": best_fit_by_batch,
    "multipack": multipack,
    "next-fit": next_fit,
}


def lognormal_lengths(count: int, *, median: float, capacity: int, seed: int) -> list[int]:
    """Return lengths of which `SHARE_ABOVE` exceed the capacity before they are clipped to it."""
    sigma = math.log(capacity / median) / statistics.NormalDist().inv_cdf(1 - SHARE_ABOVE)
    drawn = np.random.default_rng(seed).lognormal(math.log(median), sigma, count)
    return [int(length) for length in np.clip(drawn, 1, capacity)]


def real_lengths(
    tokens: Path, count: int, *, capacity: int, seed: int, noise: float = 0
) -> list[int]:
    """Return `count` lengths drawn from the rows of a `tokenize` output."""
    parts = read_manifest(tokens, stage="tokenize").parts
    known = pl.concat([pl.read_parquet(part, columns=["num_tokens"]) for part in parts])
    chance = np.random.default_rng(seed)
    drawn = chance.choice(known["num_tokens"].to_numpy(), count) * chance.normal(1, noise, count)
    return [int(length) for length in np.clip(drawn, 1, capacity)]


def check(packs: list[list[int]], lengths: Sequence[int], capacity: int) -> None:
    """Stop if a document is lost or doubled or a pack is overfull."""
    seen = sorted(index for pack in packs for index in pack)
    assert seen == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= capacity for pack in packs)


def measure(name: str, lengths: list[int], capacity: int, repeats: int) -> dict[str, Any]:
    """Return one row: every way's packs, and the median and spread of its times."""
    times: dict[str, list[float]] = {each: [] for each in PACKERS}
    num_packs: dict[str, int] = {}
    for repeat in range(repeats + (len(lengths) < 1_000_000)):
        for each, packer in PACKERS.items():
            start = time.perf_counter()
            packs = packer(lengths, capacity)
            took = time.perf_counter() - start
            if each not in num_packs:  # where there are several rounds the first warms up
                check(packs, lengths, capacity)
                num_packs[each] = len(packs)
            if repeat or len(lengths) >= 1_000_000:
                times[each].append(took)
    least = lower_bound(lengths, capacity)
    return {
        "lengths": name,
        "documents": len(lengths),
        "distinct": len(set(lengths)),
        "lower_bound": least,
        "packs": num_packs,
        "over_percent": {each: 100 * (num / least - 1) for each, num in num_packs.items()},
        "fill": sum(lengths) / (num_packs["ours"] * capacity),
        "fill_bound": sum(lengths) / (least * capacity),
        "seconds": {each: statistics.median(taken) for each, taken in times.items()},
        "seconds_spread": {each: max(taken) - min(taken) for each, taken in times.items()},
    }


def cases(count: int, capacity: int, tokens: Path | None) -> dict[str, list[int]]:
    """Return the lengths of each kind."""
    drawn = {
        f"lognormal {median / 1e3:g}k": lognormal_lengths(
            count, median=median, capacity=capacity, seed=0
        )
        for median in (15_600, 21_000)
    }
    if tokens is not None:
        drawn["real"] = real_lengths(tokens, count, capacity=capacity, seed=0)
        drawn["real + noise"] = real_lengths(tokens, count, capacity=capacity, seed=0, noise=0.02)
    return drawn


@click.command()
@click.option("--repeats", default=3, show_default=True, help="Measured rounds; one at 1,000,000.")
@click.option("--capacity", default=DEFAULT_SEQ_LEN, show_default=True, help="In tokens.")
@click.option(
    "--tokens",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Draw from the real lengths of a `tokenize` output too.",
)
def main(repeats: int, capacity: int, tokens: Path | None) -> None:
    """Measure packing and print a table."""
    print(f"capacity {capacity}; packs over the lower bound in percent, and seconds (median)")
    print(f"{'lengths':16}{'documents':>10}{'bound':>9}" + "".join(f"{e:>17}" for e in PACKERS))
    rows = []
    for count in (10_000, 100_000, 1_000_000):
        for name, lengths in cases(count, capacity, tokens).items():
            row = measure(name, lengths, capacity, repeats if count < 1_000_000 else 1)
            rows.append(row)
            cells = "".join(
                f"{row['over_percent'][each]:>8.3f}%{row['seconds'][each]:>7.2f}s"
                for each in PACKERS
            )
            print(f"{name:16}{count:>10,}{row['lower_bound']:>9,}{cells}", flush=True)
    machine = {"python": platform.python_version(), "numpy": np.__version__}
    machine["machine"] = platform.machine()
    document = {"benchmark": "packing", "capacity": capacity, "repeats": repeats, **machine}
    print(orjson.dumps({**document, "rows": rows}).decode())


if __name__ == "__main__":
    main()
