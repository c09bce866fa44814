"""Small shards, packed by `pack` itself from made-up tokens, in several files and row groups."""

from pathlib import Path

from srft_prep.config import PackConfig
from srft_prep.manifest import Manifest
from srft_prep.shards import pack
from srft_prep.weights import DEFAULT_WEIGHTS
from tests.stages import label_row, listed_label, token_row, trajectory, write_labels, write_tokens


def write_shards(
    root: Path, *, runs: int = 90, step_tokens: int = 6, seq_len: int = 128, hold_out: float = 0.0
) -> Manifest:
    """Write `root`/tokens, labels and shards; all steps of every fifth run are harmful."""
    owners = [
        trajectory(f"run-{number}", num_steps=1 + number * 7 % 11, resolved=number % 4 == 0)
        for number in range(runs)
    ]
    rows = [
        token_row(owner, gap=2 + number % 5, step_tokens=step_tokens)
        for number, owner in enumerate(owners)
    ]
    labels = [
        label_row(owner, step, "harmful" if number % 5 == 3 else listed_label(step).label)
        for number, owner in enumerate(owners)
        for step in range(owner.num_steps)
    ]
    weights = dict(DEFAULT_WEIGHTS) | {"unnecessary": 0.3}
    config = PackConfig(
        recipe="srft",
        weights=weights,
        seq_len=seq_len,
        shard_tokens=16 * seq_len,
        hold_out=hold_out,
    )
    tokens = write_tokens(root / "tokens", rows[:40], rows[40:])
    return pack(tokens, root / "shards", config, labels=write_labels(root / "labels", labels))
