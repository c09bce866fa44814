"""Models load, keep their seeds, take adapters, and say what is wrong."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from srft_prep.errors import ConfigError
from srft_prep.train.model import (
    add_lora,
    causal_lm,
    checkpoint_activations,
    compile_layers,
    decoder_layers,
    head_of,
    load_model,
    random_model,
    tiny_model,
)
from tests.train.architectures import SUPPORTED, tiny_config
from tests.train.documents import batch_of, random_documents

VOCABULARY = 131
BATCH = batch_of([random_documents((9, 20, 5), vocab_size=VOCABULARY)])


def test_a_tiny_model_is_the_same_for_the_same_seed_and_leaves_the_random_state() -> None:
    state = torch.random.get_rng_state()
    first, second, third = (tiny_model(VOCABULARY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first(BATCH), second(BATCH))
    assert not torch.equal(first(BATCH), third(BATCH))


def test_a_saved_model_loads_with_the_same_loss(tmp_path: Path) -> None:
    model = tiny_model(VOCABULARY)
    causal_lm(model.model).save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(BATCH), model(BATCH))


def test_a_model_without_weights_takes_no_memory_and_has_the_same_parameters(
    tmp_path: Path,
) -> None:
    model = tiny_model(VOCABULARY)
    causal_lm(model.model).save_pretrained(tmp_path)
    empty = load_model(tmp_path, weights=False)
    shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in empty.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_folder_without_a_model_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a causal language model"):
        load_model(tmp_path)


def test_token_nll_weighted_adds_up_to_the_loss() -> None:
    model = tiny_model(VOCABULARY)
    nll = model.token_nll(BATCH)
    assert not nll.requires_grad
    torch.testing.assert_close((nll * BATCH.weights).sum(), model(BATCH))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_all_decoder_layers_are_found(name: str) -> None:
    layers = decoder_layers(random_model(tiny_config(name, SUPPORTED[name])))
    assert len(layers) == 2
    assert all("DecoderLayer" in type(layer).__name__ for layer in layers)


def test_checkpointing_computes_each_layer_twice_and_keeps_the_gradient() -> None:
    plain, model = tiny_model(VOCABULARY), tiny_model(VOCABULARY)
    checkpoint_activations(model)
    counts = [0, 0]
    for index, layer in enumerate(decoder_layers(model)):
        layer.mlp.register_forward_pre_hook(
            lambda *_, i=index: counts.__setitem__(i, counts[i] + 1)
        )
    for each in (plain, model):
        each(BATCH).backward()
    assert counts == [2, 2]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_checkpointed_layers_keep_the_names_of_their_parameters() -> None:
    plain, model = tiny_model(VOCABULARY), tiny_model(VOCABULARY)
    checkpoint_activations(model)
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own doings
def test_compiled_layers_give_the_same_gradients_for_rows_of_any_layout() -> None:
    plain, model = (tiny_model(VOCABULARY, num_layers=1) for _ in range(2))
    compile_layers(model)
    for seed, lengths in enumerate([(9, 20), (30, 4, 6), (17,)]):
        batch = batch_of([random_documents(lengths, vocab_size=VOCABULARY, seed=seed)])
        for each in (plain, model):
            each.zero_grad()
            each(batch).backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_adapters_train_alone_and_begin_as_nothing() -> None:
    plain, model = tiny_model(VOCABULARY), tiny_model(VOCABULARY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(model, rank=4, alpha=8)
        loss = model(BATCH)
        loss.backward()
    assert torch.equal(loss, plain(BATCH))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained


def test_an_output_layer_with_an_adapter_is_refused() -> None:
    model = tiny_model(VOCABULARY)
    model.model.lm_head = nn.Sequential(model.model.lm_head)
    with pytest.raises(ConfigError, match="expected a plain linear layer"):
        head_of(model.model)


def test_the_heads_scale_and_cap_are_read_from_the_configuration() -> None:
    cohere = random_model(tiny_config("cohere", {"logit_scale": 0.3}))
    granite = random_model(tiny_config("granite", {"logits_scaling": 4.0}))
    gemma = random_model(tiny_config("gemma2", {"final_logit_softcapping": 20.0}))
    assert head_of(cohere.model).scale == 0.3
    assert head_of(granite.model).scale == 0.25
    assert head_of(gemma.model).softcap == 20.0


def test_loading_changes_no_other_models_attention() -> None:
    tiny_model(VOCABULARY)
    other = AutoModelForCausalLM.from_config(tiny_config("qwen2", {}))
    assert other.config._attn_implementation == "sdpa"
