"""The command from raw runs to trajectories: ingest.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

from pathlib import Path

import click

from srft_prep.config import MAX_INTEGER
from srft_prep.errors import ConfigError
from srft_prep.options import (
    FILE,
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

    SOURCES are files, folders or globs, local or s3://, gs:// or hf://: JSON, JSONL and Parquet,
    also .gz and .zst. Records that are no trajectory go to rejected.jsonl with file, line and
    reason.
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
    from srft_prep.object_mirror import address_of
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
        click.echo(f"rejected records, with reasons: {address_of(output)}/rejected.jsonl", err=True)
    finish(manifest, as_json, failed=counts["rejected"] > 0)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
