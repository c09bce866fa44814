"""A causal language model of transformers as the loop sees it: a batch in, a weighted NLL out.

`WeightedModel.forward` is the one way in. FSDP gathers a module's parameters around its forward, so
everything that reads the trunk or the head runs inside it, evaluation and self-tests too.

Activation checkpointing and compilation work layer by layer, on the layer's `forward`, inside the
hooks that FSDP sets: parameters are gathered once for a recomputed layer, not twice.

Legend: T tokens, L loss-bearing positions, H hidden size, V vocabulary.
"""

import warnings
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from srft_prep.errors import ConfigError
from srft_prep.train.attention import ATTENTION, Layout, register
from srft_prep.train.batches import Batch
from srft_prep.train.loss import CHUNK_POSITIONS, Head, token_nll, weighted_nll
from srft_prep.train.ulysses import Stretch, split, whole

Output = Literal["loss", "token_nll", "hidden", "logits"]
"""What a forward pass returns."""
LAYER_TYPES: Final = {"full_attention", "sliding_attention"}
"""Kinds of layers that packed attention covers, in the words of transformers' configurations."""
MOVING_ROPES: Final = {"dynamic", "longrope"}
"""Rotary embeddings that depend on the longest document of a row, and so leak between documents."""


class WeightedModel(nn.Module):
    """A causal language model whose forward pass returns the weighted NLL sum of a batch."""

    def __init__(self, model: PreTrainedModel, *, chunk: int = CHUNK_POSITIONS) -> None:
        """Wrap a model, whose attention must be `ATTENTION` (`load_model`, `tiny_model`)."""
        super().__init__()
        self.model: nn.Module = model
        self.chunk = chunk
        self.group: dist.ProcessGroup | None = None
        """The ranks that share each batch (sequence parallelism); set by `shard_model`."""

    def forward(self, batch: Batch, output: Output = "loss") -> Tensor:
        """Return what a batch is asked for.

        `loss`: sum over the batch of weight x NLL, a float32 scalar, with gradients. Under sequence
        parallelism it is this rank's part of the sum, otherwise all of it.
        `token_nll`: NLL of each target, float32 [L]. `hidden`: hidden states after the final norm
        [T, H]. `logits`: logits of the model's own forward pass [T, V], to compare with, not to
        train on. These three are whole on every rank.
        """
        part = split(batch, self.group)
        model = causal_lm(self.model)
        if output == "logits":
            return whole(
                self._call(model, part).logits[0], part.first, batch.num_tokens, self.group
            )
        hidden_TH = self._call(model.base_model, part).last_hidden_state[0]
        if output == "hidden":
            return whole(hidden_TH, part.first, batch.num_tokens, self.group)
        head = head_of(model)
        if output == "token_nll":
            nll = token_nll(hidden_TH, head, part.positions, part.targets, chunk=self.chunk)
            return whole(nll, part.first_loss, batch.num_loss_tokens, self.group)
        return weighted_nll(
            hidden_TH, head, part.positions, part.targets, part.weights, chunk=self.chunk
        )

    @torch.no_grad()
    def token_nll(self, batch: Batch) -> Tensor:
        """Return each target's NLL, float32 [L], without gradients."""
        values: Tensor = self(batch, "token_nll")
        return values

    def _call(self, module: nn.Module, part: Stretch) -> Any:
        layout = Layout(
            lengths=part.lengths,
            cu_seqlens=part.cu_seqlens,
            longest=max(part.lengths),
            group=self.group,
        )
        return module(
            input_ids=part.input_ids[None],
            position_ids=part.position_ids[None],
            use_cache=False,
            layout=layout,
        )


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    chunk: int = CHUNK_POSITIONS,
    weights: bool = True,
) -> WeightedModel:
    """Return the causal language model of a Hugging Face folder, with packed attention.

    Args:
        path: The folder, or the model's name at the hub.
        dtype: Of the weights that are trained.
        chunk: Loss-bearing positions whose logits are held at a time.
        weights: Read the weights. False leaves them without memory ("meta"), for ranks that
            receive theirs in `shard_model`.

    Raises:
        ConfigError: there is no such model, a weight is missing, damaged or of another shape, or
            the architecture cannot be trained packed.
    """
    register()
    try:
        config = AutoConfig.from_pretrained(path)
        require_packable(config)
        if weights:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=ATTENTION,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with names
            )
            model, info = loaded
            _require_all_weights(path, info)
        else:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    config, dtype=dtype, attn_implementation=ATTENTION
                )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{path}: expected a causal language model (a folder with config.json and weights, or "
            f"a name at the hub): {error}"
        ) from error
    return WeightedModel(model, chunk=chunk).train()


def _require_all_weights(path: Path | str, info: dict[str, Any]) -> None:
    """Raise where transformers filled up with random values; tied weights are not missing.

    Raises:
        ConfigError: a weight is missing, or has another shape than the configuration says.
    """
    lines = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    for name, there, expected in sorted(info["mismatched_keys"]):
        lines.append(f"{name}: expected {tuple(expected)}, got {tuple(there)}")
    if lines:
        more = f" and {len(lines) - 5:,} more" if len(lines) > 5 else ""
        raise ConfigError(
            f"{path}: the weights do not fit config.json: {'; '.join(lines[:5])}{more}; they would "
            "be random: download the model again"
        )


def tiny_model(
    vocab_size: int,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    chunk: int = CHUNK_POSITIONS,
    **settings: Any,
) -> WeightedModel:
    """Return a small Qwen2 with random weights, the same for the same seed.

    Args:
        vocab_size: The tokenizer's.
        seed: Of the weights; the global generator is left as it was.
        hidden_size: H, a multiple of the heads.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_key_value_heads: Key heads.
        chunk: Loss-bearing positions whose logits are held at a time.
        settings: Further settings of `Qwen2Config`.
    """
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "tie_word_embeddings": False,
    }
    return random_model(Qwen2Config(**(values | settings)), seed=seed, chunk=chunk)


def random_model(
    config: PreTrainedConfig, *, seed: int = 0, chunk: int = CHUNK_POSITIONS
) -> WeightedModel:
    """Return a model of a configuration with random float32 weights.

    Raises:
        ConfigError: the architecture cannot be trained packed.
    """
    register()
    require_packable(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, attn_implementation=ATTENTION
        )
    return WeightedModel(model, chunk=chunk).train()


def require_packable(config: PreTrainedConfig) -> None:
    """Raise for an architecture known to mix documents or to attend in ways not covered here.

    What is not known is found by the start-up self-test (`leaks`).

    Raises:
        ConfigError: a layer type, dropout or rotary embedding that packed training would get wrong.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - LAYER_TYPES
    if kinds:
        raise ConfigError(
            f"{config.model_type}: layers of type {', '.join(sorted(kinds))} cannot be trained on "
            f"packed documents, expected {' and '.join(sorted(LAYER_TYPES))}; choose another model"
        )
    if dropout := getattr(text, "attention_dropout", 0.0):
        raise ConfigError(
            f"{config.model_type}: attention_dropout is {dropout}, and packed attention has none; "
            "set it to 0 in the model's config.json"
        )
    ropes = getattr(text, "rope_parameters", None) or {}
    nested = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    moving = {str(rope.get("rope_type")) for rope in nested} & MOVING_ROPES
    if moving:
        raise ConfigError(
            f"{config.model_type}: rotary embedding of type {moving.pop()} depends on the longest "
            "document beside a document; set another rope_type in the model's config.json"
        )


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model beneath LoRA's wrapper, if there is one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    assert isinstance(inner, PreTrainedModel)
    return inner


def head_of(model: PreTrainedModel) -> Head:
    """Return a model's output layer; `check_head` in `leaks` compares it with the model's own.

    Raises:
        ConfigError: it is not a plain linear layer.
    """
    layer = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(layer, nn.Linear) or set(dict(layer.named_parameters())) - {"weight", "bias"}:
        raise ConfigError(
            f"{type(model).__name__}: the output layer is a {type(layer).__name__}, expected a "
            "plain linear layer, without adapters"
        )
    config = model.config.get_text_config()
    scale = (
        getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    )
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return Head(
        weight=layer.weight,
        bias=layer.bias,
        scale=scale / divisor,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return a model's decoder layers, first to last.

    Raises:
        ConfigError: none of its lists of modules has as many as the configuration says.
    """
    inner = causal_lm(model.model if isinstance(model, WeightedModel) else model)
    count = inner.config.get_text_config().num_hidden_layers
    for module in inner.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ConfigError(
        f"{type(inner).__name__}: found no list of {count} decoder layers; choose another model"
    )


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only each decoder layer's input for the backward pass, and compute the rest again."""
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer; call it before `checkpoint_activations` and `shard_model`."""
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward)


def add_lora(
    model: WeightedModel, *, rank: int, alpha: int, targets: str | list[str] = "all-linear"
) -> None:
    """Freeze a model and give its linear layers, all but the head, adapters to train (in place).

    Args:
        model: The model; call this before `shard_model`.
        rank: Of the adapters.
        alpha: Their scale: alpha / rank.
        targets: The layers' names, or peft's "all-linear".

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("LoRA needs peft: pip install 'srft-prep[lora]'") from error
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.24 in a way that is to end with transformers 6
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model.model = get_peft_model(model.model, settings)
