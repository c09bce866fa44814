"""What an export counts on its way, and what a tool without weights makes of them.

A loss that divides the weighted sum by the sum of weights, as the paper's does, does not change
when all weights are multiplied by one number: weights that are all equal lose nothing as weight 1.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

import numpy as np

from srft_prep.export.packs import Packs

SHOWN_WEIGHTS: Final = 16
"""Different weights that are counted one by one; soft labels give a weight to every step."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """Counts of packs; those of several files add up."""

    rows: int = 0
    """Rows written."""
    packs: int = 0
    documents: int = 0
    longest_document: int = 0
    """Tokens."""
    most_documents: int = 0
    """In one pack."""
    shortest_pack: int | None = None
    """Tokens of the shortest pack without the last of each of its documents."""
    weighted_tokens: int = 0
    sum_weights: float = 0.0
    least_weight: float | None = None
    """Of the weights > 0."""
    greatest_weight: float | None = None
    other_tokens: int = 0
    """Tokens of a weight that is neither 0 nor 1."""
    other_weights: float = 0.0
    """The sum of their weights."""
    by_weight: dict[str, int] | None = field(default_factory=dict)
    """Tokens by weight, shortest decimal that reads back as float32; None: too many weights."""

    @classmethod
    def of(cls, packs: Packs, *, rows: int) -> Self:
        """Return the counts of some packs that became `rows` rows."""
        counts = np.diff(packs.documents)
        net = np.diff(packs.tokens) - counts
        lengths, weights = packs.run_lengths.astype(np.int64), packs.run_weights
        other = weights != 1
        products = lengths * weights.astype(np.float64)
        known, places = np.unique(weights, return_inverse=True)
        tokens = np.bincount(places, lengths, minlength=len(known)).astype(np.int64)
        return cls(
            rows=rows,
            packs=packs.num_packs,
            documents=len(packs.lengths),
            longest_document=int(packs.lengths.max(initial=0)),
            most_documents=int(counts.max(initial=0)),
            shortest_pack=int(net.min()) if len(net) else None,
            weighted_tokens=int(lengths.sum()),
            sum_weights=float(products.sum()),
            least_weight=float(known[0]) if len(known) else None,
            greatest_weight=float(known[-1]) if len(known) else None,
            other_tokens=int(lengths[other].sum()),
            other_weights=float(products[other].sum()),
            by_weight=None
            if len(known) > SHOWN_WEIGHTS
            else {str(weight): int(count) for weight, count in zip(known, tokens, strict=True)},
        )

    @classmethod
    def total(cls, tallies: Iterable[Self]) -> Self:
        """Return the counts of all."""
        total = cls()
        for each in tallies:
            for name in _SUMS:
                setattr(total, name, getattr(total, name) + getattr(each, name))
            for name, choose in _EXTREMES.items():
                known = [
                    value
                    for value in (getattr(total, name), getattr(each, name))
                    if value is not None
                ]
                setattr(total, name, choose(known) if known else None)
            if total.by_weight is not None:
                merged = Counter(total.by_weight) + Counter(each.by_weight or {})
                many = each.by_weight is None or len(merged) > SHOWN_WEIGHTS
                total.by_weight = None if many else dict(sorted(merged.items()))
        return total

    def entry(self) -> dict[str, Any]:
        """Return the counts as JSON; `Tally(**entry)` reads it."""
        return asdict(self)

    def lost_weights(self) -> dict[str, Any] | None:
        """Return what a tool without weights changes; None where it changes nothing."""
        if self.least_weight is None or self.least_weight == self.greatest_weight:
            return None
        return {
            "tokens": self.other_tokens,
            "of_tokens": self.weighted_tokens,
            "sum_weights": self.other_weights,
            "least_weight": self.least_weight,
            "greatest_weight": self.greatest_weight,
            "tokens_by_weight": self.by_weight,
        }


_SUMS: Final = (
    "rows",
    "packs",
    "documents",
    "weighted_tokens",
    "sum_weights",
    "other_tokens",
    "other_weights",
)
_EXTREMES: Final[dict[str, Any]] = {
    "longest_document": max,
    "most_documents": max,
    "shortest_pack": min,
    "least_weight": min,
    "greatest_weight": max,
}
