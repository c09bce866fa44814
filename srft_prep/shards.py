"""Tokens + labels -> packed, weighted shards.

Three passes. The first reads lengths and spans only and decides everything: which rows the recipe
takes, the weight of every step, the documents, the packs, their order. The second copies the token
ids that are needed, once and in order, to a scratch file. The third writes the shards, reading each
document from the scratch file by its place. Memory holds one part, one shard and some hundred bytes
a step. The same inputs and settings give the same bytes.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.config import PackConfig
from srft_prep.documents import Document, Run, documents_of
from srft_prep.errors import ConfigError, LabelError, ShardError
from srft_prep.judgements import JudgedTrajectory, read_judgements
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.packing import best_fit_decreasing
from srft_prep.progress import Progress, Silent
from srft_prep.schemas import SHARDS
from srft_prep.storage import StageWriter, write_table
from srft_prep.types import LABELS
from srft_prep.weights import DEFAULT_WEIGHTS, RECIPES, step_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROW_GROUP_ROWS: Final = 4
IGNORED: Final = -100
"""The label of a token that carries no loss, as in every Hugging Face trainer."""


@dataclass(slots=True)
class _Plan:
    """All decisions of a pack run."""

    documents: list[Document] = field(default_factory=list)
    trajectory_ids: list[str] = field(default_factory=list)
    """Of each token row that the recipe takes."""
    places: list[tuple[int, int]] = field(default_factory=list)
    """(part, row in part) of each token row that the recipe takes."""
    labelled_steps: dict[str, set[int]] = field(default_factory=dict)
    """Steps that a label was looked up for, by trajectory."""
    counts: Counter[str] = field(default_factory=Counter)


def pack(
    tokens: Path,
    output: Path,
    config: PackConfig,
    *,
    labels: Path | None = None,
    overwrite: bool = False,
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write packed sequences of a token directory to a stage directory and return its manifest.

    Raises:
        ShardError: `tokens` or `labels` is no finished stage output.
        ConfigError: the recipe needs labels and there are none, the label probabilities that
            `soft` needs are missing, or the recipe leaves nothing to train on.
        LabelError: labels do not fit the tokens.
    """
    source = read_manifest(tokens, stage="tokenize").checked()
    recipe = RECIPES[config.recipe]
    inputs = [source.as_input()]
    judgements: dict[str, JudgedTrajectory] = {}
    if not recipe.needs_labels:
        _refuse_unused_weights(config)
    else:
        if labels is None:
            raise ConfigError(
                f"--recipe {config.recipe} weights steps by labels: give --labels DIR"
            )
        label_source = read_manifest(labels, stage="label").checked()
        inputs.append(label_source.as_input())
        judgements = read_judgements(label_source, soft=config.soft)
    plan = _decide(source, judgements, config)
    if not plan.documents:
        raise ConfigError(_nothing_left(config, plan))
    with StageWriter.open(
        output, stage="pack", config=asdict(config), inputs=inputs, overwrite=overwrite
    ) as writer:
        if writer.finished:
            return writer.finished
        packs = best_fit_decreasing([each.length for each in plan.documents], config.seq_len)
        order = shuffled(len(packs), config.shuffle_seed)
        scratch = writer.progress / "input_ids.bin"
        offsets = _spill(source.parts, plan, scratch)
        names = _write_shards(
            [packs[i] for i in order], plan, offsets, scratch, output, config, progress or Silent()
        )
        totals = _totals(plan, len(packs), config)
        return writer.finish(
            counts={**plan.counts, **totals},
            names=names,
            command=command or [],
            extra={**_description(source, config), **totals},
        )


def _refuse_unused_weights(config: PackConfig) -> None:
    if config.soft or config.weights != DEFAULT_WEIGHTS:
        raise ConfigError(
            f"--recipe {config.recipe} gives every step weight 1 and reads no labels: leave out "
            "--weights and --soft, or choose unresolved-masked, srft or srft-all"
        )


def _description(source: Manifest, config: PackConfig) -> dict[str, Any]:
    """Return what a trainer must know of the shards, beside their totals."""
    tokenizer = source.data["tokenizer"]
    return {
        "recipe": config.recipe,
        "weights": config.weights,
        "seq_len": config.seq_len,
        "tokenizer": tokenizer["source"],
        "tokenizer_hash": tokenizer["tokenizer_hash"],
        "template_hash": tokenizer["template_hash"],
    }


def _decide(source: Manifest, judgements: dict[str, JudgedTrajectory], config: PackConfig) -> _Plan:
    """Read everything but the token ids and decide what goes into the shards."""
    plan = _Plan()
    plan.counts.update(left_out=0, missing_label=0, overlong=0, lost_steps=0, lost_tokens=0)
    columns = ["trajectory_id", "resolved", "content_hash", "step_spans", "num_tokens"]
    for part_index, part in enumerate(source.parts):
        for row_index, row in enumerate(pl.read_parquet(part, columns=columns).iter_rows()):
            trajectory_id, resolved, content_hash, raw_spans, num_tokens = row
            spans = [(span["step"], span["start"], span["end"]) for span in raw_spans]
            weights = _weights_of(
                trajectory_id, resolved, content_hash, spans, judgements, plan, config
            )
            if weights is None:
                continue
            if num_tokens == 0:
                plan.counts["empty"] += 1
                continue
            cut = documents_of(
                len(plan.places),
                num_tokens,
                spans,
                weights,
                seq_len=config.seq_len,
                overlong=config.overlong,
            )
            _count_overlong(trajectory_id, num_tokens, config, plan)
            plan.counts["lost_steps"] += cut.num_lost_steps
            plan.counts["lost_tokens"] += cut.num_lost_tokens
            kept = [each for each in cut.documents if each.runs or not config.drop_weightless]
            plan.counts["weightless"] += sum(not each.runs for each in cut.documents)
            if kept:
                plan.documents += kept
                plan.places.append((part_index, row_index))
                plan.trajectory_ids.append(trajectory_id)
    _refuse_foreign_labels(plan, judgements)
    return plan


def _refuse_foreign_labels(plan: _Plan, judgements: dict[str, JudgedTrajectory]) -> None:
    if plan.counts["missing_label"] and not plan.labelled_steps:
        raise LabelError(
            f"none of the {plan.counts['missing_label']} trajectories that the recipe weights by "
            "label has a label: were these labels made for other trajectories, or only for other "
            "outcomes (label --only all)?"
        )
    for trajectory_id, steps in plan.labelled_steps.items():
        extra = judgements[trajectory_id].by_step.keys() - steps
        if extra:
            raise LabelError(
                f"{trajectory_id}: a label for step {min(extra)}, but the trajectory has the steps "
                f"0 to {max(steps)}; were these labels made for other trajectories?"
            )


def _weights_of(
    trajectory_id: str,
    resolved: bool | None,
    content_hash: str,
    spans: Sequence[tuple[int, int, int]],
    judgements: dict[str, JudgedTrajectory],
    plan: _Plan,
    config: PackConfig,
) -> list[float] | None:
    """Return a weight for each span, or None where the trajectory is left out."""
    treatment = RECIPES[config.recipe].treatment(resolved)
    if treatment == "left out":
        plan.counts["left_out"] += 1
        return None
    if treatment == "whole" or not spans:
        return step_weights("whole", [], {}, num_steps=len(spans))
    judged = judgements.get(trajectory_id)
    if judged is not None and judged.content_hash != content_hash:
        judged = None  # labels of an earlier version of this trajectory
        plan.counts["stale_labels"] += 1
    by_step = judged.by_step if judged else {}
    if judged:
        plan.labelled_steps.setdefault(trajectory_id, set()).update(step for step, _, _ in spans)
    missing = [step for step, _, _ in spans if step not in by_step]
    if missing:
        plan.counts["missing_label"] += 1
        if config.missing_label == "error":
            raise LabelError(
                f"{trajectory_id}: no label for step {missing[0]} ({len(missing)} missing); run "
                "label again, or choose --missing-label drop|mask"
            )
        if config.missing_label == "drop":
            return None
    present = [by_step[step] for step, _, _ in spans if step in by_step]
    if config.soft:
        hard = sum(judgement.probabilities is None for judgement in present)
        plan.counts["steps_without_probabilities"] += hard
    known = iter(
        step_weights(
            treatment,
            present,
            {label: config.weights[label] for label in LABELS},
            num_steps=len(present),
            soft=config.soft,
        )
    )
    weights = [next(known) if step in by_step else 0.0 for step, _, _ in spans]
    return [float(np.float32(weight)) for weight in weights]


def _count_overlong(trajectory_id: str, num_tokens: int, config: PackConfig, plan: _Plan) -> None:
    if num_tokens > config.seq_len:
        plan.counts["overlong"] += 1
        if config.overlong == "error":
            raise ConfigError(
                f"{trajectory_id}: {num_tokens} tokens, more than --seq-len {config.seq_len}; "
                "choose --overlong truncate|windows|drop, or a longer --seq-len"
            )


def _nothing_left(config: PackConfig, plan: _Plan) -> str:
    reasons = ", ".join(f"{count} {name}" for name, count in plan.counts.items() if count)
    return f"--recipe {config.recipe} leaves no trajectory to pack ({reasons or 'no tokens'})"


def shuffled(count: int, seed: int) -> list[int]:
    """Return a permutation of range(count) that depends on nothing but count and seed."""
    return sorted(
        range(count),
        key=lambda i: hashlib.blake2b(f"{seed}:{i}".encode(), digest_size=16).digest(),
    )


def _spill(parts: Sequence[Path], plan: _Plan, scratch: Path) -> list[int]:
    """Copy the ids of all taken rows to the scratch file; return where each row starts."""
    offsets: list[int] = []
    position = 0
    with scratch.open("wb") as file:
        for part_index, places in groupby(plan.places, key=lambda place: place[0]):
            lists = pq.read_table(parts[part_index], columns=["input_ids"])[
                "input_ids"
            ].combine_chunks()
            ids = lists.values.to_numpy()
            starts = lists.offsets.to_numpy()
            for _, row in places:
                piece = np.ascontiguousarray(ids[starts[row] : starts[row + 1]], np.int32)
                file.write(piece.data)
                offsets.append(position)
                position += len(piece)
    return offsets


def _write_shards(
    packs: list[list[int]],
    plan: _Plan,
    offsets: list[int],
    scratch: Path,
    output: Path,
    config: PackConfig,
    progress: Progress,
) -> list[str]:
    names: list[str] = []
    file = os.open(scratch, os.O_RDONLY)
    try:
        for chunk in _chunks(packs, plan, config.shard_tokens):
            names.append(f"shard-{len(names):05d}.parquet")
            write_table(
                _shard_table(chunk, plan, offsets, file),
                output / names[-1],
                row_group_rows=ROW_GROUP_ROWS,
            )
            progress.advance(len(chunk))
    finally:
        os.close(file)
    return names


def _chunks(packs: list[list[int]], plan: _Plan, tokens: int) -> Iterator[list[list[int]]]:
    chunk: list[list[int]] = []
    size = 0
    for members in packs:
        chunk.append(members)
        size += sum(plan.documents[i].length for i in members)
        if size >= tokens:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _shard_table(packs: list[list[int]], plan: _Plan, offsets: list[int], file: int) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in SHARDS.names}
    for members in packs:
        documents = [plan.documents[i] for i in members]
        ids = np.concatenate([_ids_of(document, offsets, file) for document in documents])
        runs = list(_shifted_runs(documents))
        columns["input_ids"].append(ids)
        columns["labels"].append(_labels_of(ids, runs))
        columns["seq_lengths"].append([document.length for document in documents])
        columns["loss_weights"].append(
            [{"start": start, "length": length, "weight": weight} for start, length, weight in runs]
        )
        columns["trajectory_ids"].append(
            [plan.trajectory_ids[document.row] for document in documents]
        )
    return pa.Table.from_arrays(
        [pa.array(columns[field.name], field.type) for field in SHARDS], schema=SHARDS
    )


def _ids_of(document: Document, offsets: list[int], file: int) -> "NDArray[np.int32]":
    start = (offsets[document.row] + document.start) * 4
    data = os.pread(file, document.length * 4, start)
    if len(data) != document.length * 4:
        raise ShardError("the scratch file of token ids was cut short; run pack again")
    return np.frombuffer(data, np.int32)


def _shifted_runs(documents: list[Document]) -> Iterator[Run]:
    position = 0
    for document in documents:
        for start, length, weight in document.runs:
            yield position + start, length, weight
        position += document.length


def _labels_of(ids: "NDArray[np.int32]", runs: list[Run]) -> "NDArray[np.int32]":
    labels = np.full(len(ids), IGNORED, np.int32)
    for start, length, _ in runs:
        labels[start : start + length] = ids[start : start + length]
    return labels


def _totals(plan: _Plan, num_packs: int, config: PackConfig) -> dict[str, Any]:
    """Return the numbers that a trainer plans with; `sum_weights` is the loss's denominator.

    It is the exact sum, rounded once, so that it does not depend on the order of the sequences.
    """
    num_tokens = sum(document.length for document in plan.documents)
    runs = [run for document in plan.documents for run in document.runs]
    return {
        "num_sequences": num_packs,
        "num_documents": len(plan.documents),
        "num_trajectories": len(set(plan.trajectory_ids)),
        "num_tokens": num_tokens,
        "num_loss_tokens": sum(length for _, length, _ in runs),
        "sum_weights": math.fsum(length * weight for _, length, weight in runs),
        "fill": num_tokens / (num_packs * config.seq_len),
        "min_sequences": -(-num_tokens // config.seq_len),
    }
