"""Which lengths share a packed sequence: cutting stock on the counts of equal lengths.

A pattern is the lengths of one packed sequence, and a solution is patterns with how often each is
used, so that the cost grows with the number of distinct lengths and not with that of documents.
Two ways to a solution, of which `packing.py` takes the better:

`best_fit`: longest first, each to the fullest sequence that has room for it. Up to 0.5% above
the lower bound on lengths of agent runs. The loss is made at the end: what is left then is a little
below half or a third of the capacity, with nothing small to go beside it.

`balanced`: longest first, each with the longest that fits beside it if that fills the sequence
well, else with two to five of about the same length that fill it to within a few tokens. What
spoils the end above is used up in the middle, and what is left for the end is small. Documents that
the lower bound says may be alone, and those too small to matter to it, come last: no other
sequence needs to waste anything (Martello and Toth 1990, section 8.3, is where the bound is from).

Sets of lengths are big integers (bit n for length n). One AND of the set with its mirror image,
shifted by the room, gives every pair that fills that room: 1 us at a capacity of 32,768.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Final

import numpy as np

Pattern = tuple[int, ...]
"""The lengths of one packed sequence."""

Patterns = list[tuple[Pattern, int]]
"""Patterns and how often each is used; a pattern may occur more than once."""

MOST_BESIDE: Final = 5
"""Most documents that `balanced` looks for at once to go beside the longest."""
WASTE: Final = 4
"""Tokens: a search for an exact fill is content with less than this left over."""
TRIES: Final = 8
"""Lengths tried for the first of several documents beside the longest."""


def best_fit(counts: dict[int, int], capacity: int, *, started: Patterns | None = None) -> Patterns:
    """Return best-fit-decreasing patterns that hold every length as often as `counts` says.

    They fill as many sequences, equally full, as placing one document after the other does: equal
    lengths do the same to every sequence of equal room, so a group of them is moved at once.

    Args:
        counts: how often each length, 1 to the capacity, occurs.
        capacity: the most that the lengths of a pattern may sum up to.
        started: patterns that are there already and may be filled up.
    """
    groups: defaultdict[int, Patterns] = defaultdict(list)
    rooms = 0  # bit r: some sequence has room r
    for pattern, times in started or []:
        groups[capacity - sum(pattern)].append((pattern, times))
        rooms |= 1 << capacity - sum(pattern)
    for length in sorted(counts, reverse=True):
        count = counts[length]
        while count:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                pattern, times = groups[room].pop()
            else:
                room, pattern, times = capacity, (), count
            each = min(room // length, count)
            used = min(times, count // each)
            count -= each * used
            if pattern and times > used:
                groups[room].append((pattern, times - used))
            elif not groups[room]:
                rooms &= ~(1 << room)
            left = room - each * length
            groups[left].append((pattern + (length,) * each, used))
            rooms |= 1 << left
    return [each for group in groups.values() for each in group]


def balanced(
    counts: dict[int, int], capacity: int, *, threshold: int, percent: int, tolerance: int
) -> Patterns:
    """Return patterns that hold every length as often as `counts` says, made as the module says.

    Args:
        counts: how often each length, 1 to the capacity, occurs.
        capacity: the most that the lengths of a pattern may sum up to.
        threshold: lengths below it, and above the capacity less it, come last, by best fit.
        percent: the least share of the longer of the last two in their sum; 50 is both alike.
        tolerance: one document beside the longest is enough if it leaves no more than this.
    """
    stock = _Stock(counts, capacity, threshold=threshold, percent=percent, tolerance=tolerance)
    made: Patterns = []
    for length in stock.offered:
        while stock.left[length]:
            beside = stock.beside(length)
            if not beside:
                stock.hide(length)
                break
            made.append(stock.take((length, *beside)))
    return best_fit({n: count for n, count in stock.left.items() if count}, capacity, started=made)


class _Stock:
    """How many documents of each length are left, and which of them are offered."""

    def __init__(
        self,
        counts: dict[int, int],
        capacity: int,
        *,
        threshold: int,
        percent: int,
        tolerance: int,
    ) -> None:
        self.left = dict(counts)
        self.offered = [
            n for n in sorted(counts, reverse=True) if threshold <= n <= capacity - threshold
        ]
        self._capacity = capacity
        self._percent = percent
        self._tolerance = tolerance
        self._bits = _bit_set(self.offered, capacity)
        self._mirror = _bit_set([capacity - n for n in self.offered], capacity)

    def hide(self, length: int) -> None:
        """Offer this length no more."""
        self._bits &= ~(1 << length)
        self._mirror &= ~(1 << self._capacity - length)

    def take(self, pattern: Pattern) -> tuple[Pattern, int]:
        """Return the pattern and how often it could be taken at once; so often it is taken."""
        need = Counter(pattern)
        times = min(self.left[length] // number for length, number in need.items())
        for length, number in need.items():
            self.left[length] -= number * times
            if not self.left[length]:
                self.hide(length)
        return pattern, times

    def beside(self, longest: int) -> Pattern:
        """Return what fills the sequence that this length begins, or nothing if nothing does."""
        room = self._capacity - longest
        fitting = self._bits & ((1 << room + 1) - 1)
        if self.left[longest] == 1:
            fitting &= ~(1 << longest)
        if not fitting:
            return ()
        one = fitting.bit_length() - 1
        if room - one <= self._tolerance:
            return (one,)
        for number in range(max(2, room // one), MOST_BESIDE + 1):
            found = self._several((longest,), room, number, tries=TRIES)
            if found:
                return found
        return ()

    def _several(self, chosen: Pattern, room: int, number: int, *, tries: int) -> Pattern:
        """Return this number of lengths, about alike, that fill the room, or nothing."""
        if number == 2:
            return self._pair(chosen, room)
        least = -(-room // number)
        longer = self._bits >> least
        for _ in range(tries):
            length = least + (longer & -longer).bit_length() - 1
            if not longer or length >= room:
                break
            longer &= longer - 1
            if chosen.count(length) < self.left[length]:
                rest = self._several(
                    (*chosen, length), room - length, number - 1, tries=max(2, tries // 4)
                )
                if rest:
                    return (length, *rest)
        return ()

    def _pair(self, chosen: Pattern, room: int) -> Pattern:
        """Return two lengths that fill the room, the longer as short as may be, or nothing."""
        for total in range(room, max(1, room - WASTE), -1):
            pairs = self._bits & (self._mirror >> self._capacity - total)
            least = max((total + 1) // 2, total * self._percent // 100)
            pairs >>= least
            for _ in range(3):  # more fail only where few documents are left
                if not pairs:
                    break
                longer = least + (pairs & -pairs).bit_length() - 1
                pairs &= pairs - 1
                pattern = (*chosen, longer, total - longer)
                if all(pattern.count(each) <= self.left[each] for each in pattern[-2:]):
                    return pattern[-2:]
        return ()


def _bit_set(numbers: Iterable[int], most: int) -> int:
    """Return the integer that has these bits, 0 to `most`, set."""
    flags = np.zeros(most + 1, np.uint8)
    flags[list(numbers)] = 1
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")
