"""One trajectory of a stage directory, found and made ready to be shown.

    ingest     its messages, with the labels of its steps
    tokenize   its tokens: what the agent wrote, by step and part
    pack       its documents: tokens with weights, and with the tokens they were packed from,
               which step each stretch is and which label made it weigh nothing

Only rows of that trajectory are decoded; finding them costs one pass over the column of ids.
`inspection_text` shows it on a terminal, `inspection_page` as HTML.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final

import polars as pl

from srft_prep.errors import ConfigError, LabelError
from srft_prep.hostile_text import printable
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.packed_steps import Stretch, placed_in, steps_of, weighted
from srft_prep.schemas import LABELS_FILE
from srft_prep.trajectories import trajectory_of
from srft_prep.types import LABELS, Label, Trajectory

Decode = Callable[[Sequence[int]], str]
NEAR_IDS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a critic said of a step."""

    label: Label
    rationale: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTrajectory:
    """A trajectory and what a critic said of its steps."""

    trajectory: Trajectory
    judgements: dict[int, Judgement] | None
    """By step; None where no labels were given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTokens:
    """A row of tokens, or a document of a packed sequence."""

    facts: tuple[tuple[str, str], ...]
    """Names and values, the trajectory's id first."""
    ids: Sequence[int]
    """Token ids, [T]."""
    stretches: tuple[Stretch, ...]
    """What the agent wrote, or what has weight; sorted, disjoint, the rest is context."""
    context: str
    """What to say of the rest."""
    decode: Decode


Shown = ShownTrajectory | list[ShownTokens]


def find(
    directory: Path,
    trajectory_id: str,
    *,
    labels: Path | None = None,
    tokens: Path | None = None,
) -> Shown:
    """Return one trajectory of a stage directory, ready to be shown.

    Args:
        directory: output of ingest, tokenize or pack.
        trajectory_id: which one.
        labels: output of label, beside trajectories, or beside shards with `tokens`.
        tokens: output of tokenize that the shards were packed from.

    Raises:
        ConfigError: no such trajectory, a directory that holds no trajectories, or labels or
            tokens beside what they say nothing of.
        LabelError: the labels were made for another version of the trajectory, or one is unknown.
    """
    source = read_manifest(directory).checked()
    if source.stage == "label":
        raise ConfigError(f"{directory}: give the trajectories, and this folder as --labels")
    if source.stage in ("export", "train"):
        what = {"export": "an export", "train": "a training run"}[source.stage]
        raise ConfigError(f"{directory}: is {what}; give the shards that it was made from")
    if tokens is not None and source.stage != "pack":
        raise ConfigError(f"--tokens: only beside shards; {directory} is a {source.stage}")
    if labels is not None and source.stage != "ingest" and tokens is None:
        raise ConfigError(
            "--labels: only beside trajectories, or beside shards with the --tokens that they were "
            f"packed from; {directory} is a {source.stage}"
        )
    if source.stage == "ingest":
        row = _rows(source, trajectory_id)[0]
        trajectory = trajectory_of(row)
        judged = None if labels is None else _judgements(row, labels)
        return ShownTrajectory(trajectory=trajectory, judgements=judged)
    if source.stage == "tokenize":
        return list(_tokens(source, trajectory_id))
    return _documents(source, trajectory_id, tokens=tokens, labels=labels)


def _rows(source: Manifest, trajectory_id: str) -> list[dict[str, Any]]:
    """Return a trajectory's rows, in order."""
    mine = pl.col("trajectory_id") == trajectory_id
    if source.stage == "pack":
        mine = pl.col("trajectory_ids").list.contains(trajectory_id)
    found = [
        row
        for part in source.parts
        for row in pl.scan_parquet(part).filter(mine).collect().iter_rows(named=True)
    ]
    if not found:
        near = ", ".join(printable(each) for each in _near(source, trajectory_id))
        hint = f"; there is {near}" if near else ""
        raise ConfigError(f"{source.path}: no trajectory {trajectory_id!r}{hint}")
    return found


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


def _judgements(row: dict[str, Any], folder: Path) -> dict[int, Judgement]:
    """Return what a critic said of the steps of a trajectory, given a row of it."""
    source = read_manifest(folder, stage="label").checked()
    found = (
        pl.scan_parquet(source.path / LABELS_FILE)
        .filter(pl.col("trajectory_id") == row["trajectory_id"])
        .collect()
    )
    if found.height and set(found["content_hash"]) != {row["content_hash"]}:
        raise LabelError(
            f"{folder}: labels of another version of {printable(row['trajectory_id'])}; run "
            "label again"
        )
    for step, label in found.select("step_index", "label").iter_rows():
        if label not in LABELS:
            raise LabelError(
                f"{folder}: {printable(row['trajectory_id'])}: step {step}: expected a label of "
                f"{', '.join(LABELS)}, got {label!a:.80}; run label again"
            )
    return {
        each["step_index"]: Judgement(label=each["label"], rationale=each["rationale"])
        for each in found.iter_rows(named=True)
    }


def _tokens(source: Manifest, trajectory_id: str) -> Iterator[ShownTokens]:
    decode = _decoder(source.data["tokenizer"]["source"], source.data["tokenizer"])
    for row in _rows(source, trajectory_id):
        facts = (
            ("trajectory", trajectory_id),
            ("tokens", str(row["num_tokens"])),
            ("steps", str(len(row["step_spans"]))),
        )
        yield ShownTokens(
            facts=facts,
            ids=row["input_ids"],
            stretches=tuple(steps_of(row)),
            context="context",
            decode=decode,
        )


def _documents(
    source: Manifest, trajectory_id: str, *, tokens: Path | None, labels: Path | None
) -> list[ShownTokens]:
    """Return a trajectory's documents: in their order in the trajectory where tokens tell it.

    Windows of one trajectory lie anywhere in the shards.
    """
    decode = _decoder(source.data["tokenizer"], source.data)
    packs = _rows(source, trajectory_id)
    found = [shown for pack in packs for shown in _packed(pack, trajectory_id, decode)]
    if tokens is None:
        return found
    rows = _rows(read_manifest(tokens, stage="tokenize").checked(), trajectory_id)
    judged = {} if labels is None else _judgements(rows[0], labels)
    known = {step: each.label for step, each in judged.items()}
    placed = []
    for shown in found:
        number, first = _place(shown.ids, rows, tokens=tokens, shards=source)
        row, length = rows[number], len(shown.ids)
        facts = [
            *shown.facts,
            ("cut from", f"tokens {first}-{first + length} of {row['num_tokens']}"),
        ]
        if judged and source.data["config"].get("calibration"):
            facts.append(("labels", "as the critic gave them; pack weighted them calibrated"))
        steps = placed_in(row, shown.stretches, first, length, labels=known)
        shown = replace(shown, facts=tuple(facts), stretches=tuple(steps), context="context")
        placed.append((number, first, shown))
    return [shown for _, _, shown in sorted(placed, key=lambda each: each[:2])]


def _packed(pack: dict[str, Any], trajectory_id: str, decode: Decode) -> Iterator[ShownTokens]:
    """Yield a trajectory's documents in one packed sequence."""
    bounds = list(accumulate(pack["seq_lengths"], initial=0))
    sums = zip(pack["document_sum_weights"], pack["trajectory_sum_weights"], strict=True)
    for owner, (start, end), (of_document, of_all) in zip(
        pack["trajectory_ids"], pairwise(bounds), sums, strict=True
    ):
        if owner != trajectory_id:
            continue
        runs = [run for run in pack["loss_weights"] if start <= run["start"] < end]
        facts = (
            ("trajectory", trajectory_id),
            ("tokens", f"{end - start}, {sum(run['length'] for run in runs)} of them weighted"),
            ("weights", f"{of_document:.9g} in sum, {of_all:.9g} in all its documents"),
            ("lies at", f"{start}-{end} of a packed sequence of {bounds[-1]} tokens"),
        )
        yield ShownTokens(
            facts=facts,
            ids=pack["input_ids"][start:end],
            stretches=tuple(weighted(run, start) for run in runs),
            context="weight 0",
            decode=decode,
        )


def _place(
    ids: Sequence[int], rows: Sequence[dict[str, Any]], *, tokens: Path, shards: Manifest
) -> tuple[int, int]:
    """Return which row a document was cut from, and where in it the document begins."""
    sought = pl.Series(ids, dtype=pl.Int32).to_numpy().tobytes()
    for number in sorted(range(len(rows)), key=lambda each: len(rows[each]["input_ids"])):
        row = rows[number]
        text = pl.Series(row["input_ids"], dtype=pl.Int32).to_numpy().tobytes()
        place = text.find(sought)
        while place > 0 and place % 4:  # an id has four bytes
            place = text.find(sought, place + 1)
        if place >= 0:
            return number, place // 4
    made_from = next(
        (each["path"] for each in shards.data["inputs"] if each["stage"] == "tokenize"), "others"
    )
    raise ConfigError(
        f"--tokens {tokens}: hold other tokens than {shards.path}, which was packed from "
        f"{made_from}; give those"
    )


def _decoder(source: str, hashes: dict[str, Any]) -> Decode:
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
