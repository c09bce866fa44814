"""What Megatron-Bridge makes of an exported folder, in its own environment; prints a JSON document.

    .venv-peers/megatron/bin/python megatron_batches.py SPECS

SPECS: JSON of the arguments of `PackedSequenceSpecs`. The reader of packed Parquet files, its
collator and the check of the settings are Megatron-Bridge's own. Its packages import CUDA kernels
when they are imported; they are entered here without that, and what the reader imports and does
not need (process groups, tokenizers) is left empty.
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

EOS = 0
PACKAGES = ("", ".data", ".data.packing", ".data.datasets", ".training", ".utils")
EMPTY = ("utils.common_utils", "training.tokenizers", "training.tokenizers.tokenizer")


def main(specs: str) -> None:
    """Print rows and batches, with and without the fixed shapes of CUDA graphs."""
    enter()
    reader = importlib.import_module("megatron.bridge.data.packing.parquet")
    settings = importlib.import_module("megatron.bridge.data.packing.config")
    given = settings.PackedSequenceSpecs(**json.loads(specs))
    answer = {}
    for name, fixed in (("batches", False), ("fixed", True)):
        rows = reader.GPTSFTPackedParquetDataset(
            given.packed_train_data_path,
            tokenizer=SimpleNamespace(eos_id=EOS),
            max_seq_length=given.packed_sequence_size,
            pad_to_max_length=fixed,
            prompt_template="{text} {answer}",  # is asked for, and used for text alone
            pad_cu_seqlens=fixed,
            pack_metadata_file_path=given.packed_metadata_path,
        )
        answer["rows"] = [rows[index] for index in range(len(rows))]
        for index, row in enumerate(answer["rows"]):
            starts = row["seq_boundaries"][:-1]
            rows.validate_row(index, row["input_ids"], row["loss_mask"], starts)
        batches = [rows.collate_fn([row]) for row in answer["rows"]]
        answer[name] = [{key: _plain(value) for key, value in batch.items()} for batch in batches]
    sys.stdout.write(json.dumps(answer) + "\n")


def enter() -> None:
    """Make Megatron's packages importable without what they import on a GPU machine."""
    megatron = importlib.util.find_spec("megatron")
    assert megatron is not None
    assert megatron.submodule_search_locations is not None
    root = Path(next(iter(megatron.submodule_search_locations)))
    for name in PACKAGES:
        _module("megatron.bridge" + name, root.joinpath("bridge", *name.split(".")))
    _module("megatron.core", root / "core").__getattr__ = _anything  # type: ignore[method-assign]
    for name in EMPTY:
        _module(f"megatron.bridge.{name}", None).__getattr__ = _anything  # type: ignore[method-assign]


def _module(name: str, folder: Path | None) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = [str(folder)] if folder else []
    sys.modules[name] = module
    return module


def _anything(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


if __name__ == "__main__":
    main(*sys.argv[1:])
