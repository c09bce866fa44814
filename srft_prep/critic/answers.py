"""What a model wrote -> labels and their probabilities: one parser for all backends.

The answer is a JSON object whose `labels` has one property a step, `{"labels": {"0": "good"}}`, or
with rationales `{"labels": {"0": {"rationale": "...", "label": "good"}}}`. A list of objects with
`step` and `label` is taken too: models that are not held to the schema like to write one. Exactly
the steps asked for and exactly the three labels count; anything else is an AnswerError, whose text
goes back to the model where it is asked again.

A label's probability is read off the token that begins it. Which token that is, and which of its
alternatives begin which label, is decided by text alone, so it works for every tokenizer: what
stands of the token before the label must be equal, and the rest must begin the label, or the label
and its closing quote must begin with it. The three are normalised to sum 1.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

from srft_prep.critic import CriticReply, CriticRequest, StepLabel
from srft_prep.errors import LabelError
from srft_prep.types import LABELS, Label

THOUGHTS_END: Final = ("</think>", "</thinking>", "</reasoning>", "[/THINK]")
"""What reasoning models close their thoughts with; only what follows is an answer."""

_THOUGHTS_END: Final = re.compile("|".join(map(re.escape, THOUGHTS_END)))
_MOST_MARKS: Final = 16
"""Marks that are looked behind: the last ones."""

_LABEL: Final = re.compile(rf'"(?:label|\d+)"\s*:\s*"(?=({"|".join(LABELS)})")')
"""Just before a label's text. Inside a JSON string no quote stands without a backslash, so that a
rationale that quotes an answer never matches."""

_FENCE: Final = "```"
_SHOWN: Final = 10


class AnswerError(LabelError):
    """What a model wrote is not the answer asked for; the text says why, for the model too."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token that a model wrote."""

    text: str
    alternatives: tuple[tuple[str, float], ...]
    """(text, log-probability) of the likeliest tokens at its place, itself among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What came back from a model, as every backend tells it."""

    text: str
    """All that it wrote, thoughts included where they come in the same text."""
    tokens: tuple[Token, ...] | None = None
    """Its tokens with their alternatives, which add up to `text`; None where none are given."""
    prompt_tokens: int = 0
    """Tokens sent, cached and cache-written ones included."""
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    completion_tokens: int = 0
    """Tokens received and billed, thoughts included."""
    refusal: str | None = None
    """Why the model or its provider declined; None where it did not."""
    cut: bool = False
    """Whether it ended for want of output tokens."""


def reply_of(
    request: CriticRequest,
    text: str,
    tokens: Sequence[Token] | None = None,
    **usage: Any,
) -> CriticReply:
    """Return the reply to a request: the labels in what a model wrote.

    Args:
        request: what was asked.
        text: all that the model wrote, thoughts included.
        tokens: its tokens, whose texts add up to `text`; None where the backend gives none.
        usage: fields of the reply (`prompt_tokens`, `seconds`, ...).

    Raises:
        AnswerError: it is not the answer asked for.
    """
    answer, skipped = without_thoughts(text)
    labels = parse_answer(answer, request.steps)
    if tokens is not None:
        starts = [skipped + match.end() for match in _LABEL.finditer(answer)]
        if len(starts) == len(labels):
            labels = _with_probabilities(labels, tokens, starts)
    order = {step: place for place, step in enumerate(request.steps)}
    return CriticReply(
        request=request,
        labels=tuple(sorted(labels, key=lambda label: order[label.step_index])),
        **usage,
    )


def without_thoughts(text: str) -> tuple[str, int]:
    """Return what follows a model's thoughts, and how many characters were left out before it.

    Thoughts end where the rest is one JSON document, whatever its rationales quote; where no rest
    is one, at the last mark.
    """
    ends = [match.end() for match in _THOUGHTS_END.finditer(text)][-_MOST_MARKS:]
    starts = [0, *reversed(ends)]
    last = starts[1] if ends else 0
    start = next((start for start in starts if _is_json(text[start:])), last)
    return text[start:], start


def _is_json(text: str) -> bool:
    try:
        json.loads(_without_fence(text))
    except (ValueError, RecursionError):
        return False
    return True


def parse_answer(answer: str, steps: Sequence[int]) -> list[StepLabel]:
    """Return the labels of an answer, in its order.

    Raises:
        AnswerError: no JSON, not the shape asked for, a step twice, missing or not asked for, or an
            unknown label.
    """
    try:
        value = json.loads(_without_fence(answer), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # ValueError: also of numbers without end
        shown = " ".join(answer.split())
        shown = shown if len(shown) <= 80 else f"{shown[:40]} … {shown[-38:]}"
        raise AnswerError(
            f"expected one JSON object and nothing around it, got {shown or 'nothing'!r}: {error}"
        ) from None
    found = value.get("labels") if isinstance(value, dict) else None
    if not isinstance(found, dict | list):
        got = f"the keys {', '.join(value) or 'none'}" if isinstance(value, dict) else repr(value)
        raise AnswerError(f"expected an object with `labels`, got {got[:80]}")
    labels = [_step_label(step, entry) for step, entry in _entries(found)]
    _refuse_other_steps([label.step_index for label in labels], steps)
    return labels


def _without_fence(answer: str) -> str:
    text = answer.strip()
    if not (text.startswith(_FENCE) and text.endswith(_FENCE)):
        return answer
    return text[len(_FENCE) : -len(_FENCE)].removeprefix("json")


def _entries(found: dict[str, Any] | list[Any]) -> Iterator[tuple[Any, Any]]:
    if isinstance(found, dict):
        yield from found.items()
        return
    for entry in found:
        if not isinstance(entry, dict) or "step" not in entry:
            raise AnswerError(f"expected objects with `step` and `label`, got {entry!r:.60}")
        yield entry["step"], entry


def _step_label(step: Any, entry: Any) -> StepLabel:
    if isinstance(step, str) and step.isascii() and step.isdigit() and len(step) < 10:
        step = int(step)
    if not isinstance(step, int) or isinstance(step, bool):
        raise AnswerError(f"expected the number of a step, got {step!r:.40}")
    name, rationale = entry, None
    if isinstance(entry, dict):
        name, rationale = entry.get("label"), entry.get("rationale")
    label: Label | None = next((known for known in LABELS if known == name), None)
    if label is None:
        raise AnswerError(f"step {step}: expected one of {', '.join(LABELS)}, got {name!r:.40}")
    if rationale is not None and not isinstance(rationale, str):
        raise AnswerError(f"step {step}: rationale: expected text, got {rationale!r:.40}")
    rationale = rationale and _writable(rationale)
    return StepLabel(step_index=step, label=label, rationale=rationale or None)


def _writable(text: str) -> str:
    """Return a text that a file can hold: JSON can name halves of characters, UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _without_repeats(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; JSON readers keep the last of two equal properties without a word."""
    found = dict(items)
    if len(found) < len(items):
        names = [name for name, _ in items]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise AnswerError(f"expected each property once, got two of {_named(twice)}")
    return found


def _refuse_other_steps(got: list[int], steps: Sequence[int]) -> None:
    expected = f"exactly the steps {steps[0]} to {steps[-1]}" if steps else "no step"
    problems = {
        "no label for": sorted(set(steps).difference(got)),
        "a label for": sorted(set(got).difference(steps)),
        "two labels for": sorted({step for step in got if got.count(step) > 1}),
    }
    found = [f"{what} {_named(which)}" for what, which in problems.items() if which]
    if found:
        raise AnswerError(f"expected labels for {expected}, got {' and '.join(found)}")


def _named(steps: Sequence[object]) -> str:
    more = f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else ""
    return f"{', '.join(map(str, steps[:_SHOWN]))}{more}"


def _with_probabilities(
    labels: Sequence[StepLabel], tokens: Sequence[Token], starts: Sequence[int]
) -> list[StepLabel]:
    """Return labels with their probabilities; `starts` is where each label's text begins."""
    edges = [0]
    for token in tokens:
        edges.append(edges[-1] + len(token.text))
    found: list[StepLabel] = []
    spans = iter(zip(pairwise(edges), tokens, strict=True))
    span = next(spans, None)
    for label, start in zip(labels, starts, strict=True):
        while span is not None and span[0][1] <= start:
            span = next(spans, None)
        if span is None:
            return list(labels)
        (begin, _), token = span
        shares = label_shares(token, token.text[: start - begin])
        total = sum(shares.values())
        if total:
            label = replace(
                label,
                p_good=shares["good"] / total,
                p_unnecessary=shares["unnecessary"] / total,
                p_harmful=shares["harmful"] / total,
            )
        found.append(label)
    return found


def label_shares(token: Token, before: str) -> Mapping[Label, float]:
    """Return the probability mass of a token's alternatives by the label that each begins."""
    shares: dict[Label, float] = dict.fromkeys(LABELS, 0.0)
    for text, logprob in dict(token.alternatives).items():
        rest = text[len(before) :]
        if not rest or not text.startswith(before):
            continue
        for label in LABELS:
            if label.startswith(rest) or rest.startswith(f'{label}"'):
                shares[label] += math.exp(logprob)
    return shares
