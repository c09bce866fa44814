"""Shards -> a folder that another tool loads; a stage like the others.

A file of rows for every shard, so that a killed run goes on behind the last whole file; memory
holds a batch of packs, whatever the size of the shards. What the tool loses of the weights is
counted, and stands in the manifest and the README.md.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from srft_prep.errors import ConfigError
from srft_prep.export import axolotl, hugging_face, llama_factory, megatron, trl
from srft_prep.export.card import README, card
from srft_prep.export.packs import Packs, read_packs
from srft_prep.export.tally import Tally
from srft_prep.export.target import Target, Written
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.progress import Progress, Silent
from srft_prep.storage import PARQUET_OPTIONS, StageWriter, atomic_path, write_bytes

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

TARGETS: Final[dict[str, Target]] = {
    "trl": trl.TARGET,
    "axolotl": axolotl.TARGET,
    "llama-factory": llama_factory.TARGET,
    "megatron": megatron.TARGET,
    "hf": hugging_face.TARGET,
}

DESCRIBED: Final = (
    "recipe",
    "weights",
    "part_weights",
    "convention",
    "seq_len",
    "tokenizer",
    "tokenizer_hash",
    "template_hash",
)
"""What the manifest repeats of the shards'."""


def export(
    shards: Path,
    output: Path,
    target: str,
    *,
    overwrite: bool = False,
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write shards in a form that a tool loads, to a stage directory; return its manifest.

    `lost_weights` of the manifest says which weights the tool cannot hold, and is null where it
    holds them or they are all the same.

    Args:
        shards: output of `pack`.
        output: directory to write.
        target: a key of `TARGETS`.
        overwrite: whether what another export left in `output` may go.
        command: the command line, for the manifest.
        progress: what shows how far it is.

    Raises:
        ShardError: `shards` is no finished output of `pack`, or was changed.
        ConfigError: there is no such target, or `output` holds something else.
    """
    if target not in TARGETS:
        raise ConfigError(f"export to {target}: expected one of {', '.join(TARGETS)}")
    form = TARGETS[target]
    source = read_manifest(shards, stage="pack").checked()
    with StageWriter.open(
        output,
        stage="export",
        config={"target": target},
        inputs=[source.as_input()],
        overwrite=overwrite,
    ) as writer:
        if writer.finished:
            return writer.finished
        names = [f"part-{number:05d}.{form.format}" for number in range(len(source.parts))]
        _clear_others(output, names)
        tallies = []
        for part, name in zip(source.parts, names, strict=True):
            tallies.append(_convert(part, name, form, source.data["seq_len"], writer))
            (progress or Silent()).advance(tallies[-1].packs)
        tally = Tally.total(tallies)
        written = Written(
            seq_len=source.data["seq_len"],
            shards_hash=source.as_input()["sha256"],
            names=names,
            tally=tally,
        )
        lost = None if form.keeps_weights else tally.lost_weights()
        others = form.beside(output, written)
        schema = pq.read_schema(output / names[0]) if form.format == "parquet" else form.schema
        text = card(form, source, written, schema=schema, lost=lost)
        write_bytes(output / README, text.encode())
        return writer.finish(
            counts=_counts(source, tally, lost),
            names=[*names, *others, README],
            command=command or [],
            extra={"target": target, **_description(source), "lost_weights": lost},
        )


def _clear_others(output: Path, names: list[str]) -> None:
    """Remove what an unfinished export of another plan left; the writer made sure it is ours."""
    for path in (*output.glob("part-*"), *output.glob("*.json"), output / README):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _convert(part: Path, name: str, form: Target, seq_len: int, writer: StageWriter) -> Tally:
    """Write the file of one shard, if an earlier run did not, and return what it holds."""
    path = writer.path / name
    entry = writer.entry(path.stem)
    if entry is not None:
        return Tally(**entry)
    if form.rows is None:
        with atomic_path(path) as temporary:
            shutil.copyfile(part, temporary)
        num_rows = pq.read_metadata(path).num_rows
        tally = Tally(rows=num_rows, packs=num_rows)
    else:
        tally = _convert_rows(part, path, form, partial(form.rows, seq_len=seq_len))
    writer.record(path.stem, tally.entry(), files=[path])
    return tally


def _convert_rows(part: Path, path: Path, form: Target, rows: Callable[[Packs], pa.Table]) -> Tally:
    tallies = []
    with atomic_path(path) as temporary, _opened(temporary, form) as writer:
        for packs in read_packs(part):
            table = rows(packs)
            tallies.append(Tally.of(packs, rows=table.num_rows))
            if form.format == "arrow":
                writer.write_table(table)
            else:
                writer.write_table(table, row_group_size=form.rows_together or table.num_rows)
    return Tally.total(tallies)


def _opened(path: Path, form: Target) -> "AbstractContextManager[Any]":
    writer: AbstractContextManager[Any]
    if form.format == "arrow":
        writer = pa.ipc.new_stream(path, form.schema)
    else:
        writer = pq.ParquetWriter(path, form.schema, **PARQUET_OPTIONS)
    return writer


def _counts(source: Manifest, tally: Tally, lost: dict[str, Any] | None) -> dict[str, Any]:
    """Return the export's counts: its own rows, and the shards' numbers."""
    names = ("num_sequences", "num_documents", "num_tokens", "num_loss_tokens", "sum_weights")
    return {
        "rows": tally.rows,
        **{name: source.counts[name] for name in names},
        "changed_weights": lost["tokens"] if lost else 0,
    }


def _description(source: Manifest) -> dict[str, Any]:
    return {name: source.data[name] for name in DESCRIBED if name in source.data}
