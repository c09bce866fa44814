"""Which instances must not get into a training set: the evaluation's own, above all.

An exclusion is an instance id (`django__django-11999`) or a repository (`django/django`,
`django__django`); both are compared without regard to case. An id also covers its numbered copies
(`..._3`, as some data sets write repeated attempts), a repository all its instances.

A run that does not say which instance it worked on is known by its own id, if that holds the
instance's (`run-7/django__django-11999.3fa9`).
"""

import csv
import re
from collections.abc import Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Final

import orjson

from srft_prep.errors import ConfigError
from srft_prep.types import Trajectory

_COPY: Final = re.compile(r"_\d+$")
_REPOSITORY: Final = re.compile(r"(.+?__.+?)(?:-\d+(?:_\d+)?|\.[0-9a-f]{7,40}\..+)")
"""`owner__name` before SWE-bench's `-123` or SWE-smith's `.<commit>.<bug>`."""


class Exclusion:
    """A set of excluded instances and repositories."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name.lower() for name in names)

    def __bool__(self) -> bool:
        return bool(self._names)

    def covers(self, instance_id: str) -> bool:
        """Return whether an instance is excluded, by its id or by its repository."""
        return bool(self.matches(instance_id))

    def matches(self, instance_id: str) -> frozenset[str]:
        """Return the names that exclude an instance: its id, its repository."""
        key = instance_id.lower()
        repository = _REPOSITORY.fullmatch(key)
        candidates = {key, _COPY.sub("", key), repository[1] if repository else key}
        return self._names & candidates

    def matches_run(self, trajectory: Trajectory) -> frozenset[str]:
        """Return the names that exclude a run, by its instance or else by its own id."""
        found = map(self.matches, _instances_of(trajectory))
        return frozenset[str]().union(*found)


def names_instance(trajectory: Trajectory) -> bool:
    """Return whether a run says which instance it worked on, itself or in its id."""
    return bool(trajectory.instance_id) or any(
        _REPOSITORY.fullmatch(name.lower()) for name in _instances_of(trajectory)
    )


def _instances_of(trajectory: Trajectory) -> set[str]:
    """Return what may be the id of a run's instance."""
    if trajectory.instance_id:
        return {trajectory.instance_id}
    whole = trajectory.trajectory_id
    names = {whole, whole.partition("/")[2], whole.rpartition("/")[2]}
    names |= {name.rpartition(".")[0] for name in names}
    return {name.removesuffix(".traj") for name in names} - {""}


def read_exclusions(path: Path) -> tuple[str, ...]:
    """Return the exclusions of a file, normalised and sorted.

    The file is text with one name a line (`#` starts a comment), a JSON list of names, or JSONL
    or CSV with `instance_id` (a SWE-bench data set, say).

    Raises:
        ConfigError: the file cannot be read, holds no name, or a line holds something else.
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
        header = next(csv.reader(text.splitlines()[:1]), [])
        return _column(text, path) if "instance_id" in header else _lines(text, path)
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


def _lines(text: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        name = line.partition("#")[0].strip()
        if "," in name or len(name.split()) > 1:
            raise ConfigError(
                f"{path}:{number}: expected one instance id or repository a line, got {name[:80]!r}"
            )
        yield name


def _column(text: str, path: Path) -> Iterator[str]:
    rows = csv.DictReader(StringIO(text, newline=""))
    try:
        for row in rows:
            if not row["instance_id"]:
                raise ConfigError(f"{path}:{rows.line_num}: expected an instance_id, got none")
            yield row["instance_id"]
    except csv.Error as error:
        raise ConfigError(f"{path}:{rows.line_num}: expected CSV: {error}") from None
