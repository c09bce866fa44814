"""Packed causal attention, registered with transformers under one name: exact for each document.

A row holds documents laid end to end; no query may see another document's key. transformers leaves
that to the shape of a mask and gets it wrong without a word in several ways of calling it
(a cache, a 2-D mask, segment ids), so this function takes the documents' lengths and no mask:

- CPU: one `scaled_dot_product_attention` per document, sliding windows in bands of queries.
- CUDA in 16 bits: `torch.nn.attention.varlen.varlen_attn`, one call for the row (in 32 bits, which
  that kernel does not have, as on CPU); on Hopper and Blackwell long documents alone, by cuDNN.
- Score caps (Gemma 2) and attention sinks (gpt-oss): written out, in bands of queries, anywhere;
  the backward pass computes a band's scores again, so that one band's are held at a time.
- Sequence parallelism: each rank of a group holds a stretch of the row; queries, keys and values
  are exchanged, so that a rank has all tokens of some heads, and back (`ulysses`).

What no path covers (dropout, chunked attention, position biases, a mask of the model's own) is an
error, never a fallback.

Legend: T tokens, N tokens of a document, Q query heads, K key heads, D and Dv their sizes.
"""

from dataclasses import dataclass
from inspect import signature
from itertools import accumulate, groupby
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from srft_prep.errors import TrainError
from srft_prep.train.ulysses import misfit, to_heads, to_tokens

ATTENTION: Final = "srft_packed"
"""The name to give as `attn_implementation`."""
BAND_TOKENS: Final = 512
"""Queries at a time where scores are written out: a band's scores are Q x 512 x N."""
LONG_TOKENS: Final = 4096
"""From this length on a document goes through cuDNN's kernel, if it can: on an H200 1.7 times as
fast as the kernel for rows at 16k and 32k tokens, 1.15 times at 4k."""
CUDNN_MULTIPLE: Final = 512
"""To which a document is padded for cuDNN, which plans 0.1 s for each length that is new to it."""
TELL_GQA: Final = "enable_gqa" in signature(varlen_attn).parameters
"""torch 2.13 wants to be told that keys have fewer heads than queries, 2.11 takes them untold."""
UNSUPPORTED: Final = ("position_bias", "head_mask", "alibi", "attention_bias")
"""Arguments with which some models change the scores, and this function does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the documents of a row lie: what attention is told, in place of a mask."""

    lengths: tuple[int, ...]
    """Tokens of each document, summing to T."""
    cu_seqlens: Tensor
    """int32 [D + 1], the same on the device."""
    longest: int
    """The longest of them: a number of its own, so that compiled code need not look at all."""
    group: dist.ProcessGroup | None = None
    """The ranks that share the row, each with T / size tokens in order; None: all of it is here."""


def register() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers; again changes nothing."""
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, no_mask)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return causal attention within each document, in transformers' calling convention.

    Args:
        module: The attention layer, for its name in errors.
        query: [1, Q, T, D], of one row.
        key: [1, K, T, D]; K divides Q.
        value: [1, K, T, Dv].
        attention_mask: None; a mask would say something that is not heard.
        scaling: Factor of the scores, 1 / sqrt(D) unless given.
        dropout: 0.
        sliding_window: Keys that a query sees, itself included; None sees all before it.
        softcap: Cap c of the scores: c * tanh(score / c).
        s_aux: Sink logit of each query head [Q]: it takes part in the softmax, and has no value.
        layout: The row's documents, which `WeightedModel` hands through the model.
        others: What models pass to any attention; arguments in `UNSUPPORTED` must be None.

    Returns:
        [1, T, Q, Dv], and None for the attention weights.

    Raises:
        TrainError: the model asks for something that this attention does not do.
    """
    _check(module, query, attention_mask, dropout, layout, others)
    _check_handed(module, sliding_window, softcap, s_aux)
    assert layout is not None
    if (group := layout.group) is not None:
        if what := misfit(group.size(), query_heads=query.shape[1], key_heads=key.shape[1]):
            raise TrainError(what)
        query, key, value = (to_heads(part, group) for part in (query, key, value))
        s_aux = None if s_aux is None else s_aux.chunk(group.size())[group.rank()]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and query.element_size() == 2 and softcap is None and s_aux is None:
        output = _attend_on_cuda(query, key, value, layout, scale, sliding_window)
    else:
        output = _attend_by_document(
            query, key, value, layout, scale, sliding_window, softcap, s_aux
        )
    if group is not None:
        output = to_tokens(output, group)
    return output, None


def no_mask(*, attention_mask: Tensor | None = None, use_vmap: bool = False, **_: Any) -> None:
    """Return no mask, where transformers asks for one.

    Raises:
        TrainError: the model wants more than causality: a mask of its own, or one from the caller.
    """
    if attention_mask is not None or use_vmap:
        raise TrainError(
            f"{ATTENTION}: the model asks for a mask beyond causal attention within a document, "
            "which packed attention does not apply; train a text-only causal model"
        )


def _check(
    module: nn.Module,
    query: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    layout: Layout | None,
    others: dict[str, Any],
) -> None:
    """Raise for a call that packed attention would answer wrongly."""
    what = None
    if layout is None:
        what = "it does not hand `layout` to its attention"
    elif query.shape[0] != 1:
        what = f"it has {query.shape[0]} rows, expected documents laid end to end in 1"
    elif attention_mask is not None:
        what = "it builds an attention mask of its own"
    elif dropout:
        what = f"it has attention dropout {dropout}; set `attention_dropout` to 0 in its config"
    elif not others.get("is_causal", getattr(module, "is_causal", True)):
        what = "its attention is not causal"
    elif given := [name for name in UNSUPPORTED if others.get(name) is not None]:
        what = f"its attention takes {', '.join(given)}"
    if what:
        raise TrainError(f"{type(module).__name__} cannot be trained on packed documents: {what}")


def _check_handed(
    module: nn.Module, window: int | None, softcap: float | None, sinks: Tensor | None
) -> None:
    """Raise if a layer has a window, a cap or sinks, and does not hand them to its attention."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds and layer is not None else None
    handed = {
        "a sliding window": (kind == "sliding_attention", window),
        "a score cap": (getattr(config, "attn_logit_softcapping", None) is not None, softcap),
        "sinks": (getattr(module, "sinks", None) is not None, sinks),
    }
    missing = [name for name, (has, value) in handed.items() if has and value is None]
    if missing:
        raise TrainError(
            f"{type(module).__name__} cannot be trained on packed documents: it has "
            f"{', '.join(missing)} and does not hand this to its attention; choose another model"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return attention [1, T, Q, Dv], each document alone."""
    outputs = []
    parts = (torch.split(part, list(layout.lengths), dim=2) for part in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        length = q.shape[2]
        if softcap is None and sinks is None and (window is None or length <= window):
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scale, enable_gqa=True
                )
            )
            continue
        for start in range(0, length, BAND_TOKENS):
            stop = min(start + BAND_TOKENS, length)
            first = 0 if window is None else max(0, start - window + 1)
            band = q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop]
            if softcap is None and sinks is None:
                seen = _band_mask(start, stop, first, window, q.device)
                outputs.append(
                    F.scaled_dot_product_attention(
                        *band, attn_mask=seen, scale=scale, enable_gqa=True
                    )
                )
                continue
            output = checkpoint(
                _attend_band,
                *band,
                (start, stop, first, window),
                scale,
                softcap,
                sinks,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            outputs.append(output)
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _band_mask(
    start: int, stop: int, first: int, window: int | None, device: torch.device
) -> Tensor:
    """Return which keys [first, stop) each of the queries [start, stop) sees, as booleans."""
    queries = torch.arange(start, stop, device=device)[:, None]
    keys = torch.arange(first, stop, device=device)[None, :]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _attend_band(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    place: tuple[int, int, int, int | None],
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return attention of some queries, whose place is as `_band_mask` takes it, written out."""
    seen = _band_mask(*place, query.device)
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(-1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    probabilities = scores.softmax(dim=-1)[..., : key.shape[2]]
    return probabilities.to(value.dtype) @ value


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None
) -> Tensor:
    """Return attention [1, T, Q, Dv] in 16 bits: long documents alone, those between at once."""
    lengths, bounds = layout.lengths, [0, *accumulate(layout.lengths)]
    takes_long = window is None and _cudnn_takes(query, key, value)
    outputs = []
    for alone, group in groupby(
        range(len(lengths)), lambda number: takes_long and lengths[number] >= LONG_TOKENS
    ):
        documents = list(group)
        for first, last in (
            zip(documents, documents, strict=True) if alone else [(documents[0], documents[-1])]
        ):
            start, stop = bounds[first], bounds[last + 1]
            q, k, v = (part[:, :, start:stop] for part in (query, key, value))
            if alone:
                outputs.append(_attend_by_cudnn(q, k, v, scale))
                continue
            cu_seqlens = layout.cu_seqlens[first : last + 2] - layout.cu_seqlens[first]
            longest = max(lengths[first : last + 1])
            outputs.append(_attend_by_varlen(q, k, v, cu_seqlens, longest, scale, window))
    return torch.cat(outputs, dim=1)


def _cudnn_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether long documents go through cuDNN: on Hopper and Blackwell, if it can.

    Its backward pass adds up in no fixed order, so that `deterministic` leaves it out.
    """
    if torch.are_deterministic_algorithms_enabled() or query.shape[-1] != value.shape[-1]:
        return False
    if torch.cuda.get_device_capability(query.device)[0] not in (9, 10):
        return False
    shared = query.shape[1] != key.shape[1]
    asked = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, shared)
    return torch.backends.cuda.can_use_cudnn_attention(asked)


def _attend_by_cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return attention [1, N, Q, D] of one document, padded behind its end, which it cannot see."""
    length = query.shape[2]
    if padding := -length % CUDNN_MULTIPLE:
        query, key, value = (F.pad(part, (0, 0, 0, padding)) for part in (query, key, value))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    return output[:, :, :length].transpose(1, 2)


def _attend_by_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Return attention [1, N, Q, Dv] of some documents, by one variable-length kernel."""
    size = value.shape[-1]
    # The kernel wants one size for keys and values; DeepSeek's are 192 and 128.
    if size != query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - size))
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    told: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if TELL_GQA else {}
    output = varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **told,
    )
    assert isinstance(output, Tensor)
    return output[None, ..., :size]
