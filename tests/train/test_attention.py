"""Packed attention equals attention on each document alone, for every kind of model."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from srft_prep.errors import ConfigError, TrainError
from srft_prep.train import attention
from srft_prep.train.attention import Layout, no_mask, packed_attention
from srft_prep.train.leaks import check_leaks
from srft_prep.train.model import WeightedModel, random_model
from tests.train.architectures import CAUGHT, REFUSED, SUPPORTED, tiny_config
from tests.train.documents import batch_of, random_documents

LENGTHS = (7, 1, 23, 40, 2)
LAYER = nn.Identity()


def layout_of(lengths: tuple[int, ...]) -> Layout:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Layout(lengths=lengths, cu_seqlens=bounds, longest=max(lengths))


def random_parts(*, size: int = 8, value_size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries of 4 heads, keys and values of 2, in float64, with gradients."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(
            1, heads, sum(LENGTHS), width, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for heads, width in ((4, size), (2, size), (2, value_size))
    )


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return attention as its formula says, one query of one document at a time."""
    outputs = []
    first = 0
    for length in LENGTHS:
        for index in range(first, first + length):
            start = first if window is None else max(first, index - window + 1)
            rows = []
            for head in range(query.shape[1]):
                theirs = head // (query.shape[1] // key.shape[1])
                scores = key[0, theirs, start : index + 1] @ query[0, head, index]
                scores = scores / query.shape[-1] ** 0.5
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                parts = scores.exp()
                total = parts.sum() + (0 if sinks is None else sinks[head].exp())
                rows.append(parts / total @ value[0, theirs, start : index + 1])
            outputs.append(torch.stack(rows))
        first += length
    return torch.stack(outputs)[None]


@pytest.mark.parametrize("band", [3, 512])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": 5},
        {"window": 30},
        {"softcap": 2.0},
        {"sinks": torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)},
        {"window": 6, "softcap": 1.5, "sinks": torch.zeros(4, dtype=torch.float64)},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_output_and_gradients_are_the_formulas(
    settings: dict[str, Any], band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands of three queries cut documents; those of 512 do not."""
    monkeypatch.setattr(attention, "BAND_TOKENS", band)
    parts = random_parts(value_size=8 if not settings else 6)
    names = {"window": "sliding_window", "softcap": "softcap", "sinks": "s_aux"}
    given = {names[name]: value for name, value in settings.items()}
    output, _ = packed_attention(LAYER, *parts, None, layout=layout_of(LENGTHS), **given)
    expected = plain_attention(*parts, **settings)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).double()
    found = torch.autograd.grad((output * weights).sum(), parts)
    wanted = torch.autograd.grad((expected * weights).sum(), parts)
    for grad, value in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("argument", [{"softcap": 2.0}, {"s_aux": torch.zeros(4)}], ids=str)
def test_no_scores_are_kept_for_the_backward_pass(
    argument: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BAND_TOKENS", 8)
    length = 64
    parts = [torch.randn(1, heads, length, 4, requires_grad=True) for heads in (4, 2, 2)]
    sizes = {}

    def noted(kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()  # of queries, keys and values, whose stretches are kept
        sizes[storage.data_ptr()] = storage.nbytes()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda kept: kept):
        output, _ = packed_attention(LAYER, *parts, None, layout=layout_of((length,)), **argument)
    inputs = sum(part.untyped_storage().nbytes() for part in parts)
    assert inputs <= sum(sizes.values()) <= inputs + 4 * 4  # and the sinks
    assert all(grad.any() for grad in torch.autograd.grad(output.square().sum(), parts))


def test_a_documents_output_has_no_gradient_in_another() -> None:
    parts = random_parts()
    output, _ = packed_attention(LAYER, *parts, None, layout=layout_of(LENGTHS))
    first, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    for grad in torch.autograd.grad(output[:, first:end].square().sum(), parts):
        assert grad[:, :, first:end].abs().sum() > 0
        assert not grad[:, :, :first].any()
        assert not grad[:, :, end:].any()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"layout": None}, "does not hand `layout`"),
        ({"attention_mask": torch.ones(1, 1, 73, 73)}, "a mask of its own|attention mask of its"),
        ({"dropout": 0.1}, "attention dropout 0.1"),
        ({"is_causal": False}, "not causal"),
        ({"position_bias": torch.ones(1)}, "position_bias"),
    ],
)
def test_what_packed_attention_would_get_wrong_is_refused(
    arguments: dict[str, Any], what: str
) -> None:
    given = {"attention_mask": None, "layout": layout_of(LENGTHS)} | arguments
    with pytest.raises(TrainError, match=what):
        packed_attention(LAYER, *random_parts(), **given)


def test_several_rows_are_refused() -> None:
    parts = [part.expand(2, -1, -1, -1) for part in random_parts()]
    with pytest.raises(TrainError, match="2 rows"):
        packed_attention(LAYER, *parts, None, layout=layout_of(LENGTHS))


@pytest.mark.parametrize("arguments", [{"attention_mask": torch.ones(1, 3)}, {"use_vmap": True}])
def test_a_mask_beyond_causality_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match="a mask beyond causal attention"):
        no_mask(**arguments)
    assert no_mask() is None


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (
            {"config": SimpleNamespace(layer_types=["sliding_attention"]), "layer_idx": 0},
            "a sliding window",
        ),
        ({"config": SimpleNamespace(attn_logit_softcapping=5.0)}, "a score cap"),
        ({"sinks": torch.zeros(4)}, "sinks"),
    ],
)
def test_a_layer_that_keeps_what_it_does_to_itself_is_refused(
    module: dict[str, Any], what: str
) -> None:
    with pytest.raises(TrainError, match=what):
        packed_attention(
            SimpleNamespace(**module), *random_parts(), None, layout=layout_of(LENGTHS)
        )


@pytest.mark.parametrize("name", list(SUPPORTED))
def test_architectures_give_what_their_own_attention_gives_on_each_document(name: str) -> None:
    """Documents longer than the sliding windows, in a row, against eager attention alone."""
    model = distinct(random_model(tiny_config(name, SUPPORTED[name])))
    check_leaks(model)
    own = AutoModelForCausalLM.from_config(
        tiny_config(name, SUPPORTED[name]), dtype=torch.float32, attn_implementation="eager"
    )
    own.load_state_dict(model.model.state_dict())
    documents = random_documents((13, 20, 7), vocab_size=131)
    with torch.no_grad():
        row = model.eval()(batch_of([documents], trim=False), "logits")
        alone = [
            own.eval()(torch.tensor([document.ids]), use_cache=False).logits[0]
            for document in documents
        ]
    assert relative_difference(row, torch.cat(alone)) < 1e-6


def distinct(model: WeightedModel) -> WeightedModel:
    """Make weights larger: with a fresh model's, attention hardly shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.1 * noise
    return model


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", list(REFUSED))
def test_architectures_that_would_be_trained_wrongly_are_refused(name: str) -> None:
    settings, what = REFUSED[name]
    with pytest.raises(ConfigError, match=what):
        random_model(tiny_config(name, settings))


@pytest.mark.parametrize("name", list(CAUGHT))
def test_architectures_that_cannot_be_packed_are_caught_by_the_self_test(name: str) -> None:
    settings, what = CAUGHT[name]
    model = distinct(random_model(tiny_config(name, settings)))
    with pytest.raises(TrainError, match=what):
        check_leaks(model)


def test_no_warning_comes_from_a_row_of_many_documents() -> None:
    model = random_model(tiny_config("qwen2", {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch_of([random_documents((9, 5), vocab_size=131)])).backward()
