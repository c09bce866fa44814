"""Fields of raw records, checked one by one: what is taken is of the type it should be.

Every function takes `where`, the words that start its error message ("message 3"), and raises
FormatError for a value of the wrong type, so that a broken record is rejected with a reason and
never half-read.
"""

from typing import Any

import orjson

from srft_prep.errors import FormatError


def field(record: dict[str, Any], key: str, kind: type, *, where: str) -> Any:
    """Return `record[key]`, or None where it is absent or null.

    Raises:
        FormatError: the value is there and is no `kind`.
    """
    value = record.get(key)
    if value is None or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise FormatError(
        f"{where}: field {key!r}: expected {kind.__name__}, got {type(value).__name__}"
    )


def outcome_of(record: dict[str, Any], key: str, *, where: str) -> bool | None:
    """Return an outcome column as a bool: true or 1, false or 0; None for null, absent or -1.

    Raises:
        FormatError: the value is none of these.
    """
    value = record.get(key)
    if value is None or (isinstance(value, (bool, int, float)) and value in (-1, 0, 1)):
        return None if value in (None, -1) else bool(value)
    shown = repr(value)[:40] if isinstance(value, (str, int, float)) else type(value).__name__
    raise FormatError(f"{where}: field {key!r}: expected a bool, 0, 1 or -1, got {shown}")


def first_text(record: dict[str, Any], *keys: str) -> str | None:
    """Return the first of a record's text fields that is there, None for none.

    Raises:
        FormatError: it is no text.
    """
    for key in keys:
        value: str | None = field(record, key, str, where="record")
        if value is not None:
            return value
    return None


def text_of(content: Any, *, where: str) -> str | None:
    """Return the text of a message's content: a string, null, or a list of typed parts.

    Text parts are joined as they are; a part that is no text (an image) leaves `[image]`, so that
    its place is seen.

    Raises:
        FormatError: the content is of another type.
    """
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part, where=where) for part in content)
    raise FormatError(
        f"{where}: content: expected a string or a list of parts, got {type(content).__name__}"
    )


def calls_json(calls: Any, *, where: str) -> str | None:
    """Return tool calls as JSON text in OpenAI's form, without null fields; None for no calls.

    Arguments stay exactly as emitted: a JSON string stays a string.

    Raises:
        FormatError: the calls are no list of objects with a function name.
    """
    if not calls:
        return None
    if not isinstance(calls, list):
        raise FormatError(f"{where}: tool_calls: expected a list, got {type(calls).__name__}")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise FormatError(f"{where}: tool_calls: expected objects with function.name")
    kept = [
        {key: value for key, value in call.items() if value is not None and key != "index"}
        for call in calls
    ]
    return dump(kept)


def tools_json(tools: Any, *, where: str) -> str | None:
    """Return tool definitions as JSON text, null slots removed; None for no tools.

    Parquet fills the parameter slots that a tool does not use with nulls (SWE-Gym's rows); a model
    never saw those. A null under `default` or `const` says something and stays.

    Raises:
        FormatError: the tools are neither a list of objects nor JSON text of one.
    """
    if isinstance(tools, str):
        tools = parse_json(tools, where=f"{where}: tools")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise FormatError(f"{where}: tools: expected a list, got {type(tools).__name__}")
    parsed = [
        parse_json(tool, where=f"{where}: tools") if isinstance(tool, str) else tool
        for tool in tools
    ]
    if not all(isinstance(tool, dict) for tool in parsed):
        raise FormatError(f"{where}: tools: expected objects")
    try:
        return dump(_without_nulls(parsed))
    except RecursionError:
        raise FormatError(f"{where}: tools: nested too deeply") from None


def rows_of(record: dict[str, Any], key: str) -> list[Any]:
    """Return the raw messages under a key: a list, or JSON text of one.

    Raises:
        FormatError: the value is neither.
    """
    rows = record.get(key)
    if isinstance(rows, str):
        rows = parse_json(rows, where=f"record: field {key!r}")
    if not isinstance(rows, list):
        raise FormatError(
            f"record: field {key!r}: expected a list or JSON text of one, got {type(rows).__name__}"
        )
    return rows


def parse_json(text: str, *, where: str) -> Any:
    """Return the parsed JSON text.

    Raises:
        FormatError: the text is no JSON.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise FormatError(f"{where}: expected JSON text: {error}") from None


def dump(value: Any) -> str:
    """Return a value as JSON text, keys in the order given.

    Raises:
        FormatError: a string with a lone surrogate, or an integer beyond 64 bits.
    """
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError as error:
        raise FormatError(f"cannot be written as JSON: {error}") from None


def _part_text(part: Any, *, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        text = part.get("text")
        if isinstance(text, str):
            return text
        if isinstance(part.get("type"), str) and part["type"] != "text":
            return "[image]" if "image" in part["type"] else f"[{part['type']}]"
    raise FormatError(f"{where}: content: expected parts with text, got {type(part).__name__}")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_nulls(item)
            for key, item in value.items()
            if item is not None or key in ("default", "const")
        }
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
