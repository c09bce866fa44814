"""A trained model as a folder that transformers and vLLM load: weights, configuration, tokenizer.

    OUT/model/     the whole model, in the precision of training; LoRA adapters are merged into it
    OUT/adapter/   with LoRA, the adapters alone, as peft and vLLM load them

Each weight is gathered from all ranks in turn, converted, and kept in the first rank's host memory
(2 bytes a parameter in bf16: 66 GB for a model of 33B). Names and layouts are those that
transformers would save: `save_pretrained` undoes the conversions that loading did. A folder appears
by rename when everything in it is on the disk.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import orjson
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.utils.logging import disable_progress_bar

from srft_prep.storage import flush
from srft_prep.train.model import WeightedModel, causal_lm

MODEL: Final = "model"
ADAPTER: Final = "adapter"


@torch.no_grad()
def export_model(
    model: WeightedModel, output: Path, *, dtype: torch.dtype, tokenizer: str | None
) -> list[str]:
    """Write a model to `output`; return the names of its files there, the same in all ranks.

    All ranks call it together.

    Args:
        model: of any sharding, with adapters or without.
        output: the run's directory; what stood at `model/` and `adapter/` is replaced.
        dtype: of the weights that are written.
        tokenizer: folder or hub id whose tokenizer goes with it; None for none.
    """
    language_model = causal_lm(model.model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward pass leaves weights gathered
    wrapper: Any = model.model
    adapters = wrapper is not language_model
    weights = _gather(_merged(language_model) if adapters else _weights(language_model), dtype)
    own = _gather(_adapter_weights(wrapper), torch.float32) if adapters else {}
    if dist.get_rank() == 0:
        disable_progress_bar()  # type: ignore[no-untyped-call]
        with _replacing(output / MODEL) as folder:
            language_model.save_pretrained(folder, state_dict=weights)
            _set_dtype(folder / "config.json", dtype)
            if tokenizer is not None:
                _save_tokenizer(tokenizer, folder)
        if adapters:
            with _replacing(output / ADAPTER) as folder:
                wrapper.save_pretrained(str(folder), state_dict=own)
    dist.barrier()
    folders = [MODEL, ADAPTER] if adapters else [MODEL]
    return sorted(
        str(path.relative_to(output))
        for folder in folders
        for path in (output / folder).rglob("*")
        if path.is_file()
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights and persistent buffers by name; tied ones are the same tensor."""
    owned = dict(model.named_parameters(remove_duplicate=False))
    for name, value in model.state_dict().items():
        yield name, owned.get(name, value)


def _merged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the model that an adapted one is equal to: W + scaling x B A."""
    adapted = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    for name, value in _weights(model):
        owner = next((each for each in _prefixes(name) if each in adapted), None)
        if owner is None:
            yield name, value
            continue
        inner = name.removeprefix(f"{owner}.")
        if not inner.startswith("base_layer."):
            continue
        if inner == "base_layer.weight":
            value = _whole(value).float() + _delta(adapted[owner])
        yield f"{owner}.{inner.removeprefix('base_layer.')}", value


def _delta(module: Any) -> Tensor:
    """Return what a LoRA module adds to its weight, as one matrix."""
    up, down = (_whole(part["default"].weight).float() for part in (module.lora_B, module.lora_A))
    scale: float = module.scaling["default"]
    return scale * (up @ down)


def _adapter_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in _weights(model) if ".lora_" in name)


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _prefixes(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _gather(weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return whole tensors on the host of the first rank, nothing on the others."""
    gathered: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    first_rank = dist.get_rank() == 0
    for name, value in weights:
        known = name
        if isinstance(value, nn.Parameter):  # lives on in the model, so that its id is its own
            known = names.setdefault(id(value), name)
        if known == name:
            whole = _whole(value)
            whole = whole.to(dtype) if whole.is_floating_point() else whole
            if first_rank:
                gathered[name] = whole.detach().cpu().contiguous()
        elif first_rank:
            gathered[name] = gathered[known]
    return gathered


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Let config.json name the files' precision: `save_pretrained` names that of training."""
    config = orjson.loads(path.read_bytes())
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")


def _save_tokenizer(source: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder`, durably, if the block succeeds."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in (*temporary.rglob("*"), temporary):
        flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    flush(folder.parent)
