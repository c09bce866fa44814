"""Readers: one module a format, each turning one raw record into one Trajectory.

A reader module has two functions:

    recognises(record) -> bool          cheap, by content, never raises
    read(record, *, origin) -> Trajectory

`record` is one parsed JSON value (a dict, or a list for the formats that are bare lists). `read`
raises FormatError with a sentence that says which message or field is wrong. Readers never guess a
schema: tool calls, arguments and tools travel as the JSON text that was emitted.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from srft_prep.errors import FormatError
from srft_prep.hostile_text import printable

READERS: Final[dict[str, str]] = {
    "nebius": "srft_prep.readers.nebius",
    "swe-agent": "srft_prep.readers.swe_agent",
    "mini-swe-agent": "srft_prep.readers.mini_swe_agent",
    "openhands": "srft_prep.readers.openhands",
    "swe-smith": "srft_prep.readers.swe_smith",
    "messages": "srft_prep.readers.messages",
}
"""Format name -> module, in the order in which `auto` asks them: the most particular first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a record was found."""

    path: Path
    """The file."""
    line: int | None = None
    """1-based line (JSONL), element (JSON list) or row (Parquet); None for a file of one record."""

    def __str__(self) -> str:
        return str(self.path) if self.line is None else f"{self.path}:{self.line}"


def reader_of(record: Any, *, format_name: str = "auto") -> ModuleType:
    """Return the reader module for a record.

    Raises:
        FormatError: no format recognises the record, or the format asked for does not.
    """
    if format_name != "auto":
        chosen = import_module(READERS[format_name])
        if not chosen.recognises(record):
            raise FormatError(f"not a {format_name} record: {describe(record)} (try --format auto)")
        return chosen
    module = recognised(record)
    if module is None:
        raise FormatError(
            f"no trajectory: {describe(record)}; known formats are {', '.join(sorted(READERS))}"
        )
    return module


def recognised(record: Any) -> ModuleType | None:
    """Return the first reader module that recognises a record, or None."""
    modules = (import_module(path) for path in READERS.values())
    return next((module for module in modules if module.recognises(record)), None)


def describe(record: Any) -> str:
    """Return a few words about a value, for error messages: its type and its first keys."""
    if isinstance(record, dict):
        keys = [printable(str(key)[:40]).expandtabs(1) for key in list(record)[:6]]
        return f"an object with the keys {', '.join(keys)}" if keys else "an empty object"
    if isinstance(record, list):
        return f"a list of {len(record)} {type(record[0]).__name__}" if record else "an empty list"
    return f"a {type(record).__name__}"
