"""LLaMA-Factory: padded packed rows as its `neat_packing` saves them under `tokenized_path`.

`attention_mask` numbers the documents of a row from 1, padding is 0; `position_ids` begin anew with
every document. FlashAttention 2 separates documents by the position ids, other attention by the
numbers, from which the collator makes a block-diagonal mask (0.9.5, data/collator.py:
SFTDataCollatorWith4DAttentionMask). All columns are handed to the model: there are no others.

Every row has the same length, the least multiple of 8 above seq_len: the collator would pad to it
too, but not the position ids. LLaMA-Factory itself gives its rows one token of padding at least.

`load_from_disk` reads a folder of Arrow streams beside two JSON files. They are written here, with
the older name of a list's type, so that `datasets` 2.21 to 5.2 open them and it is not needed here.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson
import pyarrow as pa

from srft_prep.export.packs import Packs, list_column
from srft_prep.export.target import Target, Written
from srft_prep.ragged import ranges
from srft_prep.shard_files import IGNORED
from srft_prep.storage import write_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCHEMA: Final = pa.schema(
    [
        pa.field(name, pa.list_(pa.int32()))
        for name in ("input_ids", "attention_mask", "position_ids", "labels")
    ]
)

INFO: Final = "dataset_info.json"
STATE: Final = "state.json"
MULTIPLE: Final = 8
"""What LLaMA-Factory's collator pads to in training."""


def row_tokens(seq_len: int) -> int:
    """Return the length of every row."""
    return (seq_len // MULTIPLE + 1) * MULTIPLE


def rows(packs: Packs, *, seq_len: int) -> pa.Table:
    """Return a row a pack."""
    width = row_tokens(seq_len)
    starts = np.arange(packs.num_packs) * width
    places = ranges(starts, np.diff(packs.tokens))
    first = np.repeat(packs.documents[:-1], np.diff(packs.documents))
    numbers = np.arange(1, len(packs.lengths) + 1) - first
    offsets = np.append(starts, packs.num_packs * width)

    def column(values: "NDArray[np.integer]", padding: int = 0) -> pa.ListArray:
        padded = np.full(offsets[-1], padding, np.int32)
        padded[places] = values
        return list_column(padded, offsets)

    columns = {
        "input_ids": column(packs.ids),
        "attention_mask": column(np.repeat(numbers, packs.lengths)),
        "position_ids": column(packs.positions),
        "labels": column(packs.labels, IGNORED),
    }
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def beside(folder: Path, written: Written) -> list[str]:
    """Write the two files that make the folder one of `datasets`."""
    integers = {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "Sequence"}
    info: dict[str, Any] = {
        "citation": "",
        "description": "",
        "features": dict.fromkeys(SCHEMA.names, integers),
        "homepage": "",
        "license": "",
    }
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in written.names],
        "_fingerprint": written.shards_hash[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    for name, document in ((INFO, info), (STATE, state)):
        write_bytes(folder / name, orjson.dumps(document, option=orjson.OPT_INDENT_2))
    return [INFO, STATE]


def loading(written: Written) -> str:
    """Return the lines that load it."""
    return f"""\
```yaml
stage: sft
tokenized_path: DIR
dataset: srft  # LLaMA-Factory asks for a name; with tokenized_path it reads none
template: TEMPLATE  # the model's; the tokens are not made again
packing: true
neat_packing: true  # documents of a row do not see each other
cutoff_len: {written.seq_len}
flash_attn: fa2
per_device_train_batch_size: 1  # neat_packing under fa2 takes no more
```

Rows are packed and padded to {row_tokens(written.seq_len)} tokens. Without `neat_packing` documents
of a row see each other. LLaMA-Factory divides the sum of the losses by the number of trained tokens
of the whole batch. `datasets.load_from_disk("DIR")` opens the folder too."""


TARGET: Final = Target(
    tool="LLaMA-Factory",
    schema=SCHEMA,
    rows=rows,
    loading=loading,
    format="arrow",
    beside=beside,
)
