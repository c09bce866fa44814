"""The command from shards to what another tool loads: export.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

from pathlib import Path

import click

from srft_prep.object_mirror import address_of
from srft_prep.options import (
    FOLDER,
    command_line,
    finish,
    json_option,
    output_option,
    overwrite_option,
)


@click.command()
@click.argument("shards", type=FOLDER)
@click.option(
    "--to",
    "target",
    type=click.Choice(["trl", "axolotl", "llama-factory", "megatron", "hf"]),
    required=True,
    help="What is to load it; hf is a Hugging Face dataset, which loses nothing.",
)
@output_option
@overwrite_option
@json_option
def export(shards: Path, target: str, output: Path, overwrite: bool, as_json: bool) -> None:
    """Write SHARDS in the form that another tool loads; its README.md holds the lines for it.

    Only hf keeps weights other than 0 and 1. The other tools train every token of a weight > 0
    alike; what that changes is said, and written into the manifest.
    """
    from srft_prep.export.card import lost_sentence
    from srft_prep.export.stage import TARGETS
    from srft_prep.export.stage import export as run
    from srft_prep.progress import shown

    with shown("export", total=None, unit="sequences") as progress:
        manifest = run(
            shards, output, target, overwrite=overwrite, command=command_line(), progress=progress
        )
    if lost := manifest.data["lost_weights"]:
        click.secho("warning: weights are lost", bold=True, err=True)
        click.echo(lost_sentence(TARGETS[target].tool, lost), err=True)
        click.echo("export --to hf keeps them; for the paper's loss train on the shards", err=True)
    click.echo(f"how to load it: {address_of(output)}/README.md", err=True)
    finish(manifest, as_json, failed=False)
