"""TRL's SFTTrainer: packed rows, in the columns that its own packing makes.

With `skip_prepare_dataset` the trainer takes `input_ids`, `labels` and `seq_lengths` as they are,
and its padding-free collator makes position ids that begin anew with every document of
`seq_lengths`; other columns, weights among them, it drops without a word (trl 1.16.0,
trainer/sft_trainer.py: DataCollatorForLanguageModeling, _set_signature_columns_if_needed).
"""

from typing import Final

import pyarrow as pa

from srft_prep.export.packs import Packs, list_column
from srft_prep.export.target import Target, Written

SCHEMA: Final = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("labels", pa.list_(pa.int32()), nullable=False),
        pa.field("seq_lengths", pa.list_(pa.int32()), nullable=False),
    ]
)


def rows(packs: Packs, *, seq_len: int) -> pa.Table:
    """Return a row a pack."""
    columns = [
        list_column(packs.ids, packs.tokens),
        list_column(packs.labels, packs.tokens),
        list_column(packs.lengths, packs.documents),
    ]
    return pa.table(columns, schema=SCHEMA)


def loading(written: Written) -> str:
    """Return the lines that load it."""
    return f"""\
```python
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

dataset = load_dataset("DIR", split="train")
args = SFTConfig(
    dataset_kwargs={{"skip_prepare_dataset": True}},  # the rows are ready: nothing is packed or cut
    padding_free=True,  # position ids from seq_lengths: no document sees another
    packing=False,
    max_length=None,  # rows have up to {written.seq_len} tokens
    per_device_train_batch_size=1,
    model_init_kwargs={{"attn_implementation": "flash_attention_2"}},
)
SFTTrainer(model="MODEL", args=args, train_dataset=dataset).train()
```

All four settings are needed: without `padding_free` documents of a row see each other, and without
`skip_prepare_dataset` rows may be cut. TRL supports padding-free batches with FlashAttention 2 and
3 only. It divides the sum of the losses by the number of trained tokens of the whole batch."""


TARGET: Final = Target(tool="TRL", schema=SCHEMA, rows=rows, loading=loading)
