"""A command of srft-prep, run to its end and watched: time, memory of all its processes, counts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import click

INTERVAL_SECONDS: Final = 0.1


def watched(arguments: list[str]) -> dict[str, Any]:
    """Run `srft-prep` with arguments that end in `--json`; return what it took and its document.

    `peak_mib` is the largest sum of the resident memory of its processes, seen every tenth of a
    second; pages that processes share count once for each. `cpu_seconds` is that of all of them.

    Raises:
        click.ClickException: it failed; that some records were rejected is no failure.
    """
    began = time.monotonic()
    command = [sys.executable, "-m", "srft_prep", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peak, most = 0, 1
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        sizes = [_resident(each) for each in _family(process.pid)]
        peak, most = max(peak, sum(sizes)), max(most, len(sizes))
        time.sleep(INTERVAL_SECONDS)
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stdout is not None
    with process.stdout as output:
        lines = output.read().splitlines()
    if process.returncode not in (0, 1) or not lines:
        raise click.ClickException(f"srft-prep {arguments[0]} ended with {process.returncode}")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": peak / 2**20,
        "processes": most,
        "counts": json.loads(lines[-1]),
    }


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
