"""The journal of batches: whenever a run dies, no request is in two jobs and none is lost.

The provider here is in memory, so that every moment can be tried.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.critic import CriticReply, CriticRequest, Question
from srft_prep.critic.answers import Completion
from srft_prep.critic.batch.journal import BatchJournal
from srft_prep.critic.batch.provider import ItemResult, JobState, RecentJob
from srft_prep.critic.budget import Budget, most_usd
from srft_prep.critic.pricing import Rates
from tests.critic.batch_child import CRITIC, PRICE, id_of, request_of, run

OWNER = {"provider": "memory", **CRITIC}
RATES = Rates(price=PRICE, batch=True)


class Killed(BaseException):
    """The process ends here."""


@dataclass
class MemoryProvider:
    """A provider that a run can die before and after every call of."""

    journal: Path
    tagged: bool
    """Whether it keeps a job's name, as OpenAI does."""
    name: str = "memory"
    max_requests: int = 100
    max_bytes: int = 1 << 20
    jobs: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    """Job id -> its name and its custom ids."""
    polls: Counter[str] = field(default_factory=Counter)
    moments_left: int = -1
    """Moments until the run dies; negative for never."""
    sizes: list[int] = field(default_factory=lambda: [0, 0])
    """Bytes of the journal a moment ago and now."""
    at_death: bytes = b""

    def moment(self) -> None:
        """Maybe die: what the journal holds now is what a later run finds."""
        self.sizes = [self.sizes[1], self.journal.stat().st_size]
        if self.moments_left == 0:
            self.at_death = self.journal.read_bytes()
            raise Killed
        self.moments_left -= 1

    def line(self, custom_id: str, question: Question) -> bytes:
        return orjson.dumps({"custom_id": custom_id, "text": question.user}) + b"\n"

    def completion(self, response: dict[str, Any]) -> Completion:
        return Completion(text=response["text"])

    def submit(self, lines: BinaryIO, *, name: str) -> str:
        self.moment()
        ids = [orjson.loads(line)["custom_id"] for line in lines]
        job_id = f"job-{len(self.jobs)}"
        self.jobs[job_id] = (name, ids)
        self.moment()
        return job_id

    def poll(self, job_id: str) -> JobState:
        self.moment()
        self.polls[job_id] += 1
        return JobState(phase="ended" if self.has_ended(job_id) else "running")

    def has_ended(self, job_id: str) -> bool:
        return self.polls[job_id] > 1

    def results(self, job_id: str) -> Iterator[ItemResult]:
        labels = {str(step): "good" for step in range(3)}
        for custom_id in self.jobs[job_id][1]:
            self.moment()
            text = orjson.dumps({"labels": labels}).decode()
            yield ItemResult(custom_id=custom_id, response={"text": text})

    def recent(self, since: float) -> Iterator[RecentJob]:
        self.moment()
        for job_id, (name, ids) in reversed(self.jobs.items()):
            self.polls[job_id] += 1
            yield RecentJob(
                job_id=job_id,
                ended=self.has_ended(job_id),
                num_requests=len(ids),
                tag=name if self.tagged else None,
            )

    def cancel(self, job_id: str) -> None:
        self.moment()

    def close(self) -> None:
        pass


def live(
    provider: MemoryProvider, ledger: list[str], numbers: list[int], torn: float, **sizes: int
) -> bool:
    """Run until the end or death; return whether it came to the end. The dead leave a journal whose
    last line is torn, by a share of what was written in the last moment."""
    journal = provider.journal
    missing = (request for request in map(request_of, numbers) if id_of(request) not in ledger)
    replies: Iterator[CriticReply] = run(
        missing, provider, journal, poll_seconds=0.0, settle_seconds=0.0, **sizes
    )
    try:
        for reply in replies:
            provider.moment()
            assert reply.failure is None
            ledger.append(id_of(reply.request))
            provider.moment()
    except Killed:
        before, now = provider.sizes
        journal.write_bytes(provider.at_death[: round(before + torn * (now - before))])
        return False
    return True


@settings(max_examples=300)
@given(
    tagged=st.booleans(),
    num_requests=st.integers(1, 7),
    max_requests=st.integers(1, 4),
    max_jobs=st.integers(1, 3),
    deaths=st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1)), max_size=6),
    selections=st.lists(st.permutations(range(7)), min_size=7, max_size=7),
)
def test_after_any_deaths_each_request_was_accepted_once_and_answered_once(
    tagged: bool,
    num_requests: int,
    max_requests: int,
    max_jobs: int,
    deaths: list[tuple[int, float]],
    selections: list[list[int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "batches.jsonl"
        provider = MemoryProvider(journal, tagged)
        ledger: list[str] = []
        for (moments, torn), order in zip([*deaths, (-1, 0.0)], selections, strict=False):
            provider.moments_left = moments
            provider.sizes = [journal.stat().st_size if journal.exists() else 0] * 2
            numbers = [number for number in order if number < num_requests]
            sizes = {"max_requests": max_requests, "max_jobs": max_jobs}
            came_to_the_end = live(provider, ledger, numbers, torn, **sizes)
        assert came_to_the_end
        expected = Counter(id_of(request_of(number)) for number in range(num_requests))
        assert Counter(ledger) == expected
        assert Counter(id_ for _, ids in provider.jobs.values() for id_ in ids) == expected


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, set[str]]]:
    """Events of a journal as a driver makes them: (event, number of the job, ids)."""
    events: list[tuple[str, int, set[str]]] = []
    held: dict[int, set[str]] = {}
    accepted: set[int] = set()
    free = {f"id-{number}" for number in range(6)}
    for _ in range(draw(st.integers(0, 12))):
        number = draw(st.sampled_from([*held, len(events)]))
        if number not in held:
            if free:
                ids = set(draw(st.lists(st.sampled_from(sorted(free)), min_size=1, unique=True)))
                held[number] = ids
                free -= ids
                events.append(("intent", number, ids))
        elif number not in accepted:
            accept = draw(st.booleans())
            events.append(("submitted" if accept else "dropped", number, set()))
            if accept:
                accepted.add(number)
            else:
                free |= held.pop(number)
        else:
            ids = set(
                draw(st.lists(st.sampled_from(sorted(held[number])), min_size=1, unique=True))
            )
            events.append(("taken", number, ids))
            free |= ids
            held[number] = held[number] - ids
            if not held[number]:
                del held[number]
    return events


@given(history=histories(), share=st.floats(0, 1), torn=st.floats(0, 1, exclude_max=True))
def test_any_prefix_of_a_journal_tells_what_its_whole_lines_tell(
    history: list[tuple[str, int, set[str]]], share: float, torn: float
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batches.jsonl"
        journal = BatchJournal.open(path, **OWNER)
        entries, ends, states = {}, [0], [{}]
        for event, number, ids in history:
            if event == "intent":
                entries[number] = journal.intend(dict.fromkeys(ids, 0.0))
            elif event == "submitted":
                journal.submitted(entries[number], f"job-{number}")
            elif event == "taken":
                journal.taken(entries[number], ids)
            else:
                journal.dropped(entries[number], "no room")
            ends.append(path.stat().st_size)
            states.append(state_of(journal))
        journal.close()
        whole = int(share * (len(ends) - 1))
        start, end = [*ends, ends[-1] + 1][whole : whole + 2]
        path.write_bytes(path.read_bytes()[: start + int(torn * (end - start))])
        for _ in range(2):  # what was torn is gone: the second reads the same
            again = BatchJournal.open(path, **OWNER)
            assert state_of(again) == states[whole]
            held = Counter(id_ for job in again.jobs.values() for id_ in job.ids)
            assert set(held.values()) <= {1}
            again.close()
        assert path.stat().st_size == ends[whole]


def state_of(journal: BatchJournal) -> dict[str, tuple[str | None, int, frozenset[str]]]:
    return {
        name: (job.job_id, job.num_requests, frozenset(job.ids))
        for name, job in journal.jobs.items()
    }


def test_a_request_that_an_open_job_holds_cannot_be_put_into_another(tmp_path: Path) -> None:
    journal = BatchJournal.open(tmp_path / "batches.jsonl", **OWNER)
    journal.intend({"a": 0.0, "b": 0.0})
    with pytest.raises(AssertionError, match="in an open job already"):
        journal.intend({"b": 0.0, "c": 0.0})
    journal.close()


def test_all_but_the_reply_in_hand_are_taken_whenever_a_run_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "batches.jsonl"
    replies = run([request_of(number) for number in range(6)], MemoryProvider(path, True), path)
    handed_out = [id_of(next(replies).request) for _ in range(4)]
    (tmp_path / "copy.jsonl").write_bytes(path.read_bytes())
    killed = BatchJournal.open(tmp_path / "copy.jsonl", **OWNER)
    (job,) = killed.jobs.values()
    assert job.ids == {id_of(request_of(number)) for number in range(6)} - {*handed_out[:3]}
    killed.close()
    replies.close()


def reserving(numbers: list[int], budget: Budget) -> Iterator[CriticRequest]:
    """Requests as `label` sends them: each paid for in advance, none once the money is out."""
    for number in numbers:
        request = request_of(number)
        if not budget.reserve(most_usd(request.question, RATES)):
            return
        yield request


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3]),
        ([4, 0, 1, 2, 3], [4]),  # one may be new before it shows that it is
        ([4, 5, 6], [4]),
    ],
)
def test_what_a_killed_run_has_in_flight_counts_against_the_budget(
    tmp_path: Path, numbers: list[int], expected: list[int]
) -> None:
    path = tmp_path / "batches.jsonl"
    provider = MemoryProvider(path, True)
    killed = run([request_of(number) for number in range(4)], provider, path)
    next(killed)
    killed.close()
    budget = Budget(4.5 * most_usd(request_of(0).question, RATES))
    replies = list(run(reserving(numbers, budget), provider, path, budget))
    asked = {reply.request.trajectory_id for reply in replies}
    assert asked == {f"run-{number}" for number in expected}


def test_what_is_set_aside_for_jobs_in_flight_is_given_back_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "batches.jsonl"
    provider = MemoryProvider(path, True)
    killed = run([request_of(number) for number in range(4)], provider, path)
    next(killed)
    killed.close()
    most = most_usd(request_of(0).question, RATES)
    budget = Budget(4.5 * most)
    assert len(list(run([request_of(2)], provider, path, budget))) == 1
    assert budget.reserve(4 * most)


def test_a_journal_without_costs_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "batches.jsonl"
    journal = BatchJournal.open(path, **OWNER)
    journal.intend({"a": 1.0, "b": 2.0})
    journal.close()
    line = orjson.loads(path.read_bytes())
    assert line.pop("reserve_usd") == [1.0, 2.0]
    path.write_bytes(orjson.dumps(line) + b"\n")
    journal = BatchJournal.open(path, **OWNER)
    (job,) = journal.jobs.values()
    assert job.reserve_usd == {"a": 0.0, "b": 0.0}
    journal.close()


def test_a_custom_id_is_the_same_in_every_run_and_another_for_every_key() -> None:
    ids = [id_of(request_of(number)) for number in range(100)]
    assert ids == [id_of(request_of(number, fate="other")) for number in range(100)]
    assert len(set(ids)) == 100
    assert all(len(each) == 40 and each.isalnum() for each in ids)


def test_the_jobs_of_another_machines_journal_are_waited_for_and_no_request_twice(
    tmp_path: Path,
) -> None:
    mine, theirs = tmp_path / "batches-judge.jsonl", tmp_path / "theirs.jsonl"

    def submit(path: Path, job_id: str, ids: str) -> BatchJournal:
        journal = BatchJournal.open(path, **OWNER)
        journal.submitted(journal.intend(dict.fromkeys(ids, 0.5)), job_id)
        return journal

    submit(mine, "common", "ab").close()
    theirs.write_bytes(mine.read_bytes())
    submit(theirs, "lost", "cde").close()
    foreign = BatchJournal.open(theirs, **{**OWNER, "critic_id": "another"})
    foreign.submitted(foreign.intend({"f": 0.5}), "foreign")
    foreign.close()
    with theirs.open("ab") as file:
        file.write(b'{"event": "int')
    submit(mine, "new", "d").close()
    theirs.rename(tmp_path / "batches-judge-2.jsonl")
    for _ in range(2):  # what was taken in once is not taken in again
        journal = BatchJournal.open(mine, **OWNER)
        held = {job.job_id: job.ids for job in journal.jobs.values()}
        assert held == {"common": {"a", "b"}, "new": {"d"}, "lost": {"c", "e"}}
        assert journal.known_job_ids == {"common", "new", "lost", "foreign"}
        journal.close()
    journal = BatchJournal.open(mine, **OWNER)
    for job in list(journal.jobs.values()):
        journal.taken(job, job.ids.copy())
    journal.close()
    assert not BatchJournal.open(mine, **OWNER).jobs
