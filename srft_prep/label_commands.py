"""The command from trajectories to labels: label.

Nothing heavy is imported before a command runs, so that `--help` and usage errors answer at once.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
import orjson

from srft_prep.cluster_options import array_job, array_options, cluster_of, engine_options
from srft_prep.critic_options import (
    API_CRITICS,
    LOCAL_CRITICS,
    MODEL_CRITICS,
    ChosenCritic,
    critic_options,
)
from srft_prep.hostile_text import printable
from srft_prep.options import (
    FOLDER,
    command_line,
    finish,
    json_option,
    output_option,
)
from srft_prep.panel_options import ChosenPanel, chosen_panel, opened_panel, panel_options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from srft_prep.critic import Critic
    from srft_prep.manifest import Manifest
    from srft_prep.panel import Panel
    from srft_prep.ray_cluster import RayCluster

_NAMES: Final = ("critic_id", "at_most")
"""What tells several critics' estimates apart."""


@click.command()
@click.argument("trajectories", type=FOLDER)
@output_option
@critic_options
@panel_options
@click.option(
    "--only",
    type=click.Choice(["unresolved", "resolved", "all"]),
    default="unresolved",
    show_default=True,
    help="Which trajectories; an unknown outcome counts as unresolved.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="With --engine ray: critics at work at once. By default one a core of the cluster; of a "
    "model one a GPU (or group of tensor_parallel_size), or one where there is no GPU.",
)
@engine_options
@array_options
@click.option("--retry-failed", is_flag=True, help="Ask again what failed in an earlier run.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Write the tables anew for other critics, another question or calibration; the ledger "
    "keeps all answers.",
)
@json_option
@click.pass_context
def label(
    context: click.Context,
    /,
    trajectories: Path,
    output: Path,
    only: Any,
    workers: int | None,
    placed_by: str,
    ray_address: str,
    shard_index: int | None,
    num_shards: int | None,
    retry_failed: bool,
    overwrite: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Let critics label every step of the TRAJECTORIES good, unnecessary or harmful.

    One (--critic), several together (--critics, --ensemble), or one after the other (--cascade).
    """
    array = array_job(shard_index, num_shards)
    if workers is not None and placed_by == "local":
        raise click.UsageError("--workers: expected --engine ray with it; critics have --gpus here")
    chosen = chosen_panel(context, output=output)
    from srft_prep.critic.budget import Budget
    from srft_prep.labeling import count_trajectories, label_together
    from srft_prep.progress import shown

    budget = Budget(values["budget_usd"])
    critics: list[Critic] = []
    placed = ExitStack()
    try:
        cluster = placed.enter_context(cluster_of(placed_by, ray_address, workers=workers))
        for choice in chosen.critics:
            extra = {"budget": budget} if choice.name in API_CRITICS else {}
            critics.append(_opened(choice, extra, cluster, workers=workers))
        panel = opened_panel(chosen, critics, only=only, array=array)
        machines = [
            _machine(each.name, each.values["model"], each.values["gpus"])
            if cluster is None
            else _Machine()
            for each in chosen.critics
        ]
        if values["dry_run"]:
            _tell_estimates(
                trajectories,
                output,
                critics,
                panel,
                chosen=chosen,
                machines=machines,
                retry_failed=retry_failed,
                as_json=as_json,
            )
            return
        total = count_trajectories(trajectories, panel.config) * len(critics)
        with shown("label", total=total, unit="trajectories") as progress:
            manifest = label_together(
                trajectories,
                output,
                critics,
                panel,
                retry_failed=retry_failed,
                overwrite=overwrite,
                budget=budget,
                flops=[machine.flops for machine in machines],
                command=command_line(),
                progress=progress,
            )
    finally:
        for critic in critics:
            critic.close()
        placed.close()
    if budget.limit_usd is not None:
        click.echo(f"spent so far: ${budget.spent_usd:,.2f} of ${budget.limit_usd:,.2f}", err=True)
    _tell_run(manifest, output, machines, as_json=as_json)


def _opened(
    choice: ChosenCritic,
    extra: dict[str, Any],
    cluster: "RayCluster | None",
    *,
    workers: int | None,
) -> "Critic":
    """Return a critic that works here, or in a cluster."""
    from srft_prep.critic import open_critic

    if cluster is None:
        return open_critic(choice.name, **choice.options, **extra)
    from srft_prep.critic.on_ray import RayCritic

    return RayCritic(
        choice.name,
        choice.options,
        cluster,
        workers=workers,
        gpu_usd_per_hour=choice.values["gpu_usd_per_hour"],
    )


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


def _tell_estimates(
    trajectories: Path,
    output: Path,
    critics: "Sequence[Critic]",
    panel: "Panel",
    *,
    chosen: "ChosenPanel",
    machines: "Sequence[_Machine]",
    retry_failed: bool,
    as_json: bool,
) -> None:
    """Print what a run would ask and what that would take, critic by critic."""
    from srft_prep.estimates import estimate
    from srft_prep.label_report import estimate_lines
    from srft_prep.labeling import missing_together

    found: list[dict[str, Any]] = []
    asked_model = False
    for place, requests in missing_together(
        trajectories, output, critics, panel, retry_failed=retry_failed
    ):
        choice, critic = chosen.critics[place], critics[place]
        is_api, free = choice.name in API_CRITICS, choice.name not in MODEL_CRITICS
        expected = estimate(
            requests,
            critic.rates,
            free=free,
            hosted=is_api and not choice.values["base_url"],
            flops=machines[place].flops,
            peak_flops=machines[place].peak_flops,
        )
        at_most = panel.is_cascade and asked_model
        asked_model = asked_model or not free
        if chosen.together is not None:
            click.echo(f"{critic.critic_id}{', at most' if at_most else ''}:")
        exact = not is_api or choice.values["tokenizer"] is not None
        for line in estimate_lines(expected, exact=exact, free=free):
            click.echo(line)
        found.append({"critic_id": critic.critic_id, "at_most": at_most, **asdict(expected)})
    if as_json:
        document: dict[str, Any] = {"stage": "label", "dry_run": True}
        if chosen.together is None:
            document |= {key: value for key, value in found[0].items() if key not in _NAMES}
        else:
            document["critics"] = found
        click.echo(orjson.dumps(document))


def _tell_run(
    manifest: "Manifest", output: Path, machines: "Sequence[_Machine]", *, as_json: bool
) -> NoReturn:
    """Print what a run did and what it took; exit."""
    from srft_prep.cascade_report import cascade_lines

    run, config = manifest.run, manifest.data["config"]
    members = run.get("members", [{"usage": run["usage"]}])
    for settings, member, machine in zip(
        config.get("members", [config]), members, machines, strict=False
    ):
        if "critic_id" in member and member["usage"]["prompt_tokens"]:
            click.echo(f"{member['critic_id']}:", err=True)
        _tell_usage(member["usage"], machine, votes=settings["votes"])
    if cascade := manifest.data.get("cascade"):
        for line in cascade_lines(cascade):
            click.echo(line, err=True)
    stopped = "stopped_by_budget" in run
    if stopped:
        click.echo("stopped by --budget-usd; a larger one goes on", err=True)
    for failure in manifest.data["first_failures"]:
        click.echo(f"failed: {printable(failure)}", err=True)
    if manifest.counts["failures"]:
        where = output / "requests.parquet"
        click.echo(f"all failures: {where}; --retry-failed asks again", err=True)
    went_on = manifest.counts.get("went_on", 0)
    if went_on:
        told = f"{went_on:,} of {manifest.counts['failures']:,} failures cost no label"
        click.echo(f"{told}: other critics of the cascade gave it", err=True)
    more: dict[str, Any] = {name: run[name] for name in ("usage", "members") if name in run}
    counts = {name: count for name, count in run.items() if name not in more}
    data = {**manifest.data, "counts": {**manifest.counts, **counts}}
    if cascade:
        more["cascade"] = cascade
    finish(
        replace(manifest, data=data),
        as_json,
        failed=stopped or manifest.counts["failures"] > went_on,
        more=more,
    )


def _tell_usage(usage: dict[str, float], machine: _Machine, *, votes: int) -> None:
    """Print what asking one critic took."""
    from srft_prep.label_report import usage_lines

    for line in usage_lines(usage, peak_flops=machine.peak_flops):
        click.echo(line, err=True)
    if usage["prompt_tokens"] and usage["steps"] and not usage["scored_steps"]:
        hint = "" if votes > 1 else "; --votes 5 would estimate them"
        click.echo(f"probabilities: none, the model gives no log-probabilities{hint}", err=True)
    if machine.unknown:
        click.echo(f"MFU: not known: {machine.unknown}", err=True)
