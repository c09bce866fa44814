"""The options of commands that run on more than one machine: array jobs, and Ray."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from srft_prep.array_jobs import ArrayJob
    from srft_prep.ray_cluster import RayCluster

MAX_SHARDS: Final = 100_000


def array_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that make a command one of several jobs."""
    command = click.option(
        "--num-shards",
        type=click.IntRange(1, MAX_SHARDS),
        help="How many jobs share the trajectories, each with a directory of its own; merge makes "
        "one of them.",
    )(command)
    return click.option(
        "--shard-index",
        type=click.IntRange(min=0),
        help="Which of the jobs this is, from 0; its share is chosen by content hash.",
    )(command)


def array_job(shard_index: int | None, num_shards: int | None) -> "ArrayJob | None":
    """Return the job that the options name; None where they are not given.

    Raises:
        click.UsageError: one is given without the other, or they do not go together.
    """
    from srft_prep.array_jobs import ArrayJob

    if shard_index is None and num_shards is None:
        return None
    if shard_index is None or num_shards is None:
        raise click.UsageError("--shard-index and --num-shards go together: give both or neither")
    if shard_index >= num_shards:
        raise click.UsageError(
            f"--shard-index: expected 0 to {num_shards - 1} (--num-shards {num_shards}), got "
            f"{shard_index}; in SLURM use --array=0-{num_shards - 1}"
        )
    return ArrayJob(shard_index=shard_index, num_shards=num_shards)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose where a command's processes run."""
    command = click.option(
        "--ray-address",
        metavar="ADDRESS",
        envvar="RAY_ADDRESS",
        default="local",
        show_default=True,
        show_envvar=True,
        help="With --engine ray: a running cluster, all of whose nodes see the same files; local "
        "starts one of this machine's cores.",
    )(command)
    return click.option(
        "--engine",
        "placed_by",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Where the work is done: by processes of this machine, or by those of a Ray cluster.",
    )(command)


def cluster_of(
    placed_by: str, ray_address: str, *, workers: int | None
) -> "AbstractContextManager[RayCluster | None]":
    """Return the cluster that the options choose, to be entered; one that gives None for `local`.

    Raises:
        ConfigError: Ray is not installed.
        click.UsageError: an address is given, and the cluster is not asked for.
    """
    if placed_by == "local":
        source = click.get_current_context().get_parameter_source("ray_address")
        if source is ParameterSource.COMMANDLINE:  # RAY_ADDRESS is set for all that one runs
            raise click.UsageError("--ray-address: expected --engine ray with it")
        return nullcontext()
    from srft_prep.ray_cluster import RayCluster

    return RayCluster(ray_address, num_cpus=workers)
