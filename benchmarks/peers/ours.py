"""Passes of this package's `tokenize`, or of bare `tokenizers`, by the protocol of `serving`.

    python benchmarks/peers/ours.py srft-prep TRAJECTORIES TOKENIZER TEMPLATE CORES
    python benchmarks/peers/ours.py encode_batch TRAJECTORIES TOKENIZER TEMPLATE CORES

Both read a trajectory stage directory. `srft-prep` goes from its Parquet parts to token parts, all
that a user gets; its seconds are those from the start of the first part to the end of the last.
`encode_batch` (or `encode_batch_fast`, which gives no offsets) is given the finished texts, in
memory; so it does no reading, no rendering, no masks and no writing.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, Final

import polars as pl
from serving import Pass, Passed, Row, serve

from srft_prep.chat import load_spec
from srft_prep.manifest import read_manifest
from srft_prep.render import ChatTemplate
from srft_prep.template_messages import template_messages, template_tools
from srft_prep.tokens import tokenize
from srft_prep.trajectories import read_trajectories

TEXTS_AT_ONCE: Final = 64
"""Texts in one call of `encode_batch`; a whole data set's offsets would not fit into memory."""


def main(what: str, trajectories: str, tokenizer: str, template: str, cores: str) -> None:
    """Serve passes until stdin ends."""
    os.environ["RAYON_NUM_THREADS"] = cores
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if int(cores) > 1 else "false"

    def load() -> tuple[dict[str, Any], Pass]:
        source, chosen = Path(trajectories), Path(template)
        if what == "srft-prep":
            make_pass = _load_tokenize(source, tokenizer, chosen, int(cores))
        else:
            make_pass = _load_encode(source, tokenizer, chosen, what)
        names = ("tokenizers", "fastokens", "transformers", "polars", "pyarrow")
        return {"versions": {name: version(name) for name in names}}, make_pass

    serve(load)


def _load_tokenize(source: Path, tokenizer: str, template: Path, cores: int) -> Pass:
    passes = count()

    def make_pass() -> Passed:
        output = Path(tempfile.mkdtemp(prefix="tokens-", dir=source.parent))
        manifest = tokenize(
            source,
            output,
            tokenizer=tokenizer,
            chat_template=template,
            axolotl=next(passes) == 0,  # the first pass is compared, and not timed
            workers=cores,
            overwrite=True,
        )
        said = {
            "seconds": manifest.run["seconds"],
            "startup_seconds": manifest.run["startup_seconds"],
            "tokens": manifest.counts["tokens"],
            "certificate": manifest.data.get("certificate"),
            "output": str(output),
        }
        return said, lambda: _rows_of(output)

    return make_pass


def _rows_of(tokens: Path) -> Iterator[Row]:
    """Yield what is in token parts, with the ranges that each other tool would train."""
    for part in read_manifest(tokens, stage="tokenize").parts:
        columns = ["trajectory_id", "input_ids", "convention_spans"]
        for row in pl.read_parquet(part, columns=columns).iter_rows(named=True):
            trained: dict[str, list[tuple[int, int]]] = {"trl": [], "axolotl": []}
            for span in row["convention_spans"]:
                trained[span["convention"]].append((span["start"], span["end"]))
            yield {
                "id": row["trajectory_id"],
                "ids": row["input_ids"],
                **{name: merged(spans) for name, spans in trained.items()},
            }


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges in order, those that touch as one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _load_encode(source: Path, tokenizer: str, template: Path, method: str) -> Pass:
    from tokenizers import Tokenizer

    spec = load_spec(tokenizer, template)
    backend = Tokenizer.from_str(spec.backend)
    chat = ChatTemplate(spec.template, variables=spec.variables, control_tokens=spec.control_tokens)
    names, texts = [], []
    for trajectory in read_trajectories(read_manifest(source, stage="ingest").parts):
        messages, _ = template_messages(trajectory)
        texts.append(chat.render(messages, template_tools(trajectory)).text)
        names.append(trajectory.trajectory_id)
    encode = getattr(backend, method)

    def make_pass() -> Passed:
        found: list[list[int]] = []
        seconds = 0.0
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            batch = texts[first : first + TEXTS_AT_ONCE]
            start = time.perf_counter()
            encodings = encode(batch, add_special_tokens=False)
            seconds += time.perf_counter() - start
            found += [encoding.ids for encoding in encodings]

        def rows() -> Iterator[Row]:
            for name, ids in zip(names, found, strict=True):
                yield {"id": name, "ids": ids}

        return {"seconds": seconds, "tokens": sum(map(len, found))}, rows

    return make_pass


if __name__ == "__main__":
    main(*sys.argv[1:])
