"""Which instances must not get into a training set: the evaluation's own, above all.

An exclusion is an instance id (`django__django-11999`) or a repository (`django/django`,
`django__django`); both are compared without regard to case. An id also covers its numbered copies
(`..._3`, as some data sets write repeated attempts), a repository all its instances.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import orjson

from srft_prep.errors import ConfigError

_COPY: Final = re.compile(r"_\d+$")
_REPOSITORY: Final = re.compile(r"(.+?__.+?)(?:-\d+(?:_\d+)?|\.[0-9a-f]{7,40}\..+)")
"""`owner__name` before SWE-bench's `-123` or SWE-smith's `.<commit>.<bug>`."""


class Exclusion:
    """A set of excluded instances and repositories."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name.lower() for name in names)

    def covers(self, instance_id: str) -> bool:
        """Return whether an instance is excluded, by its id or by its repository."""
        key = instance_id.lower()
        repository = _REPOSITORY.fullmatch(key)
        candidates = {key, _COPY.sub("", key), repository[1] if repository else key}
        return not self._names.isdisjoint(candidates)


def read_exclusions(path: Path) -> tuple[str, ...]:
    """Return the exclusions of a file, normalised and sorted.

    The file is text with one name a line (`#` starts a comment), a JSON list of names, or JSONL
    with `instance_id` (a SWE-bench data set, say).

    Raises:
        ConfigError: the file cannot be read or holds no name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a list of exclusions: {error}") from None
    names = {name.strip().lower().replace("/", "__") for name in _names(text, path)} - {""}
    if not names:
        raise ConfigError(f"{path}: expected instance ids or repositories, one a line; found none")
    return tuple(sorted(names))


def _names(text: str, path: Path) -> Iterable[str]:
    if not text.lstrip().startswith(("[", "{")):
        return [line.partition("#")[0] for line in text.splitlines()]
    try:
        rows = (
            orjson.loads(text)
            if text.lstrip().startswith("[")
            else [orjson.loads(line) for line in text.splitlines() if line.strip()]
        )
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path}: expected a JSON list or JSONL: {error}") from None
    given = [row.get("instance_id") if isinstance(row, dict) else row for row in rows]
    names = [name for name in given if isinstance(name, str)]
    if len(names) != len(given):
        raise ConfigError(f"{path}: expected strings or objects with instance_id")
    return names
