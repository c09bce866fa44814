"""A folder that `datasets.load_dataset` opens: the shards' own files, with a dataset card.

Nothing is lost: the files are copied byte for byte, so that their SHA-256 are those of the shards.
"""

from typing import Final

from srft_prep.export.target import Target, Written
from srft_prep.schemas import SHARDS


def loading(_written: Written) -> str:
    """Return the lines that load it."""
    return """\
```python
import numpy as np
from datasets import load_dataset

dataset = load_dataset("DIR", split="train")

def weights_of(row):  # one float a token
    weights = np.zeros(len(row["input_ids"]), np.float32)
    for run in row["loss_weights"]:
        weights[run["start"] : run["start"] + run["length"]] = run["weight"]
    return weights
```

A row is a packed sequence: documents of `seq_lengths` tokens one after the other, which must not
see each other. `labels` are not shifted, -100 where the weight is 0; `loss_weights` are runs of
tokens of one weight > 0, sorted and disjoint. The loss is the sum of weight times negative
log-likelihood over all tokens, divided by the sum of the weights: of the whole batch, over all
devices."""


TARGET: Final = Target(
    tool="Hugging Face datasets",
    schema=SHARDS,
    rows=None,
    loading=loading,
    keeps_weights=True,
)
