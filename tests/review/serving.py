"""The review page as a user starts it: a process, its address, its end."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self


class ReviewServer:
    """A running `srft-prep review`; use as a context manager, or start and kill it."""

    def __init__(self, trajectories: Path, *options: object) -> None:
        words = [sys.executable, "-m", "srft_prep", "review", str(trajectories), "--no-browser"]
        self.process = subprocess.Popen(
            [*words, *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+/\S+/", line):
                self.address = found[0]
                break
        else:
            raise AssertionError(f"review did not start: {self.said}")
        self.origin = "/".join(self.address.split("/")[:3])
        self.token = self.address.split("/")[3]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop(9)

    def stop(self, number: int) -> int:
        """Send a signal, and return the status that the process ends with."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        assert self.process.stdout is not None
        if not self.process.stdout.closed:
            self.said += self.process.stdout.read()
            self.process.stdout.close()
        return self.process.wait(timeout=120)
