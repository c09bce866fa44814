"""Random documents with weights, and how they become packed sequences and batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from srft_prep.train.batches import Batch, PackedSequence, assemble


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """Token ids, and a weight for each: that of the first is 0."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def random_documents(
    lengths: Sequence[int], *, vocab_size: int, seed: int = 0, empty: Sequence[int] = ()
) -> list[Document]:
    """Return documents in which about half of the tokens carry weight, and none in `empty`."""
    rng = np.random.default_rng(seed)
    documents = []
    for index, length in enumerate(lengths):
        weights = rng.choice([0.0, 0.25, 1.0, 1.7], size=length, p=[0.5, 0.2, 0.2, 0.1])
        weights = weights.astype(np.float32)
        weights[0] = 0
        if index in empty:
            weights[:] = 0
        ids = rng.integers(vocab_size, size=length)
        documents.append(Document(ids=tuple(ids.tolist()), weights=tuple(weights.tolist())))
    return documents


def packed(documents: Sequence[Document]) -> PackedSequence:
    """Return documents as one packed sequence, with a run for each weighted token."""
    ids = [token for document in documents for token in document.ids]
    weights = np.array([w for document in documents for w in document.weights], np.float32)
    starts = np.flatnonzero(weights)
    return PackedSequence(
        ids=np.array(ids, np.int32),
        lengths=np.array([len(document.ids) for document in documents], np.int32),
        run_starts=starts.astype(np.int32),
        run_lengths=np.ones(len(starts), np.int32),
        run_weights=weights[starts],
    )


def batch_of(packs: Sequence[Sequence[Document]], *, trim: bool = True) -> Batch:
    """Return packs of documents as one micro-batch."""
    return assemble([packed(pack) for pack in packs], trim=trim)


def sum_weights(documents: Sequence[Document]) -> float:
    return sum(sum(document.weights) for document in documents)


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of a parameter's gradient, relative to its norm."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name].double() - value).norm() / value.norm().clamp_min(1e-12)).item()
        for name, value in expected.items()
    )


def whole_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of the difference of all gradients, relative to their norm."""
    assert found.keys() == expected.keys()
    squares = sum((found[name].double() - value).square().sum() for name, value in expected.items())
    total = sum(value.square().sum() for value in expected.values())
    return (squares / total).sqrt().item()
