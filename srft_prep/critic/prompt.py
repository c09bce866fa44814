"""Critic prompts: one Markdown file each, with front matter that says what comes back.

    ---
    name: step_critic
    version: 2
    labels: {good: ..., unnecessary: ..., harmful: ...}     a meaning for each label
    output_schema: {type: object, ...}                      JSON schema of the reply
    ---
    ## System
    ...
    ## User
    ... {task} ... {context} ... {steps} ... {first_step} ... {last_step} ... {answer}

The schema's `labels` stands for an object with one property a step; what a request asks for is
filled in when it is asked. Other properties of the schema are asked for as they are, and ignored.
`{answer}` becomes the form of the answer, in words. The hash of the file's bytes goes into every
label's key, so an edited prompt asks again.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from srft_prep.errors import ConfigError, in_one_line
from srft_prep.types import LABELS, Label

PLACEHOLDERS: Final = ("task", "steps", "first_step", "last_step", "answer")
"""What the user part must name in braces; `{context}` it may name, before the steps."""
RATIONALE_CHARS: Final = 300
"""Longest rationale of a step."""

_PLACEHOLDER: Final = re.compile(r"\{(context|" + "|".join(PLACEHOLDERS) + r")\}")
_HEADING: Final = re.compile(r"^## (System|User)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A critic's prompt."""

    name: str
    version: int
    labels: dict[Label, str]
    """Each label's meaning in a line, in the order of the file."""
    output_schema: dict[str, Any]
    """JSON schema of the reply: an object with `labels`."""
    system: str
    user: str
    """The user part, with its placeholders in braces."""
    prompt_hash: str
    """Hash of the file's bytes, in hex (64 bits)."""

    def fill(
        self,
        *,
        task: str,
        context: str,
        steps: str,
        first_step: int,
        last_step: int,
        answer: str,
    ) -> tuple[str, str]:
        """Return the user part, filled, in two: up to the steps, and from them on.

        Filled in one pass: a task that contains `{steps}` is no placeholder.
        """
        values = {
            "task": task,
            "context": context,
            "steps": steps,
            "first_step": str(first_step),
            "last_step": str(last_step),
            "answer": answer,
        }
        before, mark, after = self.user.partition("{steps}")

        def filled(text: str) -> str:
            return _PLACEHOLDER.sub(lambda match: values[match[1]], text)

        return filled(before), filled(mark + after)

    @property
    def takes_context(self) -> bool:
        """Whether there is a place for context beside the trajectory."""
        return "{context}" in self.user

    def schema_for(self, steps: Sequence[int], *, rationale: bool) -> dict[str, Any]:
        """Return the JSON schema of the answer about some steps: exactly these, in this order."""
        entry: dict[str, Any] = {"type": "string", "enum": list(self.labels)}
        if rationale:
            entry = _closed_object(
                {"rationale": {"type": "string", "maxLength": RATIONALE_CHARS}, "label": entry}
            )
        labels = _closed_object({str(step): {"$ref": "#/$defs/step"} for step in steps})
        properties = {**self.output_schema["properties"], "labels": labels}
        return {**self.output_schema, "properties": properties, "$defs": {"step": entry}}


def answer_form(steps: Sequence[int], *, rationale: bool) -> str:
    """Return the form of the answer about some steps, in words."""
    entry = '{"rationale": "<one sentence>", "label": "<label>"}' if rationale else '"<label>"'
    shown = [f'"{step}": {entry}' for step in dict.fromkeys((steps[0], steps[-1]))]
    return f'{{"labels": {{{", ..., ".join(shown)}}}}}, with {" or ".join(LABELS)} for <label>'


def _closed_object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def load_prompt(path: Path) -> Prompt:
    """Return the prompt of a file.

    Raises:
        ConfigError: the file cannot be read, its front matter is missing or incomplete, a label is
            unknown, or a part or a placeholder is missing.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a prompt file: {error.strerror} (see prompts/step_critic.md)"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text: {error} (save it as UTF-8)") from None
    front, body = _split(text, path)
    system, user = _parts(body, path)
    return Prompt(
        name=_name(front, path),
        version=_version(front, path),
        labels=_labels(front, path),
        output_schema=_schema(front, path),
        system=system,
        user=user,
        prompt_hash=hashlib.blake2b(raw, digest_size=8).hexdigest(),
    )


def _split(text: str, path: Path) -> tuple[dict[Any, Any], str]:
    lines = text.split("\n")
    end = next((at for at, line in enumerate(lines[1:], start=1) if line.rstrip() == "---"), None)
    if lines[0].rstrip() != "---" or end is None:
        raise ConfigError(
            f"{path}: expected YAML front matter between two lines `---`, got none "
            "(begin the file as prompts/step_critic.md does)"
        )
    try:
        front = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError as error:
        reason = in_one_line(error)
        raise ConfigError(f"{path}: expected YAML in the front matter: {reason}") from None
    if not isinstance(front, dict):
        raise ConfigError(
            f"{path}: front matter: expected name, version, labels and output_schema, got "
            f"{type(front).__name__}"
        )
    return front, "\n".join(lines[end + 1 :])


def _parts(body: str, path: Path) -> tuple[str, str]:
    found = list(_HEADING.finditer(body))
    if [match[1] for match in found] != ["System", "User"]:
        headings = ", ".join(f"## {match[1]}" for match in found) or "none of them"
        raise ConfigError(
            f"{path}: expected the headings `## System` and `## User`, once each and in this "
            f"order, got {headings}"
        )
    system = body[found[0].end() : found[1].start()].strip()
    user = body[found[1].end() :].strip()
    named = set(_PLACEHOLDER.findall(user))
    missing = [f"{{{name}}}" for name in PLACEHOLDERS if name not in named]
    if "{context}" in user.partition("{steps}")[2]:
        raise ConfigError(f"{path}: user part: expected {{context}} before {{steps}}, got it after")
    if missing:
        raise ConfigError(
            f"{path}: user part: expected the placeholders {', '.join(missing)}, got none of them "
            "(write them where the text belongs)"
        )
    return system, user


def _name(front: dict[Any, Any], path: Path) -> str:
    name = front.get("name")
    if isinstance(name, str) and name:
        return name
    raise ConfigError(f"{path}: name: expected text, got {name!r} (add `name: ...`)")


def _version(front: dict[Any, Any], path: Path) -> int:
    version = front.get("version")
    if isinstance(version, int) and not isinstance(version, bool):
        return version
    raise ConfigError(f"{path}: version: expected a number, got {version!r} (add `version: 1`)")


def _labels(front: dict[Any, Any], path: Path) -> dict[Label, str]:
    labels = front.get("labels")
    if not isinstance(labels, dict) or set(labels) != set(LABELS):
        got = ", ".join(map(str, labels)) if isinstance(labels, dict) else repr(labels)
        raise ConfigError(
            f"{path}: labels: expected a meaning for each of {', '.join(LABELS)}, got {got} "
            "(other labels are not known; map them to these)"
        )
    return {label: str(labels[label]) for label in labels}


def _schema(front: dict[Any, Any], path: Path) -> dict[str, Any]:
    schema = front.get("output_schema")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(schema, dict) or not isinstance(properties, dict):
        got = "none" if schema is None else type(schema).__name__
        raise ConfigError(
            f"{path}: output_schema: expected a JSON schema of an object with properties, got "
            f"{got} (copy the one of prompts/step_critic.md)"
        )
    if "labels" not in properties:
        raise ConfigError(
            f"{path}: output_schema: expected the property `labels`, got "
            f"{', '.join(map(str, properties)) or 'no property'}"
        )
    if not isinstance(properties["labels"], dict) or properties["labels"].get("type") != "object":
        raise ConfigError(
            f"{path}: output_schema: labels: expected `type: object` (one property a step, filled "
            f"in when asked), got {properties['labels']!r:.80}"
        )
    return schema
