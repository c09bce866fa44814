"""Shards -> the micro-batches of each optimiser step, for one rank.

    index of sequences -> order of the epoch -> sequences of a step -> their slots -> batches
    (data)                (order)               (a cursor)            (rank, turn)   (batches)

Step s is made of the sequences [s * batch_sequences, (s + 1) * batch_sequences) of the epochs laid
end to end. So a run goes on at any step at once, and what a step consists of depends neither on the
number of ranks nor on the micro-batches. Epochs lose nothing: a step may span the end of one.
Sequences without a weighted token are in no step: they change no gradient.

Threads decode and assemble ahead. Memory holds `prefetch` steps, the row groups that these are
made of, and two windows of row groups.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from srft_prep.errors import ConfigError
from srft_prep.train.batches import Batch, PackedSequence, assemble
from srft_prep.train.data import RecentGroups, ShardSet
from srft_prep.train.order import epoch_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOW_TOKENS: Final = 1 << 22
"""Tokens whose sequences are mixed, about: 128 sequences at 32,768."""
DECODERS: Final = 2
"""Threads that decode row groups, for which Arrow lets go of the interpreter's lock. One assembles:
two take three times as long for it together as one alone, handing the lock to and fro."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatches:
    """What one rank computes in an optimiser step, and what all ranks together do."""

    step: int
    """Number of the step, from 0."""
    micro_batches: list[Batch]
    """This rank's, as many as every other rank's; without work left, one is a filler."""
    sum_weights: float
    """Sum of the weights of all ranks' sequences, > 0: the loss's denominator, known to each."""
    num_sequences: int
    """Packed sequences of all ranks."""
    num_tokens: int
    """Tokens of all ranks, after the trim, without fillers."""
    num_loss_tokens: int
    """Tokens of all ranks that carry weight."""
    num_trimmed: int
    """Tokens of all ranks that the trim left out."""
    epoch: float
    """Epochs that are done behind this step."""


class Loader:
    """The steps of a run, in order; iterating starts at `first_step` each time."""

    def __init__(
        self,
        shards: ShardSet,
        *,
        batch_sequences: int,
        micro_batch_sequences: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        first_step: int = 0,
        num_steps: int | None = None,
        epochs: int = 1,
        trim: bool = True,
        prefetch: int = 2,
        window_tokens: int = WINDOW_TOKENS,
        pin_memory: bool = False,
    ) -> None:
        """Plan a run.

        Args:
            shards: what to train on.
            batch_sequences: packed sequences in an optimiser step, of all ranks.
            micro_batch_sequences: packed sequences that are computed at a time, at most.
            rank: of this process.
            world_size: how many processes share a step.
            seed: of the order.
            first_step: step to begin with; those before are not read.
            num_steps: steps of the whole run, in place of `epochs`.
            epochs: how often each sequence is seen.
            trim: drop tokens that no loss sees.
            prefetch: steps that are ready before they are asked for.
            window_tokens: tokens whose sequences are mixed, about; at least a row group's.
            pin_memory: put batches into page-locked memory, for a GPU.

        Raises:
            ConfigError: a number is out of its range.
        """
        at_least = {
            "batch_sequences": (batch_sequences, 1),
            "micro_batch_sequences": (micro_batch_sequences, 1),
            "world_size": (world_size, 1),
            "first_step": (first_step, 0),
            "num_steps": (num_steps, 0),
            "epochs": (epochs, 1),
            "prefetch": (prefetch, 1),
            "window_tokens": (window_tokens, 1),
        }
        for name, (value, least) in at_least.items():
            if value is not None and value < least:
                raise ConfigError(f"{name}: expected at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank: expected one below world_size {world_size}, got {rank}")
        self.shards = shards
        self.batch_sequences = batch_sequences
        self.micro_batch_sequences = micro_batch_sequences
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.first_step = first_step
        self.trim = trim
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self.window = max(1, window_tokens // (shards.group_rows * shards.seq_len))
        """Row groups whose sequences are mixed."""
        self._members = np.flatnonzero(shards.sum_weights > 0)
        self._total = epochs * len(self._members)
        if num_steps is not None:
            self._total = num_steps * batch_sequences

    @property
    def num_sequences(self) -> int:
        """Packed sequences of an epoch: those with a weighted token."""
        return len(self._members)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, those before `first_step` included."""
        return -(-self._total // self.batch_sequences)

    def __iter__(self) -> Iterator[StepBatches]:
        @lru_cache(maxsize=2)
        def order(epoch: int) -> "NDArray[np.int64]":
            ours = self.shards.groups[self._members]
            return self._members[epoch_order(ours, window=self.window, seed=self.seed, epoch=epoch)]

        ahead: deque[Future[StepBatches]] = deque()
        with (
            RecentGroups(self.shards, capacity=2 * self.window, threads=DECODERS) as groups,
            ThreadPoolExecutor(
                1, "srft-loader", initializer=_same_device(self.pin_memory)
            ) as assembler,
        ):
            try:
                for step in range(self.first_step, self.num_steps):
                    places = (divmod(place, self.num_sequences) for place in self._places(step))
                    chosen = np.array([order(epoch)[place] for epoch, place in places])
                    slots = self._slots(chosen)
                    read = {at: groups.request(chosen[at]) for at in sorted(chain(*slots))}
                    ahead.append(assembler.submit(self._step, step, chosen, slots, read))
                    if len(ahead) > self.prefetch:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                assembler.shutdown(cancel_futures=True)

    def _places(self, step: int) -> range:
        """Return a step's places in the epochs laid end to end."""
        first = step * self.batch_sequences
        return range(first, min(first + self.batch_sequences, self._total))

    def _tokens(self, chosen: "NDArray[np.int64]") -> "NDArray[np.int64]":
        """Return how many tokens of each sequence are computed."""
        return (self.shards.kept_tokens if self.trim else self.shards.tokens)[chosen]

    def _slots(self, chosen: "NDArray[np.int64]") -> list[list[int]]:
        """Return which of a step's sequences are in each of this rank's micro-batches."""
        turns = deal(
            self._tokens(chosen), world_size=self.world_size, size=self.micro_batch_sequences
        )
        return [turn[self.rank].tolist() for turn in turns]

    def _step(
        self,
        step: int,
        chosen: "NDArray[np.int64]",
        slots: list[list[int]],
        read: dict[int, Callable[[], PackedSequence]],
    ) -> StepBatches:
        """Return a step made of the chosen sequences, this rank's of which are read."""
        shards, kept = self.shards, self._tokens(chosen)
        batches = [assemble([read[at]() for at in slot], trim=self.trim) for slot in slots]
        return StepBatches(
            step=step,
            micro_batches=[batch.pin_memory() for batch in batches] if self.pin_memory else batches,
            sum_weights=math.fsum(shards.sum_weights[chosen].tolist()),
            num_sequences=len(chosen),
            num_tokens=int(kept.sum()),
            num_loss_tokens=int(shards.loss_tokens[chosen].sum()),
            num_trimmed=int((shards.tokens[chosen] - kept).sum()),
            epoch=self._places(step).stop / self.num_sequences,
        )


def deal(
    tokens: "NDArray[np.int64]", *, world_size: int, size: int
) -> "list[list[NDArray[np.int64]]]":
    """Return which of a step's sequences each rank computes in each turn: [turn][rank].

    Sequences of like length are computed side by side, since in every turn all ranks wait for the
    slowest; the longest come first, so that memory is found wanting at once.

    Args:
        tokens: of each sequence.
        world_size: ranks.
        size: sequences of one rank in one turn, at most.
    """
    order = np.argsort(-tokens, kind="stable")
    turns = []
    for start in range(0, len(order), world_size * size):
        turn = order[start : start + world_size * size]
        back_and_forth = np.arange(len(turn)) % (2 * world_size)
        ranks = np.minimum(back_and_forth, 2 * world_size - 1 - back_and_forth)
        turns.append([turn[ranks == rank] for rank in range(world_size)])
    return turns


def _same_device(pin_memory: bool) -> Callable[[], None] | None:
    """Return what lets a new thread work with this thread's GPU, or None where none is used.

    A thread begins with GPU 0. Page-locking memory there would make every rank of a machine open a
    context on it, of some hundred MB each.
    """
    if not pin_memory or not torch.cuda.is_available():
        return None
    return partial(torch.cuda.set_device, torch.cuda.current_device())
