"""What axolotl makes of an exported folder, in its own environment; prints a JSON document.

    .venv-peers/axolotl/bin/python axolotl_batches.py CONFIG.yaml TOKENIZER

Its loading and preparation of data sets, its sampler (not compiled: the environment has no numba)
and its two collators for packing.
"""

import json
import sys
import types
from pathlib import Path

import yaml


def main(config: str, tokenizer: str) -> None:
    """Print the batches of one epoch, by collator."""
    compiler = types.ModuleType("numba")
    compiler.njit = lambda function: function  # type: ignore[attr-defined]
    sys.modules["numba"] = compiler
    from axolotl import utils

    for name in ("collators", "data"):  # what their __init__ imports (TRL, PEFT) has no part in it
        package = types.ModuleType(f"axolotl.utils.{name}")
        package.__path__ = [str(Path(utils.__path__[0]) / name)]
        sys.modules[package.__name__] = package
    from axolotl.utils.collators import batching

    vars(sys.modules["axolotl.utils.collators"]).update(vars(batching))
    from axolotl.utils.data.sft import _load_and_prepare_datasets
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.samplers import MultipackBatchSampler, get_dataset_lengths
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer

    cfg = DictDefault(yaml.safe_load(Path(config).read_text(encoding="utf-8")))
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    rows, _, _ = _load_and_prepare_datasets(loaded, cfg, split="train")
    sampler = MultipackBatchSampler(
        SequentialSampler(rows),
        batch_size=cfg.micro_batch_size,
        batch_max_len=cfg.sequence_len,
        lengths=get_dataset_lengths(rows),
        packing_efficiency_estimate=1.0,
        group_size=100_000,
        bin_size=200,
        num_processes=1,
    )
    rows = rows.remove_columns(["length"])
    answer = {}
    for collator in (
        batching.BatchSamplerDataCollatorForSeq2Seq,
        batching.V2BatchSamplerDataCollatorForSeq2Seq,
    ):
        collate = collator(loaded, padding=True, pad_to_multiple_of=cfg.sequence_len)
        answer[collator.__name__] = [
            {
                name: value.tolist()
                for name, value in collate([[rows[i] for i in bin_] for bin_ in batch]).items()
            }
            for batch in sampler
        ]
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
