"""The command line: parse, make one call, print what came of it.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
Exit status: 0 all done, 1 done but some records were rejected or failed, 2 a usage or
configuration error (nothing written), 130 interrupted (the same command continues where it keeps
anything).
"""

import sys
from io import StringIO
from pathlib import Path
from typing import Final, NoReturn

import click
import orjson

from srft_prep import __version__
from srft_prep.compare_commands import compare
from srft_prep.errors import SrftError
from srft_prep.eval_commands import critic_eval
from srft_prep.export_commands import export
from srft_prep.hostile_text import printable, printable_lines
from srft_prep.ingest_commands import ingest
from srft_prep.label_commands import label
from srft_prep.merge_commands import merge
from srft_prep.object_mirror import with_addresses
from srft_prep.options import FOLDER, json_option
from srft_prep.pack_commands import pack
from srft_prep.report_commands import inspect, stats
from srft_prep.review_commands import review
from srft_prep.token_commands import tokenize
from srft_prep.train_commands import train

_KEEP_NOTHING: Final = ("critic-eval", "compare", "stats", "inspect", "verify")
"""Commands that begin anew after an interrupt."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="srft-prep")
def cli() -> None:
    """Turn agent runs into weighted, packed training data by step rejection fine-tuning.

    The stages: ingest, label, tokenize, pack, train. Each reads a directory and writes one.
    """


for stage in (
    ingest,
    label,
    tokenize,
    merge,
    pack,
    train,
    export,
    critic_eval,
    compare,
    stats,
    inspect,
    review,
):
    cli.add_command(stage)


@cli.command()
@click.argument("directory", type=FOLDER)
@json_option
def verify(directory: Path, as_json: bool) -> None:
    """Check a stage DIRECTORY again: hashes, checksums, counts and invariants."""
    from srft_prep.verification import verify as run

    report = run(directory)
    for problem in report.problems:
        click.echo(printable(with_addresses(problem)))
    word = "damaged" if report.problems else "ok"
    click.echo(
        f"{word}: {report.stage}, {report.num_files} files, {report.num_rows} rows, "
        f"{len(report.problems)} problems"
    )
    if as_json:
        problems = [with_addresses(problem) for problem in report.problems]
        click.echo(orjson.dumps({"stage": report.stage, "problems": problems}))
    if report.problems:
        raise click.exceptions.Exit(1)


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    try:
        status = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        keeps_nothing = sys.argv[1:2] and sys.argv[1] in _KEEP_NOTHING
        click.echo(
            "interrupted" if keeps_nothing else "interrupted; the same command continues", err=True
        )
        status = 130
    except click.ClickException as error:
        shown = StringIO()
        error.show(file=shown)
        _tell(shown.getvalue().removesuffix("\n"))
        status = 2
    except SrftError as error:
        _tell(f"Error: {error}")
        status = 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _tell(f"Error: {where}{error.strerror or error}")
        status = 2
    sys.exit(status if isinstance(status, int) else 0)


def _tell(error: str) -> None:
    """Print an error, which may quote what others wrote: it commands no terminal."""
    click.echo(printable_lines(with_addresses(error)), err=True)
