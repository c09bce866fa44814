"""The command that makes one directory of those of array jobs: merge."""

from pathlib import Path

import click

from srft_prep.options import FOLDER, command_line, finish, json_option, output_option


@click.command()
@click.argument("directories", nargs=-1, required=True, type=FOLDER)
@output_option
@click.option(
    "--trajectories",
    type=FOLDER,
    help="The output of ingest that the jobs shared, where it is not where they read it.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace tokens that a run with other settings left there; labels are never replaced.",
)
@json_option
def merge(
    directories: tuple[Path, ...],
    output: Path,
    trajectories: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make one directory of the DIRECTORIES of array jobs (--shard-index, --num-shards).

    It is the one that a single run of label or tokenize would have written. Refused: a job that is
    missing or given twice, jobs with different settings, and a trajectory that is nowhere or twice.
    """
    from srft_prep.merging import merge as run
    from srft_prep.progress import shown

    with shown("merge", total=None, unit="trajectories") as progress:
        manifest = run(
            directories,
            output,
            trajectories=trajectories,
            overwrite=overwrite,
            command=command_line(),
            progress=progress,
        )
    counts = manifest.counts
    failures = counts.get("failures", 0) - counts.get("went_on", 0)
    finish(manifest, as_json, failed=counts.get("rejected", 0) + failures > 0)
