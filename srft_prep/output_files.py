"""Single files that commands write: never over an input, never over what others wrote.

A stage guards its directory; a report, a page or a calibration goes to a path that a person types,
and a slip of the hand must not cost the gold labels that took days. Only a file of the kind that is
about to be written is replaced.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from srft_prep.errors import ConfigError
from srft_prep.pages import HEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """What a command writes to a path that it is given."""

    name: str
    """With its article, as an error says it."""
    is_one: Callable[[bytes], bool]
    """Whether the content of a file is of this kind."""


def will_replace(
    path: Path | None, kind: FileKind, *, option: str, others: Iterable[Path | None]
) -> bool:
    """Return whether a file of this kind is there already, and will be replaced.

    Args:
        path: the file to write; None where none was asked for.
        kind: what will be written.
        option: what names the path on the command line.
        others: what the command reads, or writes besides.

    Raises:
        ConfigError: the path is one of the others, or something else is there.
    """
    if path is None:
        return False
    for other in others:
        if other is not None and _is_same(path, other):
            raise ConfigError(
                f"{option} {path}: is also {other}, which this command reads or writes; choose "
                "another path"
            )
    if not path.exists():
        return False
    if not path.is_file() or not _is_of(path, kind):
        raise ConfigError(
            f"{option} {path}: expected {kind.name} or nothing there, got something else; choose "
            "another, or delete it"
        )
    return True


def replaced_words(is_replaced: bool) -> str:
    """Return the end of a line that says what was written."""
    return " (in place of an earlier one)" if is_replaced else ""


def _is_same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()


def _is_of(path: Path, kind: FileKind) -> bool:
    content = path.read_bytes()
    return not content.strip() or kind.is_one(content)


def _is_calibration(content: bytes) -> bool:
    data = _json(content)
    keys = {"schema", "kind", "members", "threshold", "fitted_on"}
    return isinstance(data, dict) and keys <= data.keys()


def _are_disagreements(content: bytes) -> bool:
    keys = {"trajectory_id", "step_index", "labels", "gold"}
    rows = (_json(line) for line in content.splitlines())
    return all(isinstance(row, dict) and row.keys() == keys for row in rows)


def _json(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return None


CALIBRATION: Final = FileKind(name="a calibration", is_one=_is_calibration)
DISAGREEMENTS: Final = FileKind(name="a file of disagreements", is_one=_are_disagreements)
PAGE: Final = FileKind(
    name="a page that srft-prep wrote",
    is_one=lambda content: content.startswith(HEAD.encode()),
)
