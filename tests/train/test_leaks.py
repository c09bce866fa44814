"""The self-test passes on models that keep documents apart, and catches those that do not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from srft_prep.errors import TrainError
from srft_prep.train.leaks import check_leaks
from srft_prep.train.model import (
    WeightedModel,
    add_lora,
    checkpoint_activations,
    compile_layers,
    random_model,
    tiny_model,
)
from srft_prep.train.parallel import shard_model, started
from srft_prep.train.ulysses import Stretch
from tests.train.architectures import tiny_config
from tests.train.documents import batch_of, random_documents
from tests.train.ranks import run_ranks

VOCABULARY = 131


class HandWritten(WeightedModel):
    """How loops call transformers that do not know of packing: only some arguments."""

    names: tuple[str, ...] = ()
    use_cache: bool | None = None

    def _call(self, module: nn.Module, part: Stretch) -> Any:
        given = {"input_ids": part.input_ids[None], "position_ids": part.position_ids[None]}
        chosen = {name: given[name] for name in ("input_ids", *self.names)}
        return module(**chosen, use_cache=self.use_cache)


def hand_written(*names: str, attention: str, use_cache: bool | None = None) -> WeightedModel:
    model = HandWritten(tiny_model(VOCABULARY).model)
    model.names, model.use_cache = names, use_cache
    model.model.set_attn_implementation(attention)
    return model


def test_packed_attention_leaks_exactly_nothing() -> None:
    report = check_leaks(tiny_model(VOCABULARY))
    assert report.leak == 0
    assert report.response > 1e-3
    assert report.packing < 1e-6
    assert report.head < 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("names", [(), ("position_ids",)], ids=["plain positions", "restarting"])
def test_transformers_own_attention_with_its_default_cache_is_caught(
    names: tuple[str, ...], attention: str
) -> None:
    """Positions that restart do not help: the default cache turns their detection off."""
    with pytest.raises(TrainError, match="a changed token moves tokens before it or of other"):
        check_leaks(hand_written(*names, attention=attention))


def test_transformers_own_packing_passes_where_it_is_right() -> None:
    model = hand_written("position_ids", attention="sdpa", use_cache=False)
    assert check_leaks(model).leak == 0


def leaky_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention over the whole row."""
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    return output.transpose(1, 2), None


def seeing_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any
) -> tuple[Tensor, None]:
    """Attention within each document, the future included."""
    lengths = list(others["layout"].lengths)
    parts = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    outputs = [nn.functional.scaled_dot_product_attention(*p, enable_gqa=True) for p in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def blind_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """Each token's own value, and nothing else."""
    repeats = query.shape[1] // value.shape[1]
    return value.repeat_interleave(repeats, dim=1).transpose(1, 2), None


@pytest.mark.parametrize(
    ("attention", "what"),
    [
        (leaky_attention, "moves tokens before it or of other documents"),
        (seeing_attention, "moves tokens before it or of other documents"),
        (blind_attention, "does not move the next one"),
    ],
)
def test_a_wrong_attention_is_caught(attention: Any, what: str) -> None:
    AttentionInterface.register(f"test_{attention.__name__}", attention)
    model = tiny_model(VOCABULARY)
    model.model.set_attn_implementation(f"test_{attention.__name__}")
    with pytest.raises(TrainError, match=what):
        check_leaks(model)


def test_positions_that_do_not_restart_are_caught_where_they_matter() -> None:
    """Rotary embeddings see differences only; gpt2's learned positions are absolute."""

    class Continuing(WeightedModel):
        def _call(self, module: nn.Module, part: Stretch) -> Any:
            part.position_ids.copy_(torch.arange(len(part.position_ids)))
            return super()._call(module, part)

    config = tiny_config("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "attn_pdrop": 0.0})
    right = random_model(config)
    check_leaks(right)
    with pytest.raises(TrainError, match="something depends on where it lies"):
        check_leaks(Continuing(right.model))


def test_logits_that_the_loss_does_not_know_of_are_caught() -> None:
    model = tiny_model(VOCABULARY)
    model.model.lm_head.register_forward_hook(lambda module, args, logits: 1.5 * logits)
    with pytest.raises(TrainError, match="the model does something to its logits"):
        check_leaks(model)


def test_the_self_test_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = tiny_model(VOCABULARY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    check_leaks(model)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def the_leaks_of_a_rank(way: str, sequence_parallel: int) -> tuple[float, float, float]:
    """Return the self-test's leak, the gradient's leak, and the difference from plain logits."""
    documents = random_documents((14, 33, 9, 5), vocab_size=VOCABULARY)
    row = batch_of([documents], trim=False)
    plain = tiny_model(VOCABULARY)
    with torch.no_grad():
        alone = [plain(batch_of([[each]], trim=False), "logits") for each in documents]
    with started(sequence_parallel=sequence_parallel) as world:
        model = tiny_model(VOCABULARY)
        if way == "lora":
            add_lora(model, rank=4, alpha=8)
        if way == "compiled":
            compile_layers(model)
        if way in ("checkpointed", "compiled"):
            checkpoint_activations(model)
        shard_model(model, world)
        report = check_leaks(model)
        with torch.no_grad():
            logits = model(row, "logits")
        leak = gradient_leak(model, documents) if sequence_parallel == 1 else 0.0
        return report.leak, leak, (logits - torch.cat(alone)).abs().max().item()


def gradient_leak(model: WeightedModel, documents: list[Any]) -> float:
    """Return the largest gradient of other documents' embeddings, through the backward pass."""
    batch = batch_of([documents], trim=False)
    first, end = 14, 14 + 33
    inside = (batch.positions >= first) & (batch.positions < end)
    chosen = replace(
        batch,
        positions=batch.positions[inside],
        targets=batch.targets[inside],
        weights=batch.weights[inside],
    )
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept.append(torch.zeros_like(output, requires_grad=True))
        return output + kept[0]

    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    handle = embedding.register_forward_hook(keep)
    model(chosen).backward()
    handle.remove()
    grad = kept[0].grad[0]
    assert grad[first:end].abs().sum() > 0
    return max(grad[:first].abs().max().item(), grad[end:].abs().max().item())


@pytest.mark.parametrize(
    ("way", "size", "sequence_parallel"),
    [
        ("plain", 2, 1),
        ("checkpointed", 2, 1),
        ("lora", 2, 1),
        ("plain", 2, 2),
        ("checkpointed", 4, 4),
        ("compiled", 1, 1),
    ],
)
def test_nothing_leaks_and_logits_are_those_of_separate_documents_on_every_path(
    way: str, size: int, sequence_parallel: int
) -> None:
    for leak, of_gradient, difference in run_ranks(
        size, the_leaks_of_a_rank, way, sequence_parallel
    ):
        assert leak == 0
        assert of_gradient == 0
        assert difference < 1e-6
