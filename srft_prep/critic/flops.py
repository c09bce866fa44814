"""A model's parameters and the floating-point operations of a request, from its config.json.

A token that goes through the model takes two operations a weight that it is multiplied with: the
attention's and the MLP's, of the experts only those it is routed to. Looking a token up in the
embedding multiplies nothing, and the output head works only where a token is sampled. On top comes
attention itself, 4 x heads x head_dim operations for each pair of a token and one that it sees, in
each layer: over a prompt of s tokens, s / 2 of them on average; at 32k tokens that is twice the
weights' share of a model with 3B active ones. Tokens that the prefix cache held are seen, but cost
nothing.

An architecture or a field that this module does not know is a reason, never a wrong number.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What config.json does not say of an architecture."""

    bias: Literal["none", "qkv", "given"] = "none"
    """Which attention projections have biases: none, all but the output's, or, where the field
    `attention_bias` says so, all."""
    qk_norm: bool = False
    sinks: bool = False
    """A learned attention sink a head."""
    experts: str | None = None
    """The field with the number of experts; None for a dense model."""
    expert_size: str = "moe_intermediate_size"
    """The field with the width of an expert."""
    expert_bias: bool = False
    """Biases on the experts and on what routes to them."""
    shared_expert: bool = False
    """A gated expert beside the others that every token goes through."""


FAMILIES: Final[dict[str, Family]] = {
    "llama": Family(bias="given"),
    "mistral": Family(),
    "qwen2": Family(bias="qkv"),
    "qwen3": Family(qk_norm=True, bias="given"),
    "mixtral": Family(experts="num_local_experts", expert_size="intermediate_size"),
    "qwen2_moe": Family(bias="qkv", experts="num_experts", shared_expert=True),
    "qwen3_moe": Family(qk_norm=True, bias="given", experts="num_experts"),
    "gpt_oss": Family(
        bias="given",
        sinks=True,
        experts="num_local_experts",
        expert_size="intermediate_size",
        expert_bias=True,
    ),
}
"""By `model_type`; each is tested against the model that transformers builds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoShape:
    """Why a model's operations are not known."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder's sizes, the language part only."""

    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    """A layer's attention window in tokens; None where it sees everything."""
    embedding_params: int
    """The embedding, and the output head where it is a table of its own."""
    dense_params: int
    """Weights that every token is multiplied with, but for the output head."""
    expert_params: int = 0
    """The weights of all experts."""
    expert_biases: int = 0
    """The biases of all experts."""
    other_params: int
    """Norms, biases and sinks, which are not multiplied with."""
    num_experts: int = 1
    experts_per_token: int = 1

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.windows)

    @property
    def total_params(self) -> int:
        """All parameters."""
        return (
            self.embedding_params
            + self.dense_params
            + self.expert_params
            + self.expert_biases
            + self.other_params
        )

    @property
    def active_params(self) -> int:
        """Those that one token meets, as models are advertised: embedding and head included."""
        idle_experts = self.num_experts - self.experts_per_token
        each = (self.expert_params + self.expert_biases) // self.num_experts
        return self.total_params - idle_experts * each

    def flops(
        self, *, prompt_tokens: int, cached_tokens: int = 0, completion_tokens: int = 0
    ) -> int:
        """Return the floating-point operations of one request.

        Args:
            prompt_tokens: all tokens sent, the cached ones included.
            cached_tokens: those whose keys and values the prefix cache held.
            completion_tokens: tokens received; the last of them is never fed back.
        """
        last = prompt_tokens + max(completion_tokens - 1, 0)
        first = min(cached_tokens, last)
        experts = self.expert_params // self.num_experts * self.experts_per_token
        head = self.hidden_size * self.vocab_size
        pairs = sum(
            layers * (_pairs(last, window) - _pairs(first, window))
            for window, layers in Counter(self.windows).items()
        )
        return (
            2 * (self.dense_params + experts) * (last - first)
            + 2 * head * completion_tokens
            + 4 * self.num_heads * self.head_dim * pairs
        )

    def kv_bytes(self, num_tokens: int, *, value_bytes: int = 2) -> int:
        """Return the bytes of the keys and values of a sequence; 2 bytes a value is bf16."""
        kept = sum(min(num_tokens, window or num_tokens) for window in self.windows)
        return 2 * self.num_kv_heads * self.head_dim * value_bytes * kept


def request_flops(shape: ModelShape, requests: Iterable[tuple[int, int, int]]) -> int:
    """Return the operations of many requests.

    Args:
        shape: the model.
        requests: prompt, cached and completion tokens of each, as in `requests.parquet`. Attention
            grows with the square of a request's length, so totals over requests do not do.
    """
    return sum(
        shape.flops(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion)
        for prompt, cached, completion in requests
    )


def mfu(flops: float, seconds: float, peak_flops: float) -> float:
    """Return the share of the devices' peak that was used, in [0, 1].

    Args:
        flops: operations that were done.
        seconds: wall time, above 0.
        peak_flops: operations a second of all devices together, in the precision of the weights;
            against the bf16 peak a model in FP8 can exceed 1.
    """
    return flops / seconds / peak_flops


def read_shape(model: str) -> ModelShape | NoShape:
    """Return the shape of a model's folder, or of a hub id whose config.json is in the cache."""
    path = Path(model) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(model, "config.json")
        except HFValidationError:
            found = None
        if not isinstance(found, str):
            return NoShape(reason=f"no config.json of {model} on this machine")
        path = Path(found)
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        return NoShape(reason=f"{path}: {error}")
    return shape_of(config)


def shape_of(config: Mapping[str, Any]) -> ModelShape | NoShape:
    """Return the shape that the content of a config.json tells; its `text_config` if it has one."""
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        config = {"tie_word_embeddings": config.get("tie_word_embeddings", False), **nested}
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        return NoShape(reason=f"model_type {kind!r} is none of {', '.join(FAMILIES)}")
    try:
        return _shape(config, family)
    except _UnknownFieldError as error:
        return NoShape(reason=f"config.json: {error}")


class _UnknownFieldError(Exception):
    """A field is missing, or has a value that this module does not know."""


def _shape(config: Mapping[str, Any], family: Family) -> ModelShape:
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", default=heads)
    # Only Qwen3's code has a width of its own where the file gives none.
    head_dim = _size(config, "head_dim", default=0 if family.qk_norm else hidden // heads)
    layers = _size(config, "num_hidden_layers")
    vocab = _size(config, "vocab_size")
    width, kv_width = heads * head_dim, kv_heads * head_dim
    # A file without the field means False; gpt-oss' means True, and all that has sinks is gpt-oss.
    all_bias = family.bias == "given" and bool(config.get("attention_bias", family.sinks))
    qkv_bias = all_bias or (family.bias == "qkv" and bool(config.get("qkv_bias", True)))
    others_a_layer = (
        2 * hidden
        + 2 * head_dim * family.qk_norm
        + (width + 2 * kv_width) * qkv_bias
        + hidden * all_bias
        + heads * family.sinks
    )
    mlp = _mlp(config, family, hidden=hidden, layers=layers)
    tables = 1 if config.get("tie_word_embeddings", False) else 2
    return ModelShape(
        hidden_size=hidden,
        vocab_size=vocab,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        windows=_windows(config, layers),
        embedding_params=tables * vocab * hidden,
        dense_params=layers * 2 * hidden * (width + kv_width) + mlp.dense_params,
        other_params=hidden + layers * others_a_layer + mlp.other_params,
        expert_params=mlp.expert_params,
        expert_biases=mlp.expert_biases,
        num_experts=mlp.num_experts,
        experts_per_token=mlp.experts_per_token,
    )


class _Mlp(NamedTuple):
    """The MLPs of all layers; the fields are those of ModelShape."""

    dense_params: int
    other_params: int
    expert_params: int = 0
    expert_biases: int = 0
    num_experts: int = 1
    experts_per_token: int = 1


def _mlp(config: Mapping[str, Any], family: Family, *, hidden: int, layers: int) -> _Mlp:
    sparse_layers = _num_sparse_layers(config, family, layers)
    dense_params = other_params = 0
    if sparse_layers < layers:
        size = _size(config, "intermediate_size")
        mlp_bias = bool(config.get("mlp_bias", False))
        dense_params = (layers - sparse_layers) * 3 * hidden * size
        other_params = (layers - sparse_layers) * (2 * size + hidden) * mlp_bias
    if family.experts is None or not sparse_layers:
        return _Mlp(dense_params, other_params)
    num_experts = _size(config, family.experts, or_else="num_local_experts")
    size = _size(config, family.expert_size)
    routers = sparse_layers * num_experts
    dense_params += routers * hidden
    if family.shared_expert:
        shared = _size(config, "shared_expert_intermediate_size")
        dense_params += sparse_layers * (3 * hidden * shared + hidden)
    return _Mlp(
        dense_params,
        other_params + routers * family.expert_bias,
        expert_params=routers * 3 * hidden * size,
        expert_biases=routers * (2 * size + hidden) * family.expert_bias,
        num_experts=num_experts,
        experts_per_token=_size(config, "num_experts_per_tok"),
    )


def _pairs(num_tokens: int, window: int | None) -> int:
    """Return how many pairs of a token and one that it sees a sequence has in a layer."""
    full = min(num_tokens, window or num_tokens)
    return full * (full + 1) // 2 + (num_tokens - full) * full


def _num_sparse_layers(config: Mapping[str, Any], family: Family, layers: int) -> int:
    """Return how many layers have experts; Qwen's configurations may keep some of them dense."""
    if family.experts is None:
        return 0
    step = _size(config, "decoder_sparse_step", default=1)
    dense = set(config.get("mlp_only_layers") or ())
    return sum(1 for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Return each layer's attention window, as transformers reads the configuration."""
    window = config.get("sliding_window")
    if not config.get("use_sliding_window", True) or not window:
        window = None
    elif type(window) is not int:
        raise _UnknownFieldError(f"sliding_window: expected a whole number, got {window!r:.40}")
    kinds = config.get("layer_types")
    kind = config.get("model_type")
    if window is None and (kind == "gpt_oss" or "sliding_attention" in (kinds or ())):
        raise _UnknownFieldError("sliding_window: expected a whole number, got none")
    if kinds is None and window is None:
        return (None,) * layers
    if kinds is None and kind in ("mistral", "mixtral", "qwen3_moe"):
        return (window,) * layers
    if kinds is None and kind == "gpt_oss":
        return tuple(None if layer % 2 else window for layer in range(layers))
    if kinds is None and kind in ("qwen2", "qwen3"):
        first = _size(config, "max_window_layers")
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise _UnknownFieldError(f"layer_types: expected one a layer, got {kinds!r:.60}")
    known = {"full_attention": None, "sliding_attention": window}
    if unknown := set(kinds) - set(known):
        raise _UnknownFieldError(f"layer_types: {', '.join(sorted(map(str, unknown)))}")
    return tuple(known[kind] for kind in kinds)


def _size(
    config: Mapping[str, Any], name: str, *, or_else: str | None = None, default: int = 0
) -> int:
    value = config.get(name)
    if value is None and or_else is not None:
        value = config.get(or_else)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise _UnknownFieldError(f"{name}: expected a whole number from 1, got {value!r}")
    return value
