"""An action -> the calls that it makes, whatever the harness's way of writing them.

Known ways: OpenAI tool calls; `<function=NAME><parameter=KEY>` text (SWE-smith, OpenHands without
native calls); fenced blocks (mini-swe-agent, SWE-agent, smolagents); `<execute_bash>` and kin; and,
inside a block, SWE-agent's own commands (`open`, `edit 3:5`, `submit`, `str_replace_editor view`).
What cannot be read is no call, never an exception. Linear in the text.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import orjson

from srft_prep.critic.rules.effects import Effect, effect_of, effect_of_code, strongest
from srft_prep.critic.rules.shell import Command, parse, word_set
from srft_prep.types import Message

CallKind = Literal["shell", "python", "view", "search", "edit", "create", "undo", "submit", "other"]

_FUNCTION: Final = re.compile(r"<function=([^>\n]{1,100})>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER: Final = re.compile(r"<parameter=([^>\n]{1,100})>(.*?)(?:</parameter>|\Z)", re.DOTALL)
_FENCE: Final = re.compile(r"```([\w+-]*+)[^\n`]*+\n(.*?)(?:```|\Z)", re.DOTALL)
_TAG: Final = re.compile(
    r"<(execute_bash|execute_ipython|command|code)>(.*?)(?:</\1>|\Z)", re.DOTALL
)

_LANGUAGES: Final[dict[str, CallKind]] = {
    **dict.fromkeys(("", "bash", "sh", "shell", "console", "mswea_bash_command"), "shell"),
    **dict.fromkeys(("py", "python", "execute_ipython", "code"), "python"),
    **dict.fromkeys(("execute_bash", "command"), "shell"),
}
_SHELL_TOOLS: Final = word_set(
    "bash execute_bash run shell terminal run_command execute_command run_in_terminal"
)
_PYTHON_TOOLS: Final = word_set("execute_ipython_cell run_ipython ipython python_interpreter")
_EDITORS: Final = word_set(
    "str_replace_editor str_replace_based_edit_tool file_editor edit_anthropic"
)
_EDITOR_KINDS: Final[dict[str, CallKind]] = {
    "view": "view",
    "create": "create",
    "str_replace": "edit",
    "insert": "edit",
    "undo_edit": "undo",
}
_TOOL_KINDS: Final[dict[str, CallKind]] = {
    **dict.fromkeys(("open", "goto", "scroll_up", "scroll_down", "view", "read_file"), "view"),
    **dict.fromkeys(("find_file", "search_file", "search_dir", "filemap", "grep"), "search"),
    **dict.fromkeys(("edit", "insert", "edit_file", "replace", "apply_patch"), "edit"),
    **dict.fromkeys(("create", "write_file"), "create"),
    **dict.fromkeys(("submit", "finish", "final_answer"), "submit"),
    **dict.fromkeys(("undo_edit",), "undo"),
}
_AGENT_COMMANDS: Final = word_set(
    "open goto scroll_up scroll_down find_file search_file search_dir filemap edit create insert "
    "submit str_replace_editor edit_anthropic undo_edit"
)
_SUBMIT_MARKS: Final = ("COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT", "MINI_SWE_AGENT_FINAL_OUTPUT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a tool."""

    name: str
    """The tool's name; `bash` or `python` for a fenced block."""
    kind: CallKind
    text: str
    """What was asked, without the thought: the command, the code, or all arguments."""
    effect: Effect = "reads"
    """Whether it changes files, if it succeeds."""
    path: str | None = None
    """The file that an editor's call names."""
    old: str | None = None
    """The text that an edit replaces; None where it names none (an insert, a line range)."""
    new: str | None = None
    """The text that an edit puts in."""
    commands: tuple[Command, ...] = ()
    """The simple commands of a shell call."""
    broken: str | None = None
    """Why the call cannot be read: its arguments are no JSON object; None where they are."""


def calls_of(action: Message) -> tuple[Call, ...]:
    """Return the calls of an action, in order; empty for plain text."""
    if action.tool_calls:
        return tuple(_native_calls(action.tool_calls))
    content = action.content or ""
    if "<function=" in content:
        return tuple(_xml_call(match[1].strip(), match[2]) for match in _FUNCTION.finditer(content))
    blocks = [(m[1].lower(), m[2]) for m in _FENCE.finditer(content)] if "```" in content else []
    if not blocks:
        blocks = [(match[1], match[2]) for match in _TAG.finditer(content)]
    known = [block for block in blocks if block[0] in _LANGUAGES]
    if not known:
        return ()
    language, text = known[-1]
    return (_python(text) if _LANGUAGES[language] == "python" else _shell(text),)


def prose_of(action: Message) -> str:
    """Return what an action says before its first call."""
    content = action.content or ""
    ends = [content.find(mark) for mark in ("```", "<function=", "<execute_")]
    return content[: min((end for end in ends if end >= 0), default=len(content))]


def _native_calls(tool_calls: str) -> Iterator[Call]:
    try:
        calls = orjson.loads(tool_calls)
    except orjson.JSONDecodeError:
        yield Call(name="", kind="other", text=tool_calls, broken="tool calls are no JSON")
        return
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield _native_call(str(function.get("name") or ""), function.get("arguments"))


def _native_call(name: str, arguments: Any) -> Call:
    if isinstance(arguments, str):
        try:
            parsed = orjson.loads(arguments) if arguments.strip() else {}
        except orjson.JSONDecodeError as error:
            return Call(
                name=name, kind="other", text=arguments, broken=f"arguments are no JSON: {error}"
            )
    else:
        parsed = {} if arguments is None else arguments
    if not isinstance(parsed, dict):
        return Call(
            name=name, kind="other", text=str(arguments), broken="arguments are no JSON object"
        )
    return _call(name, parsed)


def _xml_call(name: str, body: str) -> Call:
    return _call(name, {it[1].strip(): it[2].strip("\n") for it in _PARAMETER.finditer(body)})


def _call(name: str, arguments: Mapping[str, Any]) -> Call:
    def text(*keys: str) -> str | None:
        values = (arguments.get(key) for key in keys)
        return next((value for value in values if isinstance(value, str)), None)

    if name in _SHELL_TOOLS:
        return _shell(text("command", "cmd", "script") or "", name=name)
    if name in _PYTHON_TOOLS:
        return _python(text("code", "command") or "", name=name)
    command = text("command")
    kind: CallKind = _TOOL_KINDS.get(name, "other")
    if name in _EDITORS:
        kind = _EDITOR_KINDS.get(command or "", "other")
    new = text("new_str", "replace", "file_text", "text", "content")
    return Call(
        name=name,
        kind=kind,
        text=_canonical(arguments),
        effect="writes" if kind in ("edit", "create", "undo") else "reads",
        path=text("path", "file_path", "filename", "file"),
        old=text("old_str", "search") if kind == "edit" else None,
        new=new if kind in ("edit", "create") else None,
    )


def _canonical(arguments: Mapping[str, Any]) -> str:
    """Return arguments as JSON with sorted keys, without what a harness asks beside the action."""
    shown = {key: value for key, value in arguments.items() if key != "security_risk"}
    try:
        return orjson.dumps(shown, option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONEncodeError:  # nested deeper than orjson writes
        return " ".join(sorted(shown))


def _shell(text: str, *, name: str = "bash") -> Call:
    text = text.strip()
    first, _, rest = text.partition("\n")
    words = first.split(maxsplit=3)
    if words and words[0] in _AGENT_COMMANDS:
        return _agent_command(text, words, rest)
    commands = parse(text)
    return Call(
        name=name,
        kind="submit" if any(mark in text for mark in _SUBMIT_MARKS) else "shell",
        text=text,
        effect=strongest(effect_of(command) for command in commands),
        commands=commands,
    )


def _agent_command(text: str, words: list[str], rest: str) -> Call:
    name, operands = words[0], words[1:]
    kind: CallKind = _TOOL_KINDS.get(name, "other")
    if name in _EDITORS:
        kind = _EDITOR_KINDS.get(operands[0] if operands else "", "other")
        operands = operands[1:]
    names_file = name in _EDITORS or name in ("open", "create")
    return Call(
        name=name,
        kind=kind,
        text=text,
        effect="writes" if kind in ("edit", "create", "undo") else "reads",
        path=operands[0].strip("\"'") if operands and names_file else None,
        new=rest.removesuffix("end_of_edit") if name == "edit" else None,
    )


def _python(code: str, *, name: str = "python") -> Call:
    code = code.strip()
    return Call(
        name=name,
        kind="submit" if "final_answer(" in code else "python",
        text=code,
        effect=effect_of_code(code),
    )
