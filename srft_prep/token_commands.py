"""The commands from trajectories and labels to shards: tokenize and pack.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

import os
from pathlib import Path
from typing import Any

import click

from srft_prep.config import DEFAULT_SEQ_LEN, MAX_INTEGER
from srft_prep.options import (
    FILE,
    FOLDER,
    command_line,
    finish,
    json_option,
    output_option,
    overwrite_option,
)
from srft_prep.weights import RECIPES, parse_weights


@click.command()
@click.argument("trajectories", type=FOLDER)
@output_option
@click.option(
    "--tokenizer",
    required=True,
    metavar="PATH_OR_ID",
    help="Folder or hub id of the student's tokenizer; 'example' for the small one included.",
)
@click.option("--chat-template", type=FILE, help="Jinja file in place of the tokenizer's own.")
@click.option(
    "--history",
    type=click.Choice(["auto", "full", "per-step"]),
    default="auto",
    show_default=True,
    help="Templates that rewrite earlier messages: auto refuses them, full trains on the final "
    "rendering, per-step gives each step a sequence with the context that the model saw.",
)
@click.option(
    "--tokenizer-engine",
    "engine",
    type=click.Choice(["auto", "fastokens", "tokenizers"]),
    default="auto",
    show_default=True,
    help="auto takes fastokens where it proves equal to tokenizers on this tokenizer and this "
    "data (the certificate in manifest.json), and tokenizers elsewhere.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="all cores",
    help="Processes.",
)
@overwrite_option
@json_option
def tokenize(
    trajectories: Path,
    output: Path,
    tokenizer: str,
    chat_template: Path | None,
    history: Any,
    engine: Any,
    workers: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn TRAJECTORIES into token ids and the token spans of their steps."""
    from srft_prep.manifest import read_manifest
    from srft_prep.progress import shown
    from srft_prep.tokens import tokenize as run

    total = read_manifest(trajectories, stage="ingest").counts["trajectories"]
    with shown("tokenize", total=total, unit="trajectories") as progress:
        manifest = run(
            trajectories,
            output,
            tokenizer=tokenizer,
            chat_template=chat_template,
            history=history,
            engine=engine,
            workers=workers,
            overwrite=overwrite,
            command=command_line(),
            progress=progress,
        )
    for name in ("content", "reasoning_content", "tool_calls"):
        if dropped := manifest.counts.get(f"dropped_{name}"):
            click.echo(f"the chat template leaves out {name} of {dropped} steps", err=True)
    click.echo(_certified(manifest.data["certificate"]), err=True)
    finish(manifest, as_json, failed=manifest.counts["rejected"] > 0)


def _certified(certificate: dict[str, Any]) -> str:
    """Return the certificate as a sentence."""
    versions = certificate["versions"]
    engine, reference = (
        f"{name} {versions.get(name, '')}"
        for name in (certificate["engine"], certificate["reference"])
    )
    if engine == reference:
        return f"encoded by {engine}: {certificate['reason']}"
    phases = [certificate[phase] for phase in ("at_start", "during_run")]
    strings, tokens = (sum(phase[key] for phase in phases) for key in ("strings", "tokens"))
    return (
        f"encoded by {engine}, equal to {reference} on the {strings:,} strings "
        f"({tokens:,} tokens) that both encoded"
    )


@click.command()
@click.argument("tokens", type=FOLDER)
@output_option
@click.option("--labels", type=FOLDER, help="Output of label; needed by the masked recipes.")
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default="srft",
    show_default=True,
    help="Which trajectories, and which of them are weighted by their labels.",
)
@click.option(
    "--weights",
    default="good=1,unnecessary=1,harmful=0",
    show_default=True,
    help="Weight of a step by its label, each >= 0.",
)
@click.option("--soft", is_flag=True, help="Weight by the label probabilities' expected value.")
@click.option(
    "--seq-len",
    type=click.IntRange(1, 1 << 24),
    default=DEFAULT_SEQ_LEN,
    show_default=True,
    help="Tokens in a packed sequence, at most.",
)
@click.option(
    "--overlong",
    type=click.Choice(["truncate", "windows", "drop", "error"]),
    default="truncate",
    show_default=True,
    help="Longer trajectories: cut behind a step, cut into windows that train each step once, "
    "leave out, or stop.",
)
@click.option(
    "--missing-label",
    type=click.Choice(["drop", "mask", "error"]),
    default="drop",
    show_default=True,
    help="A step without a label: leave its trajectory out, give it weight 0, or stop.",
)
@click.option(
    "--drop-weightless",
    is_flag=True,
    help="Leave out documents without a weighted token, which change no gradient.",
)
@click.option(
    "--shuffle-seed",
    type=click.IntRange(0, MAX_INTEGER),
    default=0,
    show_default=True,
    help="Seed of the order.",
)
@overwrite_option
@json_option
def pack(
    tokens: Path,
    output: Path,
    labels: Path | None,
    recipe: str,
    weights: str,
    soft: bool,
    seq_len: int,
    overlong: Any,
    missing_label: Any,
    drop_weightless: bool,
    shuffle_seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Weight the steps of TOKENS by their labels and pack them into shards."""
    from srft_prep.config import PackConfig
    from srft_prep.progress import shown
    from srft_prep.shards import pack as run

    config = PackConfig(
        recipe=recipe,
        weights={str(name): value for name, value in parse_weights(weights).items()},
        soft=soft,
        seq_len=seq_len,
        overlong=overlong,
        missing_label=missing_label,
        drop_weightless=drop_weightless,
        shuffle_seed=shuffle_seed,
    )
    with shown("pack", total=None, unit="sequences") as progress:
        manifest = run(
            tokens,
            output,
            config,
            labels=labels,
            overwrite=overwrite,
            command=command_line(),
            progress=progress,
        )
    if missing := manifest.counts["missing_label"]:
        click.echo(
            f"{missing} trajectories of which {recipe} weights the steps by label lack some "
            f"({missing_label}): see label --only and label --retry-failed",
            err=True,
        )
    if (weightless := manifest.counts["weightless"]) and not drop_weightless:
        click.echo(
            f"{weightless} documents carry no weighted token; --drop-weightless leaves them out",
            err=True,
        )
    finish(manifest, as_json, failed=manifest.counts["missing_label"] > 0)
