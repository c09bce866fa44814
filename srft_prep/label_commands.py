"""The command from trajectories to labels: label.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import orjson

from srft_prep.critic_options import (
    API_CRITICS,
    LOCAL_CRITICS,
    MODEL_CRITICS,
    chosen_critic,
    critic_options,
    settled_values,
)
from srft_prep.options import (
    FOLDER,
    command_line,
    finish,
    json_option,
    output_option,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from srft_prep.config import LabelConfig
    from srft_prep.critic import Critic
    from srft_prep.manifest import Manifest


@click.command()
@click.argument("trajectories", type=FOLDER)
@output_option
@critic_options
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
@click.pass_context
def label(
    context: click.Context,
    /,
    trajectories: Path,
    output: Path,
    only: Any,
    retry_failed: bool,
    overwrite: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Let a critic label every step of the TRAJECTORIES good, unnecessary or harmful."""
    values |= settled_values(context)
    chosen = chosen_critic(values, output=output)
    from srft_prep.config import LabelConfig
    from srft_prep.critic import open_critic
    from srft_prep.critic.budget import Budget
    from srft_prep.labeling import count_trajectories
    from srft_prep.labeling import label as run
    from srft_prep.progress import shown

    budget = Budget(values["budget_usd"])
    if chosen.name in API_CRITICS:
        chosen.options["budget"] = budget
    critic = open_critic(chosen.name, **chosen.options)
    try:
        config = LabelConfig(
            critic=chosen.name,
            critic_id=critic.critic_id,
            prompt_hash=critic.prompt_hash,
            only=only,
            votes=values["votes"],
            context=values["context"] if chosen.name in MODEL_CRITICS else "none",
            max_input_tokens=critic.max_input_tokens,
        )
        if values["dry_run"]:
            _tell_estimate(
                trajectories,
                output,
                critic,
                config,
                values=values,
                retry_failed=retry_failed,
                as_json=as_json,
            )
            return
        total = count_trajectories(trajectories, config)
        machine = _machine(chosen.name, values["model"], values["gpus"])
        with shown("label", total=total, unit="trajectories") as progress:
            manifest = run(
                trajectories,
                output,
                critic,
                config,
                retry_failed=retry_failed,
                overwrite=overwrite,
                budget=budget,
                flops=machine.flops,
                command=command_line(),
                progress=progress,
            )
    finally:
        critic.close()
    if budget.limit_usd is not None:
        click.echo(f"spent so far: ${budget.spent_usd:,.2f} of ${budget.limit_usd:,.2f}", err=True)
    _tell_run(manifest, output, machine, as_json=as_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    """What a run's speed is measured by."""

    flops: "Callable[[int, int, int], float] | None" = None
    """Operations of a request by its prompt, cached and completion tokens."""
    peak_flops: float | None = None
    """Operations a second of all GPUs in use."""
    unknown: str = ""
    """Why there is no yardstick although there are GPUs."""


def _machine(critic_name: str, model: str, num_gpus: int | None) -> _Machine:
    """Return the yardstick of a model that runs here; an empty one where it is not known."""
    if critic_name not in LOCAL_CRITICS:
        return _Machine()
    from srft_prep.critic.flops import NoShape, read_shape
    from srft_prep.critic.hardware import gpus

    used = gpus()[:num_gpus]
    if not used:
        return _Machine()
    shape = read_shape(model)
    if isinstance(shape, NoShape):
        return _Machine(unknown=shape.reason)
    known = [gpu.peak_flops for gpu in used if gpu.peak_flops is not None]
    if len(known) < len(used):
        return _Machine(unknown=f"the peak of {used[0].name} is not in the table")

    def flops(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float:
        return shape.flops(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            completion_tokens=completion_tokens,
        )

    return _Machine(flops=flops, peak_flops=sum(known))


def _tell_estimate(
    trajectories: Path,
    output: Path,
    critic: "Critic",
    config: "LabelConfig",
    *,
    values: dict[str, Any],
    retry_failed: bool,
    as_json: bool,
) -> None:
    """Print what a run would ask and what that would take."""
    from srft_prep.label_report import estimate, estimate_lines
    from srft_prep.labeling import missing_requests

    requests = missing_requests(trajectories, output, critic, config, retry_failed=retry_failed)
    is_api = config.critic in API_CRITICS
    machine = _machine(config.critic, values["model"], values["gpus"])
    found = estimate(
        requests,
        critic.rates,
        hosted=is_api and not values["base_url"],
        flops=machine.flops,
        peak_flops=machine.peak_flops,
    )
    for line in estimate_lines(found, exact=not is_api or values["tokenizer"] is not None):
        click.echo(line)
    if as_json:
        click.echo(orjson.dumps({"stage": "label", "dry_run": True, **asdict(found)}))


def _tell_run(manifest: "Manifest", output: Path, machine: _Machine, *, as_json: bool) -> NoReturn:
    """Print what a run did and what it took; exit."""
    from srft_prep.label_report import usage_lines

    usage = manifest.run["usage"]
    for line in usage_lines(usage, peak_flops=machine.peak_flops):
        click.echo(line, err=True)
    if usage["prompt_tokens"] and usage["steps"] and not usage["scored_steps"]:
        votes = "" if manifest.data["config"]["votes"] > 1 else "; --votes 5 would estimate them"
        click.echo(f"probabilities: none, the model gives no log-probabilities{votes}", err=True)
    if machine.unknown:
        click.echo(f"MFU: not known: {machine.unknown}", err=True)
    stopped = "stopped_by_budget" in manifest.run
    if stopped:
        click.echo("stopped by --budget-usd; a larger one goes on", err=True)
    for failure in manifest.data["first_failures"]:
        click.echo(f"failed: {failure}", err=True)
    if manifest.counts["failures"]:
        where = output / "requests.parquet"
        click.echo(f"all failures: {where}; --retry-failed asks again", err=True)
    counts = {name: count for name, count in manifest.run.items() if name != "usage"}
    data = {**manifest.data, "counts": {**manifest.counts, **counts}}
    finish(
        replace(manifest, data=data),
        as_json,
        failed=stopped or manifest.counts["failures"] > 0,
        more={"usage": usage},
    )
