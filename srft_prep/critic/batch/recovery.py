"""Whether a job whose submission was cut off was accepted: only the provider's list can tell."""

from collections.abc import Collection, Set
from typing import Final, Literal

from srft_prep.critic.batch.journal import JobEntry
from srft_prep.critic.batch.provider import BatchProvider, ProviderTrouble

_CLOCK_SKEW_SECONDS: Final = 3600.0
"""How far this machine's clock may be from the provider's."""


def find_job(
    entry: JobEntry, provider: BatchProvider, *, known: Collection[str]
) -> str | Literal["may be running"] | None:
    """Return the provider's id of a job; None where it has none.

    A provider that keeps no words of ours shows the custom ids of a job only when it has ended, so
    one of the same size that still runs has to be waited for.

    Args:
        entry: the job.
        provider: where it may be.
        known: ids of the jobs that it is not.

    Raises:
        ProviderTrouble: the list cannot be had.
    """
    may_be_running = False
    for job in provider.recent(entry.intended - _CLOCK_SKEW_SECONDS):
        if job.job_id in known:
            continue
        if job.tag is not None:
            if job.tag == entry.name:
                return job.job_id
        elif job.num_requests == entry.num_requests:
            if not job.ended:
                may_be_running = True
            elif _answers(job.job_id, entry.ids, provider):
                return job.job_id
    return "may be running" if may_be_running else None


def _answers(job_id: str, ids: Set[str], provider: BatchProvider) -> bool:
    try:
        return all(result.custom_id in ids for result in provider.results(job_id))
    except ProviderTrouble as trouble:
        if trouble.kind in ("missing", "refused"):
            return False
        raise
