"""Token rows -> documents: what goes into packed sequences, before packing.

A document is a half-open range of one token row and the steps that it trains. Most rows are one
document; a row longer than a packed sequence is cut at a step's end, or becomes several windows,
or is left out, as asked. The cut is behind an end of turn, so that no step is ever half trained.
Rows that fit are cut all at once, longer ones one by one (some 30 us each).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from srft_prep.config import Overlong
from srft_prep.ragged import ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

Span = tuple[int, int, int]
"""(step, start, end), a half-open token range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """D documents in the order of their rows, and of their places in them."""

    rows: "NDArray[np.int64]"
    """Index of each one's token row, [D]."""
    starts: "NDArray[np.int32]"
    ends: "NDArray[np.int32]"
    """Half-open range of the row's tokens, [D]."""
    first_steps: "NDArray[np.int64]"
    last_steps: "NDArray[np.int64]"
    """Half-open range of the steps that it trains, as places among all steps, [D]."""

    @property
    def lengths(self) -> "NDArray[np.int32]":
        """Number of tokens, [D]."""
        return self.ends - self.starts

    def select(self, chosen: "NDArray[np.bool_]") -> "Documents":
        """Return some of the documents."""
        return Documents(
            rows=self.rows[chosen],
            starts=self.starts[chosen],
            ends=self.ends[chosen],
            first_steps=self.first_steps[chosen],
            last_steps=self.last_steps[chosen],
        )

    def of_steps(self, num_steps: int) -> "NDArray[np.int32]":
        """Return the document that trains each step, -1 where none does, [num_steps]."""
        documents = np.full(num_steps, -1, np.int32)
        lengths = self.last_steps - self.first_steps
        places = ranges(self.first_steps, lengths)
        documents[places] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        return documents


def cut_rows(
    rows: "NDArray[np.int64]",
    num_tokens: "NDArray[np.int32]",
    spans: "tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]",
    *,
    seq_len: int,
    overlong: Overlong,
) -> Documents:
    """Return the documents of token rows.

    Args:
        rows: which rows to take, in order.
        num_tokens: length of every row, [R].
        spans: offsets of the rows' steps [R + 1], their first tokens and those behind them, [S].
        seq_len: the longest document.
        overlong: `truncate` keeps the longest start that ends behind a step; `windows` makes as
            many documents as it takes to train every step once; otherwise no document is made.
    """
    offsets, starts, ends = spans
    fits = num_tokens[rows] <= seq_len
    short = rows[fits]
    pieces = [
        np.stack(
            [short, np.zeros_like(short), num_tokens[short], offsets[short], offsets[short + 1]]
        )
    ]
    found: list[tuple[int, int, int, int, int]] = []
    for row in rows[~fits].tolist() if overlong in ("truncate", "windows") else ():
        first, last = int(offsets[row]), int(offsets[row + 1])
        pairs = zip(starts[first:last].tolist(), ends[first:last].tolist(), strict=True)
        steps = [(first + i, start, end) for i, (start, end) in enumerate(pairs) if start < end]
        cuts = _truncated if overlong == "truncate" else _windows
        for start, end, trained in cuts(steps, seq_len):
            found.append((row, start, end, steps[trained[0]][0], steps[trained[-1]][0] + 1))
    if found:
        pieces.append(np.array(found, np.int64).T)
    table = np.concatenate(pieces, axis=1)
    table = table[:, np.argsort(table[0], kind="stable")]
    return Documents(
        rows=table[0],
        starts=table[1].astype(np.int32),
        ends=table[2].astype(np.int32),
        first_steps=table[3],
        last_steps=table[4],
    )


def _truncated(spans: Sequence[Span], seq_len: int) -> Iterator[tuple[int, int, range]]:
    """Yield the (start, end, indices of the spans trained) of what is kept of an over-long row."""
    kept = sum(end <= seq_len for _, _, end in spans)
    if kept:
        yield 0, spans[kept - 1][2], range(kept)


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
            if earliest >= spans[first][1]:  # one token of context is needed to predict the first
                first += 1
                continue
            behind = (end for _, _, end in spans[:first] if end >= earliest)
            start = min(next(behind, earliest), spans[first][1] - 1)
            last = first + 1
        end = spans[last - 1][2]
        yield start, end, range(first, last)
        first = last
        boundaries = (boundary for _, _, boundary in spans if end - boundary <= seq_len // 2)
        start = next(boundaries)
        if first < len(spans):
            start = min(start, spans[first][1] - 1)
