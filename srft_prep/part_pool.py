"""Jobs on parts in processes of their own, which die with their parent.

Every process gets the same set-up once. Results come as they finish. The processes never see a
Ctrl-C, which is the parent's to handle, and kill themselves when the parent is gone, even by
kill -9. A process that dies at any time, while it starts too, ends the run in words.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, connection, get_context, parent_process
from typing import TYPE_CHECKING, Any, TypeVar

from srft_prep.errors import BackendError

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    jobs: Sequence[Job],
    work: Callable[[Job], Result],
    *,
    workers: int,
    start: Callable[..., None],
    start_arguments: tuple[Any, ...],
) -> Iterator[tuple[Job, Result]]:
    """Yield (job, what `work` returned) of every job, in the order in which they finish.

    Args:
        jobs: what to do; picklable.
        work: a module-level function.
        workers: number of processes.
        start: a module-level function, called once in each process.
        start_arguments: its arguments; picklable.

    Raises:
        BackendError: a process died.
        Exception: whatever a job raised; the others are stopped.
    """
    context = get_context("spawn")
    workers = min(workers, len(jobs))
    # Not by `initargs`: they may be larger than a pipe, and a process that died before it had read
    # them would leave us writing to it for ever.
    setup = context.Queue()
    setup.cancel_join_thread()
    for _ in range(workers):
        setup.put(start_arguments)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(start, setup)
    ) as pool:
        try:
            with _interrupts_held():
                futures = {pool.submit(work, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise BackendError(
                "a worker process died, most often for lack of memory; choose fewer --workers, "
                "the same command continues"
            ) from None
        except BaseException:
            for worker in active_children():
                worker.kill()  # or the pool would first work off all that was submitted
            raise


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C until the block ends; the processes that it starts never see one.

    They inherit the mask. Here it is not enough: the kernel gives the signal to any thread that
    does not block it (of polars, say), and Python then interrupts the main thread after all.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    came: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        if came:
            signal.raise_signal(signal.SIGINT)


def _start(start: Callable[..., None], setup: "Queue[tuple[Any, ...]]") -> None:
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    start(*setup.get())


def _die_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
