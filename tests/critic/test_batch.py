"""Batches at both providers, over their official clients, against a server on loopback."""

import sys
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from srft_prep.critic import CriticReply
from srft_prep.critic.anthropic import anthropic_critic
from srft_prep.critic.batch.provider import BatchProvider
from srft_prep.critic.openai import openai_critic
from srft_prep.critic.prompt import load_prompt
from srft_prep.critic.question import QuestionSettings
from srft_prep.errors import BackendError, ConfigError
from tests.critic.batch_child import PROMPTS, id_of, provider_of, request_of, run
from tests.critic.batch_server import KEY, BatchServer

NAMES = ("openai", "anthropic")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.delenv("ANTHROPIC_AUTH_TOKEN", raising=False)
    with BatchServer() as server:
        yield server


@pytest.fixture(params=NAMES)
def provider(request: pytest.FixtureRequest, server: BatchServer) -> Iterator[BatchProvider]:
    provider = provider_of(request.param, server.url)
    yield provider
    provider.close()


@pytest.fixture
def openai(server: BatchServer) -> Iterator[BatchProvider]:
    provider = provider_of("openai", server.url)
    yield provider
    provider.close()


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "batches.jsonl"


def failures(replies: list[CriticReply]) -> dict[str, str]:
    """Return the kind of each reply's failure, or `none`, by trajectory."""
    return {
        reply.request.trajectory_id: (reply.failure or "none").split(":")[0] for reply in replies
    }


def assert_each_once(server: BatchServer, replies: list[CriticReply], num_requests: int) -> None:
    """Every request was accepted once and has one reply with labels."""
    expected = {id_of(request_of(number)): 1 for number in range(num_requests)}
    assert server.accepted == expected
    assert Counter(id_of(reply.request) for reply in replies) == expected
    assert set(failures(replies).values()) == {"none"}


def test_every_request_of_several_batches_has_a_reply_at_the_batch_price(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    replies = list(run([request_of(n) for n in range(7)], provider, journal, max_requests=3))
    assert_each_once(server, replies, 7)
    assert len(server.jobs) == 3
    for reply in replies:
        assert [label.label for label in reply.labels] == ["harmful"] * 3
        assert reply.labels[0].rationale == "it\u2028breaks"
        usage = (reply.prompt_tokens, reply.cached_tokens, reply.completion_tokens)
        assert usage == (1000, 200, 50)
        # 800 new tokens at $2 a million, 200 cached at 0.50, 50 out at 8, half of it for a batch.
        assert reply.usd == pytest.approx(0.5 * (800 * 2 + 200 * 0.5 + 50 * 8) / 1e6)
        assert reply.seconds > 0
        assert reply.request.question is None


def test_what_went_wrong_with_a_request_is_told_and_what_was_billed_is_kept(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    fates = ["good", "nonsense", "refusal", "over-long", "invalid", "server-error", "good"]
    requests = [request_of(n, fate=fate) for n, fate in enumerate(fates)]
    replies = list(run(requests, provider, journal))
    kinds = failures(replies)
    expected = ["none", "unparseable", "refused", "over-long", "rejected", "unavailable", "none"]
    assert [kinds[f"run-{n}"] for n in range(7)] == expected
    billed = {"none", "unparseable", "refused"}
    for reply in replies:
        is_billed = kinds[reply.request.trajectory_id] in billed
        assert (reply.usd > 0) == (reply.completion_tokens > 0) == is_billed
        assert bool(reply.labels) == (reply.failure is None)
    assert len(server.jobs) == 1, "nothing is asked again inside of a batch"


@pytest.mark.parametrize("end", ["expired", "cancelled"])
def test_a_batch_that_ends_early_gives_what_it_has_and_the_rest_can_be_asked_again(
    server: BatchServer, provider: BatchProvider, journal: Path, end: str
) -> None:
    server.faults.end = end
    replies = list(run([request_of(n) for n in range(10)], provider, journal))
    assert Counter(failures(replies).values()) == {"none": 5, "expired": 5}
    server.faults.end = "completed"
    failed = [reply.request.trajectory_id for reply in replies if reply.failure]
    again = [request_of(int(name.removeprefix("run-"))) for name in failed]
    replies = list(run(again, provider, journal))
    assert failures(replies) == dict.fromkeys(failed, "none")


def test_errors_of_polls_are_waited_out(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    server.faults.poll = deque(["429", "500", "drop", "503", "429", "502"])
    replies = list(run([request_of(n) for n in range(4)], provider, journal, max_requests=2))
    assert_each_once(server, replies, 4)
    assert not server.faults.poll


def test_results_that_are_cut_off_are_fetched_again_and_each_reply_comes_once(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    server.faults.results = deque(["cut", "cut"])
    replies = list(run([request_of(n) for n in range(9)], provider, journal))
    assert_each_once(server, replies, 9)


@pytest.mark.parametrize("late_lists", [0, 2])
def test_a_batch_whose_submission_got_no_answer_is_found_and_not_submitted_again(
    server: BatchServer, provider: BatchProvider, journal: Path, late_lists: int
) -> None:
    server.faults.create = deque(["accept-and-drop"])
    server.faults.late_lists = late_lists
    requests = [request_of(n) for n in range(5)]
    replies = list(run(requests, provider, journal, max_requests=2, settle_seconds=60.0))
    assert_each_once(server, replies, 5)
    assert len(server.jobs) == 3


@pytest.mark.parametrize("fault", ["drop", "500", "529", "429"])
def test_a_batch_that_was_not_accepted_is_submitted_again(
    server: BatchServer, provider: BatchProvider, journal: Path, fault: str
) -> None:
    server.faults.create = deque([fault, fault])
    replies = list(run([request_of(n) for n in range(5)], provider, journal, max_requests=2))
    assert_each_once(server, replies, 5)
    assert len(server.jobs) == 3


def test_a_batch_of_somebody_else_is_not_taken_for_a_lost_one(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    strangers = {f"other-{n}": server_body(n) for n in range(2)}
    ended = server.make(strangers, metadata={"srft_prep": "another"})
    ended.ended = "completed"
    server.make(strangers, metadata=None)  # runs, and ends when it was listed a few times
    server.accepted.clear()
    server.faults.create = deque(["drop"])
    replies = list(run([request_of(n) for n in range(2)], provider, journal))
    assert_each_once(server, replies, 2)


def test_an_earlier_batch_of_the_same_requests_is_not_taken_for_a_lost_one(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    rejected = list(run([request_of(n, fate="invalid") for n in range(2)], provider, journal))
    assert set(failures(rejected).values()) == {"rejected"}
    server.faults.create = deque(["drop"])
    replies = list(run([request_of(n) for n in range(2)], provider, journal))
    assert set(failures(replies).values()) == {"none"}
    assert len(server.jobs) == 2


def server_body(number: int) -> dict[str, object]:
    content = f"Task {number}. steps=0,1 fate=good"
    return {"model": "m", "messages": [{"role": "user", "content": content}]}


def test_no_more_batches_are_in_flight_and_no_more_requests_pulled_than_allowed(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    server.faults.polls_until_end = 3
    server.faults.jobs_before_end = 2
    pulled = 0

    def requests() -> Iterator:
        nonlocal pulled
        for number in range(40):
            pulled += 1
            yield request_of(number)

    replies = run(requests(), provider, journal, max_requests=4, max_jobs=2)
    found = [next(replies)]
    assert pulled <= 2 * 4
    found += replies
    assert server.most_in_flight == 2
    assert_each_once(server, found, 40)


def test_a_batch_is_full_by_its_bytes_too(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    requests = [request_of(n, padding=2000) for n in range(6)]
    replies = list(run(requests, provider, journal, max_bytes=7000))
    assert_each_once(server, replies, 6)
    assert [len(job.requests) for job in server.jobs.values()] == [2, 2, 2]


def test_a_batch_that_is_too_large_is_halved_and_a_single_request_over_long(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    server.faults.max_body_bytes = 8000
    requests = [request_of(n, padding=12_000 if n == 3 else 1000) for n in range(8)]
    kinds = failures(list(run(requests, provider, journal)))
    assert kinds.pop("run-3") == "over-long"
    assert set(kinds.values()) == {"none"}
    assert len(kinds) == 7
    assert set(server.accepted.values()) == {1}


def test_a_job_that_does_not_end_is_cancelled_for_what_it_has(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    server.faults.end = "never"
    requests = [request_of(n) for n in range(4)]

    def interrupted() -> Iterator:
        yield from requests
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run(interrupted(), provider, journal, max_requests=4))
    assert len(server.jobs) == 1
    entries = [orjson.loads(line) for line in journal.read_bytes().splitlines()]
    entries[0]["intended"] -= 25.5 * 3600
    journal.write_bytes(b"".join(orjson.dumps(entry) + b"\n" for entry in entries))
    replies = list(run(requests, provider, journal))
    assert Counter(failures(replies).values()) == {"none": 2, "expired": 2}
    assert len(server.jobs) == 1


def test_a_job_that_cannot_even_be_cancelled_is_given_up(
    server: BatchServer, provider: BatchProvider, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults.end = "never"
    monkeypatch.setattr(server, "look", lambda job: None)
    replies = list(run([request_of(n) for n in range(4)], provider, journal, window_seconds=0.5))
    assert set(failures(replies).values()) == {"expired"}
    assert "no end after" in str(replies[0].failure)
    assert list(run([], provider, journal)) == []


def test_a_consumer_that_stops_leaves_a_job_to_the_next_run(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    first = run([request_of(n) for n in range(6)], provider, journal)
    taken = [next(first), next(first)]
    first.close()
    # The second was handed out, but nobody asked for a third: it may not have been kept.
    kept = {taken[0].request.trajectory_id}
    rest = [request_of(n) for n in range(6) if f"run-{n}" not in kept]
    replies = list(run(rest, provider, journal))
    assert_each_once(server, [taken[0], *replies], 6)
    assert len(server.jobs) == 1


def test_a_rerun_for_fewer_requests_leaves_the_others_results_for_later(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    started = run([request_of(n) for n in range(6)], provider, journal)
    next(started)
    started.close()
    some = list(run([request_of(n) for n in (4, 1)], provider, journal))
    others = list(run([request_of(n) for n in (0, 2, 3, 5, 6)], provider, journal))
    assert_each_once(server, some + others, 7)
    assert len(server.jobs) == 2
    again = list(run([request_of(0)], provider, journal))
    assert failures(again) == {"run-0": "none"}
    assert len(server.jobs) == 3, "what was taken is asked anew"


def test_more_jobs_of_a_killed_run_than_may_be_in_flight_do_not_block(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    server.faults.end = "never"

    def interrupted() -> Iterator:
        yield from (request_of(n) for n in range(9))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run(interrupted(), provider, journal, max_requests=1, max_jobs=10))
    assert len(server.jobs) == 9
    server.faults.end = "completed"
    requests = [request_of(n) for n in range(12)]
    replies = list(run(requests, provider, journal, max_requests=1, max_jobs=2))
    assert_each_once(server, replies, 12)


def test_jobs_of_another_critic_in_the_journal_are_left_alone(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    started = run([request_of(n) for n in range(3)], provider, journal)
    next(started)
    started.close()
    before = journal.read_bytes()
    other = provider_of("anthropic" if provider.name == "openai" else "openai", server.url)
    assert failures(list(run([request_of(0)], other, journal))) == {"run-0": "none"}
    other.close()
    assert journal.read_bytes().startswith(before)
    replies = list(run([request_of(n) for n in range(3)], provider, journal))
    assert len(replies) == 3
    assert len(server.jobs) == 2


def test_a_key_that_is_not_taken_ends_the_run_and_is_not_told(
    server: BatchServer,
    journal: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in NAMES:
        monkeypatch.setenv(f"{name.upper()}_API_KEY", "sk-secret-wrong")
        provider = provider_of(name, server.url)
        with pytest.raises(BackendError, match=f"set {name.upper()}_API_KEY") as caught:
            list(run([request_of(0)], provider, journal))
        provider.close()
        seen = [str(caught.value), journal.read_text(), *capfd.readouterr()]
        assert not any("sk-" in text for text in seen)
        monkeypatch.delenv(f"{name.upper()}_API_KEY")
        with pytest.raises(BackendError, match=f"{name.upper()}_API_KEY"):
            provider_of(name, server.url)
    assert not server.jobs


def test_a_job_that_the_account_does_not_know_is_not_silently_paid_again(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    started = run([request_of(n) for n in range(3)], provider, journal)
    next(started)
    started.close()
    server.jobs.clear()
    with pytest.raises(BackendError, match="does not know the batch batch_0000") as caught:
        list(run([request_of(n) for n in range(3)], provider, journal))
    line = str(caught.value).split("append the line ")[1].split(" to ask again")[0]
    with journal.open("a") as file:
        file.write(f"{line}\n")
    assert len(list(run([request_of(n) for n in range(3)], provider, journal))) == 3


def test_a_provider_out_of_reach_for_longer_than_jobs_live_ends_the_run_but_loses_nothing(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    server.faults.end = "never"
    server.faults.poll = deque(["500"] * 1000)
    requests = [request_of(n) for n in range(3)]
    with pytest.raises(BackendError, match="no sound answer"):
        list(run(requests, provider, journal, window_seconds=0.3))
    server.faults.poll.clear()
    server.faults.end = "completed"
    assert_each_once(server, list(run(requests, provider, journal)), 3)


def test_a_server_without_batches_is_told_of(
    server: BatchServer, journal: Path, tmp_path: Path
) -> None:
    provider = provider_of("openai", f"{server.url}/elsewhere")
    with pytest.raises(BackendError, match="expected a server with batches"):
        list(run([request_of(0)], provider, journal))
    provider.close()


def test_a_call_that_is_refused_as_invalid_rejects_its_requests_with_the_reason(
    server: BatchServer, provider: BatchProvider, journal: Path
) -> None:
    server.faults.create = deque(["400"])
    replies = list(run([request_of(n) for n in range(3)], provider, journal))
    assert set(failures(replies).values()) == {"rejected"}
    assert "said the server" in str(replies[0].failure)
    assert_each_once(server, list(run([request_of(n) for n in range(3)], provider, journal)), 3)


def test_a_job_that_fails_validation_rejects_its_requests_with_the_reason(
    server: BatchServer, openai: BatchProvider, journal: Path
) -> None:
    server.faults.create = deque(["fail:invalid_json_line"])
    replies = list(run([request_of(n) for n in range(4)], openai, journal, max_requests=2))
    assert Counter(failures(replies).values()) == {"rejected": 2, "none": 2}
    told = next(reply.failure for reply in replies if reply.failure)
    assert "invalid_json_line: said the server (line 1)" in told


def test_a_full_queue_is_waited_for_in_smaller_batches_and_told_of_once(
    server: BatchServer,
    openai: BatchProvider,
    journal: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.faults.create = deque(["fail:token_limit_exceeded"] * 3)
    replies = list(run([request_of(n) for n in range(8)], openai, journal))
    assert_each_once(server, replies, 8)
    sizes = [len(job.requests) for job in server.jobs.values()]
    assert sizes[:2] == [8, 4]
    assert max(sizes[2:]) <= 4
    assert capfd.readouterr().err.count("takes no batch now") == 1


def test_a_queue_that_stays_full_makes_its_requests_fail_in_the_end(
    server: BatchServer, openai: BatchProvider, journal: Path
) -> None:
    server.faults.create = deque(["fail:token_limit_exceeded"] * 1000)
    server.faults.polls_until_end = 0  # or a late look would find it older than jobs get
    replies = list(run([request_of(0)], openai, journal, window_seconds=0.4))
    assert failures(replies) == {"run-0": "unavailable"}


def test_an_account_without_money_ends_the_run(
    server: BatchServer, openai: BatchProvider, journal: Path
) -> None:
    server.faults.create = deque(["fail:billing_hard_limit_reached"])
    with pytest.raises(BackendError, match="billing_hard_limit_reached"):
        list(run([request_of(0)], openai, journal))
    assert_each_once(server, list(run([request_of(0)], openai, journal)), 1)


def test_a_damaged_journal_is_refused(
    server: BatchServer, openai: BatchProvider, journal: Path
) -> None:
    journal.write_text('{"event": "intent"\n')
    with pytest.raises(ConfigError, match=r"batches\.jsonl:1: expected a line of the journal"):
        list(run([request_of(0)], openai, journal))
    assert not server.jobs


@pytest.mark.parametrize("name", NAMES)
def test_batches_over_several_servers_are_refused(tmp_path: Path, name: str) -> None:
    critic = openai_critic if name == "openai" else anthropic_critic
    with pytest.raises(ConfigError, match="--batch: expected one --base-url, got 2"):
        critic(
            model="judge",
            settings=QuestionSettings(prompt=load_prompt(next(iter(sorted(PROMPTS.glob("*.md")))))),
            base_urls=("http://127.0.0.1:1", "http://127.0.0.1:2"),
            batch_journal=tmp_path / "batches.jsonl",
            dry_run=True,
        )


def test_the_clients_are_imported_only_by_the_adapters_that_need_them() -> None:
    import subprocess

    code = (
        "import sys, srft_prep.critic.batch.openai, srft_prep.critic.batch.anthropic\n"
        "import srft_prep.critic.batch.driver\n"
        "sys.exit(bool({'openai', 'anthropic', 'httpx2'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
