"""Looks at real processes: which are alive, and whether they end."""

import time
from collections.abc import Callable
from pathlib import Path


def processes_with(text: str) -> list[int]:
    """Return the processes, zombies not counted, whose environment holds a text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if text.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that is to be so soon."""
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.02)


def wait_until_gone(text: str, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while left := processes_with(text):
        assert time.monotonic() < until, f"still alive: {left}"
        time.sleep(0.05)
