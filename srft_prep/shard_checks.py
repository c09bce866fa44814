"""Checks of shards as a whole: their sums of weights, and that they hold no held-out task.

Every sum is exact and rounded once, so that it is compared exactly, in whatever order it was made.
"""

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import numpy as np

from srft_prep.errors import ShardError
from srft_prep.hold_out import is_held_out, read_held_out
from srft_prep.manifest import Manifest
from srft_prep.schemas import HELD_OUT_FILE
from srft_prep.shard_files import IGNORED, SUM_KEY


@dataclass(slots=True)
class ShardSums:
    """What the rows of shards add up to, as they are read."""

    products: dict[str, "array[float]"] = field(default_factory=dict)
    """Weight of each run, times its length, by file."""
    by_trajectory: dict[str, "array[float]"] = field(default_factory=dict)
    """The same by trajectory."""
    said: dict[str, float] = field(default_factory=dict)
    """What the rows say of each trajectory's sum."""
    totals: dict[str, dict[str, int]] = field(default_factory=dict)
    """Counts by file, under the names of the manifest."""

    def add(self, file: str, row: dict[str, Any]) -> Iterator[str]:
        """Take in a row whose documents are sound; yield what is wrong with its sums."""
        bounds = np.cumsum([0, *row["seq_lengths"]])
        starts = [run["start"] for run in row["loss_weights"]]
        products = [run["weight"] * run["length"] for run in row["loss_weights"]]
        self.products.setdefault(file, array("d")).extend(products)
        self._count(file, row)
        if row["sum_weights"] != (total := math.fsum(products)):
            yield f"sum_weights is {row['sum_weights']}, its weights add up to {total}"
        sums, whole = row["document_sum_weights"], row["trajectory_sum_weights"]
        if not len(sums) == len(whole) == len(row["trajectory_ids"]):
            yield "expected a sum of weights for each document and its trajectory"
            return
        owned = np.searchsorted(starts, bounds).tolist()
        for owner, (first, last), of_document, of_trajectory in zip(
            row["trajectory_ids"], pairwise(owned), sums, whole, strict=True
        ):
            inside = products[first:last]
            if of_document != (total := math.fsum(inside)):
                yield f"document of {owner}: sum {of_document}, its weights add up to {total}"
            self.by_trajectory.setdefault(owner, array("d")).extend(inside)
            if self.said.setdefault(owner, of_trajectory) != of_trajectory:
                yield f"{owner}: two sums, {self.said[owner]} and {of_trajectory}"

    def _count(self, file: str, row: dict[str, Any]) -> None:
        total = self.totals.setdefault(file, {})
        for name, number in (
            ("num_sequences", 1),
            ("num_documents", len(row["seq_lengths"])),
            ("num_tokens", len(row["input_ids"])),
            ("num_loss_tokens", int((row["labels"] != IGNORED).sum())),
        ):
            total[name] = total.get(name, 0) + number

    def sum_weights(self) -> float:
        """Return the sum of all weights."""
        return math.fsum(chain.from_iterable(self.products.values()))

    def check_file(self, file: str, metadata: dict[bytes, bytes]) -> Iterator[str]:
        """Yield what is wrong with the sum that a file says of itself."""
        said = metadata.get(SUM_KEY.encode(), b"nothing").decode("ascii", "replace")
        total = math.fsum(self.products.get(file, ()))
        if said != repr(total):
            yield f"its metadata say {said:.40} of its sum of weights, they add up to {total}"

    def check_trajectories(self) -> Iterator[str]:
        """Yield which trajectories do not have the sums that the rows say."""
        for owner, products in self.by_trajectory.items():
            if self.said[owner] != (total := math.fsum(products)):
                yield f"{owner}: its sum is {self.said[owner]}, its weights add up to {total}"

    def check_manifest(self, manifest: Manifest) -> Iterator[str]:
        """Yield which shards the manifest describes otherwise than they are."""
        expected = [
            {"name": file, **total, "sum_weights": math.fsum(self.products[file])}
            for file, total in self.totals.items()
        ]
        said = manifest.data.get("shards", [])
        if said != expected:
            wrong = next(
                (each["name"] for each in expected if each not in said), "a file that is not there"
            )
            yield f"the manifest's `shards` do not fit {wrong}"


def check_held_out(manifest: Manifest, packed: set[str]) -> Iterator[str]:
    """Yield which held-out trajectories are packed nevertheless, or were not to be held out."""
    if not (fraction := manifest.data["config"].get("hold_out")):
        return
    try:
        held_out = read_held_out(manifest.path)
    except ShardError as error:
        yield str(error)
        return
    expected = manifest.counts.get("held_out", 0)
    if len(held_out) != expected:
        yield f"expected {expected} held-out trajectories, got {len(held_out)}"
    for each in held_out:
        if each.trajectory_id in packed:
            yield f"{HELD_OUT_FILE}: {each.trajectory_id} is packed nevertheless"
        if not is_held_out(each.instance_id or each.trajectory_id, fraction):
            yield f"{HELD_OUT_FILE}: {each.trajectory_id} is not of a held-out task"
