"""The commands that show what stages made: stats and inspect.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

import signal
from pathlib import Path

import click
import orjson

from srft_prep.options import FOLDER, PAGE_FILE, json_option

BY = ("outcome", "format", "model")


@click.command()
@click.argument("trajectories", type=FOLDER)
@click.option("--labels", type=FOLDER, help="Output of label.")
@click.option("--tokens", type=FOLDER, help="Output of tokenize: adds lengths in tokens.")
@click.option(
    "--by",
    type=click.Choice(BY),
    default="outcome",
    show_default=True,
    help="What the table tells apart.",
)
@click.option(
    "--full",
    is_flag=True,
    help="Print also labels by place and number of steps, cost of a trajectory, lengths.",
)
@click.option("--html", type=PAGE_FILE, help="Write a page with all tables and plots to this file.")
@json_option
def stats(
    trajectories: Path,
    labels: Path | None,
    tokens: Path | None,
    by: str,
    full: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Print label distribution, steps, tokens and cost by outcome: the paper's Table 1."""
    from srft_prep.output_files import PAGE, will_replace
    from srft_prep.plots import require_plots
    from srft_prep.statistics import collect
    from srft_prep.statistics_report import text

    if html is not None:
        require_plots("--html")
    is_replaced = will_replace(html, PAGE, option="--html", others=(trajectories, labels, tokens))
    numbers = collect(trajectories, labels=labels, tokens=tokens)
    click.echo(text(numbers, by=by, full=full))
    if html is not None:
        from srft_prep.pages import write_page
        from srft_prep.statistics_page import page

        write_page(html, page(numbers, trajectories=trajectories))
        if is_replaced:
            click.echo(f"{html}: replaced an earlier page", err=True)
    if as_json:
        click.echo(orjson.dumps(numbers))


@click.command()
@click.argument("directory", type=FOLDER)
@click.option("--id", "trajectory_id", required=True, help="The trajectory's id.")
@click.option(
    "--labels",
    type=FOLDER,
    help="Output of label, to show beside trajectories; with --tokens also beside shards.",
)
@click.option(
    "--tokens",
    type=FOLDER,
    help="Output of tokenize that shards were made from: says which steps they hold.",
)
@click.option("--full", is_flag=True, help="Show long observations whole.")
@click.option("--color/--no-color", default=None, help="Default: colour on a terminal only.")
@click.option(
    "--html",
    type=PAGE_FILE,
    help="Write a page to this file instead: coloured by label or weight, tokens told apart.",
)
def inspect(
    directory: Path,
    trajectory_id: str,
    labels: Path | None,
    tokens: Path | None,
    full: bool,
    color: bool | None,
    html: Path | None,
) -> None:
    """Show one trajectory of a DIRECTORY: steps by label, or tokens by weight.

    DIRECTORY is the output of ingest (steps with their labels), tokenize (the agent's spans) or
    pack (weights as the student will see them).
    """
    from srft_prep.inspection import find
    from srft_prep.inspection_text import lines
    from srft_prep.output_files import PAGE, will_replace

    is_replaced = will_replace(html, PAGE, option="--html", others=(directory, labels, tokens))
    shown = find(directory, trajectory_id, labels=labels, tokens=tokens)
    if html is not None:
        from srft_prep.inspection_page import page
        from srft_prep.pages import write_page

        write_page(html, page(shown))
        if is_replaced:
            click.echo(f"{html}: replaced an earlier page", err=True)
        return
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `inspect ... | head` ends like any pipe
    for line, style in lines(shown, full=full):
        click.echo(click.style(line, **style), color=color)
