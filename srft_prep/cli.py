"""The command line: parse, make one call, print what came of it.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
Exit status: 0 all done, 1 done but some records were rejected or failed, 2 a usage or
configuration error (nothing written), 130 interrupted (the same command continues).
"""

import signal
import sys
from pathlib import Path
from typing import NoReturn

import click
import orjson

from srft_prep import __version__
from srft_prep.compare_commands import compare
from srft_prep.errors import SrftError
from srft_prep.export_commands import export
from srft_prep.ingest_commands import ingest
from srft_prep.label_commands import label
from srft_prep.options import FOLDER, json_option
from srft_prep.pack_commands import pack
from srft_prep.token_commands import tokenize
from srft_prep.train_commands import train


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="srft-prep")
def cli() -> None:
    """Turn agent runs into weighted, packed training data by step rejection fine-tuning.

    The stages: ingest, label, tokenize, pack, train. Each reads a directory and writes one.
    """


for stage in (ingest, label, tokenize, pack, train, export, compare):
    cli.add_command(stage)


@cli.command()
@click.argument("trajectories", type=FOLDER)
@click.option("--labels", type=FOLDER, help="Output of label.")
@click.option("--tokens", type=FOLDER, help="Output of tokenize: adds lengths in tokens.")
@json_option
def stats(trajectories: Path, labels: Path | None, tokens: Path | None, as_json: bool) -> None:
    """Print label distribution, steps, tokens and cost by outcome: the paper's Table 1."""
    from srft_prep.statistics import collect, table

    numbers = collect(trajectories, labels=labels, tokens=tokens)
    click.echo(table(numbers))
    if as_json:
        click.echo(orjson.dumps(numbers))


@cli.command()
@click.argument("directory", type=FOLDER)
@click.option("--id", "trajectory_id", required=True, help="The trajectory's id.")
@click.option("--labels", type=FOLDER, help="Output of label, to show beside trajectories.")
@click.option("--full", is_flag=True, help="Show long observations whole.")
@click.option("--color/--no-color", default=None, help="Default: colour on a terminal only.")
def inspect(
    directory: Path, trajectory_id: str, labels: Path | None, full: bool, color: bool | None
) -> None:
    """Show one trajectory of a DIRECTORY: steps by label, or tokens by weight.

    DIRECTORY is the output of ingest (steps with their labels), tokenize (the agent's spans) or
    pack (weights as the student will see them).
    """
    from srft_prep.inspection import show

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `inspect ... | head` ends like any pipe
    for line, style in show(directory, trajectory_id, labels=labels, full=full):
        click.echo(click.style(line, **style), color=color)


@cli.command()
@click.argument("directory", type=FOLDER)
@json_option
def verify(directory: Path, as_json: bool) -> None:
    """Check a stage DIRECTORY again: hashes, checksums, counts and invariants."""
    from srft_prep.verification import verify as run

    report = run(directory)
    for problem in report.problems:
        click.echo(problem)
    word = "damaged" if report.problems else "ok"
    click.echo(
        f"{word}: {report.stage}, {report.num_files} files, {report.num_rows} rows, "
        f"{len(report.problems)} problems"
    )
    if as_json:
        click.echo(orjson.dumps({"stage": report.stage, "problems": report.problems}))
    if report.problems:
        raise click.exceptions.Exit(1)


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    try:
        status = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted; the same command continues", err=True)
        status = 130
    except click.ClickException as error:
        error.show()
        status = 2
    except SrftError as error:
        click.echo(f"Error: {error}", err=True)
        status = 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"Error: {where}{error.strerror or error}", err=True)
        status = 2
    sys.exit(status if isinstance(status, int) else 0)
