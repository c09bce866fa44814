"""Who was resolved: outcomes from report files, joined to the runs that they speak of.

Most formats do not carry the outcome; it lies in files that a SWE-bench style evaluation wrote
beside the runs. One instance can have been attempted by many runs, so an outcome is matched by
place as well as by instance id:

- a run summary `<model>.<run_id>.json` whose run id is the name of a folder among the sources
  speaks only of the runs in such a folder;
- among the others, the reports that share most folder names with the run's path decide;
- if those still disagree, the outcome stays unknown and is counted as ambiguous.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from srft_prep.errors import ConfigError
from srft_prep.object_inputs import bring_raw
from srft_prep.object_mirror import input_place
from srft_prep.object_storage import is_url
from srft_prep.readers import Origin
from srft_prep.records import SUFFIXES, Record, discover, records, stage_of

_TABLE_KEYS: Final = {"instance_id", "trajectory_id", "traj_id", "run_id", "model", "resolved"}
_REPORT_KEYS: Final = {"tests_status", "patch_exists"}
_UNKNOWN: Final = ("", "none", "null", "nan", "unknown")
_RUN_SUFFIXES: Final = (".traj", ".traj.json", ".parquet")
_RUN_KEYS: Final = {"messages", "trajectory", "history", "conversations"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one report says of one instance."""

    resolved: bool
    folders: frozenset[str]
    """Names of the folders on the report's path."""
    run_id: str | None
    """The run of which the report speaks, where its file name says so."""


@dataclass(slots=True)
class Outcomes:
    """All outcomes of the report files that were given."""

    by_instance: dict[str, list[Outcome]] = field(default_factory=lambda: defaultdict(list))
    by_trajectory: dict[str, bool] = field(default_factory=dict)
    run_folders: frozenset[str] = frozenset()
    """Folder names that occur on the paths of the sources."""
    num_damaged_files: int = 0
    """Files of a folder that could not be read to their end, and might have been reports."""

    def find(self, *, instance_id: str, trajectory_id: str, path: Path) -> set[bool]:
        """Return what the nearest reports say of the run of an instance in the file at `path`.

        Empty where none speaks of it; both values where they disagree.
        """
        if trajectory_id in self.by_trajectory:
            return {self.by_trajectory[trajectory_id]}
        folders = frozenset(path.absolute().parent.parts) - {instance_id}
        scored = [
            (score, outcome.resolved)
            for outcome in self.by_instance.get(instance_id, ())
            if (score := self._affinity(outcome, folders)) is not None
        ]
        best = max((score for score, _ in scored), default=None)
        return {resolved for score, resolved in scored if score == best}

    def _affinity(self, outcome: Outcome, folders: frozenset[str]) -> tuple[bool, int] | None:
        bound = outcome.run_id is not None and outcome.run_id in self.run_folders
        if bound and outcome.run_id not in folders:
            return None
        return bound, len(outcome.folders & folders)


def read_outcomes(paths: Iterable[str], *, sources: Iterable[Path]) -> Outcomes:
    """Return the outcomes of all report files under `paths`, to be joined to runs of `sources`.

    In a folder only files that look like reports are read; a file given by name must be one, to
    its last line.

    Raises:
        ConfigError: a path does not exist or holds no outcomes, or a line of a file given by name
            cannot be read.
    """
    folders = {part for source in sources for part in source.absolute().parent.parts}
    outcomes = Outcomes(run_folders=frozenset(folders))
    for given in paths:
        files = report_files(given)
        named = (input_place(given) if is_url(given) else Path(given)).is_file()
        if not sum(_add_file(outcomes, file, named=named) for file in files):
            raise ConfigError(
                f"{given}: no outcomes found: expected a SWE-bench report.json, a run summary "
                "with resolved_ids, a folder of them, or CSV/JSONL with instance_id,resolved"
            )
    return outcomes


def report_files(given: str) -> list[Path]:
    """Return the files that are looked at for outcomes: a file itself, or those of a folder.

    Raises:
        ConfigError: the path does not exist.
    """
    if is_url(given):
        places = bring_raw(given, (*SUFFIXES, ".csv"), stage_of)
        return [file for place in places for file in report_files(str(place))]
    if Path(given).is_file():
        return [Path(given)]
    files = [path for path in discover([given]) if not path.name.endswith(_RUN_SUFFIXES)]
    return [path for path in (*files, *sorted(Path(given).rglob("*.csv"))) if path.is_file()]


def _add_file(outcomes: Outcomes, path: Path, *, named: bool) -> int:
    found = 0
    parts = frozenset(path.absolute().parent.parts)
    for record in _csv_rows(path) if path.suffix == ".csv" else records(path):
        value = record.value
        if record.error is not None:
            if named:
                raise ConfigError(f"{record.origin}: {record.error}")
            outcomes.num_damaged_files += 1
            break
        if named:
            _refuse_unclear(value, record)
        pairs = outcomes_in(value, path=path, named=named)
        run_id = path.stem.rpartition(".")[2] if _is_summary(value) else None
        for key, resolved in pairs or ():
            found += 1
            if isinstance(value, dict) and _trajectory_key(value) == key:
                outcomes.by_trajectory[key] = resolved
            else:
                entry = Outcome(resolved=resolved, folders=parts - {key}, run_id=run_id)
                outcomes.by_instance[key].append(entry)
        if pairs is None and not named:
            break  # the first record shows that this file is no report
    return found


def _refuse_unclear(value: Any, record: Record) -> None:
    word = value.get("resolved") if isinstance(value, dict) else None
    if isinstance(word, str) and word.lower() not in _UNKNOWN and truth(word) is None:
        raise ConfigError(f"{record.origin}: resolved: expected true or false, got {word[:40]!r}")


def outcomes_in(value: Any, *, path: Path, named: bool = False) -> list[tuple[str, bool]] | None:
    """Return the (instance or trajectory id, resolved) pairs of a report, None if it is none.

    `named` accepts rows of a table with any further columns.
    """
    if not isinstance(value, dict) or _RUN_KEYS & value.keys():
        return None
    if _is_summary(value):
        return list(_summary_pairs(value))
    resolved = truth(value.get("resolved"))
    if isinstance(value.get("resolved"), bool | int | str) and (
        named or value.keys() <= _TABLE_KEYS or value.keys() & _REPORT_KEYS
    ):
        key = _trajectory_key(value) or value.get("instance_id")
        if not key and not value.keys() & _REPORT_KEYS:
            return None
        return [(str(key or path.parent.name), resolved)] if resolved is not None else []
    nested = [
        (str(key), inner["resolved"])
        for key, inner in value.items()
        if isinstance(inner, dict) and isinstance(inner.get("resolved"), bool)
    ]
    return nested if nested and len(nested) == len(value) else None


def truth(value: Any) -> bool | None:
    """Return an outcome written as a boolean, 0/1 or a word; None for anything else."""
    if isinstance(value, str):
        value = {"true": 1, "1": 1, "yes": 1, "false": 0, "0": 0, "no": 0}.get(value.lower())
    return bool(value) if value in (0, 1) and value is not None else None


def _is_summary(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(value.get(key), list) for key in ("resolved_ids", "ids_resolved", "resolved")
    )


def _summary_pairs(value: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield the pairs of a run summary; instances with errors stay unknown."""
    for keys, resolved in (
        (("resolved_ids", "ids_resolved", "resolved"), True),
        (("unresolved_ids", "ids_unresolved", "empty_patch_ids", "no_generation"), False),
    ):
        for key in keys:
            ids = value.get(key)
            if isinstance(ids, list):
                yield from ((str(instance), resolved) for instance in ids)


def _trajectory_key(value: dict[str, Any]) -> str | None:
    key = value.get("trajectory_id") or value.get("traj_id")
    return key if isinstance(key, str) else None


def _csv_rows(path: Path) -> Iterator[Record]:
    line = 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            for row in rows:
                line = rows.line_num
                yield Record(origin=Origin(path=path, line=line), value=row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = f"expected CSV in UTF-8: {error}"
        yield Record(origin=Origin(path=path, line=line), error=reason)
