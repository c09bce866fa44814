"""Packed sequences -> batches: the shift, the trim, positions that restart."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.errors import ShardError
from srft_prep.train.batches import Batch, PackedSequence, assemble, filler

Document = tuple[tuple[int, float], ...]
"""(id, weight) of each token."""

WEIGHTS = st.sampled_from([0.0, 0.0, 0.0, 0.25, 1.0])
DOCUMENTS = st.lists(st.tuples(st.integers(0, 99), WEIGHTS), min_size=1, max_size=8).map(
    lambda tokens: ((tokens[0][0], 0.0), *tokens[1:])
)
SEQUENCES = st.lists(st.lists(DOCUMENTS, min_size=1, max_size=4), max_size=4)


def sequence_of(documents: Sequence[Document], source: str = "a.parquet: row 3") -> PackedSequence:
    """Return documents as they would be stored: neighbours of one weight are one run."""
    tokens = [token for document in documents for token in document]
    bounds = {0, *accumulate(map(len, documents))}
    runs: list[list[float]] = []
    for index, (_, weight) in enumerate(tokens):
        if not weight:
            continue
        joins = runs and sum(runs[-1][:2]) == index and runs[-1][2] == weight
        if joins and index not in bounds:
            runs[-1][1] += 1
        else:
            runs.append([index, 1, weight])
    starts, lengths, weights = zip(*runs, strict=True) if runs else ((), (), ())
    return PackedSequence(
        ids=np.array([token for token, _ in tokens], np.int32),
        lengths=np.array([len(document) for document in documents], np.int32),
        run_starts=np.array(starts, np.int32),
        run_lengths=np.array(lengths, np.int32),
        run_weights=np.array(weights, np.float32),
        source=source,
    )


def terms_of(batch: Batch) -> list[tuple[tuple[int, ...], int, float]]:
    """Return the loss's terms: (the ids that the model sees, the target, its weight)."""
    ids, bounds = batch.input_ids.tolist(), batch.cu_seqlens.tolist()
    terms = []
    for position, target, weight in zip(
        batch.positions.tolist(), batch.targets.tolist(), batch.weights.tolist(), strict=True
    ):
        start = max(bound for bound in bounds if bound <= position)
        terms.append((tuple(ids[start : position + 1]), target, weight))
    return terms


def terms_expected(documents: Sequence[Document]) -> list[tuple[tuple[int, ...], int, float]]:
    """The paper's sum, in plain Python: log p(token | all before it in its document) x weight."""
    return [
        (tuple(token for token, _ in document[:index]), document[index][0], document[index][1])
        for document in documents
        for index in range(len(document))
        if document[index][1] > 0
    ]


@given(SEQUENCES, st.booleans())
def test_the_terms_of_the_loss_are_those_of_the_documents(
    sequences: list[list[Document]], trim: bool
) -> None:
    batch = assemble([sequence_of(documents) for documents in sequences], trim=trim)
    assert terms_of(batch) == terms_expected([each for each_of in sequences for each in each_of])


@given(SEQUENCES, st.booleans())
def test_a_batch_is_consistent(sequences: list[list[Document]], trim: bool) -> None:
    batch = assemble([sequence_of(documents) for documents in sequences], trim=trim)
    assert torch.equal(batch.targets, batch.input_ids[batch.positions + 1])
    assert (batch.positions.diff() > 0).all()
    assert batch.cu_seqlens.tolist() == [0, *accumulate(batch.lengths)]
    assert batch.cu_seqlens[-1] == batch.num_tokens
    assert batch.position_ids.tolist() == [i for length in batch.lengths for i in range(length)]
    assert batch.sum_weights == sum(batch.weights.tolist())
    assert batch.num_loss_tokens == len(batch.weights)
    kinds = (torch.int64, torch.int64, torch.int32, torch.int64, torch.int64, torch.float32)
    assert kinds == (
        *(batch.input_ids.dtype, batch.position_ids.dtype, batch.cu_seqlens.dtype),
        *(batch.positions.dtype, batch.targets.dtype, batch.weights.dtype),
    )


@given(SEQUENCES)
def test_the_trim_ends_every_document_at_its_last_weighted_token_and_counts_what_it_drops(
    sequences: list[list[Document]],
) -> None:
    documents = [each for each_of in sequences for each in each_of]
    ends = [
        max((index + 1 for index, (_, weight) in enumerate(document) if weight), default=0)
        for document in documents
    ]
    batch = assemble([sequence_of(documents) for documents in sequences])
    stored = sum(map(len, documents))
    assert batch.num_trimmed == stored - sum(ends)
    if any(ends):
        assert batch.lengths == tuple(filter(None, ends))
        kept = [t for doc, end in zip(documents, ends, strict=True) for t, _ in doc[:end]]
        assert batch.input_ids.tolist() == kept
    else:
        assert batch.lengths == filler().lengths


@given(SEQUENCES)
def test_without_the_trim_every_token_is_there(sequences: list[list[Document]]) -> None:
    batch = assemble([sequence_of(documents) for documents in sequences], trim=False)
    ids = [token for documents in sequences for document in documents for token, _ in document]
    if ids:
        assert batch.input_ids.tolist() == ids
        assert batch.num_trimmed == 0
        assert batch.lengths == tuple(len(each) for each_of in sequences for each in each_of)


def test_nothing_to_train_makes_a_batch_that_a_model_can_run() -> None:
    for batch in (assemble([]), assemble([sequence_of([((7, 0.0), (8, 0.0))])]), filler()):
        assert batch.num_loss_tokens == 0
        assert batch.sum_weights == 0
        assert batch.num_tokens == sum(batch.lengths) > 0


def test_a_weighted_first_token_is_refused_with_its_place() -> None:
    for index, at in ((0, 0), (1, 3)):
        documents = [[(1, 0.0), (2, 1.0), (3, 0.0)], [(4, 0.0), (5, 1.0)]]
        documents[index][0] = (9, 1.0)
        with pytest.raises(ShardError, match=rf"a\.parquet: row 3: token {at} is the first"):
            assemble([sequence_of([tuple(document) for document in documents])])


def test_a_run_across_documents_is_refused() -> None:
    sound = sequence_of([((1, 0.0), (2, 1.0)), ((3, 0.0), (4, 1.0))])
    across = replace(
        sound,
        run_starts=np.array([1], np.int32),
        run_lengths=np.array([3], np.int32),
        run_weights=np.ones(1, np.float32),
    )
    with pytest.raises(ShardError, match="token 2 is the first of its document"):
        assemble([across])


@pytest.mark.parametrize(
    "damage",
    [
        {"lengths": np.array([2, 3], np.int32)},
        {"lengths": np.array([4, 0], np.int32)},
        {"run_starts": np.array([3, 1], np.int32)},
        {"run_starts": np.array([1, 1], np.int32)},
        {"run_starts": np.array([1, 4], np.int32)},
        {"run_starts": np.array([-1, 3], np.int32)},
        {"run_lengths": np.array([0, 1], np.int32)},
        {"run_weights": np.array([1, np.nan], np.float32)},
        {"run_weights": np.array([1, np.inf], np.float32)},
        {"run_weights": np.array([-1, 1], np.float32)},
    ],
    ids=str,
)
def test_lengths_and_runs_that_do_not_fit_the_tokens_are_refused(
    damage: dict[str, np.ndarray],
) -> None:
    sound = sequence_of([((1, 0.0), (2, 1.0)), ((3, 0.0), (4, 1.0))])
    assemble([sound])
    with pytest.raises(ShardError, match=r"a\.parquet: row 3: .* run pack again"):
        assemble([replace(sound, **damage)])


def test_moving_a_batch_moves_all_its_tensors() -> None:
    batch = assemble([sequence_of([((1, 0.0), (2, 1.0))])])
    moved = batch.to("meta")
    tensors = [
        *(moved.input_ids, moved.position_ids, moved.cu_seqlens),
        *(moved.positions, moved.targets, moved.weights),
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.lengths, moved.num_trimmed) == (batch.lengths, batch.num_trimmed)


def test_documents_do_not_reach_into_each_other() -> None:
    batch = assemble([sequence_of([((1, 0.0), (2, 1.0)), ((3, 0.0), (4, 1.0))])] * 2)
    bounds = batch.cu_seqlens.tolist()
    assert [end - start for start, end in pairwise(bounds)] == [2, 2, 2, 2]
    assert not {*batch.positions.tolist()} & {bound - 1 for bound in bounds}
