"""The command from tokens and labels to shards: pack.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from srft_prep.config import DEFAULT_SEQ_LEN, MAX_INTEGER
from srft_prep.errors import ConfigError
from srft_prep.object_mirror import address_of
from srft_prep.object_storage import is_url
from srft_prep.options import (
    FOLDER,
    FOLDER_OR_FILE,
    command_line,
    finish,
    json_option,
    output_option,
    overwrite_option,
)
from srft_prep.types import LABELS
from srft_prep.weights import PARTS, RECIPES, parse_weights

if TYPE_CHECKING:
    from srft_prep.manifest import Manifest

FILE_SUFFIXES: Final = (".jsonl", ".parquet")


@click.command()
@click.argument("tokens", type=FOLDER)
@output_option
@click.option(
    "--labels",
    type=FOLDER_OR_FILE,
    metavar="DIR|FILE",
    help="Output of label, or a .jsonl or .parquet file of labels, such as a gold file; needed by "
    "the masked recipes.",
)
@click.option(
    "--annotator",
    metavar="NAME",
    help="Whose labels count, where --labels is a gold file by several people; agreed: what they "
    "all say, or who adjudicated.",
)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default="srft",
    show_default=True,
    help="Which trajectories, and which of them are weighted by their labels.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="NAME=NUMBER,...|FILE",
    show_default="good=1,unnecessary=1,harmful=0",
    help="Weight of a step by its label, each >= 0, and what multiplies the weight of its parts: "
    "thought, tool_call, end_of_turn. Or a .jsonl or .parquet file with trajectory_id, "
    "step_index, weight and, if need be, part or field, start, end (characters). Repeatable.",
)
@click.option(
    "--calibration",
    metavar="FILE",
    help="Calibration (critic-eval --calibrate) that the labels go through; one that looks at "
    "which rules fired is label's to apply.",
)
@click.option("--soft", is_flag=True, help="Weight by the label probabilities' expected value.")
@click.option(
    "--convention",
    type=click.Choice(["srft", "trl", "axolotl"]),
    default="srft",
    show_default=True,
    help="Which tokens of a turn are trained: what the agent wrote and its end of turn, or what "
    "another tool would train.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(1, 1 << 24),
    default=DEFAULT_SEQ_LEN,
    show_default=True,
    help="Tokens in a packed sequence, at most.",
)
@click.option(
    "--overlong",
    type=click.Choice(["truncate", "windows", "drop", "error"]),
    default="truncate",
    show_default=True,
    help="Longer trajectories: cut behind a step, cut into windows that train each step once, "
    "leave out, or stop.",
)
@click.option(
    "--missing-label",
    type=click.Choice(["drop", "mask", "error"]),
    default="drop",
    show_default=True,
    help="A step without a label: leave its trajectory out, give it weight 0, or stop.",
)
@click.option(
    "--drop-weightless",
    is_flag=True,
    help="Leave out documents without a weighted token, which change no gradient.",
)
@click.option(
    "--trim-suffix",
    is_flag=True,
    help="Leave out what stands behind a document's last weighted token, and documents without "
    "one: they change no gradient.",
)
@click.option(
    "--hold-out",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    metavar="FRACTION",
    help="Leave this fraction of the tasks out, with all attempts at them, and list them in "
    "held_out.jsonl: train measures itself on them.",
)
@click.option(
    "--shuffle-seed",
    type=click.IntRange(0, MAX_INTEGER),
    default=0,
    show_default=True,
    help="Seed of the order.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="all cores",
    help="Threads; they change no byte.",
)
@overwrite_option
@json_option
def pack(
    tokens: Path,
    output: Path,
    weights: tuple[str, ...],
    labels: Path | None,
    annotator: str | None,
    calibration: str | None,
    workers: int,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Weight the steps of TOKENS by their labels and pack them into shards."""
    from srft_prep.config import PackConfig
    from srft_prep.hashes import sha256_of
    from srft_prep.progress import shown
    from srft_prep.shards import pack as run

    if annotator is not None and labels is None:
        raise click.UsageError("--annotator: expected --labels FILE with it, a gold file")
    named, files = _split(weights)
    calibration_path = _calibration_path(calibration)
    config = PackConfig(
        weights={name: value for name, value in named.items() if name in LABELS},
        part_weights={name: value for name, value in named.items() if name in PARTS},
        calibration=sha256_of(calibration_path) if calibration_path else None,
        **settings,
    )
    with shown("pack", total=None, unit="sequences") as progress:
        manifest = run(
            tokens,
            output,
            config,
            labels=labels,
            annotator=annotator,
            calibration=calibration_path,
            weight_files=files,
            workers=workers,
            overwrite=overwrite,
            command=command_line(),
            progress=progress,
        )
    _tell(manifest, config.recipe)
    if calibration_path and labels and labels.is_file():
        click.echo(
            f"note: {address_of(labels)} does not say whose labels it holds; --calibration counts "
            "as theirs",
            err=True,
        )
    finish(manifest, as_json, failed=manifest.counts["missing_label"] > 0)


def _calibration_path(word: str | None) -> Path | None:
    """Return the file that `--calibration` names."""
    if word is None:
        return None
    from srft_prep.calibration_files import calibration_file

    path = calibration_file(word)
    if not path.is_file():
        raise ConfigError(f"--calibration: {path}: there is no such file")
    return path


def _split(weights: Sequence[str]) -> tuple[dict[str, float], list[Path]]:
    """Return the weights that are named and the files among values of `--weights`."""
    files = [_input(value) for value in weights if value.endswith(FILE_SUFFIXES)]
    for path in files:
        if not path.is_file():
            raise ConfigError(f"--weights: {path}: there is no such file")
    return parse_weights(*(value for value in weights if not value.endswith(FILE_SUFFIXES))), files


def _input(word: str) -> Path:
    if is_url(word):
        from srft_prep.object_inputs import input_path

        return input_path(word, folder=False)
    return Path(word)


def _tell(manifest: "Manifest", recipe: str) -> None:
    """Say what a user should know of the counts, and what can be done."""
    counts, config = manifest.counts, manifest.data["config"]
    if missing := counts["missing_label"]:
        click.echo(
            f"{missing} trajectories of which {recipe} weights the steps by label lack some "
            f"({config['missing_label']}): see label --only and label --retry-failed",
            err=True,
        )
    if lost := counts["lost_steps"]:
        click.echo(
            f"{lost} steps with {counts['lost_tokens']} weighted tokens are lost: "
            + _LOST[config["overlong"]],
            err=True,
        )
    if (weightless := counts["weightless"]) and not (
        config["drop_weightless"] or config["trim_suffix"]
    ):
        click.echo(
            f"{weightless} documents carry no weighted token; --drop-weightless leaves them out",
            err=True,
        )
    if trimmed := counts.get("trimmed_tokens"):
        click.echo(
            f"{trimmed} tokens behind the last weighted one are left out (--trim-suffix)", err=True
        )
    if clipped := counts.get("clipped_spans"):
        click.echo(
            f"{clipped} spans of characters reach behind what the chat template shows of their "
            "field and end there",
            err=True,
        )


_LOST: Final = {
    "truncate": "they lie behind the cut of trajectories longer than --seq-len (see --overlong "
    "windows)",
    "windows": "each alone is longer than a window; choose a longer --seq-len",
    "drop": "their trajectories are longer than --seq-len",
}
