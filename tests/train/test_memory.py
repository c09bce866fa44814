"""Reckoned memory: parameters as they are counted on real models, sums that scale as they must."""

import pytest
import torch

from srft_prep.critic.flops import ModelShape, shape_of
from srft_prep.train.memory import lora_params, memory_items
from srft_prep.train.model import add_lora, causal_lm, tiny_model


def shape() -> ModelShape:
    found = shape_of(causal_lm(tiny_model(640).model).config.to_dict())
    assert isinstance(found, ModelShape)
    return found


def total(**settings: int) -> float:
    values = {"intermediate_size": 256, "num_ranks": 4, "seq_len": 4096}
    return sum(item.num_bytes for item in memory_items(shape(), **(values | settings)))


def test_sharded_state_is_sixteen_bytes_a_parameter() -> None:
    model = tiny_model(640)
    items = memory_items(shape(), intermediate_size=256, num_ranks=1, seq_len=1)
    counted = sum(weight.numel() for weight in model.parameters())
    assert sum(item.num_bytes for item in items[:2]) == 16 * counted


def test_adapters_are_counted_as_peft_makes_them() -> None:
    model = tiny_model(640)
    torch.manual_seed(0)
    add_lora(model, rank=8, alpha=16)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert lora_params(shape(), intermediate_size=256, rank=8) == trained


def test_ranks_sequence_parallelism_and_adapters_save_what_they_should() -> None:
    assert total(num_ranks=8) < total()
    assert total(sequence_parallel=4) < total()
    assert total(lora_params=1000) < total()
    assert total(seq_len=8192) > total()
    assert total(sequence_parallel=2) == pytest.approx(total(seq_len=2048))
