"""Where everything lies in the shards: the plan's documents in the order of their packs.

All tokens of all packed sequences stand one after the other; a document is a range of them, and so
is a packed sequence, and a shard. Then a shard's columns are slices of the layout's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from srft_prep.pack_plan import Plan
from srft_prep.packing import pack_documents, spread
from srft_prep.ragged import exact_sum, exact_sums, offsets_of, ranges
from srft_prep.runs import Runs

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """D documents in P packed sequences, both in the order of the shards."""

    pack_documents: "NDArray[np.int64]"
    """Documents of pack p: [pack_documents[p], pack_documents[p + 1])."""
    pack_tokens: "NDArray[np.int64]"
    """Tokens of pack p, likewise."""
    pack_runs: "NDArray[np.int64]"
    """Runs of pack p, likewise."""
    places: "NDArray[np.int64]"
    """First token of each document of the *plan*, [D]."""
    lengths: "NDArray[np.int32]"
    """Tokens of each document, [D]."""
    trajectories: "NDArray[np.int32]"
    """Index of each document's trajectory, [D]."""
    runs: Runs
    """Weighted tokens, relative to the packed sequence; offsets by document, [D + 1]."""
    pack_sums: "NDArray[np.float64]"
    """Sum of the weights of each pack, [P]; this and the next two are exact, rounded once."""
    document_sums: "NDArray[np.float64]"
    """[D]"""
    trajectory_sums: "NDArray[np.float64]"
    """Of each document's whole trajectory, over all its documents, [D]."""

    @property
    def num_packs(self) -> int:
        """P."""
        return len(self.pack_sums)

    @property
    def num_tokens(self) -> int:
        """Tokens of all packs."""
        return int(self.pack_tokens[-1])

    def totals(self, first: int, last: int) -> dict[str, int | float]:
        """Return the numbers of the packs [first, last)."""
        runs = slice(self.pack_runs[first], self.pack_runs[last])
        return {
            "num_sequences": last - first,
            "num_documents": int(self.pack_documents[last] - self.pack_documents[first]),
            "num_tokens": int(self.pack_tokens[last] - self.pack_tokens[first]),
            "num_loss_tokens": int(self.runs.lengths[runs].sum(dtype=np.int64)),
            "sum_weights": exact_sum(self.runs.products[runs]),
        }


def lay_out(plan: Plan, *, seq_len: int, seed: int) -> Layout:
    """Pack a plan's documents and bring the packs into their order.

    Packs are filled by length, so that neighbours would be alike; `spread` deals them out by their
    longest document, whose length tells best what a pack holds (one long one, or many short ones).
    """
    documents, runs = plan.documents, plan.runs
    lengths = documents.lengths
    packs = pack_documents(lengths.astype(np.int64), seq_len)
    order = spread(lengths[packs.members[packs.starts[:-1]]].astype(np.int64), seed)
    counts = np.diff(packs.starts)[order]
    members = packs.members[ranges(packs.starts[:-1][order], counts)]
    pack_documents_ = offsets_of(counts)
    tokens = offsets_of(lengths[members])
    places = np.empty(len(members), np.int64)
    places[members] = tokens[:-1]
    numbers = np.diff(runs.offsets)[members]
    moved = ranges(runs.offsets[:-1][members], numbers)
    offsets = offsets_of(numbers)
    pack_tokens = tokens[pack_documents_]
    in_pack = tokens[:-1] - np.repeat(pack_tokens[:-1], counts)
    laid = Runs(
        offsets=offsets,
        starts=(runs.starts[moved] + np.repeat(in_pack, numbers)).astype(np.int32),
        lengths=runs.lengths[moved],
        weights=runs.weights[moved],
    )
    trajectories = plan.columns.trajectories[documents.rows]
    sums = exact_sums(laid.products, offsets)
    return Layout(
        pack_documents=pack_documents_,
        pack_tokens=pack_tokens,
        pack_runs=offsets[pack_documents_],
        places=places,
        lengths=lengths[members],
        trajectories=trajectories[members],
        runs=laid,
        pack_sums=exact_sums(laid.products, offsets[pack_documents_]),
        document_sums=sums,
        trajectory_sums=_trajectory_sums(trajectories, runs)[trajectories[members]],
    )


def _trajectory_sums(trajectories: "NDArray[np.int32]", runs: Runs) -> "NDArray[np.float64]":
    """Return the sum of the weights of each trajectory, 0 for one that has no document."""
    owners = np.repeat(trajectories, np.diff(runs.offsets))
    order = np.argsort(owners, kind="stable")
    numbers = np.bincount(owners, minlength=int(trajectories.max()) + 1)
    return exact_sums(runs.products[order], offsets_of(numbers))
