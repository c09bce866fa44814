"""What the commands share: types, options, the last line, the exit status."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
import orjson

from srft_prep.object_storage import is_url

if TYPE_CHECKING:
    from srft_prep.manifest import Manifest


class _InputPath(click.Path):
    """A path, or a URL (s3://, gs://, hf://), of which the place on this machine comes out."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if is_url(value):
            from srft_prep.object_inputs import input_path

            return input_path(value, folder=self.dir_okay, file=self.file_okay)
        return super().convert(value, param, ctx)


class _OutputFolder(click.Path):
    """A directory to write, or a URL, of which the place on this machine comes out."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if is_url(value):
            from srft_prep.object_mirror import output_place

            return output_place(value)
        return super().convert(value, param, ctx)


class _LocalPath(click.Path):
    """A path of this machine's alone."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if is_url(value):
            self.fail(f"{value}: expected a local path: only directories go to a store", param, ctx)
        return super().convert(value, param, ctx)


FOLDER = _InputPath(exists=True, file_okay=False, path_type=Path)
FILE = _InputPath(exists=True, dir_okay=False, path_type=Path)
FOLDER_OR_FILE = _InputPath(exists=True, path_type=Path)
PAGE_FILE = _LocalPath(dir_okay=False, writable=True, path_type=Path)
APPENDED_FILE = _LocalPath(dir_okay=False, path_type=Path)
OUTPUT = _OutputFolder(file_okay=False, path_type=Path)

MAX_COUNT: Final = 2**31 - 1

output_option = click.option(
    "-o",
    "--output",
    type=OUTPUT,
    required=True,
    help="Directory to write, local or s3:// or gs://; made if need be.",
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
        from srft_prep.object_mirror import address_of

        document = {"stage": manifest.stage, "path": address_of(manifest.path), **manifest.counts}
        document |= more or {}
        click.echo(orjson.dumps(document))
    raise click.exceptions.Exit(1 if failed else 0)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={number}" for key, number in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def named_path(word: str, *, folder: bool = False, whole: bool = False) -> tuple[str | None, Path]:
    """Return the name and the path of `NAME=PATH`, or a path that is there and has no name.

    A path may hold `=` itself: what is there as a whole is no name. Of a URL comes its place here,
    with all that is there if it is a folder and `whole`.

    Raises:
        click.BadParameter: there is no such path, or with `folder` no such directory.
    """
    name, equals, rest = word.partition("=")
    if not equals or is_url(word) or Path(word).exists():
        name, rest = "", word
    elif not (name and rest):
        raise click.BadParameter(f"expected NAME=PATH, got {word!r}")
    if is_url(rest):
        from srft_prep.object_inputs import input_path

        return name or None, input_path(rest, file=not folder, whole=whole)
    path = Path(rest)
    if folder and not path.is_dir():
        raise click.BadParameter(f"{path} is no directory")
    if not path.exists():
        raise click.BadParameter(f"{path} does not exist")
    return name or None, path


def command_line() -> list[str]:
    """Return the words of the command being run, for a manifest; without passwords and keys."""
    words = (os.fsencode(word).decode("utf-8", "backslashreplace") for word in sys.argv[1:])
    return ["srft-prep", *map(_without_secrets, words)]


def _without_secrets(word: str) -> str:
    word = re.sub(r"(?<=://)[^/@\s]+(?=@)", "[key]", word)
    return re.sub(r"(?i)((?:^|[=_-])(?:token|key|password|secret))=.+", r"\1=[key]", word)
