"""Training runs as real processes that can be killed: forked from a server that has torch loaded.

The server costs its imports once; a run is then there in some milliseconds, with the environment
that torchrun would give it.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from srft_prep.cli import main
from srft_prep.train.metrics import Recorder, StepMetrics, read_metrics
from tests.gates import FileGate, wait_at, wait_before_naming

LOADED = ["srft_prep.cli", "srft_prep.train.training", "tests.train.runs"]


def run_command(
    words: Sequence[str],
    environment: dict[str, str],
    log: str,
    gate: tuple[Path, str] | None,
    pause: tuple[Path, int] | None,
) -> None:
    """Be a rank: run the program's entry point, its output in a file."""
    os.environ.update(environment)
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    if gate is not None:
        wait_before_naming(*gate)
    if pause is not None:
        wait_after_step(*pause)
    sys.argv = ["srft-prep", *words]
    main()


def wait_after_step(gate: Path, step: int) -> None:
    """Let this run wait once a step stands in its metrics, which are the first rank's to write."""
    record = Recorder.record

    def record_and_wait(self: Recorder, metrics: StepMetrics) -> None:
        record(self, metrics)
        if metrics.step == step:
            wait_at(gate)

    Recorder.record = record_and_wait  # type: ignore[method-assign]


class Started:
    """The ranks of a run."""

    def __init__(
        self,
        output: Path,
        words: Sequence[object],
        *,
        ranks: int,
        holds: str | None = None,
        pauses_after: int | None = None,
    ) -> None:
        """Start `srft-prep ... -o output`.

        Args:
            output: where it writes; logs stand beside it.
            words: what stands behind `srft-prep`.
            ranks: their number.
            holds: the names of files (a pattern) before which it waits until it is let go.
            pauses_after: a step, counted from 1, after which it does.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        if (gpus := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            shared["CUDA_VISIBLE_DEVICES"] = gpus  # the server's is that of its own start
        self.output = output
        self.logs = [output.parent / f"{output.name}.rank{rank}.log" for rank in range(ranks)]
        self._gate = FileGate(output.parent / f"{output.name}.gate") if holds else None
        gate = (self._gate.path, holds) if self._gate and holds else None
        self._pause = FileGate(output.parent / f"{output.name}.pause") if pauses_after else None
        pause = (self._pause.path, pauses_after) if self._pause and pauses_after else None
        self.ranks: list[ForkServerProcess] = []
        for rank, log in enumerate(self.logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment = shared | (own if ranks > 1 else {})
            command = [*map(str, words), "-o", str(output)]
            arguments = (command, environment, str(log), gate, pause)
            process = context.Process(target=run_command, args=arguments)
            process.start()
            self.ranks.append(process)

    def wait(self, seconds: float = 120.0) -> list[int | None]:
        """Return the exit statuses."""
        until = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def send(self, number: signal.Signals) -> None:
        for process in self.ranks:
            if process.is_alive():
                os.kill(process.pid or 0, number)

    @property
    def is_held(self) -> bool:
        """Whether it waits for this test."""
        return any(gate.is_reached for gate in (self._gate, self._pause) if gate is not None)

    def let_go(self) -> None:
        """Let it go on, to its end."""
        for gate in (self._gate, self._pause):
            if gate is not None:
                gate.open()

    def wait_until_held(self, seconds: float = 60.0) -> None:
        """Wait until it waits for this test."""
        self.wait_until(lambda: False, seconds)
        assert self.is_held, self.said

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for something to happen while the run goes on; it may also be held or end first."""
        until = time.monotonic() + seconds
        while self.ranks[0].is_alive() and not self.is_held and not condition():
            assert time.monotonic() < until, self.said
            time.sleep(0.001)

    def has_done(self, steps: int) -> Callable[[], bool]:
        return lambda: len(losses_of(self.output)) >= steps

    @property
    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())


@contextmanager
def started(
    output: Path,
    words: Sequence[object],
    *,
    ranks: int = 1,
    holds: str | None = None,
    pauses_after: int | None = None,
) -> Iterator[Started]:
    """Start a run, as `Started` says; no rank outlives the block."""
    run = Started(output, words, ranks=ranks, holds=holds, pauses_after=pauses_after)
    try:
        yield run
    finally:
        for process in run.ranks:
            process.kill()
            process.join()


def finish(output: Path, words: Sequence[object], *, ranks: int = 1) -> Started:
    """Run to the end."""
    with started(output, words, ranks=ranks) as run:
        assert run.wait() == [0] * ranks, run.said
    return run


def losses_of(output: Path) -> dict[int, tuple[float, float]]:
    """Return the loss and the gradient's norm of each step that stands in the metrics."""
    return {
        line["step"]: (line["loss"], line["grad_norm"])
        for line in read_metrics(output)
        if line["kind"] == "step"
    }
