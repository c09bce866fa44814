"""The order of an epoch: a function of (seed, epoch) and of nothing else.

Each counter is hashed, and the counters are sorted by their hashes. So no state is carried from
step to step: a run that goes on computes the order anew, in milliseconds, and stands where it was.

A row group of Parquet is decoded whole. To read each once an epoch, groups are shuffled, and then
the sequences within windows of groups. `pack` has dealt the sequences to the groups at random, so
that a window is a sample of the whole; it holds several steps' sequences.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def epoch_order(
    groups: "NDArray[np.integer]", *, window: int, seed: int, epoch: int
) -> "NDArray[np.int64]":
    """Return the sequences of an epoch in their order [N]: a permutation of 0..N-1.

    Args:
        groups: the row group of each sequence [N].
        window: groups whose sequences are mixed.
        seed: of the run.
        epoch: its number, from 0.
    """
    _, members = np.unique(groups, return_inverse=True)
    shuffled = np.argsort(_hashes(int(members.max(initial=-1)) + 1, f"groups {seed} {epoch}"))
    windows = np.empty_like(shuffled)
    windows[shuffled] = np.arange(len(shuffled)) // window
    return np.lexsort((_hashes(len(groups), f"sequences {seed} {epoch}"), windows[members]))


def _hashes(size: int, key: str) -> "NDArray[np.uint64]":
    """Return the hashes of the counters 0..size-1 under a key, all different [size].

    SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), a bijection of 64 bits.
    """
    start, step = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=16).digest(), "<u8")
    mixed = np.arange(size, dtype=np.uint64) * (step | np.uint64(1)) + start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    hashes: NDArray[np.uint64] = mixed
    return hashes
