"""Which documents share a packed sequence: global best-fit decreasing.

Longest first, each document goes to the fullest sequence that still has room (the classic bound:
at most 11/9 of the optimum plus a constant; on the lengths of agent trajectories within half a
percent of Martello and Toth's lower bound, see `benchmarks/packing.py`). The sequences are kept by
free room, and one big integer has bit r set where some sequence has room r, so that "the smallest
room >= n" is one shift and one bit trick. Cost: about 2 us a document at a capacity of 32,768.
"""

from collections.abc import Sequence

from srft_prep.errors import ShardError


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return packed sequences as lists of document indices; every index occurs exactly once.

    Documents of equal length go in the order of their indices, so that the result is a function
    of the lengths alone.

    Raises:
        ShardError: a document is longer than the capacity, or empty.
    """
    by_room: dict[int, list[int]] = {}
    packs: list[list[int]] = []
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 0 < length <= capacity:
            raise ShardError(f"document {index}: expected 1 to {capacity} tokens, got {length}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        left = room - length
        if left:
            by_room.setdefault(left, []).append(pack)
            rooms |= 1 << left
    return packs
