"""Array jobs: which of N independent jobs handles a trajectory.

The share of a job is a pure function of the content hash and N, so that any job can be run or run
again anywhere, and two copies of one content are in one share, where the second costs nothing.
"""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayJob:
    """One of the jobs that share a stage."""

    shard_index: int
    """From 0 to below `num_shards`."""
    num_shards: int
    """How many jobs there are."""

    def has(self, content_hash: str) -> bool:
        """Return whether trajectories of a content are this job's."""
        return shard_of(content_hash, self.num_shards) == self.shard_index


def shard_of(content_hash: str, num_shards: int) -> int:
    """Return the index of the job that handles trajectories of a content, in 0..num_shards-1.

    The content hash is hashed once more: a sample holds the lowest ones of the data, so that what
    they leave when divided need not be even.
    """
    digest = hashlib.blake2b(content_hash.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % num_shards
