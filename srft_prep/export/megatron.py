"""Megatron: the packed Parquet files that Megatron-Bridge fine-tunes on (megatron-bridge 0.6.0).

`seq_start_id` holds where each document begins; `loss_mask` stands at the token that predicts, one
before the token that is trained; the reader drops the last token of every document from the input
(data/packing/gpt_sft.py: collate_fn, data/packing/algorithms.py: fill_packing_strategy). It makes
the mask integers (`torch.LongTensor`), so that weights between 0 and 1 would become 0 there.

Megatron-LM's .bin/.idx files hold token ids and no mask, and are no form for this.
"""

from pathlib import Path
from typing import Final

import numpy as np
import orjson
import pyarrow as pa

from srft_prep.export.packs import Packs, list_column
from srft_prep.export.target import Target, Written
from srft_prep.ragged import offsets_of
from srft_prep.shard_files import IGNORED
from srft_prep.storage import write_bytes

SCHEMA: Final = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.int8()), nullable=False),
        pa.field("seq_start_id", pa.list_(pa.int32()), nullable=False),
    ]
)

METADATA: Final = "packing_metadata.json"


def rows(packs: Packs, *, seq_len: int) -> pa.Table:
    """Return a row a pack."""
    ends = offsets_of(packs.lengths)
    mask = np.zeros(len(packs.ids), np.int8)
    mask[:-1] = packs.labels[1:] != IGNORED
    mask[ends[1:] - 1] = 0
    packs_of = np.repeat(packs.tokens[:-1], np.diff(packs.documents))
    columns = [
        list_column(packs.ids, packs.tokens),
        list_column(mask, packs.tokens),
        list_column((ends[:-1] - packs_of).astype(np.int32), packs.documents),
    ]
    return pa.table(columns, schema=SCHEMA)


def beside(folder: Path, written: Written) -> list[str]:
    """Write the lengths that the reader needs for CUDA graphs; it counts without last tokens."""
    tally = written.tally
    lengths = {
        "dataset_max_seqlen": tally.longest_document - 1,
        "max_samples_per_bin": tally.most_documents,
        "packing_factor": round(tally.documents / max(tally.packs, 1), 2),
        "pack_size": written.seq_len,
        "min_packed_seqlen": tally.shortest_pack,
    }
    write_bytes(folder / METADATA, orjson.dumps([lengths], option=orjson.OPT_INDENT_2))
    return [METADATA]


def loading(written: Written) -> str:
    """Return the lines that load it."""
    return f"""\
```python
from megatron.bridge.data.builders import GPTSFTDatasetConfig
from megatron.bridge.data.packing import PackedSequenceSpecs

config.dataset = GPTSFTDatasetConfig(
    dataset_root="DIR",
    seq_length={written.seq_len},
    enable_offline_packing=True,
    offline_packing_specs=PackedSequenceSpecs(
        packed_sequence_size={written.seq_len},
        packed_train_data_path="DIR/part-*.parquet",
        packed_metadata_path="DIR/{METADATA}",
    ),
    do_validation=False,
    do_test=False,
)
config.model.seq_length = {written.seq_len}
config.model.calculate_per_token_loss = True  # divide by the trained tokens of the whole batch
config.train.micro_batch_size = 1
```

The files are those of Megatron-Bridge's offline packing; the tokenizer given to it must be the one
below. Documents are not padded, which context parallelism would need (`pad_seq_to_mult` is 1).
Releases up to 0.6.0 train no token behind one that is the tokenizer's end of sequence. Megatron-LM
itself has no form with a mask for each token."""


TARGET: Final = Target(
    tool="Megatron-Bridge",
    schema=SCHEMA,
    rows=rows,
    loading=loading,
    rows_together=1,
    beside=beside,
)
