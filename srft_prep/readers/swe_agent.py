"""SWE-agent's `.traj` files (0.x, 1.0, 1.1) and the files that hold a history only.

`history` is the truth: it holds every message in full and unprocessed. The messages that a step
records beside it (`messages` up to 1.0, `query` from 1.1) repeat it after SWE-agent's history
processors, which may have cut old observations ("Old environment output: (7 lines omitted)"); they
stand in where a file has no history. Answers that SWE-agent asked the model to write again, and the
last submit of some versions, are steps of `trajectory` that `history` lacks: they are put back in
their place, so that no word of the model is lost.
"""

import re
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Final

from srft_prep.errors import FormatError
from srft_prep.readers import Origin
from srft_prep.readers.conversation import conversation_of, ended
from srft_prep.readers.fields import field, parse_json, text_of, tools_json
from srft_prep.types import Trajectory

_NO_INSTANCE: Final = ("", "main", "swe_main")
"""Values of `environment` that name no instance."""

_RUN_FOLDER: Final = re.compile(r"(.+?)__.+__t-[\d.]+__p-")
"""SWE-agent's name of a run: `<model>__<data>__<config>__t-<temperature>__p-<top p>__...`."""


def recognises(record: Any) -> bool:
    """Return whether a record looks like a `.traj` file."""
    if not isinstance(record, dict):
        return False
    if {"trajectory", "history", "info"} <= record.keys():
        return True
    step, message = _first(record.get("trajectory")), _first(record.get("history"))
    if "role" not in step and ("response" in step or {"action", "observation"} <= step.keys()):
        return True
    return "role" in message


def read(record: Any, *, origin: Origin) -> Trajectory:
    """Return the trajectory of a `.traj` object.

    Raises:
        FormatError: a field has the wrong type, or the model wrote nothing.
    """
    if not isinstance(record, dict):
        raise FormatError(f"expected an object, got {type(record).__name__}")
    info = field(record, "info", dict, where="record") or {}
    exit_status = field(info, "exit_status", str, where="info")
    raws = _merged(_history(record), _steps(record))
    messages = conversation_of(raws)
    if exit_status is not None or _submits(raws):
        messages = ended(messages)
    instance_id = _instance_id(record, origin=origin)
    return Trajectory(
        trajectory_id=_trajectory_id(instance_id, origin=origin),
        instance_id=instance_id,
        format="swe-agent",
        messages=messages,
        model=_model(record, origin=origin),
        exit_status=exit_status,
        patch=field(info, "submission", str, where="info"),
        tools=tools_json(record.get("tools"), where="record"),
    )


def _steps(record: dict[str, Any]) -> list[dict[str, Any]]:
    steps = field(record, "trajectory", list, where="record") or []
    for number, step in enumerate(steps):
        if not isinstance(step, dict):
            raise FormatError(f"step {number}: expected an object, got {type(step).__name__}")
    return steps


def _history(record: dict[str, Any]) -> list[Any]:
    """Return the recorded conversation: `history`, else the last step's view of it."""
    history: list[Any] | None = field(record, "history", list, where="record")
    steps = _steps(record)
    if history or not steps:
        return history or []
    for key in ("messages", "query"):
        view: list[Any] | None = field(steps[-1], key, list, where="last step")
        if view:
            return view
    return []


def _merged(history: list[Any], steps: list[dict[str, Any]]) -> list[Any]:
    """Return the history with the model's answers that only `steps` still hold.

    Both are in order of time, so they are aligned as sequences, and only where there are more steps
    than answers: the texts of equally many may differ, for demonstrations are edited by hand.
    """
    said = [i for i, raw in enumerate(history) if _is_answer(raw)]
    if len(said) >= len(steps):
        return history
    kept = [_key(history[i], text="content", where=f"message {i}") for i in said]
    made = [_key(step, text="response", where=f"step {i}") for i, step in enumerate(steps)]
    tool_style = any(history[i].get("tool_calls") for i in said)
    merged: list[Any] = []
    done = 0
    blocks = SequenceMatcher(None, kept, made, autojunk=False).get_opcodes()
    for _, start, end, first, last in blocks:
        at = said[start] if start < len(said) else len(history)
        merged += history[done:at]
        done = at
        # A block of fewer answers than steps: the answers are what the last attempts became.
        for number in range(first, last - (end - start)):
            after = steps[number + 1] if number + 1 < len(steps) else {}
            merged += _restored(steps[number], after, tool_style=tool_style, where=f"step {number}")
    return merged + history[done:]


def _is_answer(raw: Any) -> bool:
    return isinstance(raw, dict) and raw.get("role") == "assistant" and not raw.get("is_demo")


def _key(raw: dict[str, Any], *, text: str, where: str) -> tuple[str, str]:
    action = field(raw, "action", str, where=where) or ""
    return (text_of(raw.get(text), where=where) or "").strip(), action.strip()


def _restored(
    step: dict[str, Any], after: dict[str, Any], *, tool_style: bool, where: str
) -> list[dict[str, Any]]:
    """Return the messages of a step that the history lacks; none where it holds no words.

    A step does not record its tool calls, only the command line made of them. `submit` has no
    arguments, so it is the one call that can be told from its command line.
    """
    response = field(step, "response", str, where=where) or ""
    action = field(step, "action", str, where=where) or ""
    observation = field(step, "observation", str, where=where) or ""
    answer: dict[str, Any] = {"role": "assistant", "content": response, "action": action}
    answer["reasoning_content"] = step.get("reasoning_content")
    calls_submit = tool_style and action.strip() == "submit"
    if calls_submit:
        function = {"name": "submit", "arguments": "{}"}
        answer["tool_calls"] = [{"type": "function", "function": function}]
    elif not response.strip():
        return []
    query = after.get("query")
    if isinstance(query, list) and len(query) > 1 and isinstance(query[-1], dict):
        asked_again = _is_answer(query[-2]) and query[-2].get("content") == response
        if asked_again:
            return [answer, query[-1]]
    if not observation:
        return [answer]
    return [answer, {"role": "tool" if calls_submit else "user", "content": observation}]


def _submits(raws: list[Any]) -> bool:
    answers = [raw for raw in raws if _is_answer(raw)]
    action = answers[-1].get("action") if answers else None
    return isinstance(action, str) and action.strip() == "submit"


def _instance_id(record: dict[str, Any], *, origin: Origin) -> str:
    for key in ("instance_id", "environment"):
        name: str | None = field(record, key, str, where="record")
        if name is not None and name not in _NO_INSTANCE:
            return name
    stem, found, _ = origin.path.name.rpartition(".traj")
    return stem if found else origin.path.stem


def _trajectory_id(instance_id: str, *, origin: Origin) -> str:
    """Return `<run folder>/<instance>`; 1.x keeps each instance in a folder of its own."""
    run = _run_folder(origin.path)
    name = f"{run}/{instance_id}" if run else instance_id
    return name if origin.line is None else f"{name}:{origin.line}"


def _run_folder(path: Path) -> str:
    parent = path.absolute().parent
    own = path.name.startswith(f"{parent.name}.")
    return parent.parent.name if own else parent.name


def _model(record: dict[str, Any], *, origin: Origin) -> str | None:
    config = record.get("replay_config")
    if isinstance(config, str):
        config = parse_json(config, where="replay_config")
    for key in ("agent", "model", "name"):
        config = config.get(key) if isinstance(config, dict) else None
    if isinstance(config, str):
        return config
    named = _RUN_FOLDER.match(_run_folder(origin.path))
    return named[1] if named else None


def _first(items: Any) -> dict[str, Any]:
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}
