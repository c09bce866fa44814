"""What a training step holds in a GPU's memory, from the model's configuration.

Reckoned: what FSDP2 shards, gathers and reduces, what activation checkpointing keeps, what a layer
needs while it is computed again. The peak is in the backward pass, at one of three moments:

first     the last layer is computed again: the inputs of all layers are there, and gradients only
          where an earlier micro-batch of the step left some
last      the first layer is: gradients of all other layers are there, their inputs are gone
reduced   the gradients of embedding and head, which wait for the end, become float32

Logits are held before (256 positions at a time) and never count. Five runs on an H200 took 1.00 to
1.04 times what is reckoned (tests/train/test_memory.py has them). Allocators add to it: leave 10%.

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
    micro_batches: int = 2,
    lora_params: int = 0,
) -> list[Item]:
    """Return what one GPU holds at the peak of a step, with activation checkpointing.

    Args:
        shape: the model, dense.
        intermediate_size: width of its MLP.
        num_ranks: GPUs that share the parameters, R.
        seq_len: tokens of a micro-batch.
        sequence_parallel: ranks that share each sequence.
        micro_batches: of a step, on one rank; more than two hold no more than two.
        lora_params: trainable parameters where the model's own are frozen; 0 trains all.
    """
    held = _Held(
        shape=shape,
        intermediate_size=intermediate_size,
        num_ranks=num_ranks,
        tokens=seq_len // sequence_parallel,
        lora_params=lora_params,
    )
    trained, own = held.trained, held.own_around
    first = 0 if micro_batches == 1 else trained
    before_last = max(first, trained - held.own_layer - own)
    moments = (
        held.items(sharded_gradients=first, inputs=shape.num_layers, layer=True),
        held.items(sharded_gradients=before_last, inputs=1, layer=True),
        held.items(sharded_gradients=trained, inputs=0, layer=False),
    )
    return max(moments, key=lambda items: sum(item.num_bytes for item in items))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """What a GPU holds in a backward pass; arguments as of `memory_items`."""

    shape: ModelShape
    intermediate_size: int
    num_ranks: int
    tokens: int
    lora_params: int

    @property
    def trained(self) -> float:
        """Parameters that get gradients."""
        return self.lora_params or self.shape.total_params

    @property
    def layer(self) -> float:
        """Parameters of a layer."""
        return (self.shape.total_params - self.shape.embedding_params) / self.shape.num_layers

    @property
    def around(self) -> float:
        """Parameters of the embedding and the head: one table where they share it."""
        table = self.shape.vocab_size * self.shape.hidden_size
        return table * (2 if self.shape.embedding_params > table else 1)

    @property
    def own_layer(self) -> float:
        """Those of a layer that get gradients, but for adapters, which are next to nothing."""
        return 0 if self.lora_params else self.layer

    @property
    def own_around(self) -> float:
        """Those of embedding and head that get gradients."""
        return 0 if self.lora_params else self.around

    def items(self, *, sharded_gradients: float, inputs: int, layer: bool) -> list[Item]:
        """Return what is held at a moment of the backward pass.

        Args:
            sharded_gradients: parameters, over all ranks, whose reduced gradients are there.
            inputs: layers whose inputs are still there.
            layer: whether a layer is being computed, or embedding and head are being reduced.
        """
        hidden, ranks = self.shape.hidden_size, self.num_ranks
        reduced = self.own_layer if layer else self.own_around
        recomputed = self.tokens * (LAYER_TENSORS * self.intermediate_size + 8 * hidden)
        return [
            Item(
                name="weights, sharded",
                formula="4 P / R",
                num_bytes=STATE_BYTES * (self.shape.total_params + self.lora_params) / ranks,
            ),
            Item(
                name="AdamW's moments, sharded",
                formula="8 P_trained / R",
                num_bytes=2 * STATE_BYTES * self.trained / ranks,
            ),
            Item(
                name="gradients, sharded",
                formula="4 P_trained / R",
                num_bytes=STATE_BYTES * sharded_gradients / ranks,
            ),
            Item(
                name="two layers, gathered",
                formula="2 x 2 P_layer",
                num_bytes=2 * WEIGHT_BYTES * self.layer * layer,
            ),
            Item(
                name="embedding and head, gathered",
                formula="2 (V H + V H)",
                num_bytes=WEIGHT_BYTES * self.around,
            ),
            Item(
                name="gradients before they are reduced",
                formula="2 (V H + V H) + (2 + 4) P_layer",
                num_bytes=WEIGHT_BYTES * (self.own_around + self.own_layer * layer)
                + STATE_BYTES * reduced,
            ),
            Item(
                name="inputs of all layers (checkpoints)",
                formula="2 T H x layers",
                num_bytes=WEIGHT_BYTES * self.tokens * hidden * inputs,
            ),
            Item(
                name="one layer, computed again",
                formula="2 T (6 MLP + 8 H)",
                num_bytes=WEIGHT_BYTES * recomputed * layer,
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
