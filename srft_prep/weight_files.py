"""Files that a user wrote by hand or by a script: labels, and weights of steps, parts, characters.

JSONL or Parquet, a row a step or a piece of one:

    labels     trajectory_id, step_index, label; may add p_good, p_unnecessary, p_harmful, weight,
               parts {part: weight}, spans [{field, start, end, weight}], content_hash
    weights    trajectory_id, step_index, weight; may add part, or field, start, end

`start` and `end` count characters of the message's field (as Python does), half-open. A schema is
never inferred: every row is checked by itself, and a name that is unknown or comes late is an error
and not a column of nulls. Cost: some microseconds a row.

A gold file (`gold`) is a labels file, too: of an annotator's lines for a step the newest counts, or
none where it takes the label back. Whose labels count is said by name where several labelled.
"""

import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.errors import ConfigError, LabelError, in_one_line
from srft_prep.gold import GoldLabel, StepKey, gold_of, numbered_labels
from srft_prep.hashes import sha256_of
from srft_prep.object_mirror import address_of
from srft_prep.schemas import PROBABILITIES
from srft_prep.types import LABELS
from srft_prep.weights import FIELDS, MAX_WEIGHT, PARTS

MAX_NUMBER: Final = 2**31 - 1

_LABEL_NAMES: Final = {
    *("trajectory_id", "step_index", "label", *PROBABILITIES, "weight", "parts", "spans"),
    *("content_hash", "rationale", "critic_id", "prompt_hash"),
}
_NOTES: Final = {"reason", "severity", "comment", "time"}
"""What people's labels say beside them: read past."""
_GOLD_NAMES: Final = {"annotator", "blind", "adjudicates", "undoes"}
_IS_GOLD: Final = re.compile(rb'"(?:annotator|blind|adjudicates|undoes)"\s*:')
"""In a line that only a gold file has; inside a text its quotes would be escaped."""
AGREED: Final = "agreed"
"""Named as annotator: what all say of a step, or who adjudicated it."""
_WEIGHT_NAMES: Final = {"trajectory_id", "step_index", "weight", "part", "field", "start", "end"}
_SPAN_NAMES: Final = {"field", "start", "end", "weight"}

STEP_TARGET: Final = -1
"""Target of a factor of the whole step; a part's is its place in `PARTS`, and a field's is its
place in `FIELDS`, behind them."""
FIRST_FIELD: Final = len(PARTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A number that multiplies the weight of a step, of one of its parts or of its characters."""

    target: int
    """`STEP_TARGET`, or index of a part, or `FIRST_FIELD` + index of a field."""
    weight: float
    start: int = 0
    end: int = 0
    """Half-open range of the field's characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRow:
    """A checked row of a labels or weights file."""

    line: int
    """1-based number of the line, or of the row of a Parquet file."""
    trajectory_id: str
    step: int
    label: int = -1
    """Index in `LABELS`."""
    probabilities: tuple[float, ...] = ()
    content_hash: str | None = None
    factors: tuple[Factor, ...] = field(default=())


def file_input(path: Path, what: str) -> dict[str, Any]:
    """Return how a manifest names a file of the user's: by content, not by where it lies.

    Raises:
        ConfigError: no such file, or one of another kind.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"{path}: expected a {what} file that ends in .jsonl or .parquet")
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such {what} file")
    return {"path": address_of(path), "file": what, "sha256": sha256_of(path)}


def where(path: Path, line: int) -> str:
    """Return how an error names a row."""
    return f"{path}: row {line}" if path.suffix == ".parquet" else f"{path}:{line}"


def read_label_rows(path: Path, *, annotator: str | None = None) -> Iterator[FileRow]:
    """Yield the rows of a labels file; of a gold file, the lines that count.

    Args:
        path: the file.
        annotator: whose labels are meant; None where the file names at most one person. `AGREED`,
            if nobody is called so: what annotators agree on; where they do not, who adjudicated.

    Raises:
        ConfigError: several labelled and none is named, or nobody of that name labelled anything.
        LabelError: a row that is no label; it names file and line.
    """
    counted = _counted_lines(path, annotator)
    names = _LABEL_NAMES | _NOTES | (set() if counted is None else _GOLD_NAMES)
    for line, raw in _raw_rows(path, names, counted=counted):
        row = _Row(path=path, line=line, values=raw)
        factors = [Factor(target=STEP_TARGET, weight=row.weight())] if "weight" in raw else []
        parts = raw.get("parts", {})
        if not isinstance(parts, Mapping):
            row.refuse("parts as an object {part: weight}", parts)
        for name, weight in parts.items():
            if weight is not None:
                factors.append(Factor(target=row.part(name), weight=row.weight(weight)))
        spans = raw.get("spans", [])
        if not isinstance(spans, Sequence) or isinstance(spans, str):
            row.refuse("spans as a list of {field, start, end, weight}", spans)
        factors += [_span(row, span) for span in spans]
        yield FileRow(
            line=line,
            trajectory_id=row.text("trajectory_id"),
            step=row.number("step_index"),
            label=row.choice("label", raw.get("label"), LABELS),
            probabilities=row.probabilities(),
            content_hash=row.text("content_hash") if "content_hash" in raw else None,
            factors=tuple(factors),
        )


def annotators_of(path: Path) -> list[str]:
    """Return who labelled steps in a gold file, by name; nobody where the file is no gold file.

    "" is among them where lines name none.

    Raises:
        LabelError: a line is no gold label.
    """
    return sorted({name for name, _ in _newest_lines(path) or ()})


def names_nobody(path: Path, annotator: str) -> ConfigError:
    """Return the error of an annotator who is named for labels that are not by people."""
    return ConfigError(
        f"{path}: names no annotator; leave out --annotator {annotator}, or give a gold file"
    )


def say_whose(names: Sequence[str]) -> str:
    """Return how an error lists annotators."""
    return f"labels by {', '.join(name or '(unnamed)' for name in names)}; say whose"


def read_weight_rows(path: Path) -> Iterator[FileRow]:
    """Yield the rows of a weights file.

    Raises:
        LabelError: a row that is no weight; it names file and line.
    """
    for line, raw in _raw_rows(path, _WEIGHT_NAMES):
        row = _Row(path=path, line=line, values=raw)
        if raw.keys() & {"field", "start", "end"}:
            if "part" in raw:
                row.refuse("either part or field, start, end", sorted(raw))
            names = [name for name in raw if name not in ("trajectory_id", "step_index")]
            factor = _span(row, {name: raw[name] for name in names})
        elif "part" in raw:
            factor = Factor(target=row.part(raw["part"]), weight=row.weight())
        else:
            factor = Factor(target=STEP_TARGET, weight=row.weight())
        yield FileRow(
            line=line,
            trajectory_id=row.text("trajectory_id"),
            step=row.number("step_index"),
            factors=(factor,),
        )


def _span(row: "_Row", raw: Any) -> Factor:
    if not isinstance(raw, Mapping) or raw.keys() != _SPAN_NAMES:
        got = sorted(raw) if isinstance(raw, Mapping) else raw
        row.refuse("a span with field, start, end and weight", got)
    span = _Row(path=row.path, line=row.line, values=raw)
    start, end = span.number("start"), span.number("end")
    if start >= end:
        row.refuse("a span with start < end", f"{start}-{end}")
    return Factor(
        target=FIRST_FIELD + span.choice("field", raw["field"], FIELDS),
        weight=span.weight(),
        start=start,
        end=end,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """Values of a row and where they stand; its methods return one that is sound, or refuse it."""

    path: Path
    line: int
    values: Mapping[str, Any]

    def refuse(self, expected: str, got: Any) -> NoReturn:
        raise LabelError(f"{where(self.path, self.line)}: expected {expected}, got {got!r:.80}")

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str):
            self.refuse(f"{name} as text", value)
        return value

    def number(self, name: str) -> int:
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_NUMBER:
            self.refuse(f"{name} as a whole number from 0 to {MAX_NUMBER}", value)
        return value

    def weight(self, value: Any = None) -> float:
        value = self.values.get("weight") if value is None else value
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 <= value <= MAX_WEIGHT
        ):
            self.refuse("weight as a finite number >= 0", value)
        return float(value) + 0.0

    def choice(self, name: str, value: Any, choices: Sequence[str]) -> int:
        if value not in choices:
            self.refuse(f"{name} as one of {', '.join(choices)}", value)
        return choices.index(value)

    def part(self, value: Any) -> int:
        return self.choice("part", value, PARTS)

    def probabilities(self) -> tuple[float, ...]:
        chances = tuple(self.values[name] for name in PROBABILITIES if name in self.values)
        if not chances:
            return ()
        sound = len(chances) == len(LABELS) and all(
            isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1 for p in chances
        )
        if not sound or abs(math.fsum(chances) - 1) > 1e-3:
            self.refuse("three probabilities that sum to 1", list(chances))
        return chances


def _newest_lines(path: Path) -> dict[tuple[str, StepKey], tuple[int, GoldLabel]] | None:
    """Return the newest line of every annotator for every step, if it is a label and no null.

    None where the file is no gold file.
    """
    if path.suffix == ".parquet":
        return None
    with path.open("rb") as file:
        if not any(map(_IS_GOLD.search, file)):
            return None
    newest = {
        (row.annotator, row.key): (line, row)
        for line, row in numbered_labels(path, path.read_bytes())
    }
    return {key: found for key, found in newest.items() if found[1].label is not None}


def _counted_lines(path: Path, annotator: str | None) -> set[int] | None:
    """Return the numbers of a gold file's lines that count; None of a file that is none."""
    newest = _newest_lines(path)
    if newest is None:
        if annotator is not None:
            raise names_nobody(path, annotator)
        return None
    names = sorted({name for name, _ in newest})
    if annotator is None and len(names) > 1:
        example = next(filter(None, names))
        raise ConfigError(
            f"{path}: {say_whose(names)}: --annotator {example}, or --annotator {AGREED}: what "
            "they all say, or who adjudicated"
        )
    if annotator == AGREED and AGREED not in names:
        agreed = gold_of(row for _, row in newest.values()).labels
        said = {row.key: line for line, row in newest.values() if agreed.get(row.key) == row.label}
        return set(said.values())
    if annotator not in (None, *names):
        there = ", ".join(name or "(unnamed)" for name in names)
        raise ConfigError(f"{path}: expected labels by {annotator!r}, there are some by {there}")
    return {line for (name, _), (line, _) in newest.items() if annotator in (None, name)}


def _raw_rows(
    path: Path, names: set[str], *, counted: set[int] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, values that are not null) of every row, or of those that are counted."""
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path, counted)
    for line, row in rows:
        if unknown := row.keys() - names:
            raise LabelError(
                f"{where(path, line)}: expected the names {', '.join(sorted(names))}, got "
                f"{sorted(unknown)[0]!r:.80}; leave it out, or correct it"
            )
        yield line, {name: value for name, value in row.items() if value is not None}


def _json_rows(path: Path, counted: set[int] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip() or (counted is not None and line not in counted):
                continue
            try:
                row = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise LabelError(f"{path}:{line}: expected a JSON object: {error}") from None
            if not isinstance(row, dict):
                raise LabelError(f"{path}:{line}: expected a JSON object, got {row!r:.80}")
            yield line, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    line = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1 << 13):
                for row in batch.to_pylist():
                    line += 1
                    if isinstance(row.get("parts"), list):  # a map
                        row["parts"] = dict(row["parts"])
                    yield line, row
    except (pa.ArrowException, OSError) as error:
        raise LabelError(
            f"{path}: cannot be read as Parquet: {in_one_line(error, limit=300)}"
        ) from None


class Growing:
    """Columns of numbers that grow row by row, without an object a number."""

    def __init__(self, **types: str) -> None:
        self._columns = {name: array(code) for name, code in types.items()}

    def add(self, **values: Any) -> None:
        """Add a row."""
        for name, column in self._columns.items():
            column.append(values[name])

    def __getitem__(self, name: str) -> "array[Any]":
        return self._columns[name]
