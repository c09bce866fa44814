import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.chat import load_spec
from srft_prep.errors import ShardError
from srft_prep.packing import best_fit_decreasing

CAPACITY = 100

documents = st.lists(st.integers(1, CAPACITY), max_size=60)


def loads(lengths: Sequence[int], packs: list[list[int]]) -> list[int]:
    return [sum(lengths[index] for index in pack) for pack in packs]


def plain_best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[int]:
    """The textbook's: look at every sequence, take the fullest that has room. O(n^2)."""
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, load in enumerate(filled) if load + length <= capacity]
        if fitting:
            filled[max(fitting, key=filled.__getitem__)] += length
        else:
            filled.append(length)
    return filled


def optimum(lengths: Sequence[int], capacity: int) -> int:
    """The least number of packs there is, by trying everything: for a few documents."""
    states = {(0, 0)}  # (documents packed so far as a bit set, room used in the last pack)
    done = (1 << len(lengths)) - 1
    for num_packs in range(1, len(lengths) + 1):
        frontier, reached = set(states), set(states)
        while frontier:
            frontier = {
                (packed | 1 << index, used + length)
                for packed, used in frontier
                for index, length in enumerate(lengths)
                if not packed >> index & 1 and used + length <= capacity
            } - reached
            reached |= frontier
        if any(packed == done for packed, _ in reached):
            return num_packs
        states = {(packed, 0) for packed, _ in reached}
    return 0


@given(documents)
def test_every_document_is_in_one_pack_and_no_pack_is_overfull(lengths: list[int]) -> None:
    packs = best_fit_decreasing(lengths, CAPACITY)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(0 < load <= CAPACITY for load in loads(lengths, packs))


@given(documents)
def test_packs_are_as_full_as_those_of_the_plain_algorithm(lengths: list[int]) -> None:
    packs = best_fit_decreasing(lengths, CAPACITY)
    assert Counter(loads(lengths, packs)) == Counter(plain_best_fit_decreasing(lengths, CAPACITY))


def test_long_lists_pack_like_the_plain_algorithm() -> None:
    chance = random.Random(0)
    for shape in (0.3, 0.8, 1.5):
        lengths = [min(32_768, 1 + int(chance.lognormvariate(9.5, shape))) for _ in range(1_500)]
        packs = best_fit_decreasing(lengths, 32_768)
        assert len(packs) == len(plain_best_fit_decreasing(lengths, 32_768))


@given(documents, st.randoms(use_true_random=False))
def test_the_result_is_a_function_of_the_lengths(lengths: list[int], chance: random.Random) -> None:
    assert best_fit_decreasing(lengths, CAPACITY) == best_fit_decreasing(tuple(lengths), CAPACITY)
    mixed = list(lengths)
    chance.shuffle(mixed)
    one, other = (
        Counter(loads(each, best_fit_decreasing(each, CAPACITY))) for each in (lengths, mixed)
    )
    assert one == other


def test_documents_of_equal_length_go_in_the_order_of_their_indices() -> None:
    assert best_fit_decreasing([40, 40, 60, 40, 40], CAPACITY) == [[2, 0], [1, 3], [4]]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_packs_are_at_most_eleven_ninths_of_the_optimum_plus_one(lengths: list[int]) -> None:
    packs = best_fit_decreasing(lengths, 12)
    assert optimum(lengths, 12) <= len(packs) <= 11 / 9 * optimum(lengths, 12) + 1


@given(documents)
def test_at_most_one_pack_is_half_empty(lengths: list[int]) -> None:
    packs = best_fit_decreasing(lengths, CAPACITY)
    assert sum(2 * load <= CAPACITY for load in loads(lengths, packs)) <= 1


@given(st.lists(st.integers(1, CAPACITY), min_size=1))
def test_a_document_of_full_length_is_alone(lengths: list[int]) -> None:
    packs = best_fit_decreasing([*lengths, CAPACITY], CAPACITY)
    assert [len(lengths)] in packs


@pytest.mark.parametrize("wrong", [0, -1, CAPACITY + 1])
def test_a_document_that_is_empty_or_too_long_is_refused(wrong: int) -> None:
    with pytest.raises(ShardError, match=rf"document 1: expected 1 to 100 tokens, got {wrong}"):
        best_fit_decreasing([5, wrong, 7], CAPACITY)


def test_no_documents_make_no_packs() -> None:
    assert best_fit_decreasing([], CAPACITY) == []


@pytest.mark.slow
def test_real_trajectories_fill_packs_like_the_plain_algorithm(shared_data: Path) -> None:
    backend = load_spec(str(shared_data / "tokenizers" / "qwen2.5-coder-instruct")).load().backend
    texts = [
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted((shared_data / "trajectories").rglob("*.traj*"))[::4]
    ]
    lengths = [min(32_768, len(each.ids)) for each in backend.encode_batch(texts)]
    lengths = [length for length in lengths if length]
    assert len(lengths) > 20
    packs = best_fit_decreasing(lengths, 32_768)
    assert len(packs) == len(plain_best_fit_decreasing(lengths, 32_768))
    assert len(packs) <= 1.02 * -(-sum(lengths) // 32_768) + 1
