import bisect
import math
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from srft_prep.cutting import balanced, best_fit
from srft_prep.errors import ShardError
from srft_prep.packing import Packs, lower_bound, pack_documents, spread

CAPACITY = 100
SEQ_LEN = 32_768

documents = st.lists(st.integers(1, CAPACITY), max_size=60)
repeated = st.lists(
    st.tuples(st.integers(1, CAPACITY), st.integers(1, 40)), min_size=1, max_size=8
).map(lambda pairs: [length for length, count in pairs for _ in range(count)])
"""Few distinct lengths, each many times: cutting stock."""
seeds = st.integers(-(2**70), 2**70)


def loads(lengths: Sequence[int], packs: Packs) -> list[int]:
    return [sum(lengths[index] for index in pack) for pack in packs]


def plain_best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[int]:
    """The textbook's, by bisection in the sorted rooms: what every pack is filled to."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = bisect.bisect_left(rooms, length)
        room = rooms.pop(fitting) if fitting < len(rooms) else capacity
        bisect.insort(rooms, room - length)
    return [capacity - room for room in rooms]


def plain_lower_bound(lengths: Sequence[int], capacity: int) -> int:
    """L2 by its definition, one threshold after the other."""
    bounds = [0]
    for least in range(capacity // 2 + 1):
        alone = [n for n in lengths if n > capacity - least]
        large = [n for n in lengths if capacity // 2 < n <= capacity - least]
        small = [n for n in lengths if least <= n <= capacity // 2]
        left_over = max(0, sum(small) - (len(large) * capacity - sum(large)))
        bounds.append(len(alone) + len(large) + math.ceil(left_over / capacity))
    return max(bounds)


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


def agent_lengths(count: int, *, median: float, seed: int) -> NDArray[np.int64]:
    """Lognormal, one in ten above SEQ_LEN and clipped to it: the fit to real agent runs."""
    sigma = math.log(SEQ_LEN / median) / statistics.NormalDist().inv_cdf(0.9)
    drawn = np.random.default_rng(seed).lognormal(math.log(median), sigma, count)
    return np.clip(drawn, 1, SEQ_LEN).astype(np.int64)


@given(documents | repeated)
def test_every_document_is_in_one_pack_and_no_pack_is_overfull(lengths: list[int]) -> None:
    packs = pack_documents(lengths, CAPACITY)
    assert sorted(packs.members.tolist()) == list(range(len(lengths)))
    assert all(0 < load <= CAPACITY for load in loads(lengths, packs))
    assert packs.starts[0] == 0
    assert packs.starts[-1] == len(lengths)
    assert np.concatenate([[], *packs]).tolist() == packs.members.tolist()


@given(documents | repeated)
def test_packs_are_never_more_than_best_fit_decreasing_makes(lengths: list[int]) -> None:
    num_packs = len(pack_documents(lengths, CAPACITY))
    assert num_packs <= len(plain_best_fit_decreasing(lengths, CAPACITY))
    assert num_packs >= lower_bound(lengths, CAPACITY)


@given(documents | repeated)
def test_best_fit_by_counts_fills_as_document_after_document(lengths: list[int]) -> None:
    filled: Counter[int] = Counter()
    for pattern, times in best_fit(Counter(lengths), CAPACITY):
        filled[sum(pattern)] += times
    assert filled == Counter(plain_best_fit_decreasing(lengths, CAPACITY))


@given(
    documents | repeated,
    st.integers(0, CAPACITY // 2),
    st.integers(0, 100),
    st.integers(0, CAPACITY),
)
def test_balanced_fills_hold_every_length_whatever_the_settings(
    lengths: list[int], threshold: int, percent: int, tolerance: int
) -> None:
    patterns = balanced(
        Counter(lengths), CAPACITY, threshold=threshold, percent=percent, tolerance=tolerance
    )
    held: Counter[int] = Counter()
    for pattern, times in patterns:
        assert times > 0
        assert 0 < sum(pattern) <= CAPACITY
        for length in pattern:
            held[length] += times
    assert held == Counter(lengths)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_packs_lie_between_bound_and_optimum_and_near_the_optimum(lengths: list[int]) -> None:
    least = optimum(lengths, 12)
    assert lower_bound(lengths, 12) <= least
    assert least <= len(pack_documents(lengths, 12)) <= 11 / 9 * least + 1


@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c)))))
def test_the_lower_bound_is_that_of_its_definition(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    assert lower_bound(lengths, capacity) == plain_lower_bound(lengths, capacity)


@given(documents, st.randoms(use_true_random=False))
def test_the_result_is_a_function_of_the_lengths(lengths: list[int], chance: random.Random) -> None:
    packs = pack_documents(lengths, CAPACITY)
    for same in (tuple(lengths), np.array(lengths, np.uint32)):
        again = pack_documents(same, CAPACITY)
        assert again.members.tolist() == packs.members.tolist()
        assert again.starts.tolist() == packs.starts.tolist()
    mixed = list(lengths)
    chance.shuffle(mixed)
    other = pack_documents(mixed, CAPACITY)
    assert other.starts.tolist() == packs.starts.tolist()
    assert [mixed[i] for i in other.members] == [lengths[i] for i in packs.members]


@given(documents | repeated)
def test_the_longest_document_of_a_pack_is_first_and_equal_ones_go_by_index(
    lengths: list[int],
) -> None:
    packs = pack_documents(lengths, CAPACITY)
    for pack in packs:
        keys = [(-lengths[index], index) for index in pack]
        assert keys == sorted(keys)
    for length in set(lengths):
        of_length = [index for index in packs.members if lengths[index] == length]
        assert of_length == sorted(of_length)


def test_documents_of_equal_length_go_in_the_order_of_their_indices() -> None:
    packs = pack_documents([40, 40, 60, 40, 40], CAPACITY)
    assert [pack.tolist() for pack in packs] == [[2, 0], [1, 3], [4]]


@given(st.lists(st.integers(1, CAPACITY), min_size=1))
def test_a_document_of_full_length_is_alone(lengths: list[int]) -> None:
    packs = pack_documents([*lengths, CAPACITY], CAPACITY)
    assert [len(lengths)] in [pack.tolist() for pack in packs]


@pytest.mark.parametrize("wrong", [0, -1, CAPACITY + 1])
def test_a_document_that_is_empty_or_too_long_is_refused(wrong: int) -> None:
    with pytest.raises(ShardError, match=rf"document 1: expected 1 to 100 tokens, got {wrong}"):
        pack_documents([5, wrong, 7, wrong], CAPACITY)


def test_no_documents_make_no_packs() -> None:
    packs = pack_documents([], CAPACITY)
    assert len(packs) == lower_bound([], CAPACITY) == 0
    assert packs.starts.tolist() == [0]
    assert packs.members.tolist() == list(packs) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_packs_of_agent_lengths_are_within_a_fifth_of_a_percent_of_the_bound(seed: int) -> None:
    lengths = agent_lengths(30_000, median=15_600, seed=seed)
    packs = pack_documents(lengths, SEQ_LEN)
    assert len(packs) <= 1.002 * lower_bound(lengths, SEQ_LEN)
    assert len(packs) < 0.998 * len(plain_best_fit_decreasing(lengths.tolist(), SEQ_LEN))
    assert np.array_equal(np.sort(packs.members), np.arange(30_000))
    assert np.add.reduceat(lengths[packs.members], packs.starts[:-1]).max() <= SEQ_LEN


@pytest.mark.slow
def test_packs_of_real_lengths_are_within_a_fifth_of_a_percent_of_the_bound(
    shared_data: Path, tmp_path: Path
) -> None:
    trajectories, tokens = tmp_path / "trajectories", tmp_path / "tokens"
    tokenizer = shared_data / "tokenizers" / "qwen2.5-coder-instruct"
    for stage in (
        ("ingest", shared_data / "trajectories", "-o", trajectories),
        ("tokenize", trajectories, "--tokenizer", tokenizer, "-o", tokens),
    ):
        subprocess.run([sys.executable, "-m", "srft_prep", *map(str, stage)], check=False)
    known = pl.read_parquet(tokens / "part-*.parquet", columns=["num_tokens"])["num_tokens"]
    real = np.clip(known.to_numpy(), 1, SEQ_LEN)
    assert len(real) > 100
    assert len(pack_documents(real, SEQ_LEN)) <= lower_bound(real, SEQ_LEN) + 1
    lengths = np.random.default_rng(0).choice(real, 100_000)
    packs = pack_documents(lengths, SEQ_LEN)
    assert len(packs) <= 1.002 * lower_bound(lengths, SEQ_LEN)
    assert len(packs) <= len(plain_best_fit_decreasing(lengths.tolist(), SEQ_LEN))


@given(st.lists(st.integers(0, 9), max_size=200), seeds)
def test_a_spread_order_is_a_permutation_that_depends_on_keys_and_seed(
    keys: list[int], seed: int
) -> None:
    order = spread(np.array(keys, np.int64), seed)
    assert sorted(order.tolist()) == list(range(len(keys)))
    assert order.tolist() == spread(np.array(keys, np.float64) * 2 + 1, seed).tolist()


def test_a_spread_order_is_the_same_on_every_machine() -> None:
    keys = np.array([5, 5, 5, 9, 1, 1, 7, 3])
    assert spread(keys, 0).tolist() == [0, 4, 3, 7, 2, 5, 6, 1]
    assert spread(keys, 1).tolist() == [1, 2, 3, 5, 0, 7, 6, 4]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=120), seeds)
def test_every_stretch_of_a_spread_order_has_nearly_the_mix_of_the_whole(
    keys: list[int], seed: int
) -> None:
    keys_P = np.array(keys)
    num = len(keys)
    shown = keys_P[spread(keys_P, seed)]
    ends = np.arange(num + 1)
    widths = ends[None, :] - ends[:, None]
    allowed = 2 * np.log2(np.maximum(widths, 1)) + math.log2(num) + 3
    for key in np.unique(keys_P):
        seen = np.concatenate([[0], np.cumsum(shown <= key)])
        expected = widths * seen[-1] / num
        off = np.abs(seen[None, :] - seen[:, None] - expected)
        assert (off <= allowed)[widths > 0].all()


def test_a_spread_order_mixes_far_better_than_a_plain_shuffle() -> None:
    keys = agent_lengths(20_000, median=15_600, seed=0)
    above = keys > np.median(keys)
    plain = np.random.default_rng(0).permutation(len(keys))

    def worst(order: NDArray[np.int64]) -> float:
        """Most that a stretch of 512 packs has too many or too few of the longer half."""
        seen = np.concatenate([[0], np.cumsum(above[order])])
        return float(np.abs(seen[512:] - seen[:-512] - 512 * above.mean()).max())

    assert worst(spread(keys, 0)) <= 6
    assert worst(plain) > 25


def test_another_seed_gives_an_unrelated_order() -> None:
    keys = np.arange(1_000)
    orders = [spread(keys, seed) for seed in range(20)]
    assert len({tuple(order.tolist()) for order in orders}) == 20
    for order in orders:
        assert abs(np.corrcoef(order, keys)[0, 1]) < 0.2
    firsts = [int(order[0]) for order in orders]
    assert min(firsts) < 250
    assert max(firsts) > 750
