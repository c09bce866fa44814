"""Critics behind an API against a server that misbehaves, through both official clients."""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from srft_prep.critic import CriticReply, CriticRequest, Question
from srft_prep.critic.anthropic import anthropic_critic
from srft_prep.critic.api.exchange import Patience
from srft_prep.critic.budget import Budget
from srft_prep.critic.openai import openai_critic
from srft_prep.critic.pricing import Price
from srft_prep.critic.prompt import load_prompt
from srft_prep.critic.question import QuestionSettings
from srft_prep.errors import BackendError, ConfigError
from srft_prep.types import Message, Trajectory
from tests.critic.api_server import (
    MODEL,
    ApiServer,
    Reaction,
    Turn,
    answer,
    dropped,
    half,
    label_of,
    labels_text,
    late,
    limited,
    not_json,
    problem,
)

KEY = "sk-secret-0123456789"
PROVIDERS = ("openai", "anthropic")
QUICK = Patience(backoff_seconds=0.01, pause_seconds=0.01, probe_seconds=0.02, drain_seconds=60.0)
PRICE = Price(input=1.0, cached_input=0.1, cache_write=1.25, output=10.0)
SETTINGS = QuestionSettings(
    prompt=load_prompt(Path(__file__).parents[2] / "prompts" / "step_critic.md")
)
Script = Callable[[Turn], Reaction]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)


def trajectory(name: str, *, num_steps: int = 3) -> Trajectory:
    """Return a trajectory of a prompt and some steps."""
    steps = [
        message
        for step in range(num_steps)
        for message in (
            Message(role="assistant", kind="action", content=f"{name}: action {step}"),
            Message(role="user", kind="observation", content=f"{name}: output {step}"),
        )
    ]
    return Trajectory(
        trajectory_id=name,
        instance_id=name,
        format="messages",
        messages=(Message(role="user", kind="prompt", content=f"{name}: task"), *steps),
        resolved=False,
    )


def critic_at(provider: str, *servers: ApiServer, **options: object) -> openai_critic:
    """Return a critic of a provider's format at some servers."""
    factory = {"openai": openai_critic, "anthropic": anthropic_critic}[provider]
    urls = tuple(getattr(server, f"{provider}_url") for server in servers)
    options = {"model": MODEL, "settings": SETTINGS, "patience": QUICK} | options
    return factory(base_urls=urls, **options)


def request_of(number: int, *, num_steps: int = 3, **fields: object) -> CriticRequest:
    """Return a request whose prompt is like no other's."""
    owner = fields.pop("owner", None) or trajectory(f"t{number}", num_steps=num_steps)
    steps = fields.pop("steps", tuple(range(owner.num_steps)))
    names = [str(step) for step in steps]
    label = {"type": "string", "enum": ["good", "unnecessary", "harmful"]}
    labels = {
        "type": "object",
        "properties": dict.fromkeys(names, label),
        "required": names,
        "additionalProperties": False,
    }
    question = Question(
        system="Judge.",
        shared=f"Trajectory {number}: {'words ' * 20}",
        rest=f"Label the steps {steps[0]} to {steps[-1]}.",
        schema={
            "type": "object",
            "properties": {"labels": labels},
            "required": ["labels"],
            "additionalProperties": False,
        },
        prompt_tokens=100,
        output_tokens=30,
        max_output_tokens=200,
    )
    return CriticRequest.of(owner, steps=steps, question=question, **fields)


def requests_of(count: int) -> Iterator[CriticRequest]:
    return (request_of(number) for number in range(count))


def run(provider: str, script: Script, count: int, **options: object) -> list[CriticReply]:
    """Label some requests and return the replies; every one has been checked."""
    with ApiServer(script) as server:
        critic = critic_at(provider, server, **options)
        try:
            replies = list(critic.label(requests_of(count)))
        finally:
            critic.close()
        run.server = server
    assert_complete(replies, count)
    return replies


def keep(source: Iterator[CriticReply], replies: list[CriticReply]) -> None:
    """Collect replies; those before an error are kept."""
    for reply in source:
        replies.append(reply)  # noqa: PERF402 - kept although the iterator raises


def assert_complete(replies: list[CriticReply], count: int) -> None:
    """Every step of every request has a label or its request a recorded failure, once."""
    names = Counter(reply.request.trajectory_id for reply in replies)
    assert names == Counter(f"t{number}" for number in range(count))
    for reply in replies:
        assert reply.request.trajectory is None
        assert reply.request.question is None
        if reply.failure is None:
            assert [each.step_index for each in reply.labels] == list(reply.request.steps)
        else:
            assert not reply.labels
        assert KEY not in repr(reply)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_request_is_answered_with_the_servers_labels(provider: str) -> None:
    replies = run(provider, answer, 40, price=PRICE)
    for reply in replies:
        assert [each.label for each in reply.labels] == [label_of(step) for step in range(3)]
        assert (reply.prompt_tokens, reply.completion_tokens) == (100, 10)
        assert reply.usd == pytest.approx(200e-6)
        assert reply.seconds > 0
    assert set(run.server.billed().values()) == {1}


def test_label_probabilities_come_from_the_tokens_alternatives() -> None:
    (reply,) = run("openai", answer, 1)
    for each in reply.labels:
        shares = {"good": each.p_good, "unnecessary": each.p_unnecessary, "harmful": each.p_harmful}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert max(shares, key=shares.__getitem__) == each.label


def troubled(turn: Turn) -> Reaction:
    """Every way to fail at first, by the prompt; from the third asking on, well."""
    kinds: list[Script] = [
        limited,
        lambda each: limited(each, retry_after="0.02"),
        lambda each: limited(each, retry_after_ms="20"),
        lambda _: problem(500),
        lambda _: problem(502),
        lambda _: problem(503),
        lambda _: problem(529, "overloaded"),
        lambda _: problem(408),
        lambda each: late(each, 0.05),
        dropped,
        half,
        not_json,
        answer,
    ]
    kind = kinds[int(turn.share(str(turn.asked)) * len(kinds))]
    return kind(turn) if turn.asked < 2 else answer(turn)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_trouble_on_the_wire_loses_or_bills_a_request_twice(provider: str) -> None:
    replies = run(provider, troubled, 150)
    assert not [reply.failure for reply in replies if reply.failure]
    # `not_json` has status 200 as well, and is no answer; what was cut is not delivered.
    whole = Counter(
        each.turn.prompt
        for each in run.server.turns
        if each.billed and each.delivered and troubled(each.turn).body[:1] == b"{"
    )
    assert set(whole.values()) == {1}
    assert len(whole) == 150


def wrong(turn: Turn) -> Reaction:
    """Answers that are not the one asked for, by the prompt; some are mended when asked again."""
    steps = [*turn.steps]
    texts = [
        labels_text(dict.fromkeys(steps, "wonderful")),
        labels_text(dict.fromkeys(steps[1:], "good")),
        labels_text(dict.fromkeys([*steps, 99], "good")),
        "I would rather not say.",
        "",
        f"Authorization: Bearer {KEY}",
    ]
    if turn.is_asked_again and turn.share("mended") < 0.5:
        return answer(turn)
    return answer(turn, texts[int(turn.share() * len(texts))])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_wrong_answer_is_asked_for_once_more_and_both_are_counted(provider: str) -> None:
    replies = run(provider, wrong, 60, price=PRICE)
    failures = [reply.failure for reply in replies if reply.failure]
    assert 0 < len(failures) < 60
    assert all(failure.startswith("unparseable: ") for failure in failures)
    assert set(run.server.billed().values()) == {2}
    for reply in replies:
        assert (reply.prompt_tokens, reply.completion_tokens) == (200, 20)
        assert reply.usd == pytest.approx(400e-6)
    again = [each.turn.body["messages"] for each in run.server.turns if each.turn.is_asked_again]
    assert all(each[-2]["role"] == "assistant" for each in again)
    assert any(
        "expected labels for exactly the steps 0 to 2" in each[-1]["content"] for each in again
    )
    assert not any(KEY in str(each) for each in again)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_answer_that_was_cut_is_asked_for_with_twice_the_room(provider: str) -> None:
    def script(turn: Turn) -> Reaction:
        limit = turn.body["max_tokens"]
        return answer(turn) if limit > 200 else answer(turn, '{"labels": {"0"', finish="length")

    (reply,) = run(provider, script, 1)
    assert reply.failure is None
    assert [each.turn.body["max_tokens"] for each in run.server.turns] == [200, 400]
    assert not run.server.turns[-1].turn.is_asked_again


@pytest.mark.parametrize("provider", PROVIDERS)
def test_without_money_left_nothing_is_asked_again(provider: str) -> None:
    budget = Budget(0.001)
    assert budget.reserve(0.0009)
    replies = run(
        provider, lambda turn: answer(turn, "no"), 3, price=PRICE, budget=budget, concurrency=1
    )
    assert all("the budget does not suffice to ask again" in reply.failure for reply in replies)
    assert set(run.server.billed().values()) == {1}
    assert budget.num_refused == 3


def test_what_a_second_answer_reserves_is_free_once_the_reply_is_counted() -> None:
    with ApiServer(lambda turn: answer(turn, None if turn.is_asked_again else "no")) as server:
        budget = Budget(1.0)
        critic = critic_at("openai", server, price=PRICE, budget=budget)
        most = 1.0
        for reply in critic.label(requests_of(5)):
            assert not budget.reserve(most)  # the second answer's share is still set aside
            budget.settle(0.0, reply.usd)
        critic.close()
    assert budget.spent_usd == pytest.approx(5 * 400e-6)
    assert budget.reserve(1.0 - budget.spent_usd - 1e-9)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_refusal_is_a_failure_and_is_paid(provider: str) -> None:
    (reply,) = run(provider, lambda turn: answer(turn, "", refusal=f"no, {KEY}"), 1, price=PRICE)
    assert reply.failure == "refused: no, [key]"
    assert reply.usd > 0
    assert len(run.server.turns) == 1


@pytest.mark.parametrize(
    ("reaction", "kind"),
    [
        (problem(400, "This model's maximum context length is 10 tokens"), "over-long"),
        (problem(413, "request_too_large"), "over-long"),
        (problem(429, "Request too large for critic-1 on tokens per min"), "over-long"),
        (problem(400, f"what is this, {KEY}"), "rejected"),
        (problem(500, f"bad key {KEY}"), "unavailable"),
        (problem(504, "too slow"), "timeout"),
        (Reaction(status=200, body=b'{"error": {"message": "oops"}}'), "unavailable"),
    ],
)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_each_trouble_has_its_kind_of_failure(provider: str, reaction: Reaction, kind: str) -> None:
    replies = run(provider, lambda _: reaction, 3)
    for reply in replies:
        assert reply.failure.startswith(f"{kind}: http://127.0.0.1:")
    tries = 4 if kind in ("unavailable", "timeout") else 1
    if reaction.status == 200:
        tries = 2  # each of them is billed
    assert len(run.server.turns) == 3 * tries


@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_answer_that_never_comes_is_a_timeout(provider: str) -> None:
    (reply,) = run(
        provider,
        lambda turn: late(turn, 30.0),
        1,
        timeout_seconds=1.0,  # of which a connection takes no more than a share
        patience=replace(QUICK, tries=2),
    )
    assert reply.failure.startswith("timeout: ")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_storm_of_rate_limits_costs_no_request_and_the_limit_recovers(provider: str) -> None:
    storm, sizes = range(64, 220), []

    def script(turn: Turn) -> Reaction:
        if turn.number in storm:
            sizes.append(limit.size)
            return limited(turn, retry_after="0.01")
        return late(turn, 0.005)

    with ApiServer(script) as server:
        critic = critic_at(provider, server, concurrency=32)
        limit = critic._api._servers.servers[0].limit
        replies = list(critic.label(requests_of(600)))
        critic.close()
    assert_complete(replies, 600)
    assert not [reply.failure for reply in replies if reply.failure]
    assert set(server.billed().values()) == {1}
    # The storm is longer than all tries of the requests under way, had it spent any.
    assert min(sizes) <= 8
    assert limit.size > 16


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rate_limits_without_end_end_the_run(provider: str) -> None:
    with ApiServer(limited) as server:
        critic = critic_at(provider, server, patience=replace(QUICK, limited_seconds=0.2))
        with pytest.raises(BackendError, match="rate limits for"):
            list(critic.label(requests_of(50)))
        critic.close()
    assert not server.billed()


@pytest.mark.parametrize(
    ("reaction", "words"),
    [
        (problem(401, f"Incorrect API key provided: {KEY}"), "check the key"),
        (problem(403, "no"), "check the key"),
        (problem(404, "The model does not exist"), "check --base-url and --model"),
        (problem(429, "You exceeded your current quota", code="insufficient_quota"), "no money"),
        (problem(400, "Your credit balance is too low"), "no money"),
    ],
)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_unusable_backend_ends_the_run_and_what_came_back_is_handed_out(
    provider: str, reaction: Reaction, words: str
) -> None:
    with ApiServer(lambda turn: answer(turn) if turn.number < 20 else reaction) as server:
        critic = critic_at(provider, server, concurrency=8)
        replies = []
        with pytest.raises(BackendError, match=words) as caught:
            keep(critic.label(requests_of(500)), replies)
        critic.close()
    assert KEY not in str(caught.value)
    assert "[key]" in str(caught.value) or KEY not in str(reaction.body)
    assert len(server.turns) < 60


def test_replies_that_came_back_are_handed_out_before_the_error() -> None:
    def script(turn: Turn) -> Reaction:
        if turn.number < 7:
            return late(turn, 0.2)  # answered after the key was refused
        return problem(401, "no") if turn.number == 7 else late(turn, 0.1)

    with ApiServer(script) as server:
        critic = critic_at("openai", server, concurrency=8)
        replies: list[CriticReply] = []
        with pytest.raises(BackendError):
            keep(critic.label(requests_of(100)), replies)
        critic.close()
    paid = {each.turn.prompt for each in server.turns if each.billed and each.delivered}
    assert len(replies) == len(paid) >= 7


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_server_that_only_fails_ends_the_run(provider: str) -> None:
    with ApiServer(lambda _: problem(500)) as server:
        critic = critic_at(provider, server)
        replies = []
        with pytest.raises(BackendError, match="20 requests in a row"):
            keep(critic.label(requests_of(5000)), replies)
        critic.close()
    assert all(reply.failure.startswith("unavailable") for reply in replies)
    assert len(server.turns) < 1000


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_load_is_spread_and_a_dying_servers_requests_go_to_the_other(provider: str) -> None:
    with (
        ApiServer(lambda turn: late(turn, 0.01)) as first,
        ApiServer(lambda turn: late(turn, 0.01)) as second,
    ):
        critic = critic_at(provider, first, second, concurrency=8)
        replies, is_dead = [], False
        for reply in critic.label(requests_of(400)):
            replies.append(reply)
            if not is_dead and len(replies) >= 100 and len(first.turns) > 20:
                first.stop()
                is_dead = True
        critic.close()
    assert is_dead
    assert_complete(replies, 400)
    assert not [reply.failure for reply in replies if reply.failure]
    assert len(first.turns) > 20
    assert len(second.turns) > 200


def test_a_server_that_is_back_gets_requests_again() -> None:
    with (
        ApiServer(lambda turn: late(turn, 0.01)) as first,
        ApiServer(lambda turn: late(turn, 0.01)) as second,
    ):
        critic = critic_at("openai", first, second, concurrency=4)
        away = critic._api._servers.servers[0]
        replies: list[CriticReply] = []
        before: int | None = None

        def requests() -> Iterator[CriticRequest]:
            number = 0
            while before is None or len(first.turns) < before + 5:
                yield request_of(number)
                number += 1

        for reply in critic.label(requests()):
            replies.append(reply)
            if len(replies) == 40:
                first.stop()
            if len(replies) > 60 and away.away and before is None:
                before = len(first.turns)
                first.restart()
        critic.close()
    assert_complete(replies, len(replies))
    assert not [reply.failure for reply in replies if reply.failure]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_a_server_refuses_is_left_out_and_reported_once(
    provider: str, caplog: pytest.LogCaptureFixture
) -> None:
    left_out = {
        "openai": ["logprobs", "response_format", "temperature", "chat_template_kwargs"],
        "anthropic": ["output_config", "temperature", "disabled"],
    }[provider]
    refused = [*left_out, "max_tokens"] if provider == "openai" else [*left_out, "thinking"]

    def script(turn: Turn) -> Reaction:
        for name in refused:
            if name in turn.body:
                return problem(400, f"Unsupported parameter: '{name}' (you are {KEY})")
        return answer(turn)

    caplog.set_level(logging.WARNING)
    replies = run(provider, script, 30)
    assert not [reply.failure for reply in replies if reply.failure]
    lines = [record.getMessage() for record in caplog.records]
    for name in left_out:
        assert sum(f": {name} is left out from now on" in line for line in lines) == 1
    assert len(lines) == len(set(lines)) == len(refused) - (provider == "anthropic")
    assert KEY not in str(lines)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_key_that_a_model_repeats_is_in_no_label(provider: str) -> None:
    def script(turn: Turn) -> Reaction:
        said = {step: {"rationale": f"I saw {KEY}.", "label": "good"} for step in turn.steps}
        return answer(turn, json.dumps({"labels": said}))

    (reply,) = run(provider, script, 1)
    assert [each.rationale for each in reply.labels] == ["I saw [key]."] * 3


def test_the_usual_placeholder_of_a_key_is_left_in_the_rationales(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    labels = {step: {"rationale": "it is EMPTY", "label": "good"} for step in range(3)}
    text = json.dumps({"labels": labels})
    (reply,) = run("openai", lambda turn: answer(turn, text), 1)
    assert [label.rationale for label in reply.labels] == ["it is EMPTY"] * 3


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        ("{name} is too large: 200. This model supports at most 100 completion tokens", 1),
        ("Unsupported parameter: '{name}'", 2),
        ("Extra inputs are not permitted", 2),
    ],
)
def test_a_bound_that_a_server_refuses_under_both_names_is_no_endless_loop(
    message: str, sent: int
) -> None:
    def script(turn: Turn) -> Reaction:
        if turn.number > 10:
            return answer(turn)
        name = next(name for name in turn.body if name.startswith("max_"))
        return problem(400, message.format(name=name), param=name)

    (reply,) = run("openai", script, 1)
    assert reply.failure.startswith("rejected: ")
    assert len(run.server.turns) == sent


@pytest.mark.parametrize(("status", "kind"), [(403, "refused"), (404, "rejected")])
def test_one_forbidden_request_is_a_failure_and_the_others_are_answered(
    status: int, kind: str
) -> None:
    def script(turn: Turn) -> Reaction:
        return problem(status) if turn.prompt.startswith("Trajectory 0:") else answer(turn)

    replies = run("openai", script, 6, concurrency=1)
    assert [reply.failure is None for reply in replies].count(True) == 5
    (failed,) = [reply for reply in replies if reply.failure]
    assert failed.request.trajectory_id == "t0"
    assert failed.failure.startswith(f"{kind}: http://127.0.0.1:")


def test_a_server_that_forbids_everything_from_some_request_on_ends_the_run() -> None:
    replies: list[CriticReply] = []
    with ApiServer(lambda turn: answer(turn) if turn.number < 5 else problem(403)) as server:
        critic = critic_at("openai", server, concurrency=1)
        with pytest.raises(BackendError, match="20 requests in a row"):
            keep(critic.label(requests_of(60)), replies)
        critic.close()
    assert 25 <= len(replies) <= 26  # one may be under way


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_server_that_counts_no_tokens_is_paid_as_estimated(provider: str) -> None:
    def script(turn: Turn) -> Reaction:
        return answer(turn, prompt=0, completion=0)

    (reply,) = run(provider, script, 1, price=PRICE)
    assert (reply.prompt_tokens, reply.completion_tokens) == (100, 30)
    assert reply.usd == pytest.approx(PRICE.usd(prompt_tokens=100, completion_tokens=30))
    (reply,) = run(provider, script, 1)
    assert (reply.prompt_tokens, reply.usd) == (0, 0.0)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("num_unreadable", [1, 9])
def test_an_answer_that_nobody_can_read_is_paid(provider: str, num_unreadable: int) -> None:
    def script(turn: Turn) -> Reaction:
        return not_json() if turn.number < num_unreadable else answer(turn, completion=30)

    (reply,) = run(provider, script, 1, price=PRICE)
    assert (reply.failure is None) == (num_unreadable == 1)
    assert len(run.server.turns) == 2
    assert reply.usd == pytest.approx(2 * PRICE.usd(prompt_tokens=100, completion_tokens=30))


def test_an_answer_that_nobody_can_read_is_paid_although_the_run_ends() -> None:
    replies: list[CriticReply] = []
    with ApiServer(lambda turn: problem(401) if turn.number else not_json()) as server:
        critic = critic_at("openai", server, price=PRICE)
        with pytest.raises(BackendError, match="check the key"):
            keep(critic.label(requests_of(1)), replies)
        critic.close()
    assert [reply.usd for reply in replies] == [
        pytest.approx(PRICE.usd(prompt_tokens=100, completion_tokens=30))
    ]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_run_ends_where_every_answer_is_cut_off(provider: str) -> None:
    replies: list[CriticReply] = []
    with ApiServer(lambda turn: answer(turn, "", finish="length")) as server:
        critic = critic_at(provider, server, concurrency=4)
        with pytest.raises(BackendError, match="--reasoning low"):
            keep(critic.label(requests_of(200)), replies)
        critic.close()
    assert 10 <= len(replies) < 30
    assert all(reply.failure.startswith("unparseable: cut off after") for reply in replies)


def test_one_whole_answer_before_keeps_a_run_of_cut_answers_going() -> None:
    def script(turn: Turn) -> Reaction:
        return answer(turn, "", finish="length") if turn.number else answer(turn)

    replies = run("openai", script, 20, concurrency=1)
    assert [reply.failure is None for reply in replies].count(True) == 1


def test_a_reasoning_model_of_openai_that_may_not_think_is_an_error_before_anything() -> None:
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=r"gpt-5: is a reasoning model.*--reasoning low"):
            openai_critic(model="gpt-5", settings=SETTINGS, dry_run=dry_run)
    with ApiServer(models=({"id": "gpt-5"},)) as server:
        critic_at("openai", server, model="gpt-5").close()


def test_fewer_alternatives_are_better_than_none() -> None:
    def script(turn: Turn) -> Reaction:
        if turn.body.get("top_logprobs", 0) > 5:
            return problem(400, "Requested sample logprobs of 20, greater than max allowed: 5")
        return answer(turn)

    replies = run("openai", script, 5)
    assert all(each.p_good is not None for reply in replies for each in reply.labels)


def test_a_schema_that_is_too_large_is_left_out_of_that_request_only() -> None:
    def script(turn: Turn) -> Reaction:
        if "Trajectory 3:" in turn.prompt and "response_format" in turn.body:
            return problem(400, "Invalid schema for response_format: too many enum values")
        return answer(turn)

    replies = run("openai", script, 10, concurrency=1)
    assert not [reply.failure for reply in replies if reply.failure]
    plain = [
        each.turn.prompt for each in run.server.turns if "response_format" not in each.turn.body
    ]
    assert len(plain) == 1


def test_votes_follow_the_first_one_so_that_the_cache_is_warm() -> None:
    settings = replace(SETTINGS, votes=3)
    with ApiServer(lambda turn: late(turn, 0.02)) as server:
        critic = critic_at("anthropic", server, settings=settings)
        asked = [
            replace(request_of(number), part="all" + (f"+vote:{vote}" if vote else ""))
            for number in range(20)
            for vote in range(3)
        ]
        replies = list(critic.label(asked))
        critic.close()
    assert len(replies) == 60
    done: set[str] = set()
    assert set(server.billed().values()) == {3}
    for each in server.turns:  # in the order of answering
        turn = each.turn
        assert turn.body["messages"][0]["content"][-1]["cache_control"] == {"type": "ephemeral"}
        assert turn.asked == 0 or turn.prompt in done
        done.add(turn.prompt)


def test_windows_mark_what_they_share_and_a_whole_trajectory_marks_nothing() -> None:
    owner = trajectory("t0", num_steps=6)
    with ApiServer() as server:
        critic = critic_at("anthropic", server)
        windows = [
            request_of(0, owner=owner, steps=steps, part=f"steps:{steps[0]}-{steps[-1]}@50")
            for steps in ((0, 1, 2), (3, 4, 5))
        ]
        assert len(list(critic.label([*windows, request_of(1)]))) == 3
        critic.close()
    marks = {
        each.turn.prompt[:13] + each.turn.prompt[-7:]: [
            "cache_control" in block for block in each.turn.body["messages"][0]["content"]
        ]
        for each in server.turns
    }
    assert marks == {
        "Trajectory 0:0 to 2.": [True, False],
        "Trajectory 0:3 to 5.": [True, False],
        "Trajectory 1:0 to 2.": [False, False],
    }


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_model_that_is_not_there_is_refused_at_once(provider: str) -> None:
    models = [{"id": f"model-{number}"} for number in range(9)]
    words = r"'critic-1', got only model-0, .* and 4 more"
    with ApiServer(models=models) as server, pytest.raises(ConfigError, match=words):
        critic_at(provider, server)
    assert not server.turns


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_server_without_a_list_of_models_is_used_all_the_same(provider: str) -> None:
    with ApiServer() as server:
        server.models_status = 405
        critic = critic_at(provider, server)
        assert len(list(critic.label(requests_of(2)))) == 2
        critic.close()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_host_out_of_reach_is_one_sentence(provider: str) -> None:
    with ApiServer() as server:
        server.stop()
        with pytest.raises(BackendError, match="expected a server, got"):
            critic_at(provider, server)


def test_a_served_context_bounds_the_prompts() -> None:
    with ApiServer(models=[{"id": MODEL, "max_model_len": 20_000}]) as server:
        critic = critic_at("openai", server)
        critic.close()
    assert 18_800 < critic.max_input_tokens < 19_000, "the answer's room is left"


def test_without_a_key_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with pytest.raises(ConfigError, match="export OPENAI_API_KEY"):
        openai_critic(model=MODEL, settings=SETTINGS)
    with ApiServer() as server:
        with pytest.raises(ConfigError, match="export ANTHROPIC_API_KEY"):
            critic_at("anthropic", server)
        critic = critic_at("openai", server)
        assert len(list(critic.label(requests_of(1)))) == 1
        critic.close()
    assert server.turns[0].turn.headers["authorization"] == "Bearer none"


def test_credentials_in_a_base_url_are_never_seen() -> None:
    with ApiServer(lambda turn: problem(400, f"you said {turn.headers}")) as server:
        url = server.openai_url.replace("://", "://user:swordfish@")
        critic = openai_critic(model=MODEL, settings=SETTINGS, base_urls=(url,), patience=QUICK)
        (reply,) = critic.label(requests_of(1))
        critic.close()
    sent = server.turns[0].turn.headers["authorization"]
    assert "swordfish" not in reply.failure
    assert sent.partition(" ")[2] not in reply.failure
    assert "[key]" in reply.failure


def test_requests_are_pulled_only_when_a_server_will_soon_take_them() -> None:
    gate = threading.Event()

    def script(turn: Turn) -> Reaction:
        return late(turn, 0.0 if gate.is_set() else 0.05)

    pulled = 0

    def requests() -> Iterator[CriticRequest]:
        nonlocal pulled
        for request in requests_of(300):
            pulled += 1
            yield request

    with ApiServer(script) as server:
        critic = critic_at("openai", server, concurrency=4)
        most = 0
        for count, _ in enumerate(critic.label(requests())):
            most = max(most, pulled - count)
            gate.set()
        critic.close()
    assert most <= 8
    assert server.most_in_flight <= 4


def test_leaving_early_stops_asking_and_the_critic_can_be_used_again() -> None:
    with ApiServer(lambda turn: late(turn, 0.02)) as server:
        critic = critic_at("openai", server, concurrency=4)
        replies = critic.label(requests_of(1000))
        next(replies)
        replies.close()
        assert len(list(critic.label(requests_of(3)))) == 3
        critic.close()
    assert len(server.turns) < 50


def test_an_interrupt_hands_out_what_had_come_back() -> None:
    with ApiServer() as server:
        critic = critic_at("openai", server, concurrency=4)

        def requests() -> Iterator[CriticRequest]:
            yield from requests_of(8)
            while len(server.turns) < 8 or critic._api._tasks:
                time.sleep(0.01)
            raise KeyboardInterrupt

        replies: list[CriticReply] = []
        with pytest.raises(KeyboardInterrupt):
            keep(critic.label(requests()), replies)
        critic.close()
    assert_complete(replies, 8)


def test_an_error_in_the_requests_is_raised_once_all_answers_are_in() -> None:
    def requests() -> Iterator[CriticRequest]:
        yield from requests_of(5)
        raise OSError("the disk is gone")

    with ApiServer(lambda turn: late(turn, 0.05)) as server:
        critic = critic_at("openai", server)
        replies: list[CriticReply] = []
        with pytest.raises(OSError, match="the disk is gone"):
            keep(critic.label(requests()), replies)
        critic.close()
    assert_complete(replies, 5)


def test_planned_requests_fit_the_server_and_are_answered() -> None:
    def script(turn: Turn) -> Reaction:
        return answer(turn, labels_text(dict.fromkeys(range(4), "good")))

    owner: Trajectory = trajectory("t0", num_steps=4)
    with ApiServer(script) as server:
        critic = critic_at("openai", server)
        planned = critic.plan(owner)
        replies = list(critic.label(planned))
        critic.close()
    assert_complete(replies, 1)
    assert replies[0].failure is None
