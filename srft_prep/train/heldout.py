"""Mean NLL of held-out trajectories, by label and by outcome: what training does to which steps.

Here every token that the agent wrote is looked at, whatever it weighs in training. So one sees what
step rejection is for: the NLL of good steps should fall, that of harmful steps of unresolved
trajectories should not fall with it.

A trajectory longer than a packed sequence is looked at in windows, whatever `pack` did with such:
each step once, with what came before it as context. Only steps that fill a window are left out, and
counted. Documents are packed as those of the training set are. Memory: 4 bytes a held-out token.

Legend: L loss-bearing positions.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from srft_prep.config import OUTCOMES, PackConfig
from srft_prep.documents import Documents, cut_rows
from srft_prep.errors import ShardError
from srft_prep.hold_out import read_held_out
from srft_prep.judgements import Judgements, read_judgements, rejected_trajectories
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.packing import pack_documents
from srft_prep.ragged import offsets_of
from srft_prep.step_weights import weigh_steps
from srft_prep.token_columns import (
    OUTCOME_CODES,
    StepIndex,
    TokenColumns,
    document_ids,
    read_columns,
)
from srft_prep.train.batches import Batch, PackedSequence, assemble, filler
from srft_prep.train.loader import deal
from srft_prep.types import LABELS
from srft_prep.weight_files import annotators_of
from srft_prep.weights import RECIPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNLABELLED: Final = "unlabelled"
_LABELS: Final = (*LABELS, UNLABELLED)
_GROUPS: Final = tuple((OUTCOMES[outcome], label) for outcome in OUTCOME_CODES for label in _LABELS)
"""(outcome, label) of each group: its number is outcome code * 4 + label code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutBatch:
    """Held-out trajectories, laid end to end, with what is known of each target."""

    batch: Batch
    """Every token of every step is a target, with weight 1."""
    groups: Tensor
    """Number of each target's (outcome, label), int64 [L]."""
    weights: Tensor
    """What each target would weigh in training, float64 [L]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The held-out trajectories of a training set, as packed sequences of their documents."""

    sequences: tuple[PackedSequence, ...]
    """Each run is a step."""
    groups: "tuple[NDArray[np.int64], ...]"
    """Of each sequence's runs: the number of their (outcome, label)."""
    weights: "tuple[NDArray[np.float64], ...]"
    """Of each sequence's runs: what they would weigh in training."""
    num_trajectories: int
    """Trajectories that are looked at."""
    labelled: bool
    """Whether labels were given."""
    weighted: bool
    """Whether the weights are known: without labels they are not, where the recipe needs some."""
    left_out: tuple[int, int]
    """Steps that are longer than a window, and their tokens."""

    @classmethod
    def open(
        cls, tokens: Path, labels: Path | None, shards: Manifest, *, limit: int | None = None
    ) -> Self:
        """Return the held-out trajectories of shards.

        Args:
            tokens: the output of `tokenize` that the shards were packed from.
            labels: output of `label`, or a labels file; without it no step has a label.
            shards: of the shards, packed with `--hold-out`.
            limit: trajectories to look at, at most: of all, those whose ids have the least hash.

        Raises:
            ShardError: nothing was held out, or the tokens are not those of the shards.
            LabelError: the labels do not fit the tokens.
        """
        config = PackConfig(**shards.data["config"])
        source = read_manifest(tokens, stage="tokenize").checked()
        _require_packed(source, shards)
        columns = read_columns(source.parts)
        held_out = [each.trajectory_id for each in read_held_out(shards.path)]
        names = sorted(held_out, key=_hash_of)[:limit]
        documents = _documents(columns, names, config, tokens)
        judgements = None
        if labels is not None:
            judgements = read_judgements(
                labels,
                columns,
                StepIndex(columns),
                soft=config.soft,
                rejected=rejected_trajectories(source),
                annotator=_annotator(labels, shards),
            )
        packs = pack_documents(documents.lengths.astype(np.int64), config.seq_len)
        groups, weights = _of_steps(columns, judgements, config)
        ids = {
            document: view.copy()
            for part in range(len(columns.parts))
            for document, view in document_ids(columns, documents, part)
        }
        made = [_sequence(columns, documents, members, ids) for members in packs]
        return cls(
            sequences=tuple(sequence for sequence, _ in made),
            groups=tuple(groups[steps] for _, steps in made),
            weights=tuple(weights[steps] for _, steps in made),
            num_trajectories=len(np.unique(columns.trajectories[documents.rows])),
            labelled=judgements is not None,
            weighted=judgements is not None or not RECIPES[config.recipe].needs_labels,
            left_out=_left_out(columns, documents, names),
        )

    @property
    def num_tokens(self) -> dict[str, int]:
        """Tokens that are looked at: all, by label, by outcome, and by both, as in `evaluate`."""
        counts = np.zeros(len(_GROUPS), np.int64)
        for sequence, groups in zip(self.sequences, self.groups, strict=True):
            np.add.at(counts, groups, sequence.run_lengths)
        return {name: int(counts[groups].sum()) for name, groups in _named(counts > 0).items()}

    def remarks(self) -> list[str]:
        """Return what to know before reading the values: how much is measured, and what is not."""
        tokens = self.num_tokens
        labels = [*LABELS] if self.labelled else []
        outcomes = ["resolved", "unresolved"]
        names = [*labels, *outcomes]
        counts = ", ".join(f"{name} {tokens[name]:,}" for name in names if name in tokens)
        said = [
            f"held out: {self.num_trajectories:,} trajectories, {tokens['all']:,} tokens of their "
            f"agents ({counts or 'of unknown outcome'})"
        ]
        pairs = [
            f"{outcome}/{label}"
            for outcome in outcomes
            for label in labels
            if outcome in tokens and label in tokens
        ]
        if missing := [name for name in (*names, *pairs) if name not in tokens]:
            said.append(
                f"held out: no token is {', '.join(missing)}: no NLL of these; give a larger "
                "--evaluate-trajectories, or pack with a larger --hold-out"
            )
        steps, lost = self.left_out
        if steps:
            said.append(
                f"held out: {steps:,} steps with {lost:,} tokens are longer than a packed sequence "
                "and not measured"
            )
        return said

    def batches(self, *, rank: int = 0, world_size: int = 1) -> Iterator[HeldOutBatch]:
        """Yield one rank's batches, of at most `seq_len` tokens; each rank has as many."""
        tokens = np.array([len(sequence.ids) for sequence in self.sequences], np.int64)
        for turn in deal(tokens, world_size=world_size, size=1):
            chosen = turn[rank].tolist()
            yield self._batch(chosen[0]) if chosen else _nothing()

    def _batch(self, index: int) -> HeldOutBatch:
        sequence = self.sequences[index]
        lengths = sequence.run_lengths
        return HeldOutBatch(
            batch=assemble([sequence]),
            groups=torch.from_numpy(np.repeat(self.groups[index], lengths)),
            weights=torch.from_numpy(np.repeat(self.weights[index], lengths)),
        )


def evaluate(
    held_out: HeldOut,
    token_nll: Callable[[Batch], Tensor],
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Return mean NLLs in nats per token; all ranks call it, all get the same.

    `nll/all` is of every token that agents wrote in steps that fit, `nll/good` of good steps,
    `nll/unresolved` of unresolved trajectories, `nll/unresolved/harmful` of both; what no token
    belongs to is left out (`HeldOut.remarks` names it). `nll/weighted` is the training loss,
    sum(w nll) / sum(w), under the recipe's weights of steps, without those of parts and characters;
    it is left out where no weight is known.

    Args:
        held_out: what to look at.
        token_nll: returns the NLL of each target of a batch [L] (`WeightedModel.token_nll`).
        rank: of this process among those that share the batches.
        world_size: how many share them.
        device: where batches go.
    """
    groups = torch.zeros(len(_GROUPS), 2, dtype=torch.float64, device=device)
    weighted = torch.zeros(2, dtype=torch.float64, device=device)
    for each in held_out.batches(rank=rank, world_size=world_size):
        nll = token_nll(each.batch.to(device)).detach().to(torch.float64)
        group, weights = each.groups.to(device), each.weights.to(device)
        groups.index_add_(0, group, torch.stack([nll, torch.ones_like(nll)], dim=1))
        weighted += torch.stack([(weights * nll).sum(), weights.sum()])
    sums = torch.cat([groups.flatten(), weighted])
    if world_size > 1:
        dist.all_reduce(sums)
    table = sums.cpu().numpy()
    by_group, (total, weight) = table[:-2].reshape(-1, 2), table[-2:]
    means = {
        f"nll/{name}": float(by_group[chosen, 0].sum() / by_group[chosen, 1].sum())
        for name, chosen in _named(by_group[:, 1] > 0).items()
    }
    if held_out.weighted and weight > 0:
        means["nll/weighted"] = float(total / weight)
    return means


def _named(seen: "NDArray[np.bool_]") -> "dict[str, NDArray[np.bool_]]":
    """Return the groups that were seen, by their names: all, by label, by outcome, by both."""
    names = ["all", *_LABELS, *OUTCOMES.values(), *("/".join(group) for group in _GROUPS)]
    by_name = {
        name: np.array(
            [seen[i] and {*name.split("/")} <= {"all", *group} for i, group in enumerate(_GROUPS)]
        )
        for name in names
    }
    return {name: groups for name, groups in by_name.items() if groups.any()}


def _require_packed(source: Manifest, shards: Manifest) -> None:
    """Raise for tokens that are not those that the shards were packed from.

    Raises:
        ShardError: another tokenizer, another template or other trajectories.
    """
    made = source.data["tokenizer"]
    packed = {each["sha256"] for each in shards.data["inputs"] if each.get("stage") == "tokenize"}
    content = source.as_input()["sha256"]
    found = {
        "tokenizer": (made["tokenizer_hash"], shards.data["tokenizer_hash"]),
        "chat template": (made["template_hash"], shards.data["template_hash"]),
        "contents": (content, min(packed - {content}, default=content)),
    }
    for what, (theirs, expected) in found.items():
        if theirs != expected:
            raise ShardError(
                f"{source.path}: hash of the {what}: expected {expected[:12]}, as of the tokens "
                f"that {shards.path} was packed from, got {theirs[:12]}; give those tokens"
            )


def _annotator(labels: Path, shards: Manifest) -> str | None:
    """Return whose labels count: of a gold file by several, those that the shards are made by."""
    packed = {each.get("annotator") for each in shards.data["inputs"]} - {None}
    is_by_people = labels.is_file() and annotators_of(labels)
    return packed.pop() if packed and is_by_people else None


def _hash_of(name: str) -> bytes:
    """Return what trajectories are chosen by: the list has them by source, their ids, too."""
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"srft-evaluate").digest()


def _documents(
    columns: TokenColumns, names: list[str], config: PackConfig, tokens: Path
) -> Documents:
    """Return the documents of held-out trajectories, each step in one of them."""
    if missing := sorted({*names} - {*columns.names}):
        raise ShardError(
            f"{tokens}: no trajectory {missing[0]}, which the shards' list of what was held out "
            "names; restore that list, or run pack again"
        )
    chosen = _rows_of(columns, names)
    documents = cut_rows(
        np.flatnonzero(chosen & (columns.num_tokens > 0)),
        columns.num_tokens,
        (columns.span_offsets, columns.starts, columns.ends),
        seq_len=config.seq_len,
        overlong="windows",
    )
    if not len(documents.rows):
        raise ShardError(
            f"{tokens}: none of the {len(names)} held-out trajectories can be looked at: give a "
            "larger --evaluate-trajectories, or run pack with a larger --hold-out or --seq-len"
        )
    return documents


def _rows_of(columns: TokenColumns, names: list[str]) -> "NDArray[np.bool_]":
    """Return whether each token row is one of the named trajectories'."""
    wanted = set(names)
    named = np.array([name in wanted for name in columns.names], np.bool_)
    return named[columns.trajectories]


def _left_out(columns: TokenColumns, documents: Documents, names: list[str]) -> tuple[int, int]:
    """Return the number of steps that are in no document, and of their tokens."""
    lengths = columns.ends - columns.starts
    lost = _rows_of(columns, names)[columns.span_rows()] & (lengths > 0)
    lost &= documents.of_steps(len(lengths)) < 0
    return int(lost.sum()), int(lengths[lost].sum())


def _of_steps(
    columns: TokenColumns, judgements: Judgements | None, config: PackConfig
) -> "tuple[NDArray[np.int64], NDArray[np.float64]]":
    """Return the group and the weight of every step."""
    labels = np.full(len(columns.steps), len(LABELS), np.int64)
    if judgements is not None:
        labels[judgements.spans] = judgements.labels
    missing = "mask" if config.missing_label == "error" else config.missing_label
    weighed = weigh_steps(columns, judgements, replace(config, missing_label=missing), Counter())
    rows = columns.span_rows()
    groups = columns.outcomes[rows].astype(np.int64) * len(_LABELS) + labels
    return groups, np.where(weighed.rows[rows], weighed.weights, 0.0)


def _sequence(
    columns: TokenColumns,
    documents: Documents,
    members: "NDArray[np.int64]",
    ids: "dict[int, NDArray[np.int32]]",
) -> "tuple[PackedSequence, NDArray[np.int64]]":
    """Return documents as a packed sequence whose runs are steps, and those steps' places."""
    lengths = documents.lengths[members]
    bounds = offsets_of(lengths)[:-1]
    steps, starts, ends = [], [], []
    for document, bound in zip(members.tolist(), bounds.tolist(), strict=True):
        places = np.arange(documents.first_steps[document], documents.last_steps[document])
        start = documents.starts[document]
        # nothing predicts a document's first token
        first = np.maximum(columns.starts[places] - start, 1)
        end = columns.ends[places] - start
        there = first < end
        steps.append(places[there])
        starts.append(first[there] + bound)
        ends.append(end[there] + bound)
    run_starts = np.concatenate(starts)
    sequence = PackedSequence(
        ids=np.concatenate([ids[member] for member in members.tolist()]),
        lengths=lengths,
        run_starts=run_starts.astype(np.int32),
        run_lengths=(np.concatenate(ends) - run_starts).astype(np.int32),
        run_weights=np.ones(len(run_starts), np.float32),
        source="held-out sequence",
    )
    return sequence, np.concatenate(steps)


def _nothing() -> HeldOutBatch:
    empty = torch.empty(0, dtype=torch.float64)
    return HeldOutBatch(batch=filler(), groups=empty.long(), weights=empty)
