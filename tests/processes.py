"""Looks at real processes: which are alive, and whether they end."""

import secrets
import time
from pathlib import Path
from typing import Final

RAY_TOKEN: Final = secrets.token_hex(32)
"""Of all clusters that this process starts: Ray goes on with the first token that it saw."""


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


def wait_until_gone(text: str, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while left := processes_with(text):
        assert time.monotonic() < until, f"still alive: {left}"
        time.sleep(0.05)
