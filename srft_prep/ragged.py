"""Lists of different lengths as one flat array and offsets, as Arrow keeps them.

Offsets [N + 1] begin with 0; list i is `flat[offsets[i] : offsets[i + 1]]`.
"""

import math
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK: Final = 1 << 16
"""Numbers that are Python objects at a time, about."""


def offsets_of(lengths: "NDArray[np.integer]") -> "NDArray[np.int64]":
    """Return the offsets of lists of these lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ranges(starts: "NDArray[np.integer]", lengths: "NDArray[np.integer]") -> "NDArray[np.int64]":
    """Return the numbers of the ranges [start, start + length), one range after the other."""
    offsets = offsets_of(lengths)
    shifts = starts.astype(np.int64) - offsets[:-1]
    return np.repeat(shifts, lengths) + np.arange(offsets[-1])


def exact_sums(
    values: "NDArray[np.float64]", offsets: "NDArray[np.int64]"
) -> "NDArray[np.float64]":
    """Return the sum of each list, exact and rounded once: it depends on no order."""
    sums = np.empty(len(offsets) - 1)
    position = 0
    for first, last in chunks(offsets, CHUNK):
        start = int(offsets[first])
        numbers = values[start : offsets[last]].tolist()
        bounds = (offsets[first : last + 1] - start).tolist()
        for begin, end in pairwise(bounds):
            sums[position] = math.fsum(numbers[begin:end])
            position += 1
    return sums


def exact_sum(values: "NDArray[np.float64]") -> float:
    """Return the sum of all values, exact and rounded once."""
    pieces = (values[start : start + CHUNK].tolist() for start in range(0, len(values), CHUNK))
    return math.fsum(chain.from_iterable(pieces))


def chunks(offsets: "NDArray[np.int64]", size: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of runs of lists that hold about `size` values, at least one list."""
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + size, side="left"))
        last = min(max(last, first + 1), len(offsets) - 1)
        yield first, last
        first = last


def find(keys: "NDArray[Any]", wanted: "NDArray[Any]") -> "NDArray[np.int64]":
    """Return where each wanted value stands in sorted keys, -1 where it does not."""
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    places = np.searchsorted(keys, wanted)
    inside = np.minimum(places, len(keys) - 1)
    return np.where(keys[inside] == wanted, inside, -1)
