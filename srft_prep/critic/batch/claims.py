"""What the jobs of earlier runs may still answer, and the money that they may still cost."""

from dataclasses import dataclass, field

from srft_prep.critic.batch.spool import Job
from srft_prep.critic.budget import Budget


@dataclass(slots=True)
class Claims:
    """Open jobs of earlier runs by custom id, until their requests come.

    Whoever sends a request has set money aside for it before the request shows whose it is. So the
    most that one of them can cost is left out of what is set aside here: else those that a full
    budget was spent on could never be fetched. A new request may take that place: what is sent can
    exceed the budget by one request.
    """

    budget: Budget | None = None
    """What is open is set aside from it; None for no limit."""
    _jobs: dict[str, Job] = field(default_factory=dict)
    _most_usd: float = 0.0
    """The most that any one request can cost."""
    _open_usd: float = 0.0
    _held_usd: float = 0.0

    def add(self, job: Job) -> None:
        """Add all that a job may answer."""
        self._jobs.update(dict.fromkeys(job.entry.ids, job))
        for custom_id in job.entry.ids:
            usd = job.entry.reserve_usd.get(custom_id, 0.0)
            self._open_usd += usd
            self._most_usd = max(self._most_usd, usd)
        self._hold()

    def pop(self, custom_id: str) -> Job | None:
        """Return the job that may answer a request, from now on the sender's to pay for."""
        job = self._jobs.pop(custom_id, None)
        if job is not None:
            self._open_usd -= job.entry.reserve_usd.get(custom_id, 0.0)
            self._hold()
        return job

    def close(self) -> None:
        """Give back what is set aside."""
        self._jobs.clear()
        self._open_usd = 0.0
        self._hold()

    def _hold(self) -> None:
        held = max(0.0, self._open_usd - self._most_usd)
        if self.budget is not None and held > self._held_usd:
            self.budget.hold(held - self._held_usd)
        elif self.budget is not None and held < self._held_usd:
            self.budget.settle(self._held_usd - held, 0.0)
        self._held_usd = held
