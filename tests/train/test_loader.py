"""The steps of a run: exact epochs, whatever the ranks; resuming; memory."""

import subprocess
import sys
import threading
from bisect import bisect_left
from collections import Counter
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.errors import ConfigError, ShardError
from srft_prep.train.batches import Batch, PackedSequence, assemble
from srft_prep.train.data import ShardSet
from srft_prep.train.loader import Loader, StepBatches, deal
from tests.train.small_shards import write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_shards(tmp_path_factory.mktemp("loader")).path)


def documents_of(batches: list[Batch]) -> Counter[tuple[Any, ...]]:
    """The documents of batches: (ids, positions, targets, weights), fillers left out."""
    found: Counter[tuple[Any, ...]] = Counter()
    for batch in batches:
        ids, bounds = batch.input_ids.tolist(), batch.cu_seqlens.tolist()
        positions, targets = batch.positions.tolist(), batch.targets.tolist()
        weights = batch.weights.tolist()
        cuts = [bisect_left(positions, bound) for bound in bounds]
        for (start, end), (first, last) in zip(pairwise(bounds), pairwise(cuts), strict=True):
            if first < last:
                found[
                    tuple(ids[start:end]),
                    tuple(position - start for position in positions[first:last]),
                    tuple(targets[first:last]),
                    tuple(weights[first:last]),
                ] += 1
    return found


def values(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """Everything that a model sees of batches, in their order."""
    return [
        (
            *(batch.input_ids.tolist(), batch.position_ids.tolist(), batch.cu_seqlens.tolist()),
            *(batch.positions.tolist(), batch.targets.tolist(), batch.weights.tolist()),
            batch.lengths,
        )
        for batch in batches
    ]


def weighted(shards: ShardSet) -> list[int]:
    return np.flatnonzero(shards.sum_weights > 0).tolist()


def all_ranks(shards: ShardSet, world_size: int, **plan: Any) -> list[list[StepBatches]]:
    """Each step, as the ranks see it."""
    loaders = [
        Loader(shards, rank=rank, world_size=world_size, **plan) for rank in range(world_size)
    ]
    return [list(step) for step in zip(*loaders, strict=True)]


def test_there_are_sequences_without_weight_and_they_are_in_no_step(shards: ShardSet) -> None:
    assert 0 < len(weighted(shards)) < shards.num_sequences


@settings(max_examples=30)  # each iterates over up to six loaders
@given(
    batch_sequences=st.integers(1, 70),
    micro_batch_sequences=st.integers(1, 4),
    world_size=st.integers(1, 5),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
    trim=st.booleans(),
)
def test_epochs_are_exact_whatever_the_ranks_and_micro_batches(
    shards: ShardSet,
    batch_sequences: int,
    micro_batch_sequences: int,
    world_size: int,
    epochs: int,
    seed: int,
    trim: bool,
) -> None:
    """Every weighted document as often as there are epochs; the same set in each step."""
    plan = {"batch_sequences": batch_sequences, "epochs": epochs, "seed": seed, "trim": trim}
    alone = list(Loader(shards, **plan))
    ranks = all_ranks(shards, world_size, micro_batch_sequences=micro_batch_sequences, **plan)
    assert len(ranks) == len(alone) == -(-epochs * len(weighted(shards)) // batch_sequences)
    total: Counter[tuple[Any, ...]] = Counter()
    for number, (one, many) in enumerate(zip(alone, ranks, strict=True)):
        found = documents_of(list(chain(*(each.micro_batches for each in many))))
        assert found == documents_of(one.micro_batches)
        total += found
        assert len({len(each.micro_batches) for each in many}) == 1
        assert {
            (each.step, each.sum_weights, each.num_sequences, each.num_tokens, each.epoch)
            for each in many
        } == {(number, one.sum_weights, one.num_sequences, one.num_tokens, one.epoch)}
    sequences = [assemble([shards.sequence(index)], trim=trim) for index in weighted(shards)]
    expected = documents_of(sequences)
    assert total == Counter({key: epochs * count for key, count in expected.items()})


@settings(max_examples=30)
@given(world_size=st.integers(1, 4), size=st.integers(1, 3), trim=st.booleans())
def test_a_step_says_what_all_ranks_together_do(
    shards: ShardSet, world_size: int, size: int, trim: bool
) -> None:
    for ranks in all_ranks(
        shards, world_size, batch_sequences=10, micro_batch_sequences=size, trim=trim
    ):
        batches = list(chain(*(each.micro_batches for each in ranks)))
        real = [batch for batch in batches if batch.num_loss_tokens]
        said = ranks[0]
        assert said.num_tokens == sum(batch.num_tokens for batch in real)
        assert said.num_loss_tokens == sum(batch.num_loss_tokens for batch in real)
        assert said.num_trimmed == sum(batch.num_trimmed for batch in real)
        exact = sum(
            (Fraction(weight) for batch in real for weight in batch.weights.tolist()), Fraction()
        )
        assert said.sum_weights == pytest.approx(float(exact), rel=1e-14)
        assert said.sum_weights > 0


@given(step=st.integers(0, 30), batch_sequences=st.integers(3, 40), prefetch=st.integers(1, 4))
def test_a_run_that_goes_on_sees_the_rest_of_the_uninterrupted_one(
    shards: ShardSet, step: int, batch_sequences: int, prefetch: int
) -> None:
    plan = {"batch_sequences": batch_sequences, "epochs": 3, "world_size": 2, "rank": 1}
    whole = list(Loader(shards, **plan))
    step = min(step, len(whole))
    tail = list(Loader(shards, first_step=step, prefetch=prefetch, **plan))
    assert [each.step for each in tail] == list(range(step, len(whole)))
    for found, expected in zip(tail, whole[step:], strict=True):
        assert values(found.micro_batches) == values(expected.micro_batches)
        assert found.sum_weights == expected.sum_weights


def test_a_far_step_of_a_long_run_comes_at_once(shards: ShardSet) -> None:
    """No step before it is computed: the cursor is a product."""
    loader = Loader(shards, batch_sequences=7, num_steps=10**12, first_step=10**12 - 1)
    (only,) = loader
    assert only.step == 10**12 - 1
    assert only.epoch == pytest.approx(7 * 10**12 / loader.num_sequences)


def test_epochs_differ_in_order_and_not_in_content(shards: ShardSet) -> None:
    loader = Loader(shards, batch_sequences=1, epochs=3)
    steps = [values(step.micro_batches)[0] for step in loader]
    size = loader.num_sequences
    first, second, third = (steps[start : start + size] for start in (0, size, 2 * size))
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third != first


def test_ranks_compute_like_amounts_at_the_same_time(shards: ShardSet) -> None:
    for ranks in all_ranks(shards, 2, batch_sequences=16):
        gaps = [
            abs(one.num_tokens - other.num_tokens)
            for one, other in zip(ranks[0].micro_batches, ranks[1].micro_batches, strict=True)
        ]
        sizes = [batch.num_tokens for each in ranks for batch in each.micro_batches]
        assert sum(gaps) <= max(sizes) - min(sizes)


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 4)
)
def test_each_sequence_is_dealt_to_one_rank_in_one_turn(
    tokens: list[int], world_size: int, size: int
) -> None:
    turns = deal(np.array(tokens), world_size=world_size, size=size)
    assert len(turns) == -(-len(tokens) // (world_size * size))
    assert all(len(turn) == world_size for turn in turns)
    dealt = [ranks.tolist() for turn in turns for ranks in turn]
    assert all(len(each) <= size for each in dealt)
    assert sorted(chain(*dealt)) == list(range(len(tokens)))


class Counting:
    """Shards, with a count of how often each row group is decoded."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.reads: Counter[int] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shards, name)

    def read_group(self, group: int) -> tuple[PackedSequence, ...]:
        self.reads[group] += 1
        return self.shards.read_group(group)


def test_a_row_group_is_decoded_once_an_epoch_though_few_are_held(tmp_path: Path) -> None:
    counting = Counting(ShardSet.open(write_shards(tmp_path, runs=600).path))
    window_tokens = 2 * 8 * 128
    loader = Loader(counting, batch_sequences=4, epochs=3, window_tokens=window_tokens)
    assert len(counting.group_files) > 10 * loader.window
    for _ in loader:
        pass
    assert set(counting.reads) == set(range(len(counting.group_files)))
    assert sum(counting.reads.values()) <= 3 * len(counting.reads)


def test_num_steps_takes_the_place_of_epochs(shards: ShardSet) -> None:
    loader = Loader(shards, batch_sequences=50, num_steps=3)
    steps = list(loader)
    assert (len(steps), loader.num_steps) == (3, 3)
    assert {step.num_sequences for step in steps} == {50}
    assert steps[-1].epoch == 150 / loader.num_sequences


def test_damage_while_training_stops_the_run_with_its_place(tmp_path: Path) -> None:
    opened = ShardSet.open(write_shards(tmp_path).path)
    opened.manifest.parts[-1].write_bytes(b"not Parquet any more")
    steps = iter(Loader(opened, batch_sequences=8))
    with pytest.raises(ShardError, match=r"shard-\d+\.parquet: row group \d+ cannot be read"):
        list(steps)
    assert not loader_threads()


def test_a_loader_that_is_left_early_leaves_no_thread(shards: ShardSet) -> None:
    steps = iter(Loader(shards, batch_sequences=4, epochs=100))
    next(steps)
    assert loader_threads()
    steps.close()
    assert not loader_threads()


def test_threads_work_with_the_gpu_of_the_thread_that_loads(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch on a machine with several GPUs is pretended: each thread begins with the first."""
    own = threading.local()
    own.device = 3
    pinned: set[tuple[str, int]] = set()

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.add((threading.current_thread().name[:11], getattr(own, "device", 0)))
        return tensor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(own, "device", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(own, "device", device))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    assert list(Loader(shards, batch_sequences=8, num_steps=4, pin_memory=True))
    assert pinned == {("srft-loader", 3)}


def loader_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("srft-")]


@pytest.mark.parametrize(
    "wrong",
    [
        {"window_tokens": 0},
        {"batch_sequences": 0},
        {"micro_batch_sequences": 0},
        {"rank": 2, "world_size": 2},
        {"first_step": -1},
        {"num_steps": -1},
        {"epochs": 0},
        {"prefetch": 0},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(shards: ShardSet, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: expected"):
        Loader(shards, **{"batch_sequences": 8} | wrong)


MEMORY = """
import sys
from pathlib import Path
from srft_prep.train.data import ShardSet
from srft_prep.train.loader import Loader

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

shards = ShardSet.open(Path(sys.argv[1]))
peaks, epoch = [0] * 10, 0
assert shards.num_tokens > 500_000
for step in Loader(shards, batch_sequences=4, epochs=10, window_tokens=1):
    epoch = min(int(step.epoch), 9)
    peaks[epoch] = max(peaks[epoch], resident())
print(*peaks)
"""


def test_memory_is_flat_over_ten_epochs(tmp_path: Path) -> None:
    """Five epochs decode 30 MB and make 135 MB of batches; of the last five less than 16 stay."""
    folder = write_shards(tmp_path, runs=900, step_tokens=300, seq_len=8192).path
    command = [sys.executable, "-c", MEMORY, folder]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peaks = [int(word) for word in done.stdout.split()]
    assert max(peaks[5:]) - max(peaks[:5]) < 16 << 20
