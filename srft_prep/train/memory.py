"""What a training step holds in a GPU's memory, from the model's configuration.

Reckoned, not measured: what FSDP2 shards, gathers and reduces, what activation checkpointing keeps,
what a layer needs while it is computed again, what the loss needs. Allocators add to it: leave 10%.

Legend: P parameters, R ranks, T tokens of a micro-batch on one rank, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

from srft_prep.critic.flops import ModelShape

WEIGHT_BYTES = 2
"""Of a gathered weight and of an activation: bfloat16."""
STATE_BYTES = 4
"""Of a sharded weight, its gradient, and each of AdamW's two moments: float32."""
LAYER_TENSORS = 6
"""Tensors as wide as the MLP that a layer holds while it is computed again: gate, up, their product
and the gradients of the three."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One thing that memory is needed for."""

    name: str
    formula: str
    """How the number comes about."""
    num_bytes: float


def memory_items(
    shape: ModelShape,
    *,
    intermediate_size: int,
    num_ranks: int,
    seq_len: int,
    sequence_parallel: int = 1,
    lora_params: int = 0,
    chunk: int = 256,
) -> list[Item]:
    """Return what one GPU holds at the peak of a step, with activation checkpointing.

    Args:
        shape: the model, dense.
        intermediate_size: width of its MLP.
        num_ranks: GPUs that share the parameters, R.
        seq_len: tokens of a micro-batch.
        sequence_parallel: ranks that share each sequence.
        lora_params: trainable parameters where the model's own are frozen; 0 trains all.
        chunk: loss-bearing positions whose logits are held at a time.
    """
    total, layers = shape.total_params, shape.num_layers
    trained = lora_params or total
    tokens = seq_len // sequence_parallel
    layer = (total - shape.embedding_params) / layers
    own_head = shape.embedding_params > shape.vocab_size * shape.hidden_size
    table = shape.vocab_size * shape.hidden_size
    around = table * (2 if own_head else 1)
    return [
        Item(
            name="weights, sharded",
            formula="4 P / R",
            num_bytes=STATE_BYTES * (total + lora_params) / num_ranks,
        ),
        Item(
            name="gradients and AdamW's moments, sharded",
            formula="12 P_trained / R",
            num_bytes=3 * STATE_BYTES * trained / num_ranks,
        ),
        Item(
            name="two layers, gathered",
            formula="2 x 2 P_layer",
            num_bytes=2 * WEIGHT_BYTES * layer,
        ),
        Item(
            name="embedding and head, gathered",
            formula="2 (V H + V H)",
            num_bytes=WEIGHT_BYTES * around,
        ),
        Item(
            name="gradients before they are reduced",
            formula="(2 + 4) (P_layer + V H + V H)",
            num_bytes=0 if lora_params else (WEIGHT_BYTES + STATE_BYTES) * (layer + around),
        ),
        Item(
            name="inputs of all layers (checkpoints)",
            formula="2 T H x layers",
            num_bytes=WEIGHT_BYTES * tokens * shape.hidden_size * layers,
        ),
        Item(
            name="one layer, computed again",
            formula="2 T (6 MLP + 8 H)",
            num_bytes=WEIGHT_BYTES
            * tokens
            * (LAYER_TENSORS * intermediate_size + 8 * shape.hidden_size),
        ),
        Item(
            name="logits of a chunk and their gradient",
            formula="(4 + 4) chunk V",
            num_bytes=2 * STATE_BYTES * chunk * shape.vocab_size,
        ),
    ]


def lora_params(shape: ModelShape, *, intermediate_size: int, rank: int) -> int:
    """Return the parameters of adapters on all linear layers of a dense model."""
    width = shape.num_heads * shape.head_dim
    kv_width = shape.num_kv_heads * shape.head_dim
    hidden = shape.hidden_size
    sides = [(hidden, width), (hidden, kv_width), (hidden, kv_width), (width, hidden)]
    sides += [(hidden, intermediate_size)] * 2 + [(intermediate_size, hidden)]
    return shape.num_layers * rank * sum(a + b for a, b in sides)
