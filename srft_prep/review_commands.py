"""The command that shows trajectories in a browser and takes labels by hand: review.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

import getpass
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from srft_prep.errors import ConfigError
from srft_prep.object_mirror import address_of, is_mirrored
from srft_prep.options import APPENDED_FILE, FOLDER, named_path

if TYPE_CHECKING:
    from srft_prep.review.session import Session, Settings

GOLD_FILE: Final = "gold.jsonl"
_LONGEST_NAME: Final = 100


def _named_folders(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> dict[str, Path]:
    """Return label directories by name: `NAME=DIR`, or DIR under its own name."""
    found: dict[str, Path] = {}
    for word in given:
        given_name, folder = named_path(word, folder=True)
        name = given_name or folder.resolve().name
        if not name or name in found:
            raise click.BadParameter(f"two are called {name!r}: name them, NAME=DIR")
        found[name] = folder
    return found


@click.command()
@click.argument("trajectories", type=FOLDER)
@click.option(
    "--labels",
    multiple=True,
    callback=_named_folders,
    metavar="DIR|NAME=DIR",
    help="Output of label (repeatable): a critic's labels to hold yours against.",
)
@click.option(
    "--gold",
    type=APPENDED_FILE,
    help="File your labels are appended to.  [default: gold.jsonl beside TRAJECTORIES]",
)
@click.option("--annotator", help="Whose labels these are.  [default: your login name]")
@click.option(
    "--read-only", is_flag=True, help="Write nothing, show all labels from the beginning."
)
@click.option(
    "--blind/--no-blind",
    default=True,
    show_default=True,
    help="Hide others' labels of a step, critics' and people's, until you have labelled it.",
)
@click.option(
    "--adjudicate",
    is_flag=True,
    help="Your labels settle what others disagree about; shows their labels.",
)
@click.option(
    "--port",
    default=0,
    show_default=True,
    type=click.IntRange(0, 65_535),
    help="Port on 127.0.0.1; 0 takes a free one.",
)
@click.option(
    "--browser/--no-browser", default=True, help="Open the page, where there is a display."
)
def review(
    trajectories: Path,
    labels: dict[str, Path],
    gold: Path | None,
    annotator: str | None,
    read_only: bool,
    blind: bool,
    adjudicate: bool,
    port: int,
    browser: bool,
) -> None:
    """Read TRAJECTORIES (output of ingest) in a browser and label their steps by hand.

    Prints the address of a page that only you can open; Ctrl-C ends it. Every label is appended to
    the gold file at once, and critic-eval --gold reads that file. Several people may label into one
    file; each gives a name.
    """
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise ConfigError(f"{package} is not installed: pip install 'srft-prep[review]'")
    from srft_prep.review.server import serve
    from srft_prep.review.session import Settings

    if read_only and adjudicate:
        raise ConfigError("--read-only writes nothing: leave out --adjudicate")
    if read_only and gold is not None and not gold.exists():
        raise ConfigError(f"--gold {gold}: expected a gold file, but it is not there")
    if gold is None and is_mirrored(trajectories) and not read_only:
        raise ConfigError(
            f"{address_of(trajectories)}: gold labels are kept in a local file: give --gold FILE"
        )
    if gold is None:
        beside = trajectories.resolve().parent / GOLD_FILE
        gold = beside if not read_only or beside.exists() else None
    if not read_only:
        _check_writable(gold)
    settings = Settings(
        annotator=_annotator(annotator),
        gold=gold,
        read_only=read_only,
        blind=blind,
        adjudicates=adjudicate,
    )
    session = _session(trajectories, labels, settings)

    def ready(address: str) -> None:
        count = session.catalogue.num_trajectories
        click.echo(f"{count:,} trajectories, {session.catalogue.num_steps:,} steps")
        if not read_only:
            click.echo(f"labels of {settings.annotator} go to {gold}")
        click.echo(f"review: {address}")
        click.echo("Ctrl-C ends it")

    serve(session, port=port, ready=ready, browser=browser)
    if not read_only:
        click.echo(f"{session.num_labelled():,} steps labelled by {settings.annotator} in {gold}")
        click.echo(f"measure the critics: {session.eval_command()}")


def _session(trajectories: Path, labels: dict[str, Path], settings: "Settings") -> "Session":
    from srft_prep.review.catalogue import Catalogue
    from srft_prep.review.columns import read_critic
    from srft_prep.review.session import Session

    catalogue = Catalogue(trajectories)
    critics = [read_critic(folder, name, catalogue) for name, folder in labels.items()]
    return Session(catalogue, critics, settings)


def _annotator(given: str | None) -> str:
    try:
        name = getpass.getuser() if given is None else given.strip()
    except (KeyError, OSError):  # a container's user may have none
        raise ConfigError("your user has no login name: give --annotator NAME") from None
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise ConfigError(
            f"--annotator: expected a name of 1 to {_LONGEST_NAME} printable characters, "
            f"got {ascii(name)[:40]}"
        )
    return name


def _check_writable(gold: Path | None) -> None:
    """Find out before an hour of labelling, not after the first label."""
    assert gold is not None
    place = gold if gold.exists() else gold.parent
    if not place.exists():
        raise ConfigError(f"--gold: the folder {place} does not exist")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"{place}: may not be written to; give --gold FILE, or --read-only")
