"""The command that tells a gain from noise: compare.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

from dataclasses import asdict
from pathlib import Path

import click
import orjson

from srft_prep.options import MAX_COUNT, PAGE_FILE, json_option, named_path


def _arms(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> list[tuple[str, Path]]:
    arms = []
    for word in given:
        name, path = named_path(word, whole=True) if "=" in word else (None, Path(word))
        if name is None:
            raise click.BadParameter(f"expected NAME=PATH, got {word!r}")
        arms.append((name, path))
    return arms


@click.command()
@click.option(
    "--arm",
    "arms",
    multiple=True,
    required=True,
    callback=_arms,
    metavar="NAME=PATH",
    help="An arm's rollouts (repeatable): a folder <training run>/<rollout>.json of SWE-bench run "
    "summaries, or a CSV with arm,training_run,rollout,instance_id,resolved.",
)
@click.option("--baseline", help="The arm that others are held against.  [default: each pair]")
@click.option(
    "--k",
    "ks",
    multiple=True,
    type=click.IntRange(1, 10_000),
    help="pass@k to print (repeatable).  [default: 1 to the number of rollouts]",
)
@click.option(
    "--samples",
    default=10_000,
    show_default=True,
    type=click.IntRange(100, 10_000_000),
    help="Bootstrap samples.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, MAX_COUNT))
@click.option(
    "--gain",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0.01, 100),
    help="Gain in points for which the runs and rollouts needed are estimated.",
)
@click.option("--html", type=PAGE_FILE, help="Write a page with tables and plots to this file.")
@json_option
def compare(
    arms: list[tuple[str, Path]],
    baseline: str | None,
    ks: tuple[int, ...],
    samples: int,
    seed: int,
    gain: float,
    html: Path | None,
    as_json: bool,
) -> None:
    """Compare arms by their rollouts on a benchmark: means, pass@k, intervals, power.

    All rollouts must be over the same instances. The default interval draws training runs and then
    rollouts; those that draw rollouts alone say nothing of training a model again.
    """
    from srft_prep.evaluate.comparison import compare as run
    from srft_prep.evaluate.report import lines
    from srft_prep.evaluate.rollouts import read_arms
    from srft_prep.output_files import PAGE, will_replace

    if html is not None:
        from srft_prep.plots import require_plots

        require_plots("--html")
    inputs = [path for _, path in arms]
    is_replaced = will_replace(html, PAGE, option="--html", others=inputs)
    read = read_arms(arms)
    found = run(
        read,
        baseline=baseline,
        ks=sorted(set(ks)),
        samples=samples,
        seed=seed,
        gain=gain,
    )
    for line in lines(found):
        click.echo(line)
    if html is not None:
        from srft_prep.evaluate.page import page
        from srft_prep.pages import write_page

        write_page(html, page(found, read, samples=samples, seed=seed))
        if is_replaced:
            click.echo(f"{html}: replaced an earlier page", err=True)
    if as_json:
        click.echo(orjson.dumps(asdict(found), option=orjson.OPT_NON_STR_KEYS))
