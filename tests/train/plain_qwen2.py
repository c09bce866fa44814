"""Qwen2 and the weighted loss as their formulas say, in float64: nothing packed, nothing shared.

Each document goes through alone, all logits are made, and the loss is added up token by token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Qwen2Config

from tests.train.documents import Document, sum_weights


def plain_loss(
    weights: dict[str, Tensor], config: Qwen2Config, documents: Sequence[Document]
) -> Tensor:
    """Return sum(w * nll) / sum(w) over all documents' tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for document in documents:
        logits = plain_logits(weights, config, torch.tensor(document.ids))
        probabilities = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
        for index, (token, weight) in enumerate(zip(document.ids, document.weights, strict=True)):
            if weight:
                total = total - weight * probabilities[index - 1, token].log()
    return total / sum_weights(documents)


def plain_gradients(
    weights: dict[str, Tensor], config: Qwen2Config, documents: Sequence[Document]
) -> dict[str, Tensor]:
    """Return the gradient of `plain_loss` for each weight."""
    leaves = {name: value.detach().double().requires_grad_() for name, value in weights.items()}
    if config.tie_word_embeddings:
        leaves.pop("lm_head.weight", None)
    plain_loss(leaves, config, documents).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def plain_logits(weights: dict[str, Tensor], config: Qwen2Config, ids: Tensor) -> Tensor:
    """Return one document's logits [T, V]."""
    hidden = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        part = {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
        normed = _norm(hidden, part["input_layernorm.weight"], config.rms_norm_eps)
        hidden = hidden + _attention(normed, part, config)
        normed = _norm(hidden, part["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = (normed @ part[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ part["mlp.down_proj.weight"].T
    hidden = _norm(hidden, weights["model.norm.weight"], config.rms_norm_eps)
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return hidden @ weights[name].T


def _norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return hidden / (hidden.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight


def _attention(hidden: Tensor, part: dict[str, Tensor], config: Qwen2Config) -> Tensor:
    """Return causal attention head by head."""
    size = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    query, key, value = (
        hidden @ part[f"self_attn.{name}_proj.weight"].T + part[f"self_attn.{name}_proj.bias"]
        for name in ("q", "k", "v")
    )
    future = torch.ones(len(hidden), len(hidden), dtype=torch.bool).triu(1)
    heads = []
    for head in range(config.num_attention_heads):
        theirs = head // group
        q = _rotated(query[:, head * size : (head + 1) * size], config)
        k = _rotated(key[:, theirs * size : (theirs + 1) * size], config)
        v = value[:, theirs * size : (theirs + 1) * size]
        scores = (q @ k.T / size**0.5).masked_fill(future, float("-inf"))
        heads.append(scores.softmax(dim=-1) @ v)
    return torch.cat(heads, dim=1) @ part["self_attn.o_proj.weight"].T


def _rotated(part: Tensor, config: Qwen2Config) -> Tensor:
    """Return a head's queries or keys, rotated by angles that are float32, as the model's are."""
    tokens, size = part.shape
    theta = config.rope_parameters["rope_theta"]
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)
    angles = torch.arange(tokens).float()[:, None] * frequencies
    cos, sin = angles.cos().double(), angles.sin().double()
    first, second = part[:, : size // 2], part[:, size // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)
