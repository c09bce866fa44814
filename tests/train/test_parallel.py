"""Processes that train together hold one model, sum their gradients, and know their rows."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from srft_prep.errors import ConfigError, TrainError
from srft_prep.train.hf_export import export_model
from srft_prep.train.leaks import check_leaks
from srft_prep.train.model import add_lora, causal_lm, load_model, tiny_model
from srft_prep.train.parallel import require_heads, shard_model, started
from srft_prep.train.ulysses import split, whole
from tests.train.documents import batch_of, random_documents
from tests.train.ranks import run_ranks

VOCABULARY = 131
ROW = random_documents((14, 33, 9, 5), vocab_size=VOCABULARY)


def place_of_a_rank(sequence_parallel: int) -> tuple[int, int, int, int]:
    with started(sequence_parallel=sequence_parallel) as world:
        return world.rank, world.world_size, world.data_rank, world.data_size


def test_ranks_that_share_rows_are_neighbours() -> None:
    assert run_ranks(4, place_of_a_rank, 2) == [
        (0, 4, 0, 2),
        (1, 4, 0, 2),
        (2, 4, 1, 2),
        (3, 4, 1, 2),
    ]


def test_one_process_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with started() as world:
        assert (world.rank, world.world_size, world.data_rank, world.data_size) == (0, 1, 0, 1)
        model = shard_model(tiny_model(VOCABULARY), world)
        expected = tiny_model(VOCABULARY)
        assert torch.equal(model(batch_of([ROW])), expected(batch_of([ROW])))
    assert not torch.distributed.is_initialized()


def test_a_degree_that_does_not_divide_the_processes_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match="--sequence-parallel 2: expected a divisor of the 1"),
        started(sequence_parallel=2),
    ):
        pass


def weights_of_a_rank(path: Path) -> tuple[dict[str, torch.Tensor], float, bool]:
    """Return all weights on a rank that read none, their NLL, and if they are shards after it."""
    with started() as world:
        model = shard_model(load_model(path, weights=world.rank == 0), world)
        with torch.no_grad():
            nll = model(batch_of([ROW])).item()
        sharded = all(isinstance(p, DTensor) for p in model.parameters())
        weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        return weights, nll, sharded


def test_every_rank_gets_a_shard_of_the_first_ranks_weights(tmp_path: Path) -> None:
    model = tiny_model(VOCABULARY, seed=5, tie_word_embeddings=True)
    causal_lm(model.model).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(batch_of([ROW])).item()
    for weights, nll, sharded in run_ranks(2, weights_of_a_rank, tmp_path):
        assert sharded
        assert nll == pytest.approx(expected, rel=1e-6)
        for name, parameter in model.named_parameters():
            assert torch.equal(weights[name], parameter)


def values_of_a_rank() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with started(sequence_parallel=2) as world, torch.no_grad():
        model = shard_model(tiny_model(VOCABULARY), world)
        row = batch_of([ROW], trim=False)
        return model.token_nll(row), model(row, "hidden"), model(row, "logits")


def test_ranks_that_share_a_row_all_have_all_of_its_values() -> None:
    """61 tokens on two ranks: the row is padded, and the padding is in no result."""
    row, model = batch_of([ROW], trim=False), tiny_model(VOCABULARY)
    assert row.num_tokens % 2
    with torch.no_grad():
        expected = model.token_nll(row), model(row, "hidden"), model(row, "logits")
    for values in run_ranks(2, values_of_a_rank):
        for value, wanted in zip(values, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


def parts_of_a_rank() -> tuple[list[int], list[int], torch.Tensor]:
    with started(sequence_parallel=4) as world:
        row = batch_of([ROW], trim=False)
        part = split(row, world.sequence_group)
        ids = whole(part.input_ids, part.first, row.num_tokens, world.sequence_group)
        assert sum(part.lengths) == 4 * len(part.input_ids)
        return (part.positions + part.first).tolist(), part.targets.tolist(), ids


def test_no_target_is_lost_or_doubled_where_a_row_is_cut() -> None:
    row, parts = batch_of([ROW], trim=False), run_ranks(4, parts_of_a_rank)
    assert [place for part in parts for place in part[0]] == row.positions.tolist()
    assert [target for part in parts for target in part[1]] == row.targets.tolist()
    assert all(torch.equal(part[2], row.input_ids) for part in parts)


@pytest.mark.parametrize(
    ("size", "query_heads", "key_heads", "what"),
    [
        (3, 4, 2, "4 query heads, expected a multiple of 3"),
        (4, 2, 2, "2 query heads, expected a multiple of 4"),
        (6, 12, 4, "4 key heads, expected a multiple or a divisor of 6"),
    ],
)
def test_a_degree_that_does_not_fit_the_heads_is_refused(
    size: int, query_heads: int, key_heads: int, what: str
) -> None:
    model = tiny_model(
        VOCABULARY, hidden_size=48, num_heads=query_heads, num_key_value_heads=key_heads
    )
    with pytest.raises(ConfigError, match=f"--sequence-parallel {size}: .*{what}; choose"):
        require_heads(causal_lm(model.model).config, size)


def refusals_of_a_rank() -> tuple[str, str]:
    """Return what is said of two heads for four ranks, before and, unheeded, in attention."""
    with started(sequence_parallel=4) as world:
        model = tiny_model(VOCABULARY, num_heads=2)
        with pytest.raises(ConfigError) as before:
            shard_model(model, world)
        model.group = world.sequence_group
        with pytest.raises(TrainError) as within:
            model(batch_of([ROW]))
        return str(before.value), str(within.value)


def test_more_ranks_than_query_heads_are_refused_and_nothing_is_repeated() -> None:
    for messages in run_ranks(4, refusals_of_a_rank):
        for message in messages:
            assert "over 4 ranks: the model has 2 query heads" in message


def loss_of_a_rank() -> float:
    with started(sequence_parallel=4) as world:
        model = shard_model(tiny_model(VOCABULARY, num_key_value_heads=1), world)
        return model(batch_of([ROW])).item()


def test_fewer_key_heads_than_ranks_are_repeated() -> None:
    expected = tiny_model(VOCABULARY, num_key_value_heads=1)(batch_of([ROW])).item()
    assert sum(run_ranks(4, loss_of_a_rank)) == pytest.approx(expected, rel=1e-6)


def tied_of_a_rank(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of a model whose head is its embedding, and export it."""
    with started() as world:
        model = shard_model(tiny_model(VOCABULARY, tie_word_embeddings=True), world)
        loss = model(batch_of([[ROW[:2], ROW[2:]][world.rank]]))
        loss.backward()
        gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        export_model(model, folder, dtype=torch.float32, tokenizer=None)
        return loss.item(), gradients


def test_a_tied_embedding_is_one_weight_when_it_is_sharded_too(tmp_path: Path) -> None:
    """Its gradient has both parts, and what is exported is tied again."""
    model = tiny_model(VOCABULARY, tie_word_embeddings=True)
    loss = model(batch_of([ROW]))
    loss.backward()
    ranks = run_ranks(2, tied_of_a_rank, tmp_path)
    assert sum(part for part, _ in ranks) == pytest.approx(loss.item(), rel=1e-6)
    names = {name for name, _ in model.named_parameters()}
    assert "model.lm_head.weight" not in names
    for _, gradients in ranks:
        assert gradients.keys() == names
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
    exported = causal_lm(load_model(tmp_path / "model").model)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    own = causal_lm(model.model).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in exported.state_dict().items())


def bfloat16_of_a_rank() -> tuple[float, set[torch.dtype], float]:
    with started() as world:
        model = shard_model(tiny_model(VOCABULARY), world, param_dtype=torch.bfloat16)
        check_leaks(model)
        loss = model(batch_of([ROW]))
        loss.backward()
        kinds = {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()}
        return loss.item(), kinds, model(batch_of([ROW]), "hidden").element_size()


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32() -> None:
    expected = tiny_model(VOCABULARY)(batch_of([ROW])).item()
    for loss, kinds, size in run_ranks(2, bfloat16_of_a_rank):
        assert loss == pytest.approx(expected, rel=1e-2)
        assert kinds == {torch.float32}
        assert size == 2


def adapters_of_a_rank() -> dict[str, torch.Tensor]:
    with started() as world:
        model = tiny_model(VOCABULARY)
        torch.manual_seed(world.rank)  # adapters are drawn anew; the first rank's count
        add_lora(model, rank=4, alpha=8)
        shard_model(model, world)
        row = [ROW[:2], ROW[2:]][world.rank]
        model(batch_of([row])).backward()
        return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}


def test_adapters_gradients_are_summed_over_ranks() -> None:
    model = tiny_model(VOCABULARY)
    torch.manual_seed(0)
    add_lora(model, rank=4, alpha=8)
    model(batch_of([ROW])).backward()
    for gradients in run_ranks(2, adapters_of_a_rank):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
