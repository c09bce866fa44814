"""The command that says whether a critic is right, and sets it right: critic-eval.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from srft_prep.hostile_text import printable
from srft_prep.object_mirror import address_of
from srft_prep.options import FILE, FOLDER, MAX_COUNT, PAGE_FILE, json_option, named_path

if TYPE_CHECKING:
    from srft_prep.evaluate.critic_labels import CriticLabels
    from srft_prep.evaluate.fitting import Fitting
    from srft_prep.evaluate.gold_steps import Cluster, GoldSteps


def _labels(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> list[tuple[str | None, Path]]:
    return [named_path(word) for word in given]


@click.command("critic-eval")
@click.option(
    "--labels",
    "critics",
    multiple=True,
    required=True,
    callback=_labels,
    metavar="[NAME=]DIR|FILE",
    help="A critic's labels (repeatable): output of label, or a file with trajectory_id, "
    "step_index, label. Of a gold file by several people, NAME's.",
)
@click.option(
    "--gold",
    "gold_files",
    multiple=True,
    required=True,
    type=FILE,
    help="Labels by people (repeatable): JSONL with trajectory_id, step_index, label, as review "
    "writes it.",
)
@click.option("--annotator", help="Count this annotator's gold labels only.")
@click.option(
    "--blind-only",
    is_flag=True,
    help="Leave out gold labels that were given with others' labels in view.",
)
@click.option(
    "--trajectories",
    type=FOLDER,
    help="Output of ingest, for outcomes, tasks and what rules see.  [default: what was labelled]",
)
@click.option(
    "--samples",
    default=10_000,
    show_default=True,
    type=click.IntRange(100, 1_000_000),
    help="Bootstrap samples.",
)
@click.option(
    "--cluster",
    type=click.Choice(["task", "trajectory"]),
    default="task",
    show_default=True,
    help="What a bootstrap sample draws whole: tasks with all attempts at them (a trajectory whose "
    "task is unknown by itself), or trajectories.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, MAX_COUNT))
@click.option(
    "--disagreements",
    type=PAGE_FILE,
    help="JSONL file to write: steps that critics label differently (with one critic: otherwise "
    "than gold).",
)
@click.option(
    "--calibrate",
    is_flag=True,
    help="Fit a threshold or a head to the gold labels, by cross-validation, and write it to -o.",
)
@click.option(
    "-o",
    "--output",
    type=PAGE_FILE,
    help="File that --calibrate writes.",
)
@json_option
def critic_eval(
    critics: list[tuple[str | None, Path]],
    gold_files: tuple[Path, ...],
    annotator: str | None,
    blind_only: bool,
    trajectories: Path | None,
    samples: int,
    cluster: "Cluster",
    seed: int,
    disagreements: Path | None,
    calibrate: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Hold critics' labels against people's: is a critic right, and is it worth its cost?

    Prints precision, recall, F1, accuracy, kappa and average precision with intervals drawn by
    task, beside trivial critics and a guess that never reads a step; only where the interval
    of the difference excludes zero is a critic called better than no critic.
    """
    if calibrate != (output is not None):
        raise click.UsageError("--calibrate and -o FILE go together")
    from srft_prep.evaluate.agreement import agreements, write_disagreements
    from srft_prep.evaluate.agreement import disagreements as disagreeing
    from srft_prep.evaluate.critic import evaluate
    from srft_prep.evaluate.critic_labels import read_critics, refuse_own_gold, trajectories_of
    from srft_prep.evaluate.critic_report import lines
    from srft_prep.evaluate.fitting import refuse_unfit, why_unfit
    from srft_prep.evaluate.gold_steps import join_gold
    from srft_prep.gold import read_gold
    from srft_prep.manifest import read_manifest
    from srft_prep.output_files import CALIBRATION, DISAGREEMENTS, replaced_words, will_replace

    inputs = [*(path for _, path in critics), *gold_files, trajectories]
    replaced = will_replace(
        disagreements, DISAGREEMENTS, option="--disagreements", others=(*inputs, output)
    )
    replaced_output = will_replace(output, CALIBRATION, option="-o", others=inputs)
    read = read_critics(critics)
    refuse_own_gold(read, gold_files, annotator=annotator)
    gold = read_gold(gold_files, annotator=annotator, blind_only=blind_only)
    source = trajectories_of(read)
    if trajectories is not None:
        source = read_manifest(trajectories, stage="ingest").checked()
    # pack applies what is fitted on a file or on several critics together, and does not know which
    # rules fired
    rules = calibrate and not any(critic.is_file or critic.together for critic in read)
    steps = join_gold(gold, read, source, rules=rules, cluster=cluster)
    if calibrate:
        refuse_unfit(steps, read)
    found = evaluate(steps, read, samples=samples, seed=seed)
    agreed = agreements(read)
    for line in lines(found, agreed, may_calibrate=why_unfit(steps, read) is None):
        click.echo(printable(line))
    document: dict[str, Any] = {"evaluation": found, "agreements": agreed}
    if disagreements is not None:
        count = write_disagreements(disagreements, disagreeing(read, gold.labels))
        where = f"{disagreements}{replaced_words(replaced)}"
        click.echo(f"{count:,} disagreements written to {where}")
        document["disagreements"] = count
    if output is not None:
        document["calibration"] = _calibrate(
            *(steps, read, gold_files, output),
            samples=samples,
            seed=seed,
            is_replaced=replaced_output,
        )
    if as_json:
        click.echo(orjson.dumps(document))


def _calibrate(
    steps: "GoldSteps",
    critics: "list[CriticLabels]",
    gold_files: tuple[Path, ...],
    output: Path,
    *,
    samples: int,
    seed: int,
    is_replaced: bool,
) -> "Fitting":
    """Fit a calibration, write it, and print what it was held against."""
    from srft_prep.calibration import needs_rules, write_calibration
    from srft_prep.evaluate.fitting import fit_calibration
    from srft_prep.evaluate.fitting_report import fitting_lines
    from srft_prep.output_files import replaced_words

    fitting = fit_calibration(steps, critics, gold_files, samples=samples, seed=seed)
    write_calibration(output, fitting.calibration)
    where = f"{output}{replaced_words(is_replaced)}"
    click.echo("")
    for line in fitting_lines(fitting):
        click.echo(printable(line))
    how = how_to_apply(critics, output, with_rules=needs_rules(fitting.calibration))
    click.echo(f"written to {where}: {how}")
    return fitting


def how_to_apply(critics: "list[CriticLabels]", file: Path, *, with_rules: bool) -> str:
    """Return the commands that apply a calibration of these critics' labels."""
    if len(critics) > 1:
        return f"label --critics ... --ensemble head --calibration {file}"
    if critics[0].is_file or critics[0].together:
        return f"pack --labels {address_of(critics[0].path)} --calibration {file}"
    return f"label --calibration {file}" + ("" if with_rules else f", or pack --calibration {file}")
