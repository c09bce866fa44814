"""Jobs on parts in the processes of a Ray cluster: `part_pool` for more than one machine.

Every process gets the same set-up once and one job at a time. A process that dies, with its node
or alone, costs the job that it was doing: that is given to another one. Results come as they
finish.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from srft_prep.errors import BackendError, SrftError, in_one_line
from srft_prep.ray_cluster import LostError, RayCluster

Job = TypeVar("Job")
Result = TypeVar("Result")

DEATHS: Final = 3
"""Processes that may die of one job."""


class _Worker:
    """Does jobs, in a process of its own."""

    def __init__(self, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._unfit: SrftError | None = None
        """Why this process can do nothing; raised here it would look like a death of it."""
        try:
            start(*arguments)
        except SrftError as error:
            self._unfit = error
        except Exception as error:  # noqa: BLE001 - this node may lack anything
            self._unfit = BackendError(
                f"a worker cannot begin: {type(error).__name__}: {in_one_line(error)}"
            )

    def do(self, work: Callable[[Job], Result], job: Job) -> Result | SrftError | OSError:
        """Return what a job returned, or the error that it raised.

        Raised here an OSError would come back as one of Ray's, with a traceback for its words.
        """
        if self._unfit is not None:
            return self._unfit
        try:
            return work(job)
        except (SrftError, OSError) as error:
            return error


def run_jobs(
    jobs: Sequence[Job],
    work: Callable[[Job], Result],
    *,
    cluster: RayCluster,
    workers: int | None,
    start: Callable[..., None],
    start_arguments: tuple[Any, ...],
) -> Iterator[tuple[Job, Result]]:
    """Yield (job, what `work` returned) of every job, in the order in which they finish.

    A job may be done twice, where the process that did it first is out of reach but not dead: what
    it writes must have a name of its own.

    Args:
        jobs: what to do.
        work: a module-level function.
        cluster: where.
        workers: number of processes; None for one a core of the cluster.
        start: a module-level function, called once in each process.
        start_arguments: its arguments.

    Raises:
        BackendError: a job's processes died several times.
        SrftError: whatever a job raised; the others are stopped.
        OSError: likewise.
    """
    number = min(cluster.workers_for("CPU", wanted=workers), len(jobs))
    todo = deque(range(len(jobs)))
    deaths: Counter[int] = Counter()
    idle = [cluster.start_actor(_Worker, start, start_arguments) for _ in range(number)]
    running: dict[Any, tuple[Any, int]] = {}
    try:
        while todo or running:
            while todo and idle:
                actor, job = idle.pop(), todo.popleft()
                running[actor.do.remote(work, jobs[job])] = actor, job
            (done,), _ = cluster.ray.wait(list(running), num_returns=1)
            actor, job = running.pop(done)
            try:
                result = cluster.result_of(done)
            except LostError as error:
                deaths[job] += 1
                if deaths[job] == DEATHS:
                    raise BackendError(
                        f"{jobs[job]}: {DEATHS} processes died of it, most often for lack of "
                        f"memory: {error}; the same command continues"
                    ) from None
                cluster.end_actor(actor)
                todo.appendleft(job)
                actor = cluster.start_actor(_Worker, start, start_arguments)
            else:
                if isinstance(result, SrftError | OSError):
                    raise result
                yield jobs[job], result
            idle.append(actor)
    finally:
        for actor in (*idle, *(actor for actor, _ in running.values())):
            cluster.end_actor(actor)
