"""Harmful steps III: edits that the run itself took back, and edits that the task forbids.

An edit is taken back by the editor's undo, by git (checkout, restore, reset --hard, a stash that is
never popped), by moving a backup over the file, or by the inverse edit. The step that takes back is
no fault, nor is a probe (an edit that adds prints and is cleaned away: it told something), nor an
edit that the run makes again afterwards. A file is compared by path, a relative path with any
absolute one that ends in it.
"""

import re
from collections.abc import Sequence
from typing import Final

from srft_prep.critic.rules.calls import Call
from srft_prep.critic.rules.effects import stashes
from srft_prep.critic.rules.evidence import Run, StepEvidence, same_file
from srft_prep.critic.rules.refused import refusal
from srft_prep.critic.rules.rule import Findings, Rule

_TEST_FILE: Final = re.compile(r"(?:^|/)(?:tests?/|test_[^/]*\.py$|[^/]*_test\.py$|conftest\.py$)")
_CONFIG_FILE: Final = re.compile(r"(?:^|/)(?:pyproject\.toml|setup\.cfg|tox\.ini|pytest\.ini)$")
_TESTS_FORBIDDEN: Final = (
    "DO NOT MODIFY: Tests",
    "DON'T have to modify the testing logic or any of the tests",
    "MUST NOT modify any content under `/tests`",
)
_PROBE: Final = re.compile(r"\bprint\(|\bbreakpoint\(|\bpdb\b|console\.log\(|\bDEBUG\b")
_CONFIG_FORBIDDEN: Final = ("DO NOT MODIFY: Tests, configuration files",)


def done_edits(run: Run) -> tuple[StepEvidence, ...]:
    """Return the steps that wrote files which they name, and were carried out."""
    return tuple(step for step in run.steps if step.writes and refusal(step) is None)


def _find_reverted(run: Run) -> Findings:
    edits = [step for step in done_edits(run) if not _PROBE.search(step.key)]
    last = {step.key: step.index for step in edits}
    edits = [step for step in edits if last[step.key] == step.index]
    standing: dict[int, set[str]] = {step.index: set(step.writes) for step in edits}
    unpopped = _last_unpopped_stash(run)
    for step in run.steps:
        if step.index == unpopped:
            yield from _take_back(standing, step.index, ".", "git stash, never popped")
        for path in step.restores:
            yield from _take_back(standing, step.index, path, f"git restored {path}")
        for path in _moved_backups(step):
            yield from _take_back(standing, step.index, path, f"a backup came back over {path}")
        for call in step.calls:
            if call.kind == "undo" and call.path and refusal(step) is None:
                yield from _take_back(
                    standing, step.index, call.path, f"undo_edit of {call.path}", latest=True
                )
    yield from _inverse_edits(edits)


def _take_back(
    standing: dict[int, set[str]], at: int, path: str, how: str, *, latest: bool = False
) -> Findings:
    hit = [
        index
        for index, files in standing.items()
        if index < at and any(path == "." or same_file(path, file) for file in files)
    ]
    for index in hit[-1:] if latest else hit:
        files = standing[index]
        back = {file for file in files if path == "." or same_file(path, file)}
        files -= back
        if not files:
            del standing[index]
            yield index, f"its edit was taken back at step {at}: {how}"


def _inverse_edits(edits: Sequence[StepEvidence]) -> Findings:
    done: dict[tuple[str, str, str], int] = {}
    for step in edits:
        for call in step.calls:
            if call.kind != "edit" or not call.path or call.old is None or call.new is None:
                continue
            first = done.pop((call.path, call.new, call.old), None)
            if first is not None and first != step.index:
                yield first, f"its edit was taken back at step {step.index}: the inverse edit"
            else:
                done[call.path, call.old, call.new] = step.index


def _last_unpopped_stash(run: Run) -> int | None:
    open_stashes: list[int] = []
    for step in run.steps:
        for call in step.calls:
            depth = stashes(call.commands)
            open_stashes += [step.index] * depth
            if depth < 0:
                del open_stashes[depth:]
    return open_stashes[-1] if open_stashes else None


def _moved_backups(step: StepEvidence) -> list[str]:
    commands = [command for call in step.calls for command in call.commands]
    return [
        command.operands[1]
        for command in commands
        if command.name in ("mv", "cp")
        and len(command.operands) == 2
        and command.operands[0].startswith(f"{command.operands[1]}.")
    ]


def _find_forbidden(run: Run) -> Findings:
    tests = any(words in run.prompt for words in _TESTS_FORBIDDEN)
    config = any(words in run.prompt for words in _CONFIG_FORBIDDEN)
    if not tests and not config:
        return
    own: set[str] = set()
    for step in run.steps:
        if refusal(step) is not None:
            continue
        for path in step.writes:
            if _creates(step, path):
                own.add(path)
            elif path not in own and (
                (tests and _TEST_FILE.search(path) and not path.startswith("/tmp/"))
                or (config and _CONFIG_FILE.search(path))
            ):
                yield step.index, f"it edits {path}, which the task forbids"
                break


def _creates(step: StepEvidence, path: str) -> bool:
    """Whether the step writes a whole file, so that it may be the agent's own."""

    def whole(call: Call) -> bool:
        if call.kind == "create":
            return call.path == path
        return any(
            path in set(command.targets) - set(command.appends)
            or command.name in ("touch", "cp", "mv", "tee")
            for command in call.commands
        )

    return any(whole(call) for call in step.calls)


EDIT_RULES: Final = (
    Rule(
        rule_id="edit-reverted",
        version=1,
        label="harmful",
        summary="an edit that the run later took back",
        find=_find_reverted,
    ),
    Rule(
        rule_id="edit-forbidden",
        version=1,
        label="harmful",
        summary="an edit to existing tests or configuration that the task forbids",
        find=_find_forbidden,
    ),
)
