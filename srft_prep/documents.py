"""Token rows + step weights -> documents: what goes into packed sequences, before packing.

A document is a half-open range of one token row with runs of weighted tokens. Most rows are one
document; a row longer than a packed sequence is cut at a step's end, or becomes several windows,
or is left out, as asked. The cut is behind an end of turn, so that no step is ever half trained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from srft_prep.config import Overlong

Span = tuple[int, int, int]
"""(step, start, end), a half-open token range."""

Run = tuple[int, int, float]
"""(start, length, weight > 0), relative to the document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A piece of one token row."""

    row: int
    """Index of the token row among those of the recipe."""
    start: int
    end: int
    """Half-open range of the row's tokens."""
    runs: tuple[Run, ...]
    """Weighted tokens, sorted and disjoint."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What became of an over-long row."""

    documents: tuple[Document, ...]
    num_lost_steps: int
    """Steps with a weight > 0 that are in no document."""
    num_lost_tokens: int
    """Tokens with a weight > 0 that are in no document."""


def documents_of(
    row: int,
    num_tokens: int,
    spans: Sequence[Span],
    weights: Sequence[float],
    *,
    seq_len: int,
    overlong: Overlong,
) -> Cut:
    """Return the documents of one token row.

    Args:
        row: the row's index.
        num_tokens: its length, T.
        spans: its steps' token ranges, in order.
        weights: the weight of each span.
        seq_len: the longest document.
        overlong: `truncate` keeps the longest start that ends behind a step; `windows` makes as
            many documents as it takes to train every step once; otherwise no document is made.
    """
    some = [i for i, (_, start, end) in enumerate(spans) if start < end]  # no token, no step
    spans, weights = [spans[i] for i in some], [weights[i] for i in some]
    if num_tokens <= seq_len:
        ranges = [(0, num_tokens, range(len(spans)))]
    elif overlong == "truncate":
        kept = sum(end <= seq_len for _, _, end in spans)
        ranges = [(0, spans[kept - 1][2], range(kept))] if kept else []
    elif overlong == "windows":
        ranges = list(_windows(spans, seq_len))
    else:
        ranges = []
    covered = {index for _, _, indices in ranges for index in indices}
    lost = [i for i, weight in enumerate(weights) if weight > 0 and i not in covered]
    return Cut(
        documents=tuple(
            Document(row=row, start=start, end=end, runs=_runs(start, spans, weights, indices))
            for start, end, indices in ranges
        ),
        num_lost_steps=len(lost),
        num_lost_tokens=sum(spans[i][2] - spans[i][1] for i in lost),
    )


def _windows(spans: Sequence[Span], seq_len: int) -> Iterator[tuple[int, int, range]]:
    """Yield (start, end, indices of the spans trained) of the windows of an over-long row.

    A later window replays what came before its first step as context of weight 0: as many whole
    steps as fit into half a window, and more rather than less where a step follows a long
    observation. Only where one observation alone is longer than a window does a window start
    within it. A step that fills a window or more is left out.
    """
    first = start = 0
    while first < len(spans):
        last = first
        while last < len(spans) and spans[last][2] - start <= seq_len:
            last += 1
        if last == first:  # the context is too long for even one step
            earliest = spans[first][2] - seq_len
            behind = (end for _, _, end in spans[:first] if end >= earliest)
            start = next(behind, earliest)
            if start >= spans[first][1]:  # a token of context is needed to predict the first one
                first += 1
                continue
            last = first + 1
        end = spans[last - 1][2]
        yield start, end, range(first, last)
        first = last
        boundaries = (boundary for _, _, boundary in spans if end - boundary <= seq_len // 2)
        start = next(boundaries)


def _runs(
    start: int, spans: Sequence[Span], weights: Sequence[float], indices: range
) -> tuple[Run, ...]:
    return tuple(
        (spans[i][1] - start, spans[i][2] - spans[i][1], weights[i])
        for i in indices
        if weights[i] > 0
    )
