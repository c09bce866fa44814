"""The commands from raw runs to labels: ingest and label.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from srft_prep.config import MAX_INTEGER
from srft_prep.errors import ConfigError
from srft_prep.options import (
    FILE,
    FOLDER,
    MAX_COUNT,
    command_line,
    finish,
    json_option,
    output_option,
    overwrite_option,
)
from srft_prep.readers import READERS


@click.command()
@click.argument("sources", nargs=-1, required=True)
@output_option
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["auto", *sorted(READERS)]),
    default="auto",
    show_default=True,
    help="How the runs are written; auto recognises every record by its content.",
)
@click.option(
    "--outcomes",
    multiple=True,
    metavar="PATH",
    help="SWE-bench report.json or run summary, a folder of them, or CSV/JSONL with "
    "instance_id,resolved. Repeatable.",
)
@click.option(
    "--exclude",
    type=FILE,
    help="Instance ids or repositories to keep out, one a line, or CSV/JSONL with instance_id.",
)
@click.option(
    "--max-per-instance",
    type=click.IntRange(1, MAX_COUNT),
    help="Take at most K runs of an instance.",
)
@click.option("--keep-duplicates", is_flag=True, help="Keep runs with exactly the same messages.")
@click.option("--system-prompt", type=FILE, help="Text that replaces every run's system prompt.")
@click.option(
    "--sample",
    metavar="OUTCOME=N,...",
    help="Draw N runs an outcome: resolved=5000,unresolved=5000. Outcomes that are not named "
    "(unknown, here) are left out.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, MAX_INTEGER),
    default=0,
    show_default=True,
    help="Seed of the sample.",
)
@click.option("--limit", type=click.IntRange(1, MAX_COUNT), help="Take at most N runs.")
@overwrite_option
@json_option
def ingest(
    sources: tuple[str, ...],
    output: Path,
    format_name: str,
    outcomes: tuple[str, ...],
    exclude: Path | None,
    max_per_instance: int | None,
    keep_duplicates: bool,
    system_prompt: Path | None,
    sample: str | None,
    seed: int,
    limit: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Read raw runs into trajectories.

    SOURCES are files, folders or globs: JSON, JSONL and Parquet, also .gz and .zst. Records that
    are no trajectory go to rejected.jsonl with file, line and reason.
    """
    from srft_prep.config import IngestConfig, parse_sample
    from srft_prep.exclusion import read_exclusions

    prompt = _read_text(system_prompt) if system_prompt else None
    if prompt is not None and not prompt.strip():
        raise ConfigError(f"{system_prompt}: expected a system prompt, the file is empty")
    config = IngestConfig(
        format=format_name,
        sample=parse_sample(sample) if sample is not None else None,
        seed=seed,
        limit=limit,
        max_per_instance=max_per_instance,
        keep_duplicates=keep_duplicates,
        system_prompt=prompt,
        exclude=read_exclusions(exclude) if exclude else (),
    )
    from srft_prep.hints import ingest_hints
    from srft_prep.ingest import ingest as run
    from srft_prep.progress import shown

    with shown("ingest", total=None, unit="trajectories") as progress:
        manifest = run(
            sources,
            output,
            config,
            outcomes=outcomes,
            overwrite=overwrite,
            command=command_line(),
            progress=progress,
        )
    counts = manifest.counts
    for hint in ingest_hints(config, counts, outcomes_given=bool(outcomes)):
        click.echo(hint, err=True)
    if counts["rejected"]:
        click.echo(f"rejected records, with reasons: {output / 'rejected.jsonl'}", err=True)
    finish(manifest, as_json, failed=counts["rejected"] > 0)


@click.command()
@click.argument("trajectories", type=FOLDER)
@output_option
@click.option(
    "--critic",
    "critic_name",
    type=click.Choice(["rules", "scripted"]),
    default="rules",
    show_default=True,
    help="Who judges the steps: rules needs no model; scripted takes labels from a file.",
)
@click.option("--model", metavar="PATH", help="scripted: JSONL or CSV of labels.")
@click.option(
    "--only",
    type=click.Choice(["unresolved", "resolved", "all"]),
    default="unresolved",
    show_default=True,
    help="Which trajectories; an unknown outcome counts as unresolved.",
)
@click.option(
    "--context",
    type=click.Choice(["none", "outcome"]),
    default="none",
    show_default=True,
    help="What the rules are told beside the trajectory; with outcome, the last submission of an "
    "unresolved run is harmful. The paper's critic is told nothing.",
)
@click.option("--retry-failed", is_flag=True, help="Ask again what failed in an earlier run.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Write the tables anew for another critic or question; the ledger keeps all answers.",
)
@json_option
def label(
    trajectories: Path,
    output: Path,
    critic_name: str,
    model: str | None,
    only: Any,
    context: str,
    retry_failed: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Let a critic label every step of the TRAJECTORIES good, unnecessary or harmful."""
    if critic_name == "rules" and model is not None:
        raise click.UsageError("--model: the rules critic has no model")
    if critic_name == "scripted" and model is None:
        raise click.UsageError("--critic scripted: give the file of labels with --model PATH")
    if critic_name == "scripted" and context != "none":
        raise click.UsageError("--context: labels from a file take no account of it")
    from srft_prep.config import LabelConfig
    from srft_prep.critic import open_critic
    from srft_prep.labeling import count_trajectories
    from srft_prep.labeling import label as run
    from srft_prep.progress import shown

    options = {"use_outcome": context == "outcome"} if model is None else {"model": model}
    critic = open_critic(critic_name, **options)
    config = LabelConfig(
        critic=critic_name, critic_id=critic.critic_id, prompt_hash=critic.prompt_hash, only=only
    )
    total = count_trajectories(trajectories, config)
    try:
        with shown("label", total=total, unit="trajectories") as progress:
            manifest = run(
                trajectories,
                output,
                critic,
                config,
                retry_failed=retry_failed,
                overwrite=overwrite,
                command=command_line(),
                progress=progress,
            )
    finally:
        critic.close()
    for failure in manifest.data["first_failures"]:
        click.echo(f"failed: {failure}", err=True)
    if manifest.counts["failures"]:
        click.echo(f"all in {output / 'requests.parquet'}", err=True)
    data = {**manifest.data, "counts": {**manifest.counts, **manifest.run}}
    finish(replace(manifest, data=data), as_json, failed=manifest.counts["failures"] > 0)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
