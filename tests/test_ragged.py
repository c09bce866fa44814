import math
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.ragged import chunks, exact_sum, exact_sums, find, offsets_of, ranges

lists = st.lists(st.lists(st.floats(-1e300, 1e300), max_size=5), max_size=20)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 9)), max_size=30))
def test_ranges_come_one_after_the_other(pairs: list[tuple[int, int]]) -> None:
    starts, lengths = (np.array([pair[i] for pair in pairs], np.int32) for i in (0, 1))
    expected = [number for start, length in pairs for number in range(start, start + length)]
    assert ranges(starts, lengths).tolist() == expected


@given(lists)
def test_sums_are_those_of_fsum(values: list[list[float]]) -> None:
    flat = np.array([value for each in values for value in each])
    offsets = offsets_of(np.array([len(each) for each in values], np.int64))
    assert exact_sums(flat, offsets).tolist() == [math.fsum(each) for each in values]
    assert exact_sum(flat) == math.fsum(flat.tolist())


def test_a_sum_over_many_chunks_is_exact() -> None:
    values = np.tile([1e16, 1.0, -1e16, 0.1], 50_000)
    assert exact_sum(values) == math.fsum(values.tolist())
    offsets = np.array([0, 3, 3, 150_001, 200_000], np.int64)
    pieces = [math.fsum(values[start:end].tolist()) for start, end in pairwise(offsets)]
    assert exact_sums(values, offsets).tolist() == pieces


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 50))
def test_chunks_cover_all_lists_once_and_are_no_longer_than_they_must(
    lengths: list[int], size: int
) -> None:
    offsets = offsets_of(np.array(lengths, np.int64))
    found = list(chunks(offsets, size))
    assert [i for first, last in found for i in range(first, last)] == list(range(len(lengths)))
    for first, last in found:
        assert sum(lengths[first : last - 1]) < size
        assert last == len(lengths) or sum(lengths[first:last]) >= size


@given(st.sets(st.integers(0, 50)), st.lists(st.integers(0, 50)))
def test_keys_are_found_where_they_stand(keys: set[int], wanted: list[int]) -> None:
    places = find(np.array(sorted(keys), np.int64), np.array(wanted, np.int64))
    expected = [sorted(keys).index(each) if each in keys else -1 for each in wanted]
    assert places.tolist() == expected
