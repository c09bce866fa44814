"""Ledger -> what one critic says of a trajectory: which of its answers are the labels.

A trajectory's labels come from one request about all of it, or from the windows of one limit; of
several limits the first that covers every step counts, the least clipped one before others. With
votes, a step's probabilities are the mean over its answers (an answer without probabilities counts
as certain), its label is the likeliest, and of equals the more severe one: on published labels a
minority that sees harm is right more often than not (reference/CRITIC.md, section 3).

Where only some steps are asked about (a cascade), answers that cover those suffice, windows of the
smaller limit `focus_limit` among them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import polars as pl

from srft_prep.config import LabelConfig, Only
from srft_prep.critic import WHOLE, StepLabel
from srft_prep.critic.parts import Part, context_hash
from srft_prep.ledger import USAGE, Ledger, Subject, labels_of
from srft_prep.types import LABELS as NAMES
from srft_prep.types import Label

SCALES: Final = (1.0, 0.75, 0.5, 0.3)
"""Parts of the limit that are tried in turn where a model finds a request over-long."""
FOCUS_TOKENS: Final = 8192
"""Input tokens of a window where only some steps of a trajectory are asked about."""

Needed = frozenset[int] | None
"""Steps that a critic is to label; None for all, empty for none."""

_SEVERITY: Final[tuple[Label, ...]] = ("harmful", "unnecessary", "good")


class Row(NamedTuple):
    """What the columns say of a trajectory that has steps."""

    trajectory_id: str
    subject: Subject
    num_steps: int
    context: str | None
    """Hash of what the critic is told beside the trajectory."""
    resolved: bool | None
    selected: bool
    """Whether this run labels it."""


def rows_of(parts: Iterable[Path], config: LabelConfig) -> Iterator[Row]:
    """Yield the trajectories of parts that have steps, in order, without their messages.

    Those of another array job are passed over.
    """
    columns = ["trajectory_id", "content_hash", "resolved", "num_steps"]
    if config.context == "patch":
        columns.append("patch")
    for part in parts:
        for name, content_hash, resolved, num_steps, *patch in pl.read_parquet(
            part, columns=columns
        ).rows():
            if num_steps and (config.array is None or config.array.has(content_hash)):
                yield Row(
                    trajectory_id=name,
                    subject=(content_hash, config.critic_id, config.prompt_hash),
                    num_steps=num_steps,
                    context=context_hash(config.context, resolved, *patch),
                    resolved=resolved,
                    selected=wanted(resolved, config.only),
                )


def wanted(resolved: bool | None, only: Only) -> bool:
    """Return whether a trajectory of an outcome is labelled; unknown counts as unresolved."""
    return only == "all" or (resolved is True) == (only == "resolved")


def limits_of(config: LabelConfig) -> list[int | None]:
    """Return the limits whose answers can settle a trajectory in this run, the best first."""
    if config.max_input_tokens is None:
        return [None]
    return [None, *(int(config.max_input_tokens * scale) for scale in SCALES)]


def focus_scale(config: LabelConfig) -> float | None:
    """Return the part of the limit that windows about some steps fit; None where it is small."""
    if config.max_input_tokens is None or config.max_input_tokens < 2 * FOCUS_TOKENS:
        return None
    return FOCUS_TOKENS / config.max_input_tokens


def focus_limit(config: LabelConfig) -> int | None:
    """Return the limit of windows about some steps, as their part names it."""
    scale = focus_scale(config)
    return None if scale is None else int((config.max_input_tokens or 0) * scale)


def is_labelled(ledger: Ledger, row: Row, config: LabelConfig, steps: Needed = None) -> bool:
    """Return whether the ledger has all the labels that this run would ask for."""
    limits = _tried_limits(ledger, row, config)
    if steps is not None:
        limits.append(focus_limit(config))
    return all(
        any(_covers(parts.get(limit, ()), row, steps) for limit in limits)
        for parts in _answers(ledger, row, config)
    )


def _tried_limits(ledger: Ledger, row: Row, config: LabelConfig) -> list[int | None]:
    """Return the limits whose answers settle a trajectory: a smaller one only after an over-long.

    Half of this run's limit may be the whole one of an earlier run, which left out more.
    """
    over_long: set[int | None] = set()
    for text in ledger.parts(row.subject):
        part, failure = Part.parse(text), ledger.failure((*row.subject, text))
        if part and part.context == row.context and (failure or "").startswith("over-long"):
            over_long.add(part.limit)
    tried: list[int | None] = []
    for limit in limits_of(config):
        tried.append(limit)
        if limit is not None and over_long.isdisjoint((None, limit)):
            break
    return tried


def merged(answers: Sequence[StepLabel]) -> StepLabel:
    """Return one label for a step of which there are several; one by itself stays as it is."""
    if len(answers) == 1:
        return answers[0]
    sums: dict[Label, float] = dict.fromkeys(NAMES, 0.0)
    for answer in answers:
        for name, share in _shares(answer).items():
            sums[name] += share
    label = max(_SEVERITY, key=lambda name: round(sums[name], 9))
    total = sum(sums.values())
    return StepLabel(
        step_index=answers[0].step_index,
        label=label,
        p_good=sums["good"] / total,
        p_unnecessary=sums["unnecessary"] / total,
        p_harmful=sums["harmful"] / total,
        rationale=next((answer.rationale for answer in answers if answer.label == label), None),
    )


def _shares(answer: StepLabel) -> dict[Label, float]:
    good, unnecessary, harmful = answer.p_good, answer.p_unnecessary, answer.p_harmful
    if good is None or unnecessary is None or harmful is None:
        return {answer.label: 1.0}
    return {"good": good, "unnecessary": unnecessary, "harmful": harmful}


def _answers(
    ledger: Ledger, row: Row, config: LabelConfig
) -> list[dict[int | None, list[tuple[Part, str]]]]:
    """Return, for each vote, the parts that were answered, by their limit."""
    found: list[dict[int | None, list[tuple[Part, str]]]] = [{} for _ in range(config.votes)]
    for text in ledger.parts(row.subject):
        part = Part.parse(text)
        if part is None or part.vote >= config.votes or part.context != row.context:
            continue
        if ledger.failure((*row.subject, text)) is None:
            found[part.vote].setdefault(part.limit, []).append((part, text))
    return found


def _covers(parts: Sequence[tuple[Part, str]], row: Row, steps: Needed) -> bool:
    """Return whether parts of one limit ask for every step that is needed."""
    num_needed = row.num_steps if steps is None else len(steps)
    return _num_asked(parts, row, steps) == num_needed


def _num_asked(parts: Sequence[tuple[Part, str]], row: Row, steps: Needed) -> int:
    """Return how many needed steps parts ask for; windows of two context sizes may overlap."""
    asked = {step for part, _ in parts for step in part.steps(row.num_steps)}
    return len(asked if steps is None else asked & steps)


def _chosen(
    parts: dict[int | None, list[tuple[Part, str]]], row: Row, config: LabelConfig, steps: Needed
) -> list[str]:
    """Return the parts of one vote that a trajectory's labels come from."""
    known = limits_of(config)
    others = sorted((limit or 0 for limit in parts if limit not in known), reverse=True)
    order = [limit for limit in (*known, *others) if limit in parts]
    best = max(
        order,
        key=lambda limit: _num_asked(parts[limit], row, steps),
        default=None,
    )
    return [text for _, text in parts.get(best, ())]


def labels_in(
    ledger: Ledger, row: Row, config: LabelConfig, steps: Needed = None
) -> list[StepLabel]:
    """Return a trajectory's labels in the order of its steps, of needed ones as of many as can be.

    Steps beside those that are needed have labels where the same answers hold some. Of windows
    that overlap, the one that was answered first counts.
    """
    by_step: dict[int, list[StepLabel]] = {}
    for parts in _answers(ledger, row, config):
        of_vote: dict[int, StepLabel] = {}
        for text in _chosen(parts, row, config, steps):
            entry = ledger.get((*row.subject, text))
            assert entry is not None
            for label in labels_of(entry):
                of_vote.setdefault(label.step_index, label)
        for step, label in of_vote.items():
            by_step.setdefault(step, []).append(label)
    return [merged(by_step[step]) for step in sorted(by_step)]


def requests_in(
    ledger: Ledger,
    row: Row,
    config: LabelConfig,
    labels: Sequence[StepLabel],
    paid: set[tuple[Subject, str]],
    *,
    unasked: str,
    steps: Needed = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a trajectory's requests.

    A copy of an earlier trajectory has its labels at no cost: nothing was asked for it. Failures
    are left out where every step has its answer nonetheless, since other requests took their place;
    what they cost is added to the first that was answered. Where nothing is needed any more (a
    cascade), a failure is left out only where other answers cover what it was about. What nobody
    was asked in this run is a failure that is in no ledger.
    """
    answers = _answers(ledger, row, config)
    answered = {
        vote
        for vote, parts in enumerate(answers)
        if steps == frozenset() or any(_covers(asked, row, steps) for asked in parts.values())
    }
    _, critic_id, prompt_hash = row.subject
    critic = {"critic_id": critic_id, "prompt_hash": prompt_hash}
    failed = False
    rows: list[dict[str, Any]] = []
    replaced: Counter[str] = Counter()
    for text in ledger.parts(row.subject):
        key = (*row.subject, text)
        entry = ledger.get(key)
        assert entry is not None
        usage = {**{name: entry[name] for name in USAGE}, **ledger.spent(key)}
        if (row.subject, text) in paid:
            usage = dict.fromkeys(USAGE, 0)
        paid.add((row.subject, text))
        part = Part.parse(text)
        settled = part and (part.vote in answered or part.vote >= config.votes)
        if steps == frozenset():
            settled = part and _is_covered(part, answers, row)
        if entry["failure"] is not None and answered and settled:
            replaced.update(usage)
            continue
        failed |= entry["failure"] is not None
        named = {"trajectory_id": row.trajectory_id, "part": text, "failure": entry["failure"]}
        rows.append({**named, **critic, **usage})
    if rows:
        _add_costs(rows[0], replaced)
    yield from rows
    lacking = config.votes - len(answered)
    if row.selected and lacking and not failed:
        num_needed = row.num_steps if steps is None else len(steps)
        given = sum(steps is None or label.step_index in steps for label in labels)
        missing = num_needed - given
        what = f"{missing} of {num_needed} steps"
        if not missing:
            what = f"{lacking} of {config.votes} answers"
        yield {
            "trajectory_id": row.trajectory_id,
            "part": "unasked" if ledger.parts(row.subject) else WHOLE,
            "failure": f"unasked: {what}: {unasked}",
            **critic,
            **dict.fromkeys(USAGE, 0),
        }


def _is_covered(
    part: Part, answers: Sequence[dict[int | None, list[tuple[Part, str]]]], row: Row
) -> bool:
    """Return whether other answers of its vote label all that a part is about."""
    if part.vote >= len(answers):
        return False
    steps = frozenset(part.steps(row.num_steps))
    return any(_covers(asked, row, steps) for asked in answers[part.vote].values())


def _add_costs(request: dict[str, Any], others: Mapping[str, float]) -> None:
    """Add what other requests cost to a row of `requests.parquet`."""
    for name in USAGE:
        if name != "clipped_tokens":
            request[name] += others.get(name, 0)
