"""Which documents share a packed sequence, and in what order the packed sequences come.

Solutions by count of equal lengths (`cutting.py`): best fit first, then balanced fills with several
settings, until one reaches Martello and Toth's lower bound L2; the best of all is taken. So there
are never more packs than best-fit decreasing makes. A million lengths of agent trajectories take
about two seconds and 50 MB and come within 0.05% of the bound if lognormal, 0.15% if drawn from
real ones with noise (`benchmarks/packing.py`).
Everything is a function of the lengths: equal lengths are taken in the order of their indices.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from srft_prep.cutting import Patterns, balanced, best_fit
from srft_prep.errors import ShardError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SETTINGS: Final = ((50, 32), (52, 32), (55, 32))
"""(percent, capacity / tolerance) of the balanced fills, in the order in which they are tried."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Packs:
    """Documents by packed sequence; every document is in exactly one."""

    members: "NDArray[np.int64]"
    """Document indices [N], pack after pack, a pack's longest first, equal lengths by index."""
    starts: "NDArray[np.int64]"
    """Where each pack begins in `members`, and at last where it ends [P + 1]."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> "Iterator[NDArray[np.int64]]":
        """Yield each pack's document indices."""
        for start, end in zip(self.starts[:-1], self.starts[1:], strict=True):
            yield self.members[start:end]


def pack_documents(lengths: "Sequence[int] | NDArray[Any]", capacity: int) -> Packs:
    """Return packs of at most `capacity` tokens that hold each of the documents once.

    Args:
        lengths: of the documents, in tokens [N].
        capacity: the most tokens of a pack.

    Raises:
        ShardError: a document is longer than the capacity, or empty.
    """
    lengths_N = np.asarray(lengths, np.int64)
    wrong = np.flatnonzero((lengths_N < 1) | (lengths_N > capacity))
    if len(wrong):
        first = int(wrong[0])
        raise ShardError(
            f"document {first}: expected 1 to {capacity} tokens, got {lengths_N[first]}"
        )
    patterns = [
        (tuple(sorted(pattern, reverse=True)), times)
        for pattern, times in _fewest(lengths_N, capacity)
    ]
    patterns.sort(reverse=True)
    num_packs = sum(times for _, times in patterns)
    sizes_P = np.fromiter(
        chain.from_iterable([len(pattern)] * times for pattern, times in patterns),
        np.int64,
        num_packs,
    )
    places_N = np.fromiter(
        chain.from_iterable(pattern * times for pattern, times in patterns),
        np.int64,
        len(lengths_N),
    )
    members_N = np.empty(len(lengths_N), np.int64)
    members_N[np.argsort(places_N, kind="stable")] = np.argsort(lengths_N, kind="stable")
    assert np.array_equal(lengths_N[members_N], places_N), "a document was lost or doubled"
    return Packs(members=members_N, starts=np.concatenate([[0], np.cumsum(sizes_P)]))


def _fewest(lengths: "NDArray[np.int64]", capacity: int) -> Patterns:
    """Return the patterns that need the fewest packs, of all the ways to make them."""
    values, numbers = np.unique(lengths, return_counts=True)
    counts = dict(zip(values.tolist(), numbers.tolist(), strict=True))
    bound, threshold = _bound(values, numbers, capacity)
    best = best_fit(counts, capacity)
    for percent, parts in SETTINGS:
        if _num_packs(best) == bound:
            break
        other = balanced(
            counts, capacity, threshold=threshold, percent=percent, tolerance=capacity // parts
        )
        best = min(best, other, key=_num_packs)
    return best


def _num_packs(patterns: Patterns) -> int:
    return sum(times for _, times in patterns)


def lower_bound(lengths: "Sequence[int] | NDArray[Any]", capacity: int) -> int:
    """Return Martello and Toth's L2: no way of packing these lengths needs fewer packs."""
    values, numbers = np.unique(np.asarray(lengths, np.int64), return_counts=True)
    return _bound(values, numbers, capacity)[0]


def _bound(
    lengths: "NDArray[np.int64]", counts: "NDArray[np.int64]", capacity: int
) -> tuple[int, int]:
    """Return L2 and the least threshold k that gives it, from increasing lengths.

    For every k up to half the capacity at once: documents longer than capacity - k are alone; those
    above half the capacity cannot share with each other; those from k up to half must fit into the
    room beside the latter or need more packs.
    """
    numbers = np.concatenate([[0], np.cumsum(counts)])
    sums = np.concatenate([[0], np.cumsum(counts * lengths)])
    half = np.searchsorted(lengths, capacity // 2, side="right")
    thresholds = np.concatenate([[0], lengths[:half]])
    shared = np.searchsorted(lengths, capacity - thresholds, side="right")
    first = np.searchsorted(lengths, thresholds, side="left")
    room_beside = (numbers[shared] - numbers[half]) * capacity - (sums[shared] - sums[half])
    left_over = np.maximum(sums[half] - sums[first] - room_beside, 0)
    bounds = numbers[-1] - numbers[half] + -(-left_over // capacity)
    best = int(bounds.argmax())
    return int(bounds[best]), int(thresholds[best])


def spread(keys: "NDArray[Any]", seed: int) -> "NDArray[np.int64]":
    """Return a shuffled order of packs in which every stretch has nearly the mix of the whole.

    A stretch of w out of n packs has w/n of the q packs of least key, for every q, to within
    2 log2(w) + log2(n) + 3 packs, and rarely misses by more than three; a plain shuffle misses by
    sqrt(w)/2. Places are scrambled base-2 fractions (van der Corput 1935; Owen 1995), which take
    one of every 2^j equal parts of the keys in each aligned run of 2^j; equal keys go by lot.

    The order is a function of the keys' ranks, their number and the seed. Its random bits are raw
    Philox words, which numpy promises never to change (NEP 19).

    Args:
        keys: what is to be spread, a number for each pack [P], such as its longest document.
        seed: any integer.
    """
    key = int.from_bytes(hashlib.blake2b(f"spread:{seed}".encode(), digest_size=16).digest())
    words = np.random.Philox(key=key)
    num = len(keys)
    lots_P = np.atleast_1d(words.random_raw(num))
    by_key_P = np.lexsort((lots_P, keys))
    levels = max(num - 1, 0).bit_length()
    flips = (np.atleast_1d(words.random_raw(1 << levels)) & 1).astype(np.int64)
    places_P = np.arange(num)
    fractions_P = np.zeros(num, np.int64)
    for level in range(levels):
        # The lower bits of a place are the part that was chosen so far: each flips its halves.
        flip_P = flips[(1 << level) + (places_P & ((1 << level) - 1))]
        fractions_P = fractions_P << 1 | (places_P >> level & 1) ^ flip_P
    ranks_P = np.empty(num, np.int64)
    ranks_P[np.argsort(fractions_P, kind="stable")] = places_P
    return by_key_P[ranks_P]
