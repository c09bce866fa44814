"""Unnecessary steps: what was done before and could not come out differently.

A repeat counts only with the same output and no write in between: running the tests again after an
edit is work, even where they fail in the same way. A program whose code is not in sight may write.
Outputs are compared without addresses, durations and times of day.
"""

import re
from typing import Final

from srft_prep.critic.rules.evidence import Run, StepEvidence, same_file
from srft_prep.critic.rules.refused import refusal
from srft_prep.critic.rules.rule import Findings, Rule

_NEW_LINES: Final = 3
_RETRIES: Final = 3
_FRAMES: Final = (
    "<returncode>",
    "<output",
    "</output",
    "<NOTE>",
    "[File:",
    "(Open file:",
    "Here's",
)
_FAILED: Final = re.compile(r"(?:ERROR|Error|error)\b|Traceback \(most recent call last\)")


def _find_repeats(run: Run) -> Findings:
    before: dict[str, StepEvidence] = {}
    last_write = -1
    for step in run.steps:
        earlier = before.get(step.key) if step.key and step.answered else None
        if (
            earlier is not None
            and earlier.index >= last_write
            and step.effect != "writes"
            and earlier.output_digest == step.output_digest
        ):
            yield (
                step.index,
                f"same action and output as step {earlier.index}, no write since",
            )
        before[step.key] = step
        if step.effect != "reads":
            last_write = step.index


def _find_retries(run: Run) -> Findings:
    """Yield the third and later runs of one failing action with no write in between."""
    failures: dict[str, list[int]] = {}
    for step in run.steps:
        if step.key and _failed(step):
            tries = failures.setdefault(step.key, [])
            tries.append(step.index)
            if len(tries) >= _RETRIES:
                yield (
                    step.index,
                    f"the same action failed before at steps {tries[-3]} and {tries[-2]}, "
                    "no write since",
                )
        elif step.effect != "reads":
            failures.clear()
        else:
            failures.pop(step.key, None)


def _find_loops(run: Run) -> Findings:
    """Yield the second and later rounds of A-B-A-B, with the same outputs in each round."""
    steps = run.steps
    flagged = -1
    for index in range(3, len(steps)):
        first, second, third, fourth = steps[index - 3 : index + 1]
        if first.key == second.key or not (first.key == third.key and second.key == fourth.key):
            continue
        if not all(step.key and step.answered for step in (first, second, third, fourth)):
            continue
        if (first.output_digest, second.output_digest) != (
            third.output_digest,
            fourth.output_digest,
        ):
            continue
        for step in (third, fourth):
            if step.index > flagged:
                flagged = step.index
                yield (
                    step.index,
                    f"A-B-A-B: steps {first.index} and {second.index} again, same outputs",
                )


def _find_rereads(run: Run) -> Findings:
    """Yield readings of which every line was shown before, from a file not written since."""
    shown: dict[str, dict[int, int]] = {}
    for step in run.steps:
        if step.effect != "reads":
            _forget(shown, step)
        elif len(step.reads) == 1 and refusal(step) is None and step.answered:
            lines = shown.setdefault(step.reads[0], {})
            new = [hash(line) for line in _content_lines(step)]
            if len(new) >= _NEW_LINES and all(line in lines for line in new):
                yield (
                    step.index,
                    f"{step.reads[0]} was shown at step {lines[new[0]]} and not written since",
                )
            for line in new:
                lines.setdefault(line, step.index)


def _forget(shown: dict[str, dict[int, int]], step: StepEvidence) -> None:
    if step.touches is None:
        shown.clear()
        return
    for path in [path for path in shown if any(same_file(path, file) for file in step.touches)]:
        del shown[path]


def _content_lines(step: StepEvidence) -> list[str]:
    """Return the lines that a reading shows, without blank ones and the harness's own."""
    lines = (line.rstrip() for line in step.output.split("\n"))
    return [line for line in lines if line.strip() and not line.lstrip().startswith(_FRAMES)]


def _find_unused_files(run: Run) -> Findings:
    """Yield the making of files that were removed again before anything used them."""
    made: dict[str, int] = {}
    for step in run.steps:
        for path in step.removes:
            if (at := made.pop(path, None)) is not None:
                yield at, f"{path} was removed at step {step.index} and never used in between"
        for path in [path for path in made if _mentions(step.key, path)]:
            del made[path]
        if refusal(step) is None and len(step.writes) == 1 and step.effect == "writes":
            path = step.writes[0]
            if any(call.kind == "create" for call in step.calls) or _only_writes(step):
                made[path] = step.index


def _mentions(text: str, path: str) -> bool:
    """Whether a text names a file, its module, or the folder that a test run would collect."""
    parts = path.split("/")
    return parts[-1].partition(".")[0] in text or (len(parts) > 1 and parts[-2] in text)


def _only_writes(step: StepEvidence) -> bool:
    commands = [command for call in step.calls for command in call.commands]
    return len(commands) == 1 and commands[0].name in ("cat", "touch", "echo", "tee")


def _failed(step: StepEvidence) -> bool:
    if step.returncode is not None:
        return step.returncode != 0
    return refusal(step) is not None or bool(_FAILED.match(step.output.lstrip()))


REDUNDANT_RULES: Final = (
    Rule(
        rule_id="repeated-action",
        version=1,
        label="unnecessary",
        summary="the same action with the same output and no write in between",
        find=_find_repeats,
    ),
    Rule(
        rule_id="repeated-failure",
        version=1,
        label="unnecessary",
        summary="the same failing action for the third time with no write in between",
        find=_find_retries,
    ),
    Rule(
        rule_id="loop",
        version=1,
        label="unnecessary",
        summary="two actions in turn, again and again, with the same outputs",
        find=_find_loops,
    ),
    Rule(
        rule_id="reread",
        version=1,
        label="unnecessary",
        summary="reading lines of a file that were shown before and not written since",
        find=_find_rereads,
    ),
    Rule(
        rule_id="unused-file",
        version=1,
        label="unnecessary",
        summary="making a file that is removed again before anything used it",
        find=_find_unused_files,
    ),
)
