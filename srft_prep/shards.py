"""Tokens + labels -> packed, weighted shards.

Three passes. The first reads lengths and spans only and decides everything (`pack_plan`, `layout`).
The second copies the token ids that are needed to a scratch file, each document to the place where
its packed sequence will stand. The third writes the shards, reading the scratch file from start to
end. Memory holds a row group a thread, and some hundred bytes a step. The same inputs and settings
give the same bytes, with any number of threads. Measured: see benchmarks/RESULTS.md.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from srft_prep.calibrated_columns import calibration_for
from srft_prep.config import PackConfig
from srft_prep.errors import ConfigError
from srft_prep.factors import read_factors
from srft_prep.hold_out import write_held_out
from srft_prep.judgements import labels_input, read_judgements, rejected_trajectories
from srft_prep.layout import Layout, lay_out
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.pack_plan import Plan, make_plan
from srft_prep.packing import lower_bound
from srft_prep.progress import Progress, Silent
from srft_prep.ragged import chunks
from srft_prep.schemas import HELD_OUT_FILE
from srft_prep.shard_files import ShardWriter, spill
from srft_prep.storage import StageWriter
from srft_prep.token_columns import StepIndex, read_columns
from srft_prep.weight_files import file_input
from srft_prep.weights import DEFAULT_WEIGHTS, RECIPES


def pack(
    tokens: Path,
    output: Path,
    config: PackConfig,
    *,
    labels: Path | None = None,
    annotator: str | None = None,
    calibration: Path | None = None,
    weight_files: Sequence[Path] = (),
    workers: int = 1,
    overwrite: bool = False,
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write packed sequences of a token directory to a stage directory and return its manifest.

    Args:
        tokens: output of `tokenize`.
        output: directory to write.
        config: the settings.
        labels: output of `label`, or a labels file (see `weight_files`).
        annotator: whose labels count, where `labels` is a gold file by several.
        calibration: file of what the labels go through, whose hash the settings name.
        weight_files: files of weights of steps, parts and characters.
        workers: threads; they change no byte.
        overwrite: whether what other settings left in `output` may go.
        command: the command line, for the manifest.
        progress: what shows how far it is.

    Raises:
        ShardError: `tokens` or `labels` is no finished stage output, or `hold_out` and the tokens
            are of an older version.
        ConfigError: the recipe needs labels and there are none, the label probabilities that
            `soft` needs are missing, or the recipe leaves nothing to train on.
        LabelError: labels or weights do not fit the tokens.
    """
    source = read_manifest(tokens, stage="tokenize")
    labels = _needed_labels(config, labels)
    source.checked()
    inputs = [source.as_input(), *([] if labels is None else [labels_input(labels, annotator)])]
    inputs += [file_input(path, "weights") for path in weight_files]
    plan = _read_plan(
        source, config, labels, weight_files, calibration=calibration, annotator=annotator
    )
    with StageWriter.open(
        output, stage="pack", config=config.describe(), inputs=inputs, overwrite=overwrite
    ) as writer:
        if writer.finished:
            return writer.finished
        layout = lay_out(plan, seq_len=config.seq_len, seed=config.shuffle_seed)
        shards = list(chunks(layout.pack_tokens, config.shard_tokens))
        names = [f"shard-{number:05d}.parquet" for number in range(len(shards))]
        scratch = writer.progress / "input_ids.bin"
        spill(plan, layout, scratch, workers=workers)
        if config.hold_out:
            write_held_out(output, plan.held_out)
        files = ShardWriter(plan=plan, layout=layout, scratch=scratch, seq_len=config.seq_len)
        todo = [(output / name, packs) for name, packs in zip(names, shards, strict=True)]
        for first, last in files.write(todo, workers=workers):
            writer.assure()
            (progress or Silent()).advance(last - first)
        totals = _totals(layout, config)
        described = [{"name": path.name, **layout.totals(*packs)} for path, packs in todo]
        return writer.finish(
            counts={**plan.counts, **totals},
            names=[*names, *([HELD_OUT_FILE] if config.hold_out else [])],
            command=command or [],
            extra={**_description(source, config), **totals, "shards": described},
        )


def _needed_labels(config: PackConfig, labels: Path | None) -> Path | None:
    """Return the labels where the recipe needs some."""
    if RECIPES[config.recipe].needs_labels:
        if labels is None:
            raise ConfigError(
                f"--recipe {config.recipe} weights steps by labels: give --labels DIR"
            )
        return labels
    if config.soft or config.calibration or config.weights != DEFAULT_WEIGHTS:
        raise ConfigError(
            f"--recipe {config.recipe} gives every step weight 1 and reads no labels: leave out "
            "--weights of labels, --soft and --calibration, or choose unresolved-masked, srft or "
            "srft-all"
        )
    return None


def _read_plan(
    source: Manifest,
    config: PackConfig,
    labels: Path | None,
    weight_files: Sequence[Path],
    *,
    calibration: Path | None,
    annotator: str | None,
) -> Plan:
    columns = read_columns(source.parts)
    index = StepIndex(columns)
    rejected = rejected_trajectories(source)
    judgements = None
    if labels is not None:
        judgements = read_judgements(
            labels,
            columns,
            index,
            soft=config.soft,
            rejected=rejected,
            calibration=calibration_for(calibration, labels) if calibration else None,
            annotator=annotator,
        )
    factors = [read_factors(path, columns, index, rejected=rejected) for path in weight_files]
    return make_plan(columns, config, judgements=judgements, factors=factors)


def _description(source: Manifest, config: PackConfig) -> dict[str, Any]:
    """Return what a trainer must know of the shards, beside their totals."""
    tokenizer = source.data["tokenizer"]
    return {
        "recipe": config.recipe,
        "weights": config.weights,
        "part_weights": config.part_weights,
        "convention": config.convention,
        "seq_len": config.seq_len,
        "tokenizer": tokenizer["source"],
        "tokenizer_hash": tokenizer["tokenizer_hash"],
        "template_hash": tokenizer["template_hash"],
    }


def _totals(layout: Layout, config: PackConfig) -> dict[str, Any]:
    """Return the numbers that a trainer plans with; `sum_weights` is the loss's denominator."""
    totals: dict[str, Any] = layout.totals(0, layout.num_packs)
    return {
        **totals,
        "num_trajectories": len(np.unique(layout.trajectories)),
        "fill": layout.num_tokens / (layout.num_packs * config.seq_len),
        "min_sequences": lower_bound(layout.lengths.astype(np.int64), config.seq_len),
    }
