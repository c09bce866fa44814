"""The README.md of an export: what it is, how it was made, and the lines that load it.

Where the files are Parquet it begins with the YAML of a dataset card: `load_dataset` finds by it
that the rows are in `part-*.parquet` and nowhere else (manifest.json is no data), and their types.
"""

from collections.abc import Iterable
from typing import Any, Final

import pyarrow as pa
import yaml

from srft_prep import __version__
from srft_prep.export.target import Target, Written
from srft_prep.manifest import Manifest

README: Final = "README.md"
NUMBERS: Final = (
    ("num_sequences", "packed sequences"),
    ("num_documents", "documents"),
    ("num_trajectories", "trajectories"),
    ("num_tokens", "tokens"),
    ("num_loss_tokens", "trained tokens"),
    ("sum_weights", "sum of weights"),
    ("fill", "fill"),
)
"""Counts of the shards' manifest, and what a card calls them."""

_DTYPES: Final = {"float": "float32", "double": "float64"}


def card(
    target: Target,
    source: Manifest,
    written: Written,
    *,
    schema: pa.Schema,
    lost: dict[str, Any] | None,
) -> str:
    """Return the text of README.md.

    Args:
        target: the form.
        source: the shards.
        written: what the folder holds.
        schema: the columns as they stand in its files.
        lost: what the tool makes of the weights; None where it loses nothing.
    """
    parts = [
        f"# Packed training data for {target.tool}",
        f"Written by `srft-prep export` {__version__} from shards of `srft-prep pack`: agent runs, "
        "their steps weighted, as token ids.",
        "## Load",
        target.loading(written),
        "## What it holds",
        _table([("rows", written.tally.rows), *_numbers(source)]),
        "## How it was made",
        _table(_making(source)),
        _weights(target, lost),
        "## Licence",
        "None is stated: it depends on the runs, their repositories and the model that wrote them. "
        "State it here, and as `license:` at the head of this file, before you share the folder.",
    ]
    text = "\n\n".join(parts) + "\n"
    return text if target.format == "arrow" else _front_matter(schema, written) + text


def _front_matter(schema: pa.Schema, written: Written) -> str:
    data_files = [{"split": "train", "path": "part-*.parquet"}]
    head = {
        "configs": [{"config_name": "default", "data_files": data_files}],
        "dataset_info": {
            "features": [_feature(column) for column in schema],
            "splits": [{"name": "train", "num_examples": written.tally.rows}],
        },
        "tags": ["srft-prep"],
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"


def _feature(column: pa.Field) -> dict[str, Any]:
    """Return a column as `datasets` writes features in YAML."""
    return {"name": column.name, **_kind(column.type)}


def _kind(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        inner = _kind(kind.value_type)
        return {"list": inner.get("dtype", inner.get("struct"))}
    if pa.types.is_struct(kind):
        return {"struct": [_feature(kind.field(index)) for index in range(kind.num_fields)]}
    return {"dtype": _DTYPES.get(str(kind), str(kind))}


def _numbers(source: Manifest) -> Iterable[tuple[str, Any]]:
    for name, words in NUMBERS:
        if (value := source.counts.get(name, source.data.get(name))) is not None:
            yield words, value


def _making(source: Manifest) -> Iterable[tuple[str, Any]]:
    data = source.data
    yield "recipe", data["recipe"]
    for name, words in (("weights", "weights of steps"), ("part_weights", "weights of parts")):
        if data.get(name):
            yield words, ", ".join(f"{key} {value:g}" for key, value in data[name].items())
    if "convention" in data:
        yield "trained tokens of a turn", f"convention `{data['convention']}`"
    yield "tokens in a sequence, at most", data["seq_len"]
    yield "tokenizer", f"`{data['tokenizer']}`"
    yield "SHA-256 of the tokenizer", f"`{data['tokenizer_hash']}`"
    yield "SHA-256 of the chat template", f"`{data['template_hash']}`"
    yield "SHA-256 of the shards", f"`{source.as_input()['sha256']}`"


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {_shown(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def _weights(target: Target, lost: dict[str, Any] | None) -> str:
    if target.keeps_weights:
        return "Every weight is in the rows."
    if lost is None:
        return f"All trained tokens have one weight: {target.tool} loses nothing."
    return f"**Weights are lost.** {lost_sentence(target.tool, lost)}"


def lost_sentence(tool: str, lost: dict[str, Any]) -> str:
    """Return what a tool makes of weights that it cannot hold, in a sentence or two."""
    by_weight = lost["tokens_by_weight"] or {}
    each = ", ".join(f"{float(weight):g}: {tokens:,}" for weight, tokens in by_weight.items())
    return (
        f"{tool} trains every token of a weight > 0 with weight 1: {lost['tokens']:,} of "
        f"{lost['of_tokens']:,} trained tokens have another weight ({lost['least_weight']:g} to "
        f"{lost['greatest_weight']:g}, together {lost['sum_weights']:,.1f}"
        f"{'; tokens by weight: ' + each if each else ''})."
    )
