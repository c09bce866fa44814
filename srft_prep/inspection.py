"""One trajectory as lines to read: its steps by label, or its tokens by weight.

    === step 5 | harmful | weight 0 | edit-refused: "No replacement was performed"
        what the agent wrote
    --- observation (user)
        what came back, its middle left out where it is long

Lines that begin with `===` carry weight, or would but for their label; `---` is context. Colour
adds nothing that the text does not say, so that the output reads the same in a file, a diff or a
golden test. Control characters of a recorded terminal are shown, never obeyed.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import orjson
import polars as pl

from srft_prep.errors import ConfigError, LabelError
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.schemas import LABELS_FILE
from srft_prep.trajectories import trajectory_of
from srft_prep.types import LABELS, Label, Message, Trajectory
from srft_prep.weights import DEFAULT_WEIGHTS, RECIPES

Line = tuple[str, dict[str, Any]]
"""A line of text and its style, in click's words."""

LABEL_STYLE: Final[dict[Label | None, dict[str, Any]]] = {
    "good": {"fg": "green"},
    "unnecessary": {"fg": "yellow"},
    "harmful": {"fg": "red"},
    None: {},
}
DIM: Final[dict[str, Any]] = {"dim": True}
BOLD: Final[dict[str, Any]] = {"bold": True}
SHOWN_LINES: Final = 12
"""Lines of context that are shown, half from its start and half from its end."""
NEAR_IDS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A half-open range of tokens that the agent wrote, and what to say of it."""

    start: int
    end: int
    title: str
    style: dict[str, Any]


def show(
    directory: Path, trajectory_id: str, *, labels: Path | None = None, full: bool = False
) -> Iterator[Line]:
    """Yield the lines that show one trajectory of a stage directory.

    Raises:
        ConfigError: no such trajectory, a directory that holds no trajectories, or labels beside
            anything but trajectories.
        LabelError: the labels were made for another version of the trajectory.
    """
    source = read_manifest(directory).checked()
    if source.stage == "label":
        raise ConfigError(f"{directory}: give the trajectories, and this folder as --labels")
    if source.stage == "export":
        raise ConfigError(f"{directory}: is an export; give the shards that it was made from")
    if labels is not None and source.stage != "ingest":
        raise ConfigError(f"--labels: only beside trajectories; {directory} is a {source.stage}")
    if source.stage == "ingest":
        lines = _show_steps(source, trajectory_id, labels, full=full)
    elif source.stage == "tokenize":
        lines = _show_tokens(source, trajectory_id, full=full)
    else:
        lines = _show_packed(source, trajectory_id, full=full)
    for text, style in lines:
        yield printable(text).rstrip(), style


def _find(source: Manifest, column: pl.Expr, trajectory_id: str) -> Iterator[dict[str, Any]]:
    found = False
    for part in source.parts:
        for row in pl.scan_parquet(part).filter(column).collect().iter_rows(named=True):
            found = True
            yield row
    if not found:
        near = ", ".join(printable(each) for each in _near(source, trajectory_id))
        hint = f"; there is {near}" if near else ""
        raise ConfigError(f"{source.path}: no trajectory {trajectory_id!r}{hint}")


def _near(source: Manifest, trajectory_id: str) -> list[str]:
    """Return the ids that a mistyped one may have meant, or else the first ones."""
    name = "trajectory_ids" if source.stage == "pack" else "trajectory_id"
    ids: dict[str, None] = {}
    for part in source.parts:
        column = pl.read_parquet(part, columns=[name])[name]
        ids |= dict.fromkeys((column.explode() if source.stage == "pack" else column).to_list())
    containing = [each for each in ids if trajectory_id and trajectory_id in each]
    near = containing or get_close_matches(trajectory_id, ids, n=NEAR_IDS) or list(ids)
    return near[:NEAR_IDS]


def _show_steps(
    source: Manifest, trajectory_id: str, labels: Path | None, *, full: bool
) -> Iterator[Line]:
    row = next(_find(source, pl.col("trajectory_id") == trajectory_id, trajectory_id))
    trajectory = trajectory_of(row)
    judged = None if labels is None else _labels_of(trajectory, labels)
    yield from _summary(trajectory, judged)
    step = -1
    for message in trajectory.messages:
        yield "", {}
        if message.kind == "action":
            step += 1
            label, reason = (judged or {}).get(step, (None, None))
            style = LABEL_STYLE[label]
            title = f"=== step {step}"
            if judged is not None:
                title += f" | {_judgement(label, trajectory)}"
            yield f"{title} | {reason}" if reason else title, {**style, "bold": True}
        else:
            style = DIM
            yield f"--- {message.kind} ({message.role}{_name(message)})", DIM
        clip = None if full or message.kind == "action" else SHOWN_LINES
        for line in clipped(_text_lines(message), clip):
            yield f"    {line}", style


def _summary(
    trajectory: Trajectory, judged: dict[int, tuple[Label, str | None]] | None
) -> Iterator[Line]:
    outcome = {True: "resolved", False: "unresolved", None: "unknown"}[trajectory.resolved]
    counts = Counter(label for label, _ in (judged or {}).values())
    counted = ", ".join(f"{counts[label]} {label}" for label in LABELS if counts[label])
    yield f"trajectory  {trajectory.trajectory_id}", BOLD
    yield f"instance    {trajectory.instance_id or '-'}", {}
    yield f"format      {trajectory.format}", {}
    yield f"outcome     {outcome}", {}
    yield f"steps       {trajectory.num_steps}{': ' + counted if counted else ''}", {}
    if judged is not None:
        whole = RECIPES["srft"].treatment(trajectory.resolved) == "whole"
        by_label = " ".join(f"{label}={DEFAULT_WEIGHTS[label]:g}" for label in LABELS)
        yield f"weights     recipe srft, {'whole: 1 everywhere' if whole else by_label}", {}


def _judgement(label: Label | None, trajectory: Trajectory) -> str:
    """Return a step's label and the weight that it has under srft."""
    if RECIPES["srft"].treatment(trajectory.resolved) == "whole":
        return f"{label or 'no label'} | weight 1"
    return f"{label} | weight {DEFAULT_WEIGHTS[label]:g}" if label else "no label"


def _labels_of(trajectory: Trajectory, folder: Path) -> dict[int, tuple[Label, str | None]]:
    source = read_manifest(folder, stage="label").checked()
    rows = (
        pl.scan_parquet(source.path / LABELS_FILE)
        .filter(pl.col("trajectory_id") == trajectory.trajectory_id)
        .collect()
    )
    if rows.height and set(rows["content_hash"]) != {trajectory.content_hash}:
        raise LabelError(
            f"{folder}: labels of another version of {printable(trajectory.trajectory_id)}; run "
            "label again"
        )
    return {
        row["step_index"]: (row["label"], row["rationale"]) for row in rows.iter_rows(named=True)
    }


def _show_tokens(source: Manifest, trajectory_id: str, *, full: bool) -> Iterator[Line]:
    decode = _decoder(source.data["tokenizer"]["source"], source.data["tokenizer"])
    style = LABEL_STYLE["good"]
    for row in _find(source, pl.col("trajectory_id") == trajectory_id, trajectory_id):
        yield f"trajectory  {trajectory_id}", BOLD
        yield f"tokens      {row['num_tokens']}", {}
        yield f"steps       {len(row['step_spans'])}", {}
        parts: dict[int, list[str]] = {}
        for span in row["part_spans"]:
            length = span["end"] - span["start"]
            parts.setdefault(span["step"], []).append(f"{span['part']} {length}")
        pieces = []
        for span in row["step_spans"]:
            title = " | ".join([f"step {span['step']}", ", ".join(parts.get(span["step"], ()))])
            pieces.append(
                _Piece(start=span["start"], end=span["end"], title=title.strip(" |"), style=style)
            )
        yield from _show_pieces(row["input_ids"], pieces, "context", decode, full=full)


def _show_packed(source: Manifest, trajectory_id: str, *, full: bool) -> Iterator[Line]:
    decode = _decoder(source.data["tokenizer"], source.data)
    contains = pl.col("trajectory_ids").list.contains(trajectory_id)
    for row in _find(source, contains, trajectory_id):
        bounds = [0]
        for length in row["seq_lengths"]:
            bounds.append(bounds[-1] + length)
        sums = zip(row["document_sum_weights"], row["trajectory_sum_weights"], strict=True)
        for owner, (start, end), (of_document, of_all) in zip(
            row["trajectory_ids"], pairwise(bounds), sums, strict=True
        ):
            if owner != trajectory_id:
                continue
            runs = [run for run in row["loss_weights"] if start <= run["start"] < end]
            weighted = sum(run["length"] for run in runs)
            yield f"trajectory  {trajectory_id}", BOLD
            yield f"tokens      {end - start}, {weighted} of them weighted", {}
            yield f"weights     {of_document:.9g} in sum, {of_all:.9g} in all its documents", {}
            yield f"lies at     {start}-{end} of a packed sequence of {bounds[-1]} tokens", {}
            pieces = [_weighted(run, start) for run in runs]
            ids = row["input_ids"][start:end]
            yield from _show_pieces(ids, pieces, "weight 0", decode, full=full)


def _weighted(run: dict[str, Any], offset: int) -> _Piece:
    start = run["start"] - offset
    return _Piece(
        start=start,
        end=start + run["length"],
        title=f"weight {run['weight']:g}",
        style=LABEL_STYLE["good" if run["weight"] >= 1 else "unnecessary"],
    )


def _show_pieces(
    ids: Sequence[int],
    pieces: list[_Piece],
    context: str,
    decode: Callable[[Sequence[int]], str],
    *,
    full: bool,
) -> Iterator[Line]:
    """Yield the lines of a document: its pieces whole, what lies between them clipped."""
    position = 0
    for piece in [*pieces, _Piece(start=len(ids), end=len(ids), title="", style={})]:
        if piece.start > position:
            yield "", {}
            yield f"--- tokens {position}-{piece.start} | {context}", DIM
            text = decode(ids[position : piece.start])
            for line in clipped(text.split("\n"), None if full else SHOWN_LINES):
                yield f"    {line}", DIM
        if piece.end > piece.start:
            yield "", {}
            title = f"=== tokens {piece.start}-{piece.end} | {piece.title}"
            yield title, {**piece.style, "bold": True}
            for line in decode(ids[piece.start : piece.end]).split("\n"):
                yield f"    {line}", piece.style
        position = piece.end


def _decoder(source: str, hashes: dict[str, Any]) -> Callable[[Sequence[int]], str]:
    """Return the tokenizer's decoding.

    Raises:
        ConfigError: the tokenizer is not there, or is another one than the tokens were made with.
    """
    from srft_prep.chat import load_backend

    backend, tokenizer_hash = load_backend(source)
    if tokenizer_hash != hashes["tokenizer_hash"]:
        raise ConfigError(f"{source}: is not the tokenizer that these tokens were made with")

    def decode(ids: Sequence[int]) -> str:
        return backend.decode(ids, skip_special_tokens=False)

    return decode


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


def _text_lines(message: Message) -> list[str]:
    lines: list[str] = []
    if message.reasoning_content:
        thoughts = message.reasoning_content.removesuffix("\n").split("\n")
        lines += ["[reasoning]", *thoughts, "[/reasoning]"]
    if message.content:
        lines += message.content.removesuffix("\n").split("\n")
    if message.tool_calls:
        lines += [f"> {_call_text(call)}" for call in orjson.loads(message.tool_calls)]
    return lines


def _call_text(call: Any) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return orjson.dumps(call).decode()
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str):
        arguments = orjson.dumps(arguments).decode()
    return f"{function.get('name')}({arguments})"


def _name(message: Message) -> str:
    return f" {message.name}" if message.name else ""
