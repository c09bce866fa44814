"""The command from trajectories to tokens: tokenize.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

import os
from pathlib import Path
from typing import Any

import click

from srft_prep.cluster_options import array_job, array_options, cluster_of, engine_options
from srft_prep.options import (
    FILE,
    FOLDER,
    command_line,
    finish,
    json_option,
    output_option,
    overwrite_option,
)


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
    "--axolotl",
    is_flag=True,
    help="Note what axolotl would train, for pack --convention axolotl; with some templates that "
    "takes further renderings.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    show_default="all cores",
    help="Processes, here or in the Ray cluster.",
)
@engine_options
@array_options
@overwrite_option
@json_option
def tokenize(
    trajectories: Path,
    output: Path,
    tokenizer: str,
    chat_template: Path | None,
    history: Any,
    engine: Any,
    axolotl: bool,
    workers: int | None,
    placed_by: str,
    ray_address: str,
    shard_index: int | None,
    num_shards: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn TRAJECTORIES into token ids and the token spans of their steps."""
    from srft_prep.findings import describe_findings
    from srft_prep.manifest import read_manifest
    from srft_prep.progress import shown
    from srft_prep.token_parts import count_share
    from srft_prep.tokens import tokenize as run

    array = array_job(shard_index, num_shards)
    source = read_manifest(trajectories, stage="ingest")
    total = count_share(source, array) if array else source.counts["trajectories"]
    if placed_by == "local":
        workers = workers or len(os.sched_getaffinity(0))
    with (
        cluster_of(placed_by, ray_address, workers=workers) as cluster,
        shown("tokenize", total=total, unit="trajectories") as progress,
    ):
        manifest = run(
            trajectories,
            output,
            tokenizer=tokenizer,
            chat_template=chat_template,
            history=history,
            engine=engine,
            axolotl=axolotl,
            array=array,
            workers=workers,
            cluster=cluster,
            overwrite=overwrite,
            command=command_line(),
            progress=progress,
        )
    for sentence in (
        _history(manifest.data["tried"], history),
        *describe_findings(manifest.counts, num_steps=manifest.counts.get("steps", 0)),
        _certified(manifest.data["certificate"]),
    ):
        click.echo(sentence, err=True)
    finish(manifest, as_json, failed=manifest.counts["rejected"] > 0)


def _history(tried: dict[str, Any], history: str) -> str:
    """Return a sentence on what the template does to the history."""
    checked = f"{tried['trajectories'] - tried['refused']} trajectories looked at closely"
    if tried["rewriting_history"]:
        return (
            f"the chat template rewrites history in {tried['rewriting_history']} of the {checked} "
            f"(--history {history}); first in {tried['first']}"
        )
    return f"the chat template only appends, in all of the {checked}"


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
