"""How much memory do `tokenize` and `pack` take on many trajectories?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from data import write_repeated
from watched import watched

from srft_prep.chat import TokenizerSpec
from srft_prep.types import Trajectory

PART_ROWS: Final = 1_000
"""Trajectories in a part; `ingest` writes fewer, so that this is the harder case."""


def measure_memory(
    folder: Path,
    trajectories: Sequence[Trajectory],
    *,
    number: int,
    spec: TokenizerSpec,
    template: Path,
) -> list[dict[str, Any]]:
    """Run both stages on `number` repeated trajectories; print and return their peaks."""
    source = write_repeated(folder / "many", trajectories, number=number, part_rows=PART_ROWS)
    tokens, shards = folder / "tokens", folder / "shards"
    tokenizer = ["--tokenizer", spec.source, "--chat-template", str(template)]
    commands = {
        "tokenize": ["tokenize", str(source), "-o", str(tokens), *tokenizer, "--json"],
        "pack": ["pack", str(tokens), "-o", str(shards), "--recipe", "naive", "--json"],
    }
    print(f"{number:,} trajectories in parts of {PART_ROWS}")
    print(f"{'stage':12}{'seconds':>10}{'peak MiB':>10}{'processes':>11}")
    rows = []
    for stage, arguments in commands.items():
        row = {"stage": stage, "trajectories": number, **watched(arguments)}
        print(f"{stage:12}{row['seconds']:>10.1f}{row['peak_mib']:>10.0f}{row['processes']:>11}")
        rows.append(row)
    return rows
