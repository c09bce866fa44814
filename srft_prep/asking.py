"""Trajectories -> a critic -> the ledger: what is missing is asked, each thing once.

Requests stream to the critic and replies into the ledger, each committed before the next is looked
at. Memory holds one batch of rows and the ledger's index. A run with nothing to ask reads no
message, unless a cascade is to tell what it spared (`foresight`). Where a model finds a request
over-long, its trajectory is asked about again in smaller ones, in further rounds. A budget ends
the asking before a request that could exceed it.

Where only some steps of a trajectory are needed (a cascade), of its windows only those with such a
step are asked, under the critic's own limit or, where that takes fewer tokens, in windows of
`FOCUS_TOKENS`; what is answered already takes none. Windows lie where they would for the whole
trajectory, whichever steps are needed, so that they are the same from run to run.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from srft_prep.config import LabelConfig
from srft_prep.critic import Critic, CriticReply, CriticRequest
from srft_prep.critic.budget import Budget, most_usd
from srft_prep.critic.parts import Part
from srft_prep.errors import ConfigError
from srft_prep.foresight import Foresight
from srft_prep.ledger import USAGE, Key, Ledger, key_of
from srft_prep.ledger_labels import SCALES, Needed, Row, focus_scale, is_labelled, rows_of
from srft_prep.manifest import Manifest
from srft_prep.progress import Progress
from srft_prep.trajectories import named, read_trajectories
from srft_prep.types import LABELS as LABEL_NAMES
from srft_prep.types import Trajectory

GUESSED_TOKENS_PER_SECOND: Final = 1000
"""What a machine reads, for the budget until its first reply: slow for any GPU."""
RUN_TOTALS: Final = (
    "requests",
    "limited_requests",
    "trajectories",
    "steps",
    "scored_steps",
    "flops",
    "wall_seconds",
)
"""What a run's usage has beside sums over its replies."""


NeededOf = Callable[[Path, Sequence[Row]], Sequence[Needed]]
"""A part and rows of it -> the steps that are needed of each."""


class Asking:
    """One critic's way through the trajectories in one run."""

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
        needed: NeededOf | None = None,
        foresight: Foresight | None = None,
        assure: Callable[[], None] = lambda: None,
    ) -> None:
        self.source, self.critic, self.config, self.ledger = source, critic, config, ledger
        self.budget, self.progress, self.retry_failed = budget, progress, retry_failed
        self.counts: Counter[str] = Counter()
        self.usage: dict[str, float] = dict.fromkeys((*USAGE, *RUN_TOTALS), 0)
        """What was asked took: sums over the replies, and `RUN_TOTALS`."""
        self.flops: Callable[[int, int, int], float] | None = None
        """Operations of a request by its prompt, cached and completion tokens."""
        self.needed = needed
        """Which steps are asked about; None for all."""
        self.foresight = foresight
        """What notes every plan, and has one of every trajectory; None where nobody asks for it."""
        self.assure = assure
        """Called before each request; raises where answers could not be kept in the output."""
        self._plan = critic.plan if foresight is None else foresight.plan
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
            rows: dict[str, tuple[Row, Needed]] = {}
            selected = [
                row
                for row in rows_of([part], self.config)
                if row.selected and (only is None or row.subject[0] in only)
            ]
            needed = self.needed(part, selected) if self.needed else (None,) * len(selected)
            for row, steps in zip(selected, needed, strict=True):
                if steps == frozenset():
                    self._pass_over(row)
                elif is_labelled(self.ledger, row, self.config, steps):
                    self._reuse(row)
                else:
                    rows[row.trajectory_id] = row, steps
            unplanned: set[str] = set()
            if self.foresight is not None and self.foresight.eager:
                unplanned = {row.trajectory_id for row in selected if self.foresight.lacks(row)}
            wanted = rows.keys() | unplanned
            for trajectory in read_trajectories([part], where=named(wanted)) if wanted else ():
                asked = rows.get(trajectory.trajectory_id)
                if asked is None:
                    if self.foresight is not None:
                        self.foresight.add(trajectory)
                    continue
                missing = self._missing(trajectory, *asked)
                if missing:
                    self._met.add(trajectory.trajectory_id)
                    self._open[trajectory.content_hash] = len(missing)
                else:
                    self._reuse(asked[0])
                for request in missing:
                    self.assure()
                    if not self._reserve(request):
                        self.stopped = True
                        return
                    self._asked.add((request.content_hash, request.part))
                    yield request

    def _missing(self, trajectory: Trajectory, row: Row, steps: Needed) -> list[CriticRequest]:
        """Return what is to be asked about a trajectory, or about some of its steps."""
        planned: Sequence[CriticRequest] = ()
        for scale in SCALES:
            try:
                planned = self._plan(trajectory, scale=scale)
            except ConfigError:  # not even one step fits so little
                planned = ()
            if not any(self._was_over_long(request, row) for request in planned):
                break
            planned = ()
        if steps is not None:
            planned = self._focused(trajectory, row, steps, planned)
        return [
            request
            for request in planned
            if (request.content_hash, request.part) not in self._asked
            and not self._is_settled((*row.subject, request.part))
        ]

    def _focused(
        self,
        trajectory: Trajectory,
        row: Row,
        steps: frozenset[int],
        planned: Sequence[CriticRequest],
    ) -> Sequence[CriticRequest]:
        """Return what asks for some steps: requests of the plan, or smaller windows if cheaper.

        What was answered costs nothing more, so that whoever began in windows goes on in them.
        """
        due = [request for request in planned if not steps.isdisjoint(request.steps)]
        scale = focus_scale(self.config)
        if scale is None:
            return due
        try:
            windows = self._plan(trajectory, scale=scale)
        except ConfigError:  # not even one step fits so little
            return due
        chosen = [request for request in windows if not steps.isdisjoint(request.steps)]
        if any(self._was_over_long(each, row) for each in chosen):
            return due
        due_tokens, chosen_tokens = (
            _num_tokens(
                each
                for each in asked
                if not self.ledger.has((*row.subject, each.part), failed=False)
            )
            for asked in (due, chosen)
        )
        return due if due and due_tokens <= chosen_tokens else chosen

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

    def _pass_over(self, row: Row) -> None:
        """Note a trajectory of which nothing is needed."""
        if row.trajectory_id not in self._met:
            self._met.add(row.trajectory_id)
            self.progress.advance()

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


def _num_tokens(requests: Iterable[CriticRequest]) -> int:
    """Return the tokens in and out that requests are expected to take."""
    questions = [request.question for request in requests]
    return sum(each.prompt_tokens + each.output_tokens for each in questions if each is not None)
