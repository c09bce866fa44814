"""The commands that run a stage: ingest, label, tokenize, pack.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import orjson

from srft_prep.config import DEFAULT_SEQ_LEN, MAX_INTEGER
from srft_prep.errors import ConfigError
from srft_prep.readers import READERS
from srft_prep.weights import RECIPES, parse_weights

if TYPE_CHECKING:
    from srft_prep.storage import Manifest

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT = click.Path(file_okay=False, path_type=Path)

MAX_COUNT = 2**31 - 1

output_option = click.option(
    "-o", "--output", type=OUTPUT, required=True, help="Directory to write; made if need be."
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace what an earlier run with other settings left there."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Make the last line of output one JSON document."
)


@click.command()
@click.argument("sources", nargs=-1, required=True)
@output_option
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["auto", *sorted(READERS)]),
    default="auto",
    show_default=True,
    help="How the runs are written; auto recognises every record by its content.",
)
@click.option(
    "--outcomes",
    multiple=True,
    metavar="PATH",
    help="SWE-bench report.json or run summary, a folder of them, or CSV/JSONL with "
    "instance_id,resolved. Repeatable.",
)
@click.option(
    "--exclude",
    type=FILE,
    help="Instance ids or repositories to keep out, one a line, or CSV/JSONL with instance_id.",
)
@click.option(
    "--max-per-instance",
    type=click.IntRange(1, MAX_COUNT),
    help="Take at most K runs of an instance.",
)
@click.option("--keep-duplicates", is_flag=True, help="Keep runs with exactly the same messages.")
@click.option("--system-prompt", type=FILE, help="Text that replaces every run's system prompt.")
@click.option(
    "--sample",
    metavar="OUTCOME=N,...",
    help="Draw N runs an outcome: resolved=5000,unresolved=5000. Outcomes that are not named "
    "(unknown, here) are left out.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, MAX_INTEGER),
    default=0,
    show_default=True,
    help="Seed of the sample.",
)
@click.option("--limit", type=click.IntRange(1, MAX_COUNT), help="Take at most N runs.")
@overwrite_option
@json_option
def ingest(
    sources: tuple[str, ...],
    output: Path,
    format_name: str,
    outcomes: tuple[str, ...],
    exclude: Path | None,
    max_per_instance: int | None,
    keep_duplicates: bool,
    system_prompt: Path | None,
    sample: str | None,
    seed: int,
    limit: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Read raw runs into trajectories.

    SOURCES are files, folders or globs: JSON, JSONL and Parquet, also .gz and .zst. Records that
    are no trajectory go to rejected.jsonl with file, line and reason.
    """
    from srft_prep.config import IngestConfig, parse_sample
    from srft_prep.exclusion import read_exclusions

    prompt = _read_text(system_prompt) if system_prompt else None
    if prompt is not None and not prompt.strip():
        raise ConfigError(f"{system_prompt}: expected a system prompt, the file is empty")
    config = IngestConfig(
        format=format_name,
        sample=parse_sample(sample) if sample is not None else None,
        seed=seed,
        limit=limit,
        max_per_instance=max_per_instance,
        keep_duplicates=keep_duplicates,
        system_prompt=prompt,
        exclude=read_exclusions(exclude) if exclude else (),
    )
    from srft_prep.hints import ingest_hints
    from srft_prep.ingest import ingest as run
    from srft_prep.progress import shown

    with shown("ingest", total=None, unit="trajectories") as progress:
        manifest = run(
            sources,
            output,
            config,
            outcomes=outcomes,
            overwrite=overwrite,
            command=_command(),
            progress=progress,
        )
    counts = manifest.counts
    for hint in ingest_hints(config, counts, outcomes_given=bool(outcomes)):
        click.echo(hint, err=True)
    if counts["rejected"]:
        click.echo(f"rejected records, with reasons: {output / 'rejected.jsonl'}", err=True)
    _finish(manifest, as_json, failed=counts["rejected"] > 0)


@click.command()
@click.argument("trajectories", type=FOLDER)
@output_option
@click.option(
    "--critic",
    "critic_name",
    type=click.Choice(["rules", "scripted"]),
    default="rules",
    show_default=True,
    help="Who judges the steps: rules needs no model; scripted takes labels from a file.",
)
@click.option("--model", metavar="PATH", help="scripted: JSONL or CSV of labels.")
@click.option(
    "--only",
    type=click.Choice(["unresolved", "resolved", "all"]),
    default="unresolved",
    show_default=True,
    help="Which trajectories; an unknown outcome counts as unresolved.",
)
@click.option("--retry-failed", is_flag=True, help="Ask again what failed in an earlier run.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Write the tables anew for another critic or question; the ledger keeps all answers.",
)
@json_option
def label(
    trajectories: Path,
    output: Path,
    critic_name: str,
    model: str | None,
    only: Any,
    retry_failed: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Let a critic label every step of the TRAJECTORIES good, unnecessary or harmful."""
    if critic_name == "rules" and model is not None:
        raise click.UsageError("--model: the rules critic has no model")
    if critic_name == "scripted" and model is None:
        raise click.UsageError("--critic scripted: give the file of labels with --model PATH")
    from srft_prep.config import LabelConfig
    from srft_prep.critic import open_critic
    from srft_prep.labeling import count_trajectories
    from srft_prep.labeling import label as run
    from srft_prep.progress import shown

    critic = open_critic(critic_name, **({"model": model} if model else {}))
    config = LabelConfig(
        critic=critic_name, critic_id=critic.critic_id, prompt_hash=critic.prompt_hash, only=only
    )
    total = count_trajectories(trajectories, config)
    try:
        with shown("label", total=total, unit="trajectories") as progress:
            manifest = run(
                trajectories,
                output,
                critic,
                config,
                retry_failed=retry_failed,
                overwrite=overwrite,
                command=_command(),
                progress=progress,
            )
    finally:
        critic.close()
    for failure in manifest.data["first_failures"]:
        click.echo(f"failed: {failure}", err=True)
    if manifest.counts["failures"]:
        click.echo(f"all in {output / 'requests.parquet'}", err=True)
    data = {**manifest.data, "counts": {**manifest.counts, **manifest.run}}
    _finish(replace(manifest, data=data), as_json, failed=manifest.counts["failures"] > 0)


@click.command()
@click.argument("trajectories", type=FOLDER)
@output_option
@click.option(
    "--tokenizer",
    required=True,
    metavar="PATH_OR_ID",
    help="Folder or hub id of the student's tokenizer; 'example' for the small one included.",
)
@click.option("--chat-template", type=FILE, help="Jinja file in place of the tokenizer's own.")
@click.option(
    "--history",
    type=click.Choice(["auto", "full", "per-step"]),
    default="auto",
    show_default=True,
    help="Templates that rewrite earlier messages: auto refuses them, full trains on the final "
    "rendering, per-step gives each step a sequence with the context that the model saw.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="all cores",
    help="Processes.",
)
@overwrite_option
@json_option
def tokenize(
    trajectories: Path,
    output: Path,
    tokenizer: str,
    chat_template: Path | None,
    history: Any,
    workers: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn TRAJECTORIES into token ids and the token spans of their steps."""
    from srft_prep.progress import shown
    from srft_prep.storage import read_manifest
    from srft_prep.tokens import tokenize as run

    total = read_manifest(trajectories, stage="ingest").counts["trajectories"]
    with shown("tokenize", total=total, unit="trajectories") as progress:
        manifest = run(
            trajectories,
            output,
            tokenizer=tokenizer,
            chat_template=chat_template,
            history=history,
            workers=workers,
            overwrite=overwrite,
            command=_command(),
            progress=progress,
        )
    for name in ("content", "reasoning_content", "tool_calls"):
        if dropped := manifest.counts.get(f"dropped_{name}"):
            click.echo(f"the chat template leaves out {name} of {dropped} steps", err=True)
    _finish(manifest, as_json, failed=manifest.counts["rejected"] > 0)


@click.command()
@click.argument("tokens", type=FOLDER)
@output_option
@click.option("--labels", type=FOLDER, help="Output of label; needed by the masked recipes.")
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default="srft",
    show_default=True,
    help="Which trajectories, and which of them are weighted by their labels.",
)
@click.option(
    "--weights",
    default="good=1,unnecessary=1,harmful=0",
    show_default=True,
    help="Weight of a step by its label, each >= 0.",
)
@click.option("--soft", is_flag=True, help="Weight by the label probabilities' expected value.")
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
    "--shuffle-seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the order.",
)
@overwrite_option
@json_option
def pack(
    tokens: Path,
    output: Path,
    labels: Path | None,
    recipe: str,
    weights: str,
    soft: bool,
    seq_len: int,
    overlong: Any,
    missing_label: Any,
    drop_weightless: bool,
    shuffle_seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Weight the steps of TOKENS by their labels and pack them into shards."""
    from srft_prep.config import PackConfig
    from srft_prep.progress import shown
    from srft_prep.shards import pack as run

    config = PackConfig(
        recipe=recipe,
        weights={str(name): value for name, value in parse_weights(weights).items()},
        soft=soft,
        seq_len=seq_len,
        overlong=overlong,
        missing_label=missing_label,
        drop_weightless=drop_weightless,
        shuffle_seed=shuffle_seed,
    )
    with shown("pack", total=None, unit="sequences") as progress:
        manifest = run(
            tokens,
            output,
            config,
            labels=labels,
            overwrite=overwrite,
            command=_command(),
            progress=progress,
        )
    if missing := manifest.counts["missing_label"]:
        click.echo(
            f"{missing} trajectories of which {recipe} weights the steps by label lack some "
            f"({missing_label}): see label --only and label --retry-failed",
            err=True,
        )
    if (weightless := manifest.counts["weightless"]) and not drop_weightless:
        click.echo(
            f"{weightless} documents carry no weighted token; --drop-weightless leaves them out",
            err=True,
        )
    _finish(manifest, as_json, failed=manifest.counts["missing_label"] > 0)


def _finish(manifest: "Manifest", as_json: bool, *, failed: bool) -> NoReturn:
    """Print a stage's counts, last, and exit with 0 or 1."""
    flat = ", ".join(
        f"{value:,} {name}" if isinstance(value, int) else f"{name} {_short(value)}"
        for name, value in manifest.counts.items()
        if value not in (0, {}, None) or name in ("trajectories", "steps")
    )
    click.echo(f"{manifest.stage}: {flat}")
    if as_json:
        document = {"stage": manifest.stage, "path": str(manifest.path), **manifest.counts}
        click.echo(orjson.dumps(document))
    raise click.exceptions.Exit(1 if failed else 0)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={number}" for key, number in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _command() -> list[str]:
    words = (os.fsencode(word).decode("utf-8", "backslashreplace") for word in sys.argv[1:])
    return ["srft-prep", *words]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
