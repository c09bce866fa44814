"""Small shards, written by the schema and the real stage writer, and what they hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from srft_prep.schemas import SHARDS
from srft_prep.storage import StageWriter, write_table

IGNORED = -100
SEQ_LEN = 64
VOCABULARY = 3700
"""Below the example tokenizer's."""

Documents = Sequence["Document"]


@dataclass(frozen=True)
class Document:
    """A trajectory, or a window of one."""

    owner: str
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    """One a token; the first is 0, since nothing predicts it."""

    @property
    def labels(self) -> list[int]:
        return np.where(self.weights > 0, self.ids, IGNORED).tolist()


def document(
    owner: str, length: int, weights: Sequence[float] = (1.0,), *, seed: int = 0
) -> Document:
    """Return a document: 3 tokens of context, a step of 4, and so on; weights by step."""
    generator = np.random.default_rng([seed, length, *owner.encode()])
    ids = generator.integers(3, VOCABULARY, length).astype(np.int32)
    each = np.zeros(length, np.float32)
    for step, start in enumerate(range(3, length, 7)):
        each[start : start + 4] = weights[step % len(weights)]
    return Document(owner, ids, each)


def ordinary(weights: Sequence[float] = (1.0, 0.0, 1.0)) -> list[list[list[Document]]]:
    """Return packs by shard: many documents, one, a weightless one, two windows of a trajectory,
    neighbours that end and begin with weight, and documents of one and two tokens."""
    hopeless = document("hopeless", 20, (0.0,))
    ended = document("ended", 14, weights)  # its last tokens carry weight
    return [
        [
            [document("a", 30, weights), hopeless, ended],
            [document("long", SEQ_LEN, weights)],
            [document("window", 40, weights), document("b", 17, weights)],
        ],
        [
            [document("window", 33, weights, seed=1), document("two", 2), document("one", 1)],
            [document("c", 21, weights), document("d", 14, weights)],
            [document("e", 9, weights)] + [document(f"tiny{n}", 8, weights) for n in range(6)],
        ],
        [[document("last", 11, weights), document("f", 21, weights)]],
    ]


def write_shards(path: Path, shards: Sequence[Sequence[Documents]], **described: Any) -> Path:
    """Write packs as `pack` does, one file for each list of packs."""
    packs = [pack for shard in shards for pack in shard]
    documents = [each for pack in packs for each in pack]
    totals = _totals(packs)
    with StageWriter.open(path, stage="pack", config={}, inputs=[], overwrite=True) as writer:
        names = [f"shard-{number:05d}.parquet" for number in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            table = pa.Table.from_pylist([_row(pack, documents) for pack in shard], schema=SHARDS)
            write_table(table, path / name, row_group_rows=2)
        extra = {
            "seq_len": SEQ_LEN,
            "recipe": "srft",
            "weights": {"good": 1.0, "unnecessary": 0.5, "harmful": 0.0},
            "part_weights": {},
            "convention": "srft",
            "tokenizer": "example",
            "tokenizer_hash": "0" * 64,
            "template_hash": "1" * 64,
        }
        writer.finish(
            counts=totals, names=names, command=[], extra={**extra, **totals, **described}
        )
    return path


def _row(pack: Documents, everything: Documents) -> dict[str, Any]:
    runs, position = [], 0
    for each in pack:
        start = position
        for weight, group in groupby(each.weights.tolist()):
            length = len(list(group))
            if weight:
                runs.append({"start": start, "length": length, "weight": weight})
            start += length
        position += len(each.ids)
    return {
        "input_ids": flat(each.ids.tolist() for each in pack),
        "labels": flat(each.labels for each in pack),
        "seq_lengths": [len(each.ids) for each in pack],
        "loss_weights": runs,
        "trajectory_ids": [each.owner for each in pack],
        "sum_weights": _sum(pack),
        "document_sum_weights": [_sum([each]) for each in pack],
        "trajectory_sum_weights": [
            _sum([other for other in everything if other.owner == each.owner]) for each in pack
        ],
    }


def _totals(packs: Sequence[Documents]) -> dict[str, Any]:
    documents = [each for pack in packs for each in pack]
    num_tokens = sum(len(each.ids) for each in documents)
    return {
        "num_sequences": len(packs),
        "num_documents": len(documents),
        "num_trajectories": len({each.owner for each in documents}),
        "num_tokens": num_tokens,
        "num_loss_tokens": sum(int((each.weights > 0).sum()) for each in documents),
        "sum_weights": _sum(documents),
        "fill": num_tokens / (len(packs) * SEQ_LEN),
    }


def _sum(documents: Documents) -> float:
    return math.fsum(weight for each in documents for weight in each.weights.tolist())


def flat(lists: Any) -> list[Any]:
    """Return the items of lists, one list after the other."""
    return [item for each in lists for item in each]


def packs_of(shards: Sequence[Sequence[Documents]]) -> list[Documents]:
    """Return the packs of all shards in order."""
    return [pack for shard in shards for pack in shard]


def positions(pack: Documents) -> list[int]:
    """Return each token's place in its document."""
    return flat(range(len(each.ids)) for each in pack)


def code_of(folder: Path, language: str, *changes: tuple[str, str]) -> str:
    """Return the lines that a folder's README.md gives to load it, with changes made in them."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    code = text.split(f"```{language}\n", 1)[1].split("```", 1)[0].replace("DIR", str(folder))
    for old, new in changes:
        assert old in code, f"the README.md has no {old}"
        code = code.replace(old, new)
    return code
