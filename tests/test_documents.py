from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.config import Overlong
from srft_prep.documents import Documents, cut_rows
from srft_prep.ragged import offsets_of
from srft_prep.runs import weighted_runs
from srft_prep.token_weights import Segments
from tests import strategies
from tests.strategies import Spans

Row = tuple[int, Spans, list[float]]
SEQ_LEN = 40

rows = strategies.token_rows()
seq_lens = st.integers(1, 120)
each_overlong = pytest.mark.parametrize("overlong", ["truncate", "windows", "drop", "error"])


@dataclass(frozen=True)
class Document:
    """A document as one object."""

    row: int
    start: int
    end: int
    runs: tuple[tuple[int, int, float], ...]

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Cut:
    """What became of a row."""

    documents: tuple[Document, ...]
    num_lost_steps: int = 0
    num_lost_tokens: int = 0


def spans_of(*rows: Row) -> tuple[Any, Any, Any]:
    """Offsets of the steps of rows, their first tokens and those behind them."""
    spans = np.array([span for _, spans, _ in rows for span in spans], np.int32).reshape(-1, 3)
    return offsets_of(np.array([len(spans) for _, spans, _ in rows])), spans[:, 1], spans[:, 2]


def documents_of(rows: list[Row], taken: list[int], seq_len: int, overlong: Overlong) -> Documents:
    return cut_rows(
        np.array(taken, np.int64),
        np.array([num_tokens for num_tokens, _, _ in rows], np.int32),
        spans_of(*rows),
        seq_len=seq_len,
        overlong=overlong,
    )


def segments_of(rows: list[Row]) -> Segments:
    """One segment a step."""
    offsets, starts, ends = spans_of(*rows)
    return Segments(
        rows=np.repeat(np.arange(len(rows), dtype=np.int32), np.diff(offsets)),
        spans=np.arange(len(starts)),
        starts=starts,
        ends=ends,
        weights=np.array([weight for _, _, weights in rows for weight in weights], np.float64),
    )


def cut(row: Row, seq_len: int, overlong: Overlong) -> Cut:
    """Documents of a row that stands at place 7, behind rows that are not taken."""
    filler: Row = (50, [(0, 3, 5)], [1.0])
    rows = [*[filler] * 7, row, filler]
    documents = documents_of(rows, [7], seq_len, overlong)
    segments = segments_of(rows)
    ours = segments.select(segments.rows == 7)
    runs, lost = weighted_runs(ours, documents, num_steps=len(segments.rows))
    found = list(
        zip(runs.starts.tolist(), runs.lengths.tolist(), runs.weights.tolist(), strict=True)
    )
    return Cut(
        documents=tuple(
            Document(row, start, end, tuple(found[runs.offsets[i] : runs.offsets[i + 1]]))
            for i, (row, start, end) in enumerate(
                zip(documents.rows, documents.starts, documents.ends, strict=True)
            )
        ),
        num_lost_steps=lost["lost_steps"],
        num_lost_tokens=lost["lost_tokens"],
    )


def weights_by_token(document: Document) -> dict[int, float]:
    """Weight of each weighted token of the row, by its place in the row."""
    found: dict[int, float] = {}
    for start, length, weight in document.runs:
        for place in range(document.start + start, document.start + start + length):
            assert place not in found, "runs overlap"
            found[place] = weight
    return found


def expected_weights(row: Row, *, first: int = 1) -> dict[int, float]:
    """Weight of each weighted token of the row, by its place; nothing predicts the first one."""
    _, spans, weights = row
    return {
        place: weight
        for (_, start, end), weight in zip(spans, weights, strict=True)
        for place in range(max(start, first), end)
        if weight > 0
    }


def trained_steps(row: Row, document: Document) -> list[int]:
    """Indices of the weighted steps of which the document trains a token."""
    places = weights_by_token(document)
    return [step for step, start, end in row[1] if any(p in places for p in range(start, end))]


@given(rows, seq_lens)
@each_overlong
def test_documents_are_runs_of_whole_steps_within_their_bounds(
    overlong: Overlong, row: Row, seq_len: int
) -> None:
    expected = expected_weights(row)
    for document in cut(row, seq_len, overlong).documents:
        assert document.row == 7
        assert 0 <= document.start < document.end <= row[0]
        assert document.length <= seq_len
        position = 0
        for start, length, weight in document.runs:
            assert position <= start < start + length <= document.length
            assert weight > 0
            position = start + length
        places = weights_by_token(document)
        assert places.items() <= expected.items(), "a weight that no step has"
        for _, start, end in row[1]:
            inside = [place in places for place in range(max(start, 1), end)]
            assert all(inside) or not any(inside), "half a step is trained"


@given(rows)
@each_overlong
def test_a_row_that_fits_is_one_document_whatever_is_asked(overlong: Overlong, row: Row) -> None:
    result = cut(row, row[0], overlong)
    [document] = result.documents
    assert (document.start, document.end) == (0, row[0])
    assert weights_by_token(document) == expected_weights(row)
    assert result.num_lost_steps == 0


@given(st.lists(rows, max_size=6), seq_lens, st.data())
@each_overlong
def test_rows_are_cut_together_as_each_is_alone(
    overlong: Overlong, rows: list[Row], seq_len: int, data: Any
) -> None:
    taken = [i for i in range(len(rows)) if data.draw(st.booleans())]
    together = documents_of(rows, taken, seq_len, overlong)
    alone = [documents_of([rows[i]], [0], seq_len, overlong) for i in taken]
    places = spans_of(*rows)[0]
    for name in ("starts", "ends"):
        assert getattr(together, name).tolist() == [
            value for each in alone for value in getattr(each, name).tolist()
        ]
    for name in ("first_steps", "last_steps"):
        assert getattr(together, name).tolist() == [
            places[i] + value
            for i, each in zip(taken, alone, strict=True)
            for value in getattr(each, name).tolist()
        ]
    assert together.rows.tolist() == [
        i for i, each in zip(taken, alone, strict=True) for _ in each.rows
    ]


@given(st.lists(rows, max_size=6), seq_lens, st.data(), st.integers(1, 9))
@each_overlong
def test_weights_are_the_same_however_many_rows_are_worked_on_at_a_time(
    overlong: Overlong, rows: list[Row], seq_len: int, data: Any, chunk: int
) -> None:
    taken = [i for i in range(len(rows)) if data.draw(st.booleans())]
    documents = documents_of(rows, taken, seq_len, overlong)
    segments = segments_of(rows)
    together, lost = weighted_runs(segments, documents, num_steps=len(segments.rows))
    some, lost_of_some = weighted_runs(
        segments, documents, num_steps=len(segments.rows), chunk=chunk
    )
    assert lost_of_some == lost
    for name in ("offsets", "starts", "lengths", "weights"):
        np.testing.assert_array_equal(getattr(some, name), getattr(together, name))


@given(rows, seq_lens)
@each_overlong
def test_lost_steps_and_tokens_are_those_that_no_document_trains(
    overlong: Overlong, row: Row, seq_len: int
) -> None:
    result = cut(row, seq_len, overlong)
    trained = {place for each in result.documents for place in weights_by_token(each)}
    weighted = expected_weights(row, first=0).keys()
    assert result.num_lost_tokens == len(weighted - trained)
    shown = {0} if any(each.start == 0 for each in result.documents) else set()
    untouched = [
        step
        for step, start, end in row[1]
        if weighted & set(range(start, end)) and not (trained | shown) & set(range(start, end))
    ]
    assert result.num_lost_steps == len(untouched)


@given(rows, seq_lens)
def test_truncation_keeps_the_longest_start_that_ends_behind_a_step(row: Row, seq_len: int) -> None:
    num_tokens, spans, _ = row
    if num_tokens <= seq_len:
        return
    ends = [end for _, start, end in spans if start < end <= seq_len]
    documents = cut(row, seq_len, "truncate").documents
    assert [(each.start, each.end) for each in documents] == ([(0, max(ends))] if ends else [])


@given(rows, seq_lens)
def test_windows_train_each_step_that_fits_exactly_once(row: Row, seq_len: int) -> None:
    num_tokens, spans, weights = row
    documents = cut(row, seq_len, "windows").documents
    found: dict[int, float] = {}
    for document in documents:
        places = weights_by_token(document)
        assert not places.keys() & found.keys(), "a token is trained twice"
        found |= places
    fits = [end - start < seq_len or end <= seq_len for _, start, end in spans]
    kept = [weight if fit else 0.0 for weight, fit in zip(weights, fits, strict=True)]
    assert found == expected_weights((num_tokens, spans, kept))


@given(rows, seq_lens)
def test_windows_come_in_order_and_each_trains_steps_of_its_own(row: Row, seq_len: int) -> None:
    every_step_counts = [1.0] * len(row[1])
    # nothing predicts a row's first token: a step of that one alone trains nothing anywhere
    spans = [(step, start, end) for step, start, end in row[1] if max(start, 1) < end]
    whole = (row[0], spans, every_step_counts[: len(spans)])
    documents = cut(whole, seq_len, "windows").documents
    if whole[0] <= seq_len:
        return
    steps = [trained_steps(whole, document) for document in documents]
    assert all(steps), "a window that trains nothing"
    flat = [step for each in steps for step in each]
    assert flat == sorted(flat)


@given(rows, seq_lens, st.data())
def test_weights_never_decide_where_documents_lie(row: Row, seq_len: int, data: Any) -> None:
    other = [data.draw(strategies.weights()) for _ in row[2]]
    for overlong in ("truncate", "windows"):
        one, two = (
            cut((row[0], row[1], weights), seq_len, overlong).documents
            for weights in (row[2], other)
        )
        assert [(d.start, d.end) for d in one] == [(d.start, d.end) for d in two]


@given(rows, seq_lens)
@pytest.mark.parametrize("overlong", ["drop", "error"])
def test_a_longer_row_makes_no_document_where_it_is_not_to_be_cut(
    overlong: Overlong, row: Row, seq_len: int
) -> None:
    if row[0] > seq_len:
        assert cut(row, seq_len, overlong).documents == ()


#   prompt 0-10, then steps of 5 tokens, each behind an observation of 5
STEPS: Spans = [(step, 10 + 10 * step, 15 + 10 * step) for step in range(6)]
LONG: Row = (70, STEPS, [1.0, 0.0, 0.5, 1.0, 1.0, 2.0])


def test_truncating_an_example() -> None:
    result = cut(LONG, SEQ_LEN, "truncate")
    [document] = result.documents
    assert (document.start, document.end) == (0, 35)
    assert document.runs == ((10, 5, 1.0), (30, 5, 0.5))
    assert (result.num_lost_steps, result.num_lost_tokens) == (3, 15)


def test_windows_of_an_example_replay_half_a_window_as_context() -> None:
    result = cut(LONG, SEQ_LEN, "windows")
    assert [(each.start, each.end, each.runs) for each in result.documents] == [
        (0, 35, ((10, 5, 1.0), (30, 5, 0.5))),
        (15, 55, ((25, 5, 1.0), (35, 5, 1.0))),
        (35, 65, ((25, 5, 2.0),)),
    ]
    assert (result.num_lost_steps, result.num_lost_tokens) == (0, 0)


def test_a_step_longer_than_a_window_is_lost_and_the_steps_around_it_are_not() -> None:
    row: Row = (120, [(0, 5, 10), (1, 20, 100), (2, 110, 115)], [1.0, 1.0, 1.0])
    result = cut(row, SEQ_LEN, "windows")
    assert [trained_steps(row, each) for each in result.documents] == [[0], [2]]
    assert (result.num_lost_steps, result.num_lost_tokens) == (1, 80)


def test_an_observation_longer_than_a_window_shows_its_end() -> None:
    row: Row = (120, [(0, 5, 10), (1, 100, 105)], [1.0, 1.0])
    first, second = cut(row, SEQ_LEN, "windows").documents
    assert (first.start, first.end) == (0, 10)
    assert (second.start, second.end, second.runs) == (65, 105, ((35, 5, 1.0),))


@pytest.mark.parametrize("spans", [[], [(0, 0, 0)], [(0, 60, 60), (1, 99, 99)]])
def test_a_long_row_without_a_token_of_a_step_makes_no_document(spans: Spans) -> None:
    for overlong in ("truncate", "windows"):
        assert cut((99, spans, [1.0] * len(spans)), SEQ_LEN, overlong) == Cut(documents=())


def test_an_empty_step_behind_a_longer_one_makes_no_window() -> None:
    row: Row = (3, [(0, 1, 2), (1, 2, 2)], [0.0, 0.0])
    [document] = cut(row, 2, "windows").documents
    assert (document.start, document.end) == (0, 2)


def test_a_step_that_fills_a_window_is_lost_since_nothing_would_predict_its_first_token() -> None:
    row: Row = (60, [(0, 5, 10), (1, 20, 60)], [1.0, 1.0])
    result = cut(row, SEQ_LEN, "windows")
    assert [trained_steps(row, each) for each in result.documents] == [[0]]
    assert (result.num_lost_steps, result.num_lost_tokens) == (1, 40)


def test_a_window_starts_behind_a_step_where_that_fits() -> None:
    row: Row = (80, [(0, 5, 12), (1, 14, 30), (2, 34, 39), (3, 66, 70)], [1.0] * 4)
    windows = cut(row, SEQ_LEN, "windows").documents
    assert [(each.start, each.end) for each in windows] == [(0, 39), (30, 70)]
