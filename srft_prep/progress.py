"""Progress on the error stream: a bar on a terminal, else one plain line every few seconds."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

PLAIN_SECONDS: Final = 5.0
"""Time between two plain lines."""


class Progress(Protocol):
    """What a stage reports to while it runs."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add finished units; `note` is a few words on the state."""

    def say(self, text: str) -> None:
        """Tell the user something that must not be missed."""


class Silent:
    """Reports nothing: for library use and tests."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""


@contextmanager
def shown(title: str, *, total: int | None, unit: str) -> Iterator[Progress]:
    """Give a Progress that shows itself on the error stream until the block ends."""
    if sys.stderr.isatty():
        with _bar(title, total=total, unit=unit) as bar:
            yield bar
    else:
        yield _Plain(title, total=total, unit=unit)


def plain(title: str, *, total: int | None, unit: str) -> Progress:
    """Return a Progress of one line every few seconds, which may go on beside another one."""
    return _Plain(title, total=total, unit=unit)


class _Plain:
    def __init__(self, title: str, *, total: int | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.started = self.said = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said < PLAIN_SECONDS:
            return
        self.said = now
        seconds = now - self.started
        of_total = f"/{self.total}" if self.total else ""
        rate = self.done / seconds
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate else ""
        sys.stderr.write(
            f"{self.title}: {self.done}{of_total} {self.unit}, {rate:.1f}/s{left}"
            f"{', ' + note if note else ''}\n"
        )
        sys.stderr.flush()

    def say(self, text: str) -> None:
        sys.stderr.write(f"{self.title}: {text}\n")
        sys.stderr.flush()


@contextmanager
def _bar(title: str, *, total: int | None, unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as rich:
        task = rich.add_task(title, total=total, note="")

        class Bar:
            def advance(self, count: int = 1, note: str = "") -> None:
                rich.update(task, advance=count, note=note)

            def say(self, text: str) -> None:
                rich.console.print(f"{title}: {text}", markup=False, highlight=False)

        yield Bar()
