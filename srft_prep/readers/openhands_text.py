"""Texts that OpenHands made of its events: an action as written, an observation as shown.

Sources: `openhands/memory/conversation_memory.py`, `events/observation/commands.py` and
`llm/fn_call_converter.py` of V0 (156d068), and `agenthub/codeact_agent/codeact_agent.py` and
`action_parser.py` of the time before function calling (421b4c1). That view of an observation is
what the model read: on the runs with GPT-4o in our samples, each call's prompt tokens, as the
provider counted them, grow by this text and not by the event's bare content.
"""

from typing import Any, Final, Literal

from srft_prep.readers.fields import dump, field, text_of

Form = Literal["function", "tags"]
"""How an action is written as text: `<function=execute_bash>`, or `<execute_bash>` of old."""

_CUT: Final = "\n[... Observation truncated due to length ...]\n"

_IMAGE: Final = "![image](data:image/png;base64,"

_TAGS: Final = {
    "run": ("<execute_bash>", "command", "</execute_bash>"),
    "run_ipython": ("<execute_ipython>", "code", "</execute_ipython>"),
}
"""Action -> opening tag, the argument between the tags, closing tag."""

_FUNCTIONS: Final = {
    "run": ("execute_bash", ("command",)),
    "run_ipython": ("execute_ipython_cell", ("code",)),
    "read": ("str_replace_editor", ("command", "path", "view_range")),
    "edit": (
        "str_replace_editor",
        ("command", "path", "file_text", "old_str", "new_str", "insert_line", "content"),
    ),
    "think": ("think", ("thought",)),
    "finish": ("finish", ("message", "final_thought")),
    "browse_interactive": ("browser", ("code", "browser_actions")),
}
"""Action -> the function's name, and those of the action's arguments that are the call's."""

_EXIT_COMMAND: Final = "<execute_bash> exit </execute_bash>"
"""How the prompts of old runs ask for the end; without it, it is `<finish></finish>`."""

_EXIT: Final = "<execute_bash>\nexit\n</execute_bash>"


def action_text(action: str, args: dict[str, Any], *, prompt: str, where: str) -> str:
    """Return an action as text, in the form that the record's own prompt asks for.

    Near to what the model wrote, and not proven to be it: OpenHands kept thought and action apart,
    stripped both, put words behind an action into the thought, and took `<finish>` and `exit` for
    the same. It is what OpenHands itself showed to the model as its earlier turns, but for the
    closing tags of a finish.

    Raises:
        FormatError: an argument has the wrong type.
    """
    if action == "message":
        return field(args, "content", str, where=where) or ""
    thought = field(args, "thought", str, where=where) or ""
    call = _tagged(action, args, prompt=prompt, where=where) if form_of(prompt) == "tags" else None
    if call is not None:
        return f"{thought}\n{call}" if thought else call
    call = _function_call(action, args)
    # `think` has nothing but its thought, and that is its argument.
    return f"{thought}\n\n{call}" if thought and action != "think" else call


def form_of(prompt: str) -> Form:
    """Return the form that a prompt shows; runs from before function calling knew only tags."""
    return "function" if "<function=" in prompt else "tags"


def answered(text: str, *, form: Form, tool: str | None, observation: str) -> str:
    """Return an observation's text with the opening line that it has as an answer to text."""
    if form == "function":
        known = _FUNCTIONS.get(observation, (observation, ()))[0]
        return f"EXECUTION RESULT of [{tool or known}]:\n{text}"
    return text if observation == "user_rejected" else f"OBSERVATION:\n{text}"


def observation_text(
    event: dict[str, Any], observation: str, *, max_chars: int | None, where: str
) -> str:
    """Return an observation as OpenHands showed it to the model.

    `max_chars` is the run's `max_message_chars`: a longer text loses its middle. None cuts nothing.

    Raises:
        FormatError: a field has the wrong type.
    """
    content = text_of(event.get("content"), where=where) or ""
    extras = field(event, "extras", dict, where=where) or {}
    shown: str | None = None
    match observation:
        case "run":
            return _command_output(content, event, max_chars=max_chars, where=where)
        case "read":
            return content  # Cut by the tool itself.
        case "error":
            return f"{_cut(content, max_chars)}\n[Error occurred in processing last action]"
        case "user_rejected":
            text = _cut(content, max_chars)
            return f"OBSERVATION:\n{text}\n[Last action has been rejected by the user]"
        case "run_ipython":
            shown = "\n".join(
                f"{_IMAGE} ...) already displayed to user" if _IMAGE in line else line
                for line in content.split("\n")
            )
        case "edit":
            # Up to early 2025 `content` was a diff for the user, and the model got this.
            shown = field(extras, "formatted_output_and_error", str, where=where) or None
        case "delegate":
            outputs = field(extras, "outputs", dict, where=where) or {}
            shown = field(outputs, "content", str, where=where)
    return _cut(content if shown is None else shown, max_chars)


def _tagged(action: str, args: dict[str, Any], *, prompt: str, where: str) -> str | None:
    """Return an action in tags (`action_to_str`), None for one that had none."""
    if action == "finish":
        return _EXIT if _EXIT_COMMAND in prompt else "<finish></finish>"
    if action == "edit":
        path = field(args, "path", str, where=where) or ""
        content = field(args, "content", str, where=where) or ""
        return f"<file_edit path={path}>\n{content}\n</file_edit>"
    if action == "delegate":
        inputs = field(args, "inputs", dict, where=where) or {}
        task = field(inputs, "task", str, where=where) or ""
        return f"<execute_browse>\n{task}\n</execute_browse>"
    if action not in _TAGS:
        return None
    opening, argument, closing = _TAGS[action]
    return f"{opening}\n{field(args, argument, str, where=where) or ''}\n{closing}"


def _function_call(action: str, args: dict[str, Any]) -> str:
    """Return an action as a call in text (`convert_tool_call_to_string`)."""
    name, names = _FUNCTIONS.get(action, (action, tuple(key for key in args if key != "thought")))
    given = {key: args[key] for key in names if args.get(key) is not None}
    if action == "read":
        given = {"command": "view", **given}
    lines = [
        f"<parameter={key}>{value if isinstance(value, str) else dump(value)}</parameter>\n"
        for key, value in given.items()
    ]
    return f"<function={name}>\n{''.join(lines)}</function>"


def _command_output(
    content: str, event: dict[str, Any], *, max_chars: int | None, where: str
) -> str:
    """Return a command's output with the lines that `to_agent_observation` adds.

    Old events have no metadata, but number and exit code of the command beside the content.
    """
    extras = field(event, "extras", dict, where=where) or {}
    metadata = field(extras, "metadata", dict, where=where)
    if metadata is None:
        flat = {**event, **extras}
        number = field(flat, "command_id", int, where=where)
        code = field(flat, "exit_code", int, where=where)
        text = _cut(content, max_chars)
        if number is None or code is None:
            return text
        return f"{text}\n[Command {number} finished with exit code {code}]"
    prefix = field(metadata, "prefix", str, where=where) or ""
    suffix = field(metadata, "suffix", str, where=where) or ""
    folder = field(metadata, "working_dir", str, where=where)
    python = field(metadata, "py_interpreter_path", str, where=where)
    code = field(metadata, "exit_code", int, where=where)
    lines = [f"{prefix}{content}{suffix}"]
    if folder:
        lines.append(f"[Current working directory: {folder}]")
    if python:
        lines.append(f"[Python interpreter: {python}]")
    if code is not None and code != -1:
        lines.append(f"[Command finished with exit code {code}]")
    return _cut("\n".join(lines), max_chars)


def _cut(text: str, limit: int | None) -> str:
    """Return a text without its middle where it is longer than a limit (`truncate_content`)."""
    if limit is None or limit <= 0 or len(text) <= limit:
        return text
    half = limit // 2
    return text[:half] + _CUT + text[len(text) - half :]
