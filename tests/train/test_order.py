"""The order of an epoch."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.train.order import epoch_order

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 10_000)
GROUPS = st.lists(st.integers(1, 9), max_size=40).map(
    lambda sizes: np.repeat(np.arange(len(sizes)), sizes)
)


@given(GROUPS, st.integers(1, 50), SEEDS, EPOCHS)
def test_every_sequence_comes_once(groups: np.ndarray, window: int, seed: int, epoch: int) -> None:
    order = epoch_order(groups, window=window, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(len(groups)))


@given(GROUPS, st.integers(1, 50), SEEDS, EPOCHS)
def test_a_row_group_is_done_within_one_window(
    groups: np.ndarray, window: int, seed: int, epoch: int
) -> None:
    """So that it is decoded once: the groups of a stretch of windows occur nowhere else."""
    found = groups[epoch_order(groups, window=window, seed=seed, epoch=epoch)].tolist()
    sizes = np.bincount(groups, minlength=1)
    while found:
        length = 0
        stretch: set[int] = set()
        while length < len(found) and (len(stretch) < window or found[length] in stretch):
            stretch.add(found[length])
            length += 1
        assert length == sum(sizes[group] for group in stretch)
        found = found[length:]


def test_it_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    groups = np.repeat(np.arange(20), 8)
    orders = {
        (seed, epoch): tuple(epoch_order(groups, window=4, seed=seed, epoch=epoch).tolist())
        for seed in range(5)
        for epoch in range(20)
    }
    assert len(set(orders.values())) == len(orders)
    again = epoch_order(groups, window=4, seed=3, epoch=7)
    assert tuple(again.tolist()) == orders[3, 7]


def test_the_order_is_the_one_that_earlier_versions_had() -> None:
    """A run that goes on after an update must not see other data."""
    order = epoch_order(np.repeat(np.arange(6), 2), window=2, seed=0, epoch=1)
    assert order.tolist() == [11, 9, 8, 10, 0, 3, 2, 1, 6, 7, 4, 5]


def test_a_sequence_is_as_likely_at_one_place_as_at_another() -> None:
    """Over 4,000 epochs: chi-square of 24 sequences by 24 places, within 6 standard deviations."""
    groups = np.repeat(np.arange(6), 4)
    counts = np.zeros((24, 24))
    for epoch in range(4_000):
        counts[epoch_order(groups, window=2, seed=1, epoch=epoch), np.arange(24)] += 1
    expected = 4_000 / 24
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = 23 * 23
    assert abs(statistic - freedom) < 6 * np.sqrt(2 * freedom)
