"""Tiny random configurations of the architectures that people train, by transformers' names."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What all of them have in common."""
EXPERTS: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
LATENT: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
"""DeepSeek's attention, with keys and values of different sizes."""
MIXED = ["sliding_attention", "full_attention"]
WINDOW = 5

SUPPORTED: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"layer_types": MIXED, "sliding_window": WINDOW, "head_dim": 8},
    "deepseek_v3": EXPERTS | LATENT,
    "ernie4_5": {"head_dim": 8},
    "exaone4": {"layer_types": MIXED, "sliding_window": WINDOW},
    "gemma": {"head_dim": 8},
    "gemma2": {"layer_types": MIXED, "sliding_window": WINDOW, "head_dim": 8},
    "gemma3_text": {"layer_types": MIXED, "sliding_window": WINDOW, "head_dim": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": EXPERTS | {"n_routed_experts": 4, "head_dim": 8, "first_k_dense_replace": 1},
    "gpt_oss": EXPERTS
    | {"num_local_experts": 4, "layer_types": MIXED, "sliding_window": WINDOW, "head_dim": 8},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "llama": {},
    "ministral": {"layer_types": MIXED, "sliding_window": WINDOW, "head_dim": 8},
    "mistral": {"sliding_window": WINDOW, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmo2": {},
    "olmo3": {"layer_types": MIXED, "sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen2 with a window": {
        "use_sliding_window": True,
        "layer_types": MIXED,
        "sliding_window": WINDOW,
    },
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "head_dim": 8},
    "seed_oss": {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {},
    "starcoder2": {"sliding_window": WINDOW},
}
"""Configurations that train, as overrides of SMALL."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama4_text": (
        {"layer_types": ["chunked_attention", "full_attention"]},
        "layers of type chunked_attention",
    ),
    "qwen3_next": (
        {"layer_types": ["linear_attention", "full_attention"]},
        "layers of type linear_attention",
    ),
    "falcon_mamba": ({}, "layers of type linear_attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    "qwen2": ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    "llama": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rotary embedding of type dynamic",
    ),
}
"""Configurations that are refused, with what is said."""

CAUGHT: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"n_head": 4, "n_layer": 2}, "a changed token moves tokens before it or of other"),
    "nemotron": ({}, "does not hand `layout` to its attention"),
    "bert": ({}, "its attention is not causal"),
    "biogpt": ({}, "asks for a mask beyond causal attention"),
}
"""Configurations that do not say what the model does, and what the self-test says of it."""


def tiny_config(name: str, settings: dict[str, Any]) -> PreTrainedConfig:
    """Return a configuration; only the first word of the name is transformers'."""
    return CONFIG_MAPPING[name.split()[0]](**(SMALL | settings))
