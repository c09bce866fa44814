"""axolotl: documents, which it packs itself.

axolotl takes rows with `input_ids`, `attention_mask` and `labels` for tokenised. Where it packs, it
writes position ids 0, 1, 2, ... over every row (0.19.0, utils/trainer.py: add_position_ids), and
where it does not pack it keeps a mask of ones: a row that held several documents would let them see
each other either way. A row is therefore a document, and `sample_packing` keeps documents apart.
"""

from typing import Final

import numpy as np
import pyarrow as pa

from srft_prep.export.packs import Packs, list_column
from srft_prep.export.target import Target, Written
from srft_prep.ragged import offsets_of

SCHEMA: Final = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("attention_mask", pa.list_(pa.int8()), nullable=False),
        pa.field("labels", pa.list_(pa.int32()), nullable=False),
    ]
)


def rows(packs: Packs, *, seq_len: int) -> pa.Table:
    """Return a row a document."""
    offsets = offsets_of(packs.lengths)
    columns = [
        list_column(packs.ids, offsets),
        list_column(np.ones(len(packs.ids), np.int8), offsets),
        list_column(packs.labels, offsets),
    ]
    return pa.table(columns, schema=SCHEMA)


def loading(written: Written) -> str:
    """Return the lines that load it."""
    return f"""\
```yaml
datasets:
  - path: DIR
    type:  # empty: the rows are tokenised
sequence_len: {written.seq_len}
sample_packing: true  # axolotl packs the documents and keeps them apart
pad_to_sequence_len: true
excess_length_strategy: raise  # no document is longer than sequence_len: none is cut or dropped
attn_implementation: flash_attention_2
micro_batch_size: 1
val_set_size: 0
```

A row is one document, not a packed sequence: axolotl would let the documents of a packed row see
each other. It leaves out documents without a trained token, which change no gradient, and
documents of one token. It divides the sum of the losses by the number of trained tokens of the
whole batch."""


TARGET: Final = Target(tool="axolotl", schema=SCHEMA, rows=rows, loading=loading)
