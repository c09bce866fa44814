"""The gradients of an optimiser step are the formula's, however it is split."""

from functools import cache
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from srft_prep.train.batches import Batch, filler
from srft_prep.train.model import WeightedModel, checkpoint_activations, tiny_model
from srft_prep.train.parallel import shard_model, started
from tests.train.documents import (
    Document,
    batch_of,
    largest_difference,
    random_documents,
    sum_weights,
    whole_difference,
)
from tests.train.plain_qwen2 import plain_gradients, plain_loss
from tests.train.ranks import run_ranks

VOCABULARY = 97
LENGTHS = (5, 13, 2, 21, 8, 30, 3, 11)
WITHOUT_LOSS = (2, 4)
"""Documents of LENGTHS without a weighted token."""

DIFFERENCES = {torch.float64: (largest_difference, 1e-12), torch.float32: (whole_difference, 1e-6)}
"""How exact: in float64 each parameter apart, in float32 all of them together (a key's bias has a
gradient that all but cancels, so that its own rounding is about 1e-6)."""

Split = list[list[list[list[int]]]]
"""Of each rank the micro-batches, of each the packs, of each the documents' numbers."""

SPLITS: dict[int, list[Split]] = {
    1: [[[[[0, 1, 2, 3, 4, 5, 6, 7]]]], [[[[n]] for n in range(8)]]],
    2: [
        [[[[0, 5], [3]], [[1]]], [[[2, 4]], [[7, 6]]]],
        [[[[0, 1, 3, 5, 6, 7]]], [[[2, 4]]]],  # the second rank has no loss at all
        [[[[5, 1, 0]], [[3, 7], [6, 2, 4]]], [[], []]],  # and no document at all
    ],
    4: [
        [[[[0, 1]]], [[[3, 2]]], [[[5]]], [[[4, 6], [7]]]],
        [[[[0, 1, 3, 5, 7]]], [[[2]]], [[[6]]], [[[4]]]],
    ],
}


def loose_model(*, dtype: torch.dtype = torch.float64, tied: bool = False) -> WeightedModel:
    """Return a small Qwen2 with distinct heads and rows of three logits at a time.

    transformers' norms compute in float32 whatever they are given; torch's do not.
    """
    model = tiny_model(VOCABULARY, hidden_size=32, chunk=3, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if dtype == torch.float64:
        for name, module in list(model.named_modules()):
            if isinstance(module, Qwen2RMSNorm):
                norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
                norm.weight = module.weight
                model.set_submodule(name, norm)
    return model.to(dtype)


@cache
def the_documents() -> list[Document]:
    return random_documents(LENGTHS, vocab_size=VOCABULARY, empty=WITHOUT_LOSS)


@cache
def expected_gradients(*, tied: bool = False) -> dict[str, Tensor]:
    model = loose_model(tied=tied).model
    return plain_gradients(model.state_dict(), model.config, the_documents())


def step(
    model: WeightedModel, batches: list[Batch], total: float
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss's sum over the batches and the gradients of the loop's arithmetic."""
    loss = 0.0
    for batch in batches:
        part = model(batch)
        (part / total).backward()
        loss += part.item()
    gradients = {}
    for name, parameter in model.model.named_parameters():
        grad = parameter.grad
        gradients[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    model.zero_grad()
    return loss, gradients


def batches_of(split: list[list[list[int]]]) -> list[Batch]:
    documents = the_documents()
    packs = [[[documents[n] for n in pack] for pack in packs] for packs in split]
    return [batch_of(pack) if pack else filler() for pack in packs]


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_one_process_are_the_formulas(tied: bool) -> None:
    model, total = loose_model(tied=tied), sum_weights(the_documents())
    for split in SPLITS[1]:
        _, gradients = step(model, batches_of(split[0]), total)
        assert largest_difference(gradients, expected_gradients(tied=tied)) < 1e-12


def test_gradients_in_float32_are_the_formulas_to_1e_6() -> None:
    model, expected = loose_model(dtype=torch.float32), expected_gradients()
    _, gradients = step(model, batches_of(SPLITS[1][0][0]), sum_weights(the_documents()))
    difference, limit = DIFFERENCES[torch.float32]
    assert difference(gradients, expected) < limit


def test_gradients_are_the_same_with_activation_checkpointing_bit_for_bit() -> None:
    plain, checkpointed = loose_model(), loose_model()
    checkpoint_activations(checkpointed)
    batches, total = batches_of(SPLITS[1][0][0]), sum_weights(the_documents())
    _, expected = step(plain, batches, total)
    _, found = step(checkpointed, batches, total)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@settings(max_examples=25)
@given(st.data())
def test_gradients_do_not_depend_on_packs_micro_batches_or_trim(data: st.DataObject) -> None:
    numbers = data.draw(st.permutations(range(len(LENGTHS))))
    packs = cut(data, numbers)
    micro_batches = cut(data, packs)
    trim = data.draw(st.booleans())
    documents = the_documents()
    batches = [
        batch_of([[documents[n] for n in pack] for pack in packs], trim=trim)
        for packs in micro_batches
    ]
    _, gradients = step(shared_model(), batches, sum_weights(documents))
    assert largest_difference(gradients, expected_gradients()) < 1e-12


@cache
def shared_model() -> WeightedModel:
    return loose_model()


def cut(data: st.DataObject, items: list) -> list[list]:
    """Draw where a list is cut into lists that are not empty."""
    inner = st.sets(st.integers(1, len(items) - 1)) if len(items) > 1 else st.just(set())
    bounds = [0, *sorted(data.draw(inner)), len(items)]
    return [items[a:b] for a, b in pairwise(bounds)]


def steps_of_ranks(
    splits: list[Split], sequence_parallel: int, checkpointed: bool, dtype: torch.dtype
) -> list[tuple[float, dict[str, Tensor]]]:
    """Return this rank's loss and the whole gradients of each split."""
    with started(sequence_parallel=sequence_parallel) as world:
        model = loose_model(dtype=dtype)
        if checkpointed:
            checkpoint_activations(model)
        shard_model(model, world, param_dtype=dtype)
        total = sum_weights(the_documents())
        return [step(model, batches_of(split[world.data_rank]), total) for split in splits]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("size", "sequence_parallel", "checkpointed"),
    [(1, 1, False), (2, 1, True), (4, 1, False), (2, 2, False), (4, 2, True), (4, 4, False)],
)
def test_gradients_of_ranks_are_the_formulas(
    size: int, sequence_parallel: int, checkpointed: bool, dtype: torch.dtype
) -> None:
    """Ranks with own rows, ranks that share rows, and both; some of them without loss."""
    difference, limit = DIFFERENCES[dtype]
    splits = SPLITS[size // sequence_parallel]
    ranks = run_ranks(size, steps_of_ranks, splits, sequence_parallel, checkpointed, dtype)
    for number in range(len(splits)):
        losses = [steps[number][0] for steps in ranks]
        assert sum(losses) == pytest.approx(expected_loss(), rel=limit)
        for steps in ranks:
            assert difference(steps[number][1], expected_gradients()) < limit


@cache
def expected_loss() -> float:
    model, documents = loose_model().model, the_documents()
    mean = plain_loss(model.state_dict(), model.config, documents)
    return mean.item() * sum_weights(documents)
