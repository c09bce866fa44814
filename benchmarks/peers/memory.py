"""How much memory do `tokenize` and `pack` take on many trajectories?"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
from data import write_repeated

from srft_prep.chat import TokenizerSpec
from srft_prep.types import Trajectory

PART_ROWS: Final = 1_000
"""Trajectories in a part; `ingest` writes fewer, so that this is the harder case."""
INTERVAL_SECONDS: Final = 0.1


def measure_memory(
    folder: Path,
    trajectories: Sequence[Trajectory],
    *,
    number: int,
    spec: TokenizerSpec,
    template: Path,
) -> list[dict[str, Any]]:
    """Run both stages on `number` repeated trajectories; print and return their peaks.

    A peak is the largest sum of the resident memory of a command's processes, seen every tenth of a
    second; pages that processes share count once for each.
    """
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
        row = {"stage": stage, "trajectories": number, **_run(arguments)}
        print(f"{stage:12}{row['seconds']:>10.1f}{row['peak_mib']:>10.0f}{row['processes']:>11}")
        rows.append(row)
    return rows


def _run(arguments: list[str]) -> dict[str, Any]:
    began = time.monotonic()
    command = [sys.executable, "-m", "srft_prep", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak, most = 0, 1
    while process.poll() is None:
        sizes = [_resident(each) for each in _family(process.pid)]
        peak, most = max(peak, sum(sizes)), max(most, len(sizes))
        time.sleep(INTERVAL_SECONDS)
    assert process.stdout is not None
    if process.returncode:
        raise click.ClickException(f"srft-prep {arguments[0]} ended with {process.returncode}")
    counts = json.loads(process.stdout.read().splitlines()[-1])
    seconds = time.monotonic() - began
    return {"seconds": seconds, "peak_mib": peak / 2**20, "processes": most, "counts": counts}


def _family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    for each in found:
        try:
            tasks = list(Path(f"/proc/{each}/task").iterdir())
            for task in tasks:
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def _resident(pid: int) -> int:
    """Return a process's resident memory in bytes; 0 if it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
