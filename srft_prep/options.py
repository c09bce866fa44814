"""What the commands share: types, options, the last line, the exit status."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
import orjson

if TYPE_CHECKING:
    from srft_prep.manifest import Manifest

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT = click.Path(file_okay=False, path_type=Path)

MAX_COUNT: Final = 2**31 - 1

output_option = click.option(
    "-o", "--output", type=OUTPUT, required=True, help="Directory to write; made if need be."
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace what an earlier run with other settings left there."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Make the last line of output one JSON document."
)


def finish(
    manifest: "Manifest",
    as_json: bool,
    *,
    failed: bool,
    more: dict[str, Any] | None = None,
) -> NoReturn:
    """Print a stage's counts, last, and exit with 0 or 1; `more` goes into the JSON document."""
    flat = ", ".join(
        f"{value:,} {name}" if isinstance(value, int) else f"{name} {_short(value)}"
        for name, value in manifest.counts.items()
        if value not in (0, {}, None) or name in ("trajectories", "steps")
    )
    click.echo(f"{manifest.stage}: {flat}")
    if as_json:
        document = {"stage": manifest.stage, "path": str(manifest.path), **manifest.counts}
        document |= more or {}
        click.echo(orjson.dumps(document))
    raise click.exceptions.Exit(1 if failed else 0)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={number}" for key, number in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def command_line() -> list[str]:
    """Return the words of the command being run, for a manifest; without passwords and keys."""
    words = (os.fsencode(word).decode("utf-8", "backslashreplace") for word in sys.argv[1:])
    return ["srft-prep", *map(_without_secrets, words)]


def _without_secrets(word: str) -> str:
    word = re.sub(r"(?<=://)[^/@\s]+(?=@)", "[key]", word)
    return re.sub(r"(?i)((?:^|[=_-])(?:token|key|password|secret))=.+", r"\1=[key]", word)
