"""The scripted critic: labels from a file, for tests and for labels made by hand or elsewhere.

The file is JSONL, or CSV with a header (by its suffix `.csv`), one line a step: `trajectory_id,
step_index, label`, and optionally `p_good, p_unnecessary, p_harmful, rationale` (or `reason`, as a
model critic is asked for it). Other fields are ignored. Read once, when the critic is opened. A
request is a failure where a step asked has no line, or a line's step is none of the trajectory.
"""

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from srft_prep.critic import CriticReply, CriticRequest, StepLabel
from srft_prep.critic.pricing import Rates
from srft_prep.errors import ConfigError, LabelError
from srft_prep.schemas import PROBABILITIES
from srft_prep.types import LABELS, Label, Trajectory

_FIELDS: Final = ("trajectory_id", "step_index", "label")
_NAMED_STEPS: Final = 10


class ScriptedCritic:
    """A critic that answers from a file: same file, same answers."""

    prompt_hash = "none"
    """The file's hash is in `critic_id`; nothing else shapes the labels."""
    rates = Rates()
    max_input_tokens = None

    def __init__(self, *, model: str | Path) -> None:
        """Read the labels.

        Args:
            model: the JSONL or CSV file.

        Raises:
            ConfigError: the file cannot be read.
            LabelError: a line is no label, or labels a step for the second time.
        """
        self.path = Path(model)
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{self.path}: expected a JSONL or CSV file of labels: {error.strerror} "
                "(give its path as --model)"
            ) from None
        self.critic_id = f"scripted@{hashlib.blake2b(raw, digest_size=8).hexdigest()}"
        self._labels: dict[str, dict[int, StepLabel]] = {}
        """By trajectory and step."""
        lines: dict[tuple[str, int], int] = {}
        for line, record in self._records(raw):
            where = f"{self.path}:{line}"
            name, step = _text(record, "trajectory_id", where=where), _step(record, where=where)
            if (name, step) in lines:
                raise LabelError(
                    f"{where}: expected one label for a step, got a second one for step {step} "
                    f"of {name} (the first is in line {lines[name, step]}; remove one)"
                )
            lines[name, step] = line
            self._labels.setdefault(name, {})[step] = _step_label(record, step, where=where)

    def plan(self, trajectory: Trajectory, *, scale: float = 1.0) -> tuple[CriticRequest, ...]:
        """Return one request for all steps."""
        return (CriticRequest.of(trajectory),) if trajectory.num_steps else ()

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        """Yield one reply for each request, in order."""
        for request in requests:
            found = self._labels.get(request.trajectory_id, {})
            if failure := self._problem_of(request, found):
                yield CriticReply(request=request, failure=failure)
            else:
                labels = tuple(found[step] for step in request.steps)
                yield CriticReply(request=request, labels=labels)

    def _problem_of(self, request: CriticRequest, found: Mapping[int, StepLabel]) -> str | None:
        """Return why a trajectory's labels do not answer a request, or None."""
        assert request.trajectory is not None
        num_steps = request.trajectory.num_steps
        if not found:
            if not self._labels:
                return f"{self.path.name} holds no labels"
            return (
                f"{self.path.name} has no line of this trajectory; those it has lines of "
                f"({len(self._labels)}) are named like {next(iter(self._labels))}"
            )
        if unknown := sorted(step for step in found if step >= num_steps):
            has = {0: "no step", 1: "only step 0"}.get(num_steps, f"the steps 0 to {num_steps - 1}")
            return f"a label for {_named(unknown)}, but the trajectory has {has}"
        if missing := [step for step in request.steps if step not in found]:
            return f"no label for {_named(missing)}"
        return None

    def close(self) -> None:
        """Do nothing: the file was read when the critic was opened."""

    def _records(self, raw: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise LabelError(f"{self.path}: expected UTF-8 text: {error}") from None
        if self.path.suffix.lower() == ".csv":
            yield from self._csv_records(text)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield number, self._json_record(line, number)

    def _json_record(self, line: str, number: int) -> Mapping[str, Any]:
        where = f"{self.path}:{number}"
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise LabelError(
                f"{where}: expected a JSON object: {error} (name a CSV file .csv)"
            ) from None
        if not isinstance(record, dict):
            raise LabelError(f"{where}: expected a JSON object, got {type(record).__name__}")
        return record

    def _csv_records(self, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            missing = [name for name in _FIELDS if name not in (reader.fieldnames or ())]
            if missing:
                raise LabelError(
                    f"{self.path}:1: expected a header with {', '.join(_FIELDS)}, got "
                    f"{', '.join(reader.fieldnames or ()) or 'nothing'}"
                )
            for record in reader:
                yield reader.line_num, {key: value or None for key, value in record.items()}
        except csv.Error as error:
            raise LabelError(f"{self.path}:{reader.line_num + 1}: expected CSV: {error}") from None


def _named(steps: Sequence[int]) -> str:
    named = ", ".join(str(step) for step in steps[:_NAMED_STEPS])
    more = f" and {len(steps) - _NAMED_STEPS} more" if len(steps) > _NAMED_STEPS else ""
    return f"{'step' if len(steps) == 1 else 'steps'} {named}{more}"


def _text(record: Mapping[str, Any], key: str, *, where: str) -> str:
    value = record.get(key)
    if isinstance(value, str) and value:
        return value
    raise LabelError(f"{where}: {key}: expected text, got {_shown(value)}")


def _step(record: Mapping[str, Any], *, where: str) -> int:
    value = record.get("step_index")
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise LabelError(f"{where}: step_index: expected a number from 0, got {_shown(value)}")


def _step_label(record: Mapping[str, Any], step: int, *, where: str) -> StepLabel:
    text = _text(record, "label", where=where)
    label: Label | None = next((known for known in LABELS if known == text), None)
    if label is None:
        raise LabelError(f"{where}: label: expected one of {', '.join(LABELS)}, got {_shown(text)}")
    key = "reason" if record.get("rationale") is None else "rationale"
    rationale = record.get(key)
    if rationale is not None and not isinstance(rationale, str):
        raise LabelError(f"{where}: {key}: expected text, got {_shown(rationale)}")
    good, unnecessary, harmful = (_probability(record, key, where=where) for key in PROBABILITIES)
    return StepLabel(
        step_index=step,
        label=label,
        p_good=good,
        p_unnecessary=unnecessary,
        p_harmful=harmful,
        rationale=rationale,
    )


def _probability(record: Mapping[str, Any], key: str, *, where: str) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    try:
        number = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise LabelError(
            f"{where}: {key}: expected a number from 0 to 1 or nothing, got {_shown(value)}"
        )
    return number


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
