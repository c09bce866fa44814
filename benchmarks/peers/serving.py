"""The protocol between a benchmark and the processes that it measures, which take turns.

A process loads all that it needs, prints one JSON line about itself, and then makes one pass for
each line on stdin, printing how long it took. A line that names a file has that pass written to it.
Idle processes cost nothing, so that rounds of several tools can take turns without any start-up.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""`id`, `ids`, and `trained`: half-open token ranges."""
Passed = tuple[dict[str, Any], Callable[[], Iterable[Row]]]
"""What there is to say of a pass (`seconds`, `tokens`), and a way to its rows."""
Pass = Callable[[], Passed]

IGNORED = -100
"""The label of a token that is not trained."""


def serve(load: Callable[[], tuple[dict[str, Any], Pass]]) -> None:
    """Load, then make a pass for each line of stdin."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the tools print what they like
    about, make_pass = load()
    _say(replies, about)
    for line in sys.stdin:
        said, rows = make_pass()
        if target := line.strip():
            with Path(target).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows())
        _say(replies, said)


def _say(replies: Any, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def runs(labels: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the half-open ranges of the labels that are trained."""
    start = None
    for place, label in enumerate([*labels, IGNORED]):
        if label != IGNORED and start is None:
            start = place
        elif label == IGNORED and start is not None:
            yield start, place
            start = None
