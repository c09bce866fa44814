"""Trajectories -> labels: put every step to a critic, once, and keep every answer.

Requests stream to the critic and replies into the ledger, each committed before the next is looked
at. The tables are rebuilt from the ledger at the end (`label_tables`), with all that it holds of
this critic and these trajectories, whichever of them this run asked about; memory holds one batch
of rows and the ledger's index. A run with nothing to ask reads no message.

Where a model finds a request over-long, its trajectory is asked about again in smaller ones, in
further rounds. A budget ends a run before a request that could exceed it; a rerun goes on.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import polars as pl

from srft_prep.config import LabelConfig
from srft_prep.critic import Critic, CriticReply, CriticRequest
from srft_prep.critic.budget import Budget, most_usd
from srft_prep.critic.parts import Part
from srft_prep.errors import ConfigError
from srft_prep.label_tables import SCALES, Row, is_labelled, rows_of, write_tables
from srft_prep.ledger import USAGE, Key, Ledger, key_of, ledger_files
from srft_prep.manifest import MANIFEST, Manifest, read_manifest
from srft_prep.progress import Progress, Silent
from srft_prep.schemas import LABELS_FILE, REQUESTS_FILE
from srft_prep.storage import StageWriter
from srft_prep.trajectories import read_trajectories
from srft_prep.types import LABELS as LABEL_NAMES
from srft_prep.types import Trajectory

GUESSED_TOKENS_PER_SECOND: Final = 1000
"""What a machine reads, for the budget until its first reply: slow for any GPU."""
_RUN_TOTALS: Final = (
    "requests",
    "limited_requests",
    "trajectories",
    "steps",
    "scored_steps",
    "flops",
    "wall_seconds",
)


def label(
    trajectories: Path,
    output: Path,
    critic: Critic,
    config: LabelConfig,
    *,
    retry_failed: bool = False,
    overwrite: bool = False,
    budget: Budget | None = None,
    flops: Callable[[int, int, int], float] | None = None,
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Label the steps of a trajectory directory and return the label directory's manifest.

    A directory accumulates: another run with more trajectories adds to its ledger and its tables.
    So does one of another critic or question with `overwrite`: the tables are then its own, and
    the ledger keeps both. The manifest describes what the directory holds; its `run` tells of this
    run: the requests `asked`, the trajectories `reused`, `damaged_ledger_lines`, and in `usage`
    what was asked took.

    With `flops`, which tells the operations of a request by its prompt, cached and completion
    tokens, `usage` has their sum, too.

    Raises:
        ShardError: `trajectories` is no finished `ingest` output.
        ConfigError: the output cannot be written to, or its tables hold the labels of another
            critic or question and `overwrite` is not set.
        BackendError: the critic cannot work at all.
    """
    source = read_manifest(trajectories, stage="ingest").checked()
    if not overwrite:
        _refuse_other_critic(output, config)
    with (
        StageWriter.open(
            output,
            stage="label",
            config=asdict(config),
            inputs=[source.as_input()],
            accumulates=True,
        ) as writer,
        Ledger(output) as ledger,
    ):
        budget = budget or Budget(None)
        budget.spent_usd += ledger.spent_usd(config.critic_id, config.prompt_hash)
        run = _Run(
            source, critic, config, ledger, budget, progress or Silent(), retry_failed=retry_failed
        )
        run.flops = flops
        run.ask()
        (output / MANIFEST).unlink(missing_ok=True)
        unasked = "the critic gave no reply"
        if run.stopped:
            unasked = f"the budget of ${budget.limit_usd:,.2f} would be exceeded; raise it"
        counts, failures = write_tables(source, output, config, ledger, unasked=unasked)
        if run.stopped:
            run.counts["stopped_by_budget"] = 1
        if ledger.num_damaged:
            run.counts["damaged_ledger_lines"] = ledger.num_damaged
        return writer.finish(
            counts=dict(counts),
            names=[LABELS_FILE, REQUESTS_FILE, *(path.name for path in ledger_files(output))],
            command=command or [],
            extra={"first_failures": failures},
            run={**run.counts, "usage": run.usage},
        )


def missing_requests(
    trajectories: Path,
    output: Path,
    critic: Critic,
    config: LabelConfig,
    *,
    retry_failed: bool = False,
) -> Iterator[CriticRequest]:
    """Yield what `label` would ask, without asking or writing anything.

    Raises:
        ShardError: `trajectories` is no finished `ingest` output.
    """
    source = read_manifest(trajectories, stage="ingest").checked()
    with Ledger(output) as ledger:
        run = _Run(
            source, critic, config, ledger, Budget(None), Silent(), retry_failed=retry_failed
        )
        run.drop_damaged()
        yield from run.requests(None)


def count_trajectories(trajectories: Path, config: LabelConfig) -> int:
    """Return how many trajectories a run would look at, for a progress bar's total.

    The parts are not hashed for it: `label` does that.

    Raises:
        ShardError: `trajectories` is no finished `ingest` output, or a part cannot be read.
    """
    source = read_manifest(trajectories, stage="ingest")
    try:
        return sum(row.selected for row in rows_of(source.parts, config))
    except (OSError, pl.exceptions.PolarsError):
        source.checked()
        raise


class _Run:
    """One run's way through the trajectories."""

    def __init__(
        self,
        source: Manifest,
        critic: Critic,
        config: LabelConfig,
        ledger: Ledger,
        budget: Budget,
        progress: Progress,
        *,
        retry_failed: bool,
    ) -> None:
        self.source, self.critic, self.config, self.ledger = source, critic, config, ledger
        self.budget, self.progress, self.retry_failed = budget, progress, retry_failed
        self.counts: Counter[str] = Counter()
        self.usage: dict[str, float] = dict.fromkeys((*USAGE, *_RUN_TOTALS), 0)
        """What was asked took: sums over the replies, and `_RUN_TOTALS`."""
        self.flops: Callable[[int, int, int], float] | None = None
        """Operations of a request by its prompt, cached and completion tokens."""
        self.stopped = False
        """Whether the budget ended the run."""
        self._reserved: dict[tuple[str, str], float] = {}
        """Money set aside, by the content and the part of a request that is out."""
        self._open: Counter[str] = Counter()
        """Requests without a reply, by their trajectory's content."""
        self._asked: set[tuple[str, str]] = set()
        """Requests of this run, by content and part."""
        self._met: set[str] = set()
        """Trajectories that this run asked about, or need not ask about."""

    def ask(self) -> None:
        """Put every request to the critic that has no answer, until none is left to ask."""
        self.drop_damaged()
        started = time.monotonic()
        only: set[str] | None = None
        while True:  # each round but the last asks something that was not asked before
            num_asked, self.stopped = len(self._asked), False
            over_long = self._round(only)
            if len(self._asked) == num_asked or not (over_long or self.stopped):
                break
            only = None if self.stopped else over_long
        self.usage["wall_seconds"] = time.monotonic() - started

    def _round(self, only: set[str] | None) -> set[str]:
        """Ask what is missing, of some contents only; return those that were over-long.

        Where the user interrupts, what had come back is committed first.
        """
        over_long: set[str] = set()
        replies = self.critic.label(self.requests(only))
        reply: CriticReply | None = None
        try:
            for reply in replies:
                if self._commit(reply):
                    over_long.add(reply.request.content_hash)
        except KeyboardInterrupt as interrupt:
            if reply is not None and not self.ledger.has(self._key(reply), failed=True):
                self._commit(reply)
            if isinstance(replies, Generator):
                with suppress(KeyboardInterrupt, StopIteration):
                    held = replies.throw(interrupt)
                    while True:
                        self.ledger.append(self._key(held), _checked(held))
                        held = next(replies)
            raise
        return over_long

    def _key(self, reply: CriticReply) -> Key:
        config = self.config
        return key_of(reply.request, critic_id=config.critic_id, prompt_hash=config.prompt_hash)

    def drop_damaged(self) -> None:
        """Take answers that lack a step for damaged."""
        for row in rows_of(self.source.parts, self.config):
            for part in self.ledger.parts(row.subject):
                if parsed := Part.parse(part):
                    steps = parsed.steps(row.num_steps)
                    self.ledger.drop_unless_complete((*row.subject, part), steps=steps)

    def _commit(self, reply: CriticReply) -> bool:
        """Keep a reply; return whether its request was over-long."""
        checked = _checked(reply)
        request = checked.request
        self.ledger.append(self._key(checked), checked)
        reserved = self._reserved.pop((request.content_hash, request.part), 0.0)
        self.budget.settle(reserved, checked.usd)
        self.counts["asked"] += 1
        for name in USAGE:
            self.usage[name] += getattr(request if name == "clipped_tokens" else checked, name)
        if self.flops is not None:
            tokens = (checked.prompt_tokens, checked.cached_tokens, checked.completion_tokens)
            self.usage["flops"] += self.flops(*tokens)
        self.usage["requests"] += 1
        self.usage["steps"] += len(checked.labels)
        self.usage["scored_steps"] += sum(each.p_good is not None for each in checked.labels)
        self.usage["limited_requests"] += request.part.startswith("steps:")
        if checked.failure is not None and checked.failure.startswith("over-long"):
            return True
        self._open[request.content_hash] -= 1
        if not self._open[request.content_hash]:
            self.usage["trajectories"] += 1
            spent = self.budget.spent_usd
            self.progress.advance(note=f"${spent:,.2f}" if spent else "")
        return False

    def requests(self, only: set[str] | None) -> Iterator[CriticRequest]:
        """Yield the requests that the ledger has no answer to, each once; of some contents only."""
        for part in self.source.parts:
            rows: dict[str, Row] = {}
            for row in rows_of([part], self.config):
                if not row.selected or (only is not None and row.subject[0] not in only):
                    continue
                if is_labelled(self.ledger, row, self.config):
                    self._reuse(row)
                else:
                    rows[row.trajectory_id] = row
            for trajectory in read_trajectories([part]) if rows else ():
                asked = rows.get(trajectory.trajectory_id)
                if asked is None:
                    continue
                missing = self._missing(trajectory, asked)
                if missing:
                    self._met.add(trajectory.trajectory_id)
                    self._open[trajectory.content_hash] = len(missing)
                else:
                    self._reuse(asked)
                for request in missing:
                    if not self._reserve(request):
                        self.stopped = True
                        return
                    self._asked.add((request.content_hash, request.part))
                    yield request

    def _missing(self, trajectory: Trajectory, row: Row) -> list[CriticRequest]:
        """Return what is to be asked about a trajectory."""
        planned: Sequence[CriticRequest] = ()
        for scale in SCALES:
            try:
                planned = self.critic.plan(trajectory, scale=scale)
            except ConfigError:  # not even one step fits so little
                planned = ()
            if not any(self._was_over_long(request, row) for request in planned):
                break
            planned = ()
        return [
            request
            for request in planned
            if (request.content_hash, request.part) not in self._asked
            and not self._is_settled((*row.subject, request.part))
        ]

    def _is_settled(self, key: Key) -> bool:
        """Return whether a request need not be asked: a server that was gone settles nothing."""
        failure = self.ledger.failure(key)
        if failure is not None and failure.startswith("unavailable"):
            return False
        return self.ledger.has(key, failed=not self.retry_failed)

    def _was_over_long(self, request: CriticRequest, row: Row) -> bool:
        """Return whether the model found a request over-long; with `retry_failed`, in this run."""
        if self.retry_failed and (request.content_hash, request.part) not in self._asked:
            return False
        failure = self.ledger.failure((*row.subject, request.part))
        return failure is not None and failure.startswith("over-long")

    def _reuse(self, row: Row) -> None:
        """Count a trajectory that is not asked about, the first time that it is met."""
        if row.trajectory_id not in self._met:
            self._met.add(row.trajectory_id)
            self.counts["reused"] += 1
            self.progress.advance()

    def _reserve(self, request: CriticRequest) -> bool:
        """Set the most that a request can cost aside; False where the budget does not allow it."""
        rates = self.critic.rates
        most = most_usd(request.question, rates)
        if rates.usd_per_hour and self.counts["asked"]:
            most = self.usage["usd"] / self.counts["asked"]
        elif rates.usd_per_hour and request.question is not None:
            seconds = request.question.prompt_tokens / GUESSED_TOKENS_PER_SECOND
            most = rates.usd_per_hour * seconds / 3600
        if not self.budget.reserve(most):
            return False
        self._reserved[request.content_hash, request.part] = most
        return True


def _refuse_other_critic(output: Path, config: LabelConfig) -> None:
    if not (output / MANIFEST).exists():
        return
    held = read_manifest(output).data["config"]
    old = held.get("critic_id"), held.get("prompt_hash")
    new = config.critic_id, config.prompt_hash
    if None in old or old == new:
        return
    old_name, new_name = (
        f"{critic} (prompt {prompt})" if old[0] == new[0] else critic
        for critic, prompt in (old, new)
    )
    raise ConfigError(
        f"{output}: holds labels of {old_name}; choose another -o, or say --overwrite to write "
        f"the tables of {new_name} anew; the ledger keeps both"
    )


def _checked(reply: CriticReply) -> CriticReply:
    """Return the reply, or a failure where its labels are not exactly those asked for."""
    if reply.failure is not None:
        return replace(reply, labels=())
    got = [step_label.step_index for step_label in reply.labels]
    unknown = {step_label.label for step_label in reply.labels}.difference(LABEL_NAMES)
    if sorted(got) != sorted(reply.request.steps):
        reason = f"expected one label for each of {len(reply.request.steps)} steps, got {got}"
    elif unknown:
        reason = f"expected labels {', '.join(LABEL_NAMES)}, got {', '.join(sorted(unknown))}"
    else:
        return reply
    return replace(reply, labels=(), failure=reason)
