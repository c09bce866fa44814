"""One trajectory as lines to read: its steps by label, or its tokens by weight.

Colour adds nothing that the text does not say, so that the output reads the same in a file, a diff
or a golden test. Control characters of a recorded terminal are shown, never obeyed.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import orjson
import polars as pl

from srft_prep.errors import ConfigError, LabelError
from srft_prep.storage import Manifest, read_manifest
from srft_prep.trajectories import trajectory_of
from srft_prep.types import Message, Trajectory
from srft_prep.weights import DEFAULT_WEIGHTS

Line = tuple[str, dict[str, Any]]
"""A line of text and its style, in click's words."""

LABEL_STYLE: Final[dict[str | None, dict[str, Any]]] = {
    "good": {"fg": "green"},
    "unnecessary": {"fg": "yellow"},
    "harmful": {"fg": "red"},
    None: {},
}
DIM: Final[dict[str, Any]] = {"dim": True}
BOLD: Final[dict[str, Any]] = {"bold": True}
SHOWN_LINES: Final = 12
"""Lines of an observation that are shown, half from its start and half from its end."""


def show(
    directory: Path, trajectory_id: str, *, labels: Path | None = None, full: bool = False
) -> Iterator[Line]:
    """Yield the lines that show one trajectory of a stage directory.

    Raises:
        ConfigError: no such trajectory, or a directory that holds no trajectories.
        LabelError: the labels were made for another version of the trajectory.
    """
    source = read_manifest(directory)
    if source.stage == "ingest":
        yield from _show_steps(source, trajectory_id, labels, full=full)
    elif source.stage == "tokenize":
        yield from _show_tokens(source, trajectory_id)
    elif source.stage == "pack":
        yield from _show_packed(source, trajectory_id)
    else:
        raise ConfigError(f"{directory}: give the trajectories, and this folder as --labels")


def _find(source: Manifest, column: pl.Expr, trajectory_id: str) -> Iterator[dict[str, Any]]:
    found = False
    for part in source.parts:
        for row in pl.scan_parquet(part).filter(column).collect().iter_rows(named=True):
            found = True
            yield row
    if not found:
        near = _near(source, trajectory_id)
        hint = f"; there are {', '.join(near)}" if near else ""
        raise ConfigError(f"{source.path}: no trajectory {trajectory_id!r}{hint}")


def _near(source: Manifest, trajectory_id: str) -> list[str]:
    name = "trajectory_ids" if source.stage == "pack" else "trajectory_id"
    ids: list[str] = []
    for part in source.parts:
        column = pl.read_parquet(part, columns=[name])[name]
        ids += (column.explode() if source.stage == "pack" else column).to_list()
    containing = [each for each in ids if trajectory_id in each]
    return (containing or ids)[:5]


def _show_steps(
    source: Manifest, trajectory_id: str, labels: Path | None, *, full: bool
) -> Iterator[Line]:
    row = next(_find(source, pl.col("trajectory_id") == trajectory_id, trajectory_id))
    trajectory = trajectory_of(row)
    judged = _labels_of(trajectory, labels) if labels else {}
    outcome = {True: "resolved", False: "unresolved", None: "outcome unknown"}
    yield f"trajectory {trajectory.trajectory_id}", BOLD
    yield f"instance   {trajectory.instance_id or '-'} ({outcome[trajectory.resolved]})", {}
    yield f"format     {trajectory.format}, {trajectory.num_steps} steps", {}
    step = -1
    for message in trajectory.messages:
        style: dict[str, Any] = DIM
        yield "", {}
        if message.kind == "action":
            step += 1
            label, reason = judged.get(step, (None, None))
            style = LABEL_STYLE[label]
            yield _step_title(step, label, reason, trajectory), {**style, "bold": True}
        else:
            yield f"--- {message.kind} ({message.role}{_name(message)})", DIM
        clip = None if full or message.kind == "action" else SHOWN_LINES
        for line in clipped(_text_of(message).splitlines(), clip):
            yield f"    {printable(line)}", style


def _step_title(step: int, label: str | None, reason: str | None, trajectory: Trajectory) -> str:
    title = f"=== step {step}"
    if label is not None:
        weight = DEFAULT_WEIGHTS[label] if trajectory.resolved is not True else 1.0  # type: ignore[index]  # checked on reading
        title += f" | {label} | weight {weight:g} under srft"
    return f"{title} | {printable(reason)}" if reason else title


def _labels_of(trajectory: Trajectory, folder: Path) -> dict[int, tuple[str, str | None]]:
    source = read_manifest(folder, stage="label")
    rows = (
        pl.scan_parquet(source.path / "labels.parquet")
        .filter(pl.col("trajectory_id") == trajectory.trajectory_id)
        .collect()
    )
    if rows.height and set(rows["content_hash"]) != {trajectory.content_hash}:
        raise LabelError(f"{folder}: labels of another version of {trajectory.trajectory_id}")
    return {
        row["step_index"]: (row["label"], row["rationale"]) for row in rows.iter_rows(named=True)
    }


def _show_tokens(source: Manifest, trajectory_id: str) -> Iterator[Line]:
    decode = _decoder(source.data["tokenizer"]["source"])
    for row in _find(source, pl.col("trajectory_id") == trajectory_id, trajectory_id):
        yield f"trajectory {trajectory_id}, {row['num_tokens']} tokens", BOLD
        runs = [(span["start"], span["end"], f"step {span['step']}") for span in row["step_spans"]]
        yield from _show_runs(row["input_ids"], runs, decode)


def _show_packed(source: Manifest, trajectory_id: str) -> Iterator[Line]:
    decode = _decoder(source.data["tokenizer"])
    contains = pl.col("trajectory_ids").list.contains(trajectory_id)
    for row in _find(source, contains, trajectory_id):
        bounds = [0]
        for length in row["seq_lengths"]:
            bounds.append(bounds[-1] + length)
        for owner, (start, end) in zip(row["trajectory_ids"], pairwise(bounds), strict=True):
            if owner != trajectory_id:
                continue
            yield f"trajectory {trajectory_id}, {end - start} tokens at {start} of a sequence", BOLD
            runs = [
                (run["start"] - start, run["start"] + run["length"] - start, _weight(run))
                for run in row["loss_weights"]
                if start <= run["start"] < end
            ]
            yield from _show_runs(row["input_ids"][start:end], runs, decode)


def _weight(run: dict[str, Any]) -> str:
    return f"weight {run['weight']:g}"


def _show_runs(ids: list[int], runs: list[tuple[int, int, str]], decode: Any) -> Iterator[Line]:
    position = 0
    for start, end, title in [*runs, (len(ids), len(ids), "")]:
        if start > position:
            yield f"--- tokens {position}-{start} | weight 0", DIM
            yield from _text_lines(decode(ids[position:start]), DIM)
        if end > start:
            yield f"=== tokens {start}-{end} | {title}", {"fg": "green", "bold": True}
            yield from _text_lines(decode(ids[start:end]), {"fg": "green"})
        position = end


def _text_lines(text: str, style: dict[str, Any]) -> Iterator[Line]:
    for line in text.split("\n"):
        yield f"    {printable(line)}", style


def _decoder(source: str) -> Any:
    from srft_prep.chat import load_spec

    backend = load_spec(source).load().backend
    return lambda ids: backend.decode(ids, skip_special_tokens=False)


def clipped(lines: list[str], limit: int | None) -> list[str]:
    """Return lines with the middle replaced by a count, where there are more than `limit`."""
    if limit is None or len(lines) <= limit + 1:
        return lines
    half = limit // 2
    return [*lines[:half], f"[... {len(lines) - 2 * half} more lines ...]", *lines[-half:]]


def printable(text: str) -> str:
    """Return text with control characters but tabs as escapes: it commands no terminal."""
    return "".join(
        char if char.isprintable() or char == "\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def _text_of(message: Message) -> str:
    parts = [message.reasoning_content, message.content]
    if message.tool_calls:
        for call in orjson.loads(message.tool_calls):
            function = call["function"]
            arguments = function.get("arguments", "")
            if not isinstance(arguments, str):
                arguments = orjson.dumps(arguments).decode()
            parts.append(f"{function['name']}({arguments})")
    return "\n".join(part for part in parts if part)


def _name(message: Message) -> str:
    return f" {message.name}" if message.name else ""
