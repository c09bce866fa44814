"""Several processes as one: the process group, FSDP2, and what a gradient is summed over.

The loss of an optimiser step is  sum(w * nll) / sum(w)  over all ranks and micro-batches. Each
rank divides its own sum by the global sum of weights, which the loader knows without asking, and
gradients are *summed* over ranks. FSDP2 would average them; `shard_model` sets its divisor to 1,
and this is the only place where the number of ranks enters.

Parameters are kept in float32 and sharded over all ranks; the forward and backward pass may run in
bfloat16 (`param_dtype`), gradients are reduced in float32. Under sequence parallelism the ranks of
a group share their rows, and every rank still holds an own shard of the parameters.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedConfig

from srft_prep.errors import ConfigError
from srft_prep.train.model import WeightedModel, causal_lm, decoder_layers
from srft_prep.train.ulysses import misfit

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits: loading a large model takes rank 0 minutes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among those that train together."""

    rank: int
    """Of this process, from 0; rank 0 writes."""
    world_size: int
    """All processes."""
    local_rank: int
    """On its machine: the number of its GPU."""
    device: torch.device
    """Where it computes."""
    mesh: DeviceMesh
    """All ranks, in one dimension, to shard parameters over."""
    sequence_group: dist.ProcessGroup | None = None
    """The ranks that share rows with this one; None without sequence parallelism."""

    @property
    def sequence_parallel(self) -> int:
        """Ranks that share a row."""
        return 1 if self.sequence_group is None else self.sequence_group.size()

    @property
    def data_rank(self) -> int:
        """Of this process's rows among `data_size`: the loader's `rank`."""
        return self.rank // self.sequence_parallel

    @property
    def data_size(self) -> int:
        """How many ranks or groups read rows of their own: the loader's `world_size`."""
        return self.world_size // self.sequence_parallel


@contextmanager
def started(*, sequence_parallel: int = 1) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one, and leave them at the end.

    One process alone is a group of one, so that everything has one way through.

    Ranks of a sequence group are neighbours, since their exchange is the busiest.

    Raises:
        ConfigError: `sequence_parallel` does not divide the number of processes, or there are more
            processes than GPUs on a machine that has some.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if sequence_parallel < 1 or world_size % sequence_parallel:
        raise ConfigError(
            f"--sequence-parallel {sequence_parallel}: expected a divisor of the {world_size} "
            "processes (torchrun --nproc-per-node)"
        )
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} on this machine has no GPU: expected at most "
            f"{torch.cuda.device_count()} (torchrun --nproc-per-node)"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        store = HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
    try:
        shape = (world_size // sequence_parallel, sequence_parallel)
        grid = init_device_mesh(device.type, shape, mesh_dim_names=("data", "sequence"))
        yield World(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            device=device,
            mesh=init_device_mesh(device.type, (world_size,), mesh_dim_names=("all",)),
            sequence_group=grid.get_group("sequence") if sequence_parallel > 1 else None,
        )
    finally:
        dist.destroy_process_group()


@contextmanager
def deterministic() -> Iterator[None]:
    """Let torch choose only kernels that add in a fixed order; enter it before `started`.

    The attention kernel's backward pass otherwise adds up the gradient of queries in the order in
    which blocks come to their end. Memory that is about to be written is not filled first, which
    torch does in this mode unless told otherwise.
    """
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS's sums may vary
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def require_heads(config: PreTrainedConfig, sequence_parallel: int) -> None:
    """Raise where so many ranks cannot share out the heads of a model of this configuration.

    Raises:
        ConfigError: the degree does not fit the heads.
    """
    text = config.get_text_config()
    query_heads = getattr(text, "num_attention_heads", None)
    if sequence_parallel == 1 or not query_heads:  # attention finds what is said nowhere
        return
    key_heads = getattr(text, "num_key_value_heads", None) or query_heads
    if what := misfit(sequence_parallel, query_heads=query_heads, key_heads=key_heads):
        raise ConfigError(f"--sequence-parallel {sequence_parallel}: {what}")


def shard_model(
    model: WeightedModel, world: World, *, param_dtype: torch.dtype = torch.float32
) -> WeightedModel:
    """Shard a model over all ranks, in place, with rank 0's weights on every rank.

    Other ranks' weights are not looked at and need not exist (`load_model(..., weights=False)`).
    Each decoder layer is gathered when it runs, and what is around the layers (embedding, norm,
    head) during a whole pass; whenever no pass runs, every parameter is a shard.

    Args:
        model: The model, with adapters, checkpointing and compilation already applied.
        world: The processes.
        param_dtype: Of the forward and backward pass.

    Raises:
        ConfigError: the ranks that share rows cannot share out the model's heads.
    """
    require_heads(causal_lm(model.model).config, world.sequence_parallel)
    model.group = world.sequence_group
    tensors = [*model.named_parameters(), *model.named_buffers()]
    source = {name: tensor.detach() for name, tensor in tensors} if world.rank == 0 else {}
    reduced = torch.promote_types(param_dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduced)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=world.mesh, mp_policy=policy)
    # FSDP would leave the outermost module gathered after a forward pass without a backward pass:
    # an optimiser made after a self-test would then step weights that are thrown away
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=True)
    if world.rank:
        model.to_empty(device=world.device)
    scatter(model, source, world)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # not as a product and a sum in one (NCCL's PREMUL_SUM), which gloo does not have
            module.set_force_sum_reduction_for_comms(True)
    return model


@torch.no_grad()
def scatter(model: nn.Module, source: dict[str, torch.Tensor], world: World) -> None:
    """Give every rank its shard of rank 0's parameters, and all of its buffers."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        if world.rank == 0:
            full = source[name].to(world.device, parameter.dtype)
        else:
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device)
        shards = distribute_tensor(full, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(shards.to_local())
    for name, buffer in model.named_buffers():
        if world.rank == 0:
            buffer.copy_(source[name])
        dist.broadcast(buffer, src=0)
