import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.critic.flops import (
    FAMILIES,
    ModelShape,
    NoShape,
    mfu,
    read_shape,
    request_flops,
    shape_of,
)

QWEN2_5_CODER_32B = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 70,
}
QWEN3_CODER_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 5472,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "sliding_window": None,
    "attention_bias": False,
}
GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "sliding_window": 128,
    "attention_bias": True,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
TINY_MODELS = [
    {"model_type": "llama"},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {"model_type": "mistral", "head_dim": 24, "sliding_window": 16},
    {"model_type": "qwen2"},
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8,
     "max_window_layers": 3},
    {"model_type": "qwen3", "head_dim": 32},
    {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "qwen2_moe", **EXPERTS, "shared_expert_intermediate_size": 80},
    {"model_type": "qwen3_moe", **EXPERTS, "head_dim": 32},
    {"model_type": "qwen3_moe", **EXPERTS, "head_dim": 32, "decoder_sparse_step": 2},
    {"model_type": "qwen3_moe", **EXPERTS, "head_dim": 32, "mlp_only_layers": [0, 3]},
    {"model_type": "gpt_oss", "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
     "sliding_window": 8},
]  # fmt: skip


def shape(config) -> ModelShape:
    found = shape_of(config)
    assert isinstance(found, ModelShape), found
    return found


def built(config, device):
    """Return the model that transformers builds of a configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in config.items() if name != "model_type"}
    config = AutoConfig.for_model(config["model_type"], **fields)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )


@pytest.mark.parametrize("config", [{**TINY, **each} for each in TINY_MODELS], ids=str)
def test_the_parameters_are_those_of_the_model_that_transformers_builds(config):
    model = built(config, "meta")
    unique = {id(each): each.numel() for each in model.parameters()}
    assert shape(config).total_params == sum(unique.values())
    assert shape(json.loads(model.config.to_json_string())) == shape(config)


def test_every_family_is_compared_with_transformers():
    assert {each["model_type"] for each in TINY_MODELS} == set(FAMILIES)


@pytest.mark.parametrize("config", [{**TINY, **each} for each in TINY_MODELS], ids=str)
def test_the_operations_are_those_that_torch_counts(config):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    sizes = shape(config)
    model = built(config, "cpu").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(40)[None], logits_to_keep=1)
    # This attention is computed over the full square, masked; a causal kernel skips the rest.
    square = 4 * sizes.num_heads * sizes.head_dim * sizes.num_layers * 40 * 40
    causal = 4 * sizes.num_heads * sizes.head_dim * sum(
        min(position + 1, window or 40) for window in sizes.windows for position in range(40)
    )  # fmt: skip
    expected = sizes.flops(prompt_tokens=40, completion_tokens=1) - causal + square
    assert counter.get_total_flops() == expected


def test_a_dense_model_of_public_size_has_its_parameters():
    sizes = shape(QWEN2_5_CODER_32B)
    attention = 2 * 5120 * 5120 + 2 * 5120 * 1024
    mlp = 3 * 5120 * 27648
    assert sizes.dense_params == 64 * (attention + mlp)
    assert sizes.total_params == 32_763_876_352
    assert sizes.active_params == sizes.total_params


def test_a_mixture_of_experts_of_public_size_has_its_parameters():
    sizes = shape(QWEN3_CODER_30B_A3B)
    assert sizes.expert_params == 48 * 128 * 3 * 2048 * 768
    assert sizes.total_params == 30_532_122_624
    assert round(sizes.active_params / 1e9, 1) == 3.4
    assert sizes.active_params - sizes.embedding_params // 2 == pytest.approx(3.04e9, rel=0.01)


def test_gpt_oss_has_the_parameters_of_its_model_card():
    sizes = shape(GPT_OSS_120B)
    assert round(sizes.total_params / 1e9, 1) == 116.8
    # The card counts the head, but not the embedding, as active.
    assert round((sizes.active_params - sizes.embedding_params // 2) / 1e9, 2) == 5.13
    without = {name: value for name, value in GPT_OSS_120B.items() if name != "layer_types"}
    assert shape(without) == sizes


def test_the_operations_of_a_long_prompt_are_those_computed_by_hand():
    # 48 layers; attention 2 x 2048 x 4096 + 2 x 2048 x 512, router 2048 x 128, 8 experts.
    weights = 48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 2048 * 128 + 8 * 3 * 2048 * 768)
    pairs = 32768 * 32769 // 2
    flops = shape(QWEN3_CODER_30B_A3B).flops(prompt_tokens=32768)
    assert flops == 2 * weights * 32768 + 48 * 4 * 32 * 128 * pairs
    attention = 48 * 4 * 32 * 128 * pairs
    assert 2.0 < attention / (flops - attention) < 2.5


def test_the_rates_at_790_teraflops_are_the_known_ones():
    # reference/CRITIC.md: 9.1k and 41k tokens/s; it counts all active parameters, 5-7% more.
    for config, rate in ((QWEN2_5_CODER_32B, 9.1e3), (QWEN3_CODER_30B_A3B, 41e3)):
        flops = shape(config).flops(prompt_tokens=32768)
        assert 790e12 * 32768 / flops == pytest.approx(rate, rel=0.06)


def test_the_head_works_once_a_sampled_token_and_the_last_one_is_not_fed_back():
    sizes = shape(QWEN2_5_CODER_32B)
    head = 2 * 5120 * 152064
    one = sizes.flops(prompt_tokens=100, completion_tokens=1)
    assert one == sizes.flops(prompt_tokens=100) + head
    three = sizes.flops(prompt_tokens=100, completion_tokens=3)
    assert three == sizes.flops(prompt_tokens=102) + 3 * head


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 200))
def test_a_prompt_read_in_two_parts_costs_as_much_as_in_one(cached, rest, completion):
    for config in (QWEN3_CODER_30B_A3B, GPT_OSS_120B):
        sizes = shape(config)
        whole = sizes.flops(prompt_tokens=cached + rest, completion_tokens=completion)
        first = sizes.flops(prompt_tokens=cached)
        second = sizes.flops(
            prompt_tokens=cached + rest, cached_tokens=cached, completion_tokens=completion
        )
        assert first + second == whole
        assert second >= sizes.flops(prompt_tokens=rest, completion_tokens=completion)


def test_a_window_bounds_what_a_token_sees_and_what_is_kept_of_it():
    sizes = shape({**TINY, "model_type": "mistral", "sliding_window": 4})
    pairs = sum(min(position + 1, 4) for position in range(10))
    attention = 4 * 4 * 16 * 4 * pairs
    assert sizes.flops(prompt_tokens=10) == 2 * sizes.dense_params * 10 + attention
    assert sizes.kv_bytes(10) == 4 * (2 * 2 * 16 * 2) * 4
    assert sizes.kv_bytes(3) == 4 * (2 * 2 * 16 * 2) * 3


def test_the_cache_of_a_token_has_two_values_a_layer_and_key_value_head():
    assert shape(QWEN3_CODER_30B_A3B).kv_bytes(1) == 2 * 48 * 4 * 128 * 2
    assert shape(QWEN3_CODER_30B_A3B).kv_bytes(1000, value_bytes=1) == 2 * 48 * 4 * 128 * 1000


def test_the_operations_of_many_requests_are_their_sum():
    sizes = shape(QWEN3_CODER_30B_A3B)
    rows = [(1000, 0, 10), (30_000, 16, 400), (500, 500, 0)]
    each = [
        sizes.flops(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion)
        for prompt, cached, completion in rows
    ]
    assert request_flops(sizes, rows) == sum(each)
    assert each[2] == 0
    assert request_flops(sizes, []) == 0


def test_the_use_of_the_peak_is_operations_by_time_and_peak():
    assert mfu(3e15, 10.0, 1e15) == pytest.approx(0.3)


def test_a_vision_models_language_part_is_meant():
    text = {
        name: value for name, value in QWEN2_5_CODER_32B.items() if name != "tie_word_embeddings"
    }
    outer = {"model_type": "vision", "tie_word_embeddings": True, "text_config": text}
    tied = shape({**QWEN2_5_CODER_32B, "tie_word_embeddings": True})
    assert shape(outer) == tied


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "model_type None"),
        ({**QWEN2_5_CODER_32B, "model_type": "mamba"}, "model_type 'mamba' is none of llama"),
        ({**QWEN2_5_CODER_32B, "hidden_size": None}, "hidden_size: expected a whole number"),
        ({**QWEN2_5_CODER_32B, "num_attention_heads": 0}, "num_attention_heads: .*got 0"),
        ({**QWEN2_5_CODER_32B, "vocab_size": "large"}, "vocab_size: .*got 'large'"),
        ({**QWEN2_5_CODER_32B, "intermediate_size": 1.5}, "intermediate_size: .*got 1.5"),
        ({**QWEN3_CODER_30B_A3B, "head_dim": None}, "head_dim"),
        ({**QWEN3_CODER_30B_A3B, "num_experts_per_tok": None}, "num_experts_per_tok"),
        ({**QWEN3_CODER_30B_A3B, "layer_types": ["linear_attention"] * 48}, "linear_attention"),
        ({**QWEN3_CODER_30B_A3B, "layer_types": ["full_attention"]}, "layer_types: expected one"),
        ({**GPT_OSS_120B, "sliding_window": None}, "sliding_window: .*got none"),
        ({**GPT_OSS_120B, "sliding_window": "short"}, "sliding_window: .*got 'short'"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_a_reason_and_no_number(config, reason):
    found = shape_of(config)
    assert isinstance(found, NoShape)
    assert re.search(reason, found.reason)


def test_a_models_folder_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5_CODER_32B), encoding="utf-8")
    assert read_shape(str(tmp_path)) == shape(QWEN2_5_CODER_32B)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert isinstance(read_shape(str(tmp_path)), NoShape)


def test_a_hub_id_is_looked_for_in_the_cache_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert read_shape("some/model") == NoShape(
        reason="no config.json of some/model on this machine"
    )
    commit = "0" * 40
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    config = folder / "snapshots" / commit / "config.json"
    config.write_text(json.dumps(QWEN2_5_CODER_32B), encoding="utf-8")
    assert read_shape("some/model") == shape(QWEN2_5_CODER_32B)


def test_a_name_that_is_no_hub_id_has_no_shape(tmp_path):
    assert isinstance(read_shape(str(tmp_path / "nowhere" / "deep" / "down")), NoShape)
