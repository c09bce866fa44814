"""Harmful steps II: submissions that cannot be applied.

A diff that the agent typed itself is checked as `git apply` would: hunks hold as many lines as
their headers announce, and lines that it removes were seen somewhere before. Diffs that git made
are right by construction and are not looked at.
"""

import io
import re
from typing import Final

from srft_prep.critic.rules.evidence import Run, StepEvidence, quote
from srft_prep.critic.rules.rule import Findings, Rule, each_step

_HUNK: Final = re.compile(r"@@ -\d{1,9}(?:,(\d{1,9}))? \+\d{1,9}(?:,(\d{1,9}))? @@")
_EMPTY_SUBMISSIONS: Final = ("EMPTY_OUTPUT", "No changes to submit", "Empty patch")
_RESULT: Final = "Last output from code snippet:"
_CHECKED_LINES: Final = 100
_TELLING_CHARS: Final = 12
_CHECKED_PATCHES: Final = 20
"""Typed patches of a run that are held against what it had seen: each costs a pass over that."""


def typed_patch(step: StepEvidence) -> str | None:
    """Return the diff that the step submits where the agent typed it; None for other steps."""
    for call in step.calls:
        if call.kind != "submit" or call.commands:
            continue
        result = step.output.rpartition(_RESULT)[2] if _RESULT in step.output else ""
        for text in (result, call.text):
            if (start := text.find("@@ -")) >= 0 and "truncated" not in text:
                return text[start:]
    return None


def broken_hunk(patch: str) -> str | None:
    """Return what is wrong with the first hunk whose length is not the announced one."""
    lines = patch.split("\n")
    at = 0
    while at < len(lines):
        match = _HUNK.match(lines[at])
        at += 1
        if match is None:
            continue
        old, new = (int(count or 1) for count in match.groups())
        have_old = have_new = 0
        while at < len(lines) and (have_old < old or have_new < new) and _in_hunk(lines[at]):
            have_old += lines[at][:1] in (" ", "-", "")
            have_new += lines[at][:1] in (" ", "+", "")
            at += 1
        ended = at >= len(lines) and old - have_old == new - have_new >= 0
        longer = at < len(lines) and lines[at][:1] in ("+", "-", " ")
        longer = longer and not lines[at].startswith(("--- ", "+++ ")) and bool(lines[at].strip())
        if longer and have_old == old and have_new == new:
            return f"hunk {match[0]} goes on after its announced lines"
        if (have_old, have_new) != (old, new) and not ended:
            return f"hunk {match[0]} has {have_old} old and {have_new} new lines"
    return None


def _in_hunk(line: str) -> bool:
    return not line or line[0] in " +-\\"


def _unapplicable(step: StepEvidence) -> str | None:
    patch = typed_patch(step)
    return broken_hunk(patch) if patch is not None else None


def _find_invented_lines(run: Run) -> Findings:
    """Yield typed patches that remove lines never shown, drafts of the patch itself left out."""
    seen = io.StringIO(run.prompt)  # grows with the run, and is searched at a submission only
    seen.seek(0, io.SEEK_END)
    checked = 0
    for step in run.steps:
        patch = typed_patch(step) if checked < _CHECKED_PATCHES else None
        checked += patch is not None
        shown = "" if patch is None else seen.getvalue()
        lines = (line for line in step.output.split("\n") if not line.startswith("-"))
        seen.writelines(f"\n{line}" for line in lines)
        if patch is None:
            continue
        removed = [
            text
            for line in patch.split("\n")
            if line.startswith("-") and len(text := line[1:].strip()) >= _TELLING_CHARS
        ]
        unseen = [line for line in removed[:_CHECKED_LINES] if line not in shown]
        if unseen:
            yield (
                step.index,
                f"{len(unseen)} of the lines that it removes were never shown: {quote(unseen[0])}",
            )


def _empty_submission(step: StepEvidence) -> str | None:
    if not any(call.kind == "submit" for call in step.calls):
        return None
    shown = [result.strip() for result in step.results]
    mark = next((text for text in shown if text.startswith(_EMPTY_SUBMISSIONS)), None)
    if mark is not None:
        return quote(mark)
    by_shell = any(call.commands for call in step.calls)
    return "the submitted text is empty" if by_shell and shown and not any(shown) else None


def _find_unresolved_submit(run: Run) -> Findings:
    if run.resolved is False:
        submits = [step for step in run.steps if any(call.kind == "submit" for call in step.calls)]
        if submits:
            yield submits[-1].index, "the run is known not to have solved its task"


SUBMIT_RULES: Final = (
    Rule(
        rule_id="submit-corrupt-patch",
        version=1,
        label="harmful",
        summary="a typed patch whose hunks do not hold the announced lines",
        find=each_step(_unapplicable),
    ),
    Rule(
        rule_id="submit-invented-lines",
        version=1,
        label="harmful",
        summary="a typed patch that removes lines which no observation has shown",
        find=_find_invented_lines,
    ),
    Rule(
        rule_id="submit-empty",
        version=1,
        label="harmful",
        summary="a submission with nothing in it",
        find=each_step(_empty_submission),
    ),
)
OUTCOME_RULES: Final = (
    Rule(
        rule_id="submit-unresolved",
        version=1,
        label="harmful",
        summary="the last submission of a run that is known to be unresolved",
        find=_find_unresolved_submit,
    ),
)
