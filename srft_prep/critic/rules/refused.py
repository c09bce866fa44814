"""Harmful steps I: the harness, a tool or the shell refused the action, so that nothing happened.

Marks are looked for where the harness writes them (the start of an observation, the start of a
line) and only for the kind of call that can earn them: source code that a step prints is full of
the same words. A command that returns non-zero is no reason: a failing test or a grep without a
match tells the agent something.
"""

import re
from typing import Final

from srft_prep.critic.rules.calls import prose_of
from srft_prep.critic.rules.evidence import Run, StepEvidence, line_with, quote
from srft_prep.critic.rules.rule import Findings, Rule, each_step

_HEAD_CHARS: Final = 400

_REQUERIES: Final = (
    "Please always provide EXACTLY ONE action",
    "Tool call error:",
    "No tool calls found in the response",
    "Your output was not formatted correctly",
    "Your last output did not use any tool calls",
    "Your last output included multiple tool calls",
    "Your action could not be parsed properly",
    "Error in code parsing:",
    "Error in generating tool call",
    "ERROR: Cannot execute multiple commands at once",
)
_ARGUMENT_ERRORS: Final = (
    "Missing required parameters for function",
    "Parameter 'command' is expected to be one of",
    "Parameter `",
    "Invalid `",
    "The `view_range` parameter is not allowed",
    "Failed to parse tool call arguments",
    "Error validating",
    "Unknown tool",
)
_BLOCKS: Final = (
    "Operation '",
    "Interactive operation",
    "Error: Interactive",
    "Action blocked",
    "ActionBlocked",
    "InterpreterError: Import",
    "InterpreterError: Forbidden",
)
_NO_REPLACEMENT: Final = "No replacement was performed"
_EDIT_REJECTIONS: Final = (
    "Your proposed edit has introduced new syntax error(s)",
    "Your edit was not applied",
    _NO_REPLACEMENT,
    "Invalid `new_str` parameter",
    f"ERROR: {_NO_REPLACEMENT}",
    "[Your proposed edit has introduced new syntax error(s)",
)
_PATCH_REJECTIONS: Final = (
    "error: patch failed:",
    "error: corrupt patch",
    "error: No valid patches in input",
    "error: unrecognized input",
    "patch: ****",
    "sed: -e expression",
    "sed: can't read",
)
_HUNK_FAILED: Final = re.compile(r"^Hunk #\d+ FAILED[^\n]*", re.MULTILINE)
_SHELL_SYNTAX: Final = (
    "syntax error near unexpected token",
    "syntax error: unexpected end of file",
    "unexpected EOF while looking for matching",
    "Syntax error:",
)
_SHELL_LINE: Final = re.compile(r"/?(?:\w+/)*+(?:ba|da|z)?sh: ")
_REFUSED_SYNTAX: Final = "Your bash command contained syntax errors and was NOT executed"
_TOOL_ERRORS: Final = ("ERROR:", "Error:", "Error executing tool", "Error while executing")
_CODE_ERRORS: Final = (
    "Code execution failed at line",
    "InterpreterError:",
    "Error in code parsing",
)
_ADMITS: Final = re.compile(r"\b(?:errors?|apologi[sz]e|mistake|failed|failing)\b", re.IGNORECASE)


def refusal(step: StepEvidence) -> str | None:
    """Return the words with which the step's action was refused; None where it was carried out."""
    for look in (_format_error, _bad_arguments, _blocked, _edit_rejected):
        if evidence := look(step):
            return evidence
    return None


def _empty_action(step: StepEvidence) -> str | None:
    if (step.action.content or "").strip() or step.calls or step.action.tool_calls:
        return None
    return "the message has neither text nor a tool call"


def _format_error(step: StepEvidence) -> str | None:
    broken = next((call.broken for call in step.calls if call.broken), None)
    return broken or _first(step, _REQUERIES)


def _bad_arguments(step: StepEvidence) -> str | None:
    by_tool = any(call.kind != "shell" for call in step.calls)
    for result in step.results:
        head = result[:_HEAD_CHARS].lstrip()
        if head.startswith(_TOOL_ERRORS):
            head = head.partition("\n")[2]
        if by_tool and head.startswith(_ARGUMENT_ERRORS) and _NO_REPLACEMENT not in head:
            return quote(head)
        if (end := result.rfind("\n[Error occurred in processing last action]")) >= 0:
            return quote(result[result.rfind("\n", 0, end) + 1 :])
    return None


def _blocked(step: StepEvidence) -> str | None:
    evidence = _first(step, _BLOCKS)
    if evidence and evidence.startswith("Operation '") and "not supported" not in evidence:
        return None
    return evidence


def _edit_rejected(step: StepEvidence) -> str | None:
    if any(call.kind in ("edit", "create") for call in step.calls):
        return line_with(step.output, _EDIT_REJECTIONS, chars=4_000)
    commands = [command for call in step.calls for command in call.commands]
    names = {command.name for command in commands}
    if "patch" in names or "sed" in names or any("apply" in it.words[:3] for it in commands):
        if evidence := line_with(_shown(step), _PATCH_REJECTIONS):
            return evidence
        if "patch" in names and (match := _HUNK_FAILED.search(step.output)):
            return quote(match[0])
    return None


def _shell_error(step: StepEvidence) -> str | None:
    commands = [command for call in step.calls for command in call.commands]
    if not commands or step.returncode == 0:
        return None
    text = _shown(step)
    if evidence := line_with(text, (_REFUSED_SYNTAX,), chars=_HEAD_CHARS):
        return evidence
    words = {word for command in commands for word in command.words[:1]}
    lines = (text[:2_000] + "\n" + text[-2_000:]).split("\n")
    for line in lines:
        if _SHELL_LINE.match(line) and (
            any(mark in line for mark in _SHELL_SYNTAX) or _missing_program(line) in words
        ):
            return quote(line)
    return None


def _missing_program(line: str) -> str | None:
    """Return the name in `bash: line 1: NAME: command not found` or `sh: 1: NAME: not found`."""
    line = line.rstrip()
    if not line.endswith("not found"):
        return None
    return line.removesuffix("not found").removesuffix("command ").rstrip(" :").rpartition(": ")[2]


def _tools_failed(step: StepEvidence) -> str | None:
    if not step.calls or not step.results or any(call.kind == "shell" for call in step.calls):
        return None
    heads = [result.lstrip() for result in step.results]
    failed = len(heads) >= len(step.calls) and all(head.startswith(_TOOL_ERRORS) for head in heads)
    return quote(heads[0].replace("\n", " ", 1)) if failed else None


def _find_code_failures(run: Run) -> Findings:
    """Yield code actions that crashed: the harness says so, or nothing at all came back.

    Some logs drop the result of a crashed action. A gap counts where the run's other code actions
    have results and either the next step speaks of an error or the step before was such a gap.
    """
    code = [any(call.name == "python" for call in step.calls) for step in run.steps]
    recorded = any(is_code and step.answered for is_code, step in zip(code, run.steps, strict=True))
    gap_before = False
    followings = (*run.steps[1:], None)
    for step, following in zip(run.steps, followings, strict=False):  # a run may have no steps
        gap = False
        if code[step.index]:
            if evidence := _first(step, _CODE_ERRORS):
                yield step.index, evidence
            elif recorded and not step.answered and following is not None:
                gap = True
                admission = _ADMITS.search(prose_of(following.action)[:600])
                if admission:
                    said = quote(prose_of(following.action)[max(0, admission.start() - 60) :])
                    yield step.index, f"no result came back, and the next step says: {said}"
                elif gap_before:
                    yield step.index, "no result came back, as from the step before"
        gap_before = gap


def _first(step: StepEvidence, marks: tuple[str, ...]) -> str | None:
    for result in step.results:
        if evidence := line_with(result.lstrip(), marks, chars=_HEAD_CHARS):
            return evidence
    return None


def _shown(step: StepEvidence) -> str:
    text = step.output
    return text.replace("<output>", "<output>\n", 1) if text.startswith("<returncode>") else text


REFUSED_RULES: Final = (
    Rule(
        rule_id="empty-action",
        version=1,
        label="harmful",
        summary="a message with neither text nor a tool call",
        find=each_step(_empty_action),
    ),
    Rule(
        rule_id="format-error",
        version=1,
        label="harmful",
        summary="an action that the harness could not parse and asked for again",
        find=each_step(_format_error),
    ),
    Rule(
        rule_id="bad-arguments",
        version=1,
        label="harmful",
        summary="a tool call with missing or impossible arguments",
        find=each_step(_bad_arguments),
    ),
    Rule(
        rule_id="action-blocked",
        version=1,
        label="harmful",
        summary="an action that the environment forbids",
        find=each_step(_blocked),
    ),
    Rule(
        rule_id="edit-rejected",
        version=1,
        label="harmful",
        summary="an edit that the linter, the editor, patch or sed rejected",
        find=each_step(_edit_rejected),
    ),
    Rule(
        rule_id="shell-error",
        version=1,
        label="harmful",
        summary="a command that the shell could not parse or did not find",
        find=each_step(_shell_error),
    ),
    Rule(
        rule_id="tools-failed",
        version=1,
        label="harmful",
        summary="a step of which every tool call came back as an error",
        find=each_step(_tools_failed),
    ),
    Rule(
        rule_id="code-failed",
        version=1,
        label="harmful",
        summary="a code action that crashed",
        find=_find_code_failures,
    ),
)
