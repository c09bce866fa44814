"""How fast and how full is packing? Against a textbook best-fit decreasing, and a lower bound.

    python benchmarks/packing.py [--repeats 7] [--tokens DIR]

Lengths are drawn from lognormals fitted to agent runs (a median of 15.6k or 21k tokens, one in ten
above the capacity, which are clipped to it), or with --tokens from the rows of a `tokenize` output.
`bisect` is the usual way in plain Python: a sorted list of (room, sequence), searched by bisection.
Both take turns within one run, since the machine is shared; the ratio is what counts. `bound` is
the fill that no packing can exceed by Martello and Toth's L2: documents above half the capacity
cannot share, whatever the algorithm. The last line of stdout is one JSON document.
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
from srft_prep.packing import best_fit_decreasing

SHARE_ABOVE = 0.1
"""Share of the drawn lengths above the capacity."""

Packer = Callable[[Sequence[int], int], list[list[int]]]


def bisect_best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
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
        insort(rooms, (room - lengths[index], pack))
    return packs


def lower_bound(lengths: Sequence[int], capacity: int) -> int:
    """Return Martello and Toth's L2: the least number of packs, for every threshold k at once.

    Documents longer than capacity - k are alone; those above half the capacity cannot share with
    each other; those from k up to half must fit into the room beside the latter or need more.
    """
    ordered = np.sort(np.asarray(lengths, np.int64))
    sums = np.concatenate([[0], np.cumsum(ordered)])
    half = np.searchsorted(ordered, capacity // 2, side="right")
    thresholds = np.concatenate([[0], np.unique(ordered[:half])])
    shared = np.searchsorted(ordered, capacity - thresholds, side="right")
    first = np.searchsorted(ordered, thresholds, side="left")
    num_above_half = len(ordered) - half
    room_beside = (shared - half) * capacity - (sums[shared] - sums[half])
    left_over = np.maximum(sums[half] - sums[first] - room_beside, 0)
    return int((num_above_half + -(-left_over // capacity)).max())


def lognormal_lengths(count: int, *, median: float, capacity: int, seed: int) -> list[int]:
    """Return lengths of which `SHARE_ABOVE` exceed the capacity before they are clipped to it."""
    sigma = math.log(capacity / median) / statistics.NormalDist().inv_cdf(1 - SHARE_ABOVE)
    drawn = np.random.default_rng(seed).lognormal(math.log(median), sigma, count)
    return [int(length) for length in np.clip(drawn, 1, capacity)]


def real_lengths(tokens: Path, count: int, *, capacity: int, seed: int) -> list[int]:
    """Return `count` lengths drawn from the rows of a `tokenize` output."""
    parts = read_manifest(tokens, stage="tokenize").parts
    known = pl.concat([pl.read_parquet(part, columns=["num_tokens"]) for part in parts])
    drawn = np.random.default_rng(seed).choice(known["num_tokens"].to_numpy(), count)
    return [int(length) for length in np.clip(drawn, 1, capacity)]


def milliseconds(packer: Packer, lengths: Sequence[int], capacity: int) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    packer(lengths, capacity)
    return 1e3 * (time.perf_counter() - start)


def measure(name: str, lengths: list[int], capacity: int, repeats: int) -> dict[str, Any]:
    """Return one row of the table: median and spread of both packers, and how full they pack."""
    packers: dict[str, Packer] = {"ours": best_fit_decreasing, "bisect": bisect_best_fit_decreasing}
    times: dict[str, list[float]] = {each: [] for each in packers}
    for repeat in range(repeats + 1):
        for each, packer in packers.items():
            took = milliseconds(packer, lengths, capacity)
            if repeat:  # the first round warms up
                times[each].append(took)
    num_packs = {each: len(packer(lengths, capacity)) for each, packer in packers.items()}
    assert num_packs["ours"] == num_packs["bisect"]
    least = lower_bound(lengths, capacity)
    total = sum(lengths)
    return {
        "lengths": name,
        "documents": len(lengths),
        "sequences": num_packs["ours"],
        "lower_bound": least,
        "fill": total / (num_packs["ours"] * capacity),
        "fill_bound": total / (least * capacity),
        "ms": {each: statistics.median(taken) for each, taken in times.items()},
        "ms_spread": {each: max(taken) - min(taken) for each, taken in times.items()},
        "speedup": statistics.median(times["bisect"]) / statistics.median(times["ours"]),
    }


@click.command()
@click.option("--repeats", default=7, show_default=True, help="Measured rounds after one warm-up.")
@click.option("--capacity", default=DEFAULT_SEQ_LEN, show_default=True, help="In tokens.")
@click.option(
    "--tokens",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Draw from the real lengths of a `tokenize` output too.",
)
def main(repeats: int, capacity: int, tokens: Path | None) -> None:
    """Measure packing and print a table."""
    rows = []
    for count in (10_000, 100_000):
        cases = {
            f"lognormal {median / 1e3:g}k": lognormal_lengths(
                count, median=median, capacity=capacity, seed=0
            )
            for median in (15_600, 21_000)
        }
        if tokens is not None:
            cases["real"] = real_lengths(tokens, count, capacity=capacity, seed=0)
        rows += [measure(name, lengths, capacity, repeats) for name, lengths in cases.items()]
    print(f"capacity {capacity}, median of {repeats} rounds and their spread, milliseconds")
    print(
        f"{'lengths':16}{'documents':>10}{'ours':>16}{'bisect':>16}{'ratio':>7}"
        f"{'sequences':>11}{'fill':>9}{'bound':>9}"
    )
    for row in rows:
        cells = "".join(
            f"{row['ms'][each]:>9.1f} ±{row['ms_spread'][each] / 2:5.1f}"
            for each in ("ours", "bisect")
        )
        print(
            f"{row['lengths']:16}{row['documents']:>10,}{cells}{row['speedup']:>6.1f}x"
            f"{row['sequences']:>11,}{row['fill']:>9.2%}{row['fill_bound']:>9.2%}"
        )
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    document = {"benchmark": "packing", "capacity": capacity, "repeats": repeats, **machine}
    print(orjson.dumps({**document, "rows": rows}).decode())


if __name__ == "__main__":
    main()
