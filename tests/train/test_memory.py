"""Reckoned memory: parameters as they are counted on real models, sums that scale as they must."""

import pytest
import torch

from srft_prep.critic.flops import ModelShape, shape_of
from srft_prep.train.memory import Item, lora_params, memory_items
from srft_prep.train.model import add_lora, causal_lm, tiny_model


def shape() -> ModelShape:
    found = shape_of(causal_lm(tiny_model(640).model).config.to_dict())
    assert isinstance(found, ModelShape)
    return found


def total(**settings: int) -> float:
    values = {"intermediate_size": 256, "num_ranks": 4, "seq_len": 4096}
    return sum(item.num_bytes for item in memory_items(shape(), **(values | settings)))


QWEN = {
    "0.5b": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5b": (1536, 28, 12, 2, 8960, 151_936, True),
    "7b": (3584, 28, 28, 4, 18_944, 152_064, False),
}
"""Hidden size, layers, heads, heads of keys, MLP, vocabulary, whether the head is tied."""


def reckoned(name: str, *, lora_rank: int = 0, micro_batches: int = 1) -> list[Item]:
    hidden, layers, heads, kv_heads, width, vocabulary, tied = QWEN[name]
    config = {"model_type": "qwen2", "hidden_size": hidden, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config |= {"intermediate_size": width, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    found = shape_of(config)
    assert isinstance(found, ModelShape)
    adapters = lora_params(found, intermediate_size=width, rank=lora_rank) if lora_rank else 0
    return memory_items(
        found,
        intermediate_size=width,
        num_ranks=1,
        seq_len=32_768,
        micro_batches=micro_batches,
        lora_params=adapters,
    )


@pytest.mark.parametrize(
    ("name", "settings", "moments", "measured_gb"),
    [
        ("0.5b", {}, True, 10.8),
        ("1.5b", {}, True, 29.9),
        ("1.5b", {"micro_batches": 2}, True, 33.3),
        ("7b", {}, False, 71.6),
        ("7b", {"lora_rank": 32}, True, 50.5),
    ],
)
def test_reckoned_memory_is_what_an_h200_measured(
    name: str, settings: dict[str, int], moments: bool, measured_gb: float
) -> None:
    """benchmarks/RESULTS.md, 2026-11-26: rows of 32,768 tokens, checkpointed; 7B without AdamW."""
    items = reckoned(name, **settings)
    kept = [item.num_bytes for item in items if moments or "AdamW" not in item.name]
    assert sum(kept) / 1e9 == pytest.approx(measured_gb, rel=0.04)


def test_sharded_state_is_sixteen_bytes_a_parameter() -> None:
    model = tiny_model(640)
    items = memory_items(shape(), intermediate_size=256, num_ranks=1, seq_len=1)
    counted = sum(weight.numel() for weight in model.parameters())
    assert sum(item.num_bytes for item in items[:3]) == 16 * counted


def test_a_second_micro_batch_holds_gradients_and_inputs_at_once_and_a_third_no_more() -> None:
    assert total(micro_batches=1) < total(micro_batches=2) == total(micro_batches=3)


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
