"""Weights of characters of a step's message -> weights of its tokens.

A token has the weight of its first character; one that only continues a character has that
character's. The characters of a field are found in the step's text by `field_spans`, and the tokens
of the text by `step_chars`, which says how many characters each token begins. Only steps whose
characters are weighted are looked at, one by one.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from srft_prep.errors import LabelError, ShardError
from srft_prep.factors import Factors
from srft_prep.ragged import offsets_of
from srft_prep.token_columns import TokenColumns
from srft_prep.token_weights import Segments, joined, parts_with, read_column, spans_of_part
from srft_prep.weight_files import FIRST_FIELD, where
from srft_prep.weights import FIELDS

if TYPE_CHECKING:
    from numpy.typing import NDArray

Shown = dict[tuple[int, int], list[tuple[int, int, int]]]
"""(step's place, field) -> (start, end, skipped) of where the field stands in the step's text."""


def by_character(
    segments: Segments,
    columns: TokenColumns,
    factors: Sequence[Factors],
    counts: Counter[str],
) -> Segments:
    """Return segments in which weighted characters have their weights.

    Counts as `clipped_spans` those that reach behind what the template shows of a field: it may
    have stripped white space there, which no token holds.

    Raises:
        LabelError: characters of a field that the step does not show, or that lie behind it.
        ShardError: `step_chars` does not fit the steps.
    """
    of_span: dict[int, list[tuple[Factors, int]]] = {}
    for each in factors:
        ours = each.of_characters()
        for place, span in enumerate(ours.spans.tolist()):
            of_span.setdefault(span, []).append((ours, place))
    if not of_span:
        return segments
    chosen = np.zeros(len(columns.steps), np.bool_)
    chosen[list(of_span)] = True
    pieces = []
    for number in parts_with(columns, chosen):
        shown = _shown(columns, number, chosen)
        for span, begun in _step_chars(columns, number, chosen):
            given = _token_factors(span, begun, shown, of_span[span], columns, counts)
            if len(begun):
                pieces.append(_resegmented(segments, span, given))
    return segments.replaced(joined(pieces), chosen) if pieces else segments


def _shown(columns: TokenColumns, number: int, chosen: "NDArray[np.bool_]") -> Shown:
    _, spans, fields = spans_of_part(columns, number, "field_spans", FIELDS)
    keep = chosen[spans]
    shown: Shown = {}
    for span, name, *place in zip(
        spans[keep].tolist(), *(field[keep].tolist() for field in fields), strict=True
    ):
        start, end, skipped = place
        shown.setdefault((span, name), []).append((start, end, skipped))
    return shown


def _step_chars(
    columns: TokenColumns, number: int, chosen: "NDArray[np.bool_]"
) -> "Iterator[tuple[int, NDArray[np.int16]]]":
    """Yield (place, characters begun by each token) of the chosen steps of a token part."""
    column = read_column(columns.parts[number], "step_chars")
    values = pa.concat_arrays(column.chunks).flatten().to_numpy()
    first, last = columns.part_offsets[number : number + 2]
    steps = slice(int(columns.span_offsets[first]), int(columns.span_offsets[last]))
    bounds = offsets_of(columns.ends[steps] - columns.starts[steps])
    if bounds[-1] != len(values):
        raise ShardError(
            f"{columns.parts[number]}: step_chars counts {len(values)} tokens, the steps have "
            f"{bounds[-1]}; run tokenize again"
        )
    for place in np.flatnonzero(chosen[steps]).tolist():
        yield steps.start + place, values[bounds[place] : bounds[place + 1]]


def _token_factors(
    span: int,
    begun: "NDArray[np.int16]",
    shown: Shown,
    given: list[tuple[Factors, int]],
    columns: TokenColumns,
    counts: Counter[str],
) -> "NDArray[np.float64]":
    """Return what the weights of a step's characters multiply each of its tokens by."""
    before = np.cumsum(begun, dtype=np.int64) - begun
    first_chars = np.where(begun > 0, before, before - 1)
    result = np.ones(len(begun))
    for factors, place in given:
        name = int(factors.targets[place]) - FIRST_FIELD
        start, end = int(factors.starts[place]), int(factors.ends[place])
        pieces = shown.get((span, name), [])
        last = max((skipped + stop - begin for begin, stop, skipped in pieces), default=0)
        if start >= last:
            row = int(np.searchsorted(columns.span_offsets, span, side="right")) - 1
            raise LabelError(
                f"{where(factors.path, int(factors.lines[place]))}: "
                f"{columns.names[columns.trajectories[row]]}: step {columns.steps[span]}: "
                + (
                    f"expected characters within the {last} of {FIELDS[name]} that the step "
                    f"shows, got {start}-{end}"
                    if pieces
                    else f"the step shows no {FIELDS[name]}: the message has none, or the chat "
                    "template leaves it out"
                )
            )
        counts["clipped_spans"] += end > last
        for begin, stop, skipped in pieces:
            low, high = (min(max(begin + char - skipped, begin), stop) for char in (start, end))
            tokens = slice(*np.searchsorted(first_chars, (low, high)))
            result[tokens] *= factors.weights[place]
    return result


def _resegmented(segments: Segments, span: int, factors: "NDArray[np.float64]") -> Segments:
    """Return the segments of a step whose tokens' weights are multiplied by factors."""
    first, last = np.searchsorted(segments.spans, (span, span + 1))
    lengths = segments.ends[first:last] - segments.starts[first:last]
    weights = np.repeat(segments.weights[first:last], lengths) * factors
    edges = np.flatnonzero(np.diff(weights, prepend=np.nan, append=np.nan))
    start = segments.starts[first]
    count = len(edges) - 1
    return Segments(
        rows=np.full(count, segments.rows[first]),
        spans=np.full(count, span),
        starts=(start + edges[:-1]).astype(np.int32),
        ends=(start + edges[1:]).astype(np.int32),
        weights=weights[edges[:-1]],
    )
