"""Runs of `label` in which one pass is not enough; also the child that the kill test starts."""

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import orjson
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.config import LabelConfig
from srft_prep.critic import CriticReply, Question, failure_of
from srft_prep.critic.budget import Budget, most_usd
from srft_prep.critic.encoding import TextEncoder
from srft_prep.critic.parts import Part
from srft_prep.critic.pricing import Price, Rates
from srft_prep.critic.prompt import load_prompt
from srft_prep.critic.question import Planner, QuestionSettings
from srft_prep.labeling import label, missing_requests
from srft_prep.ledger import ledger_files
from srft_prep.ledger_labels import SCALES
from srft_prep.verification import verify
from tests.gates import FileGate, wait_at
from tests.stages import listed_label, trajectory, write_trajectories

REPOSITORY = Path(__file__).resolve().parents[1]
PROMPT = load_prompt(REPOSITORY / "prompts" / "step_critic.md")
PRICE = Price(input=3.0, output=15.0, cached_input=0.3, cache_write=3.75)


@dataclass
class PlannedCritic:
    """Plans as a model's critic does, and labels by the pattern of `listed_label`."""

    limit: int = 6000
    votes: int = 1
    takes: int = 10**9
    """Prompt tokens that the model really takes."""
    rates: Rates = field(default_factory=Rates)
    share: float = 0.5
    """What a reply costs, as a part of the most that it can."""
    unparseable: frozenset[str] = frozenset()
    """Parts that it answers wrongly."""
    ahead: int = 1
    """Requests that it takes before it answers the first."""
    seconds: float = 0.0
    asked: list = field(default_factory=list)
    """(trajectory, part) of each request, in order."""
    critic_id: str = "planned@1"

    def __post_init__(self):
        self.planner = Planner(
            QuestionSettings(prompt=PROMPT, votes=self.votes),
            TextEncoder(),
            max_input_tokens=self.limit,
        )
        self.prompt_hash = self.planner.prompt_hash
        self.max_input_tokens = self.limit

    def plan(self, trajectory, *, scale=1.0):
        return self.planner.plan(trajectory, scale=scale)

    def label(self, requests):
        waiting = []
        for request in requests:
            self.asked.append((request.trajectory_id, request.part))
            waiting.append(request)
            if len(waiting) >= self.ahead:
                yield self.answer(waiting.pop(0))
        yield from map(self.answer, waiting)

    def answer(self, request):
        time.sleep(self.seconds)
        question = request.question
        usage = {
            "prompt_tokens": question.prompt_tokens,
            "usd": most_usd(question, self.rates) * self.share,
        }
        request = request.light()
        if question.prompt_tokens > self.takes:
            return CriticReply(request=request, failure=failure_of("over-long", "too much"))
        if request.part in self.unparseable:
            failure = failure_of("unparseable", "no JSON")
            return CriticReply(request=request, failure=failure, **usage)
        labels = tuple(map(listed_label, request.steps))
        return CriticReply(request=request, labels=labels, **usage)

    def close(self):
        pass

    def config(self, **values):
        return LabelConfig(
            critic="listed",
            critic_id=self.critic_id,
            prompt_hash=self.prompt_hash,
            votes=self.votes,
            max_input_tokens=self.limit,
            **{"only": "all", **values},
        )


def long_run(name, *, num_steps=12, words=400):
    run = trajectory(name, num_steps=num_steps)
    messages = [
        message._replace(content=f"{message.content} " + f"{name} " * words)
        if message.kind == "observation"
        else message
        for message in run.messages
    ]
    return replace(run, messages=tuple(messages))


RUNS = (trajectory("short"), long_run("middle", num_steps=6), long_run("long", num_steps=60))


@pytest.fixture
def source(tmp_path):
    return write_trajectories(tmp_path / "runs", RUNS)


def run(source, folder, critic, *, retry_failed=False, budget=None):
    """Label and check what holds after every run."""
    missing = [
        (request.content_hash, request.part)
        for request in missing_requests(
            source, folder, critic, critic.config(), retry_failed=retry_failed
        )
    ]
    before = len(critic.asked)
    manifest = label(
        source, folder, critic, critic.config(), retry_failed=retry_failed, budget=budget
    )
    asked = critic.asked[before:]
    assert len(set(asked)) == len(asked), "a request was put twice in one run"
    hashes = {each.trajectory_id: each.content_hash for each in RUNS}
    put = [(hashes.get(name, name), part) for name, part in asked]
    if budget is None:
        assert put[: len(missing)] == missing, "the first round is what is missing"
    assert verify(folder).problems == ()
    return manifest


def labelled(folder):
    rows = pl.read_parquet(folder / "labels.parquet").to_dicts()
    return {(row["trajectory_id"], row["step_index"]): row["label"] for row in rows}


def whole(*runs):
    return {
        (each.trajectory_id, step): listed_label(step).label
        for each in runs
        for step in range(each.num_steps)
    }


def ledger_keys(folder):
    return [
        (entry["content_hash"], entry["part"])
        for path in ledger_files(folder)
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
        for entry in [orjson.loads(line)]
    ]


def spent(folder):
    return sum(
        orjson.loads(line)["usd"]
        for path in ledger_files(folder)
        for line in path.read_bytes().splitlines()
    )


@pytest.mark.parametrize("votes", [1, 3])
@pytest.mark.parametrize("ahead", [1, 5, 1000])
def test_windows_and_votes_label_every_step(source, tmp_path, votes, ahead):
    critic = PlannedCritic(votes=votes, ahead=ahead)
    manifest = run(source, tmp_path / "labels", critic)
    assert labelled(tmp_path / "labels") == whole(*RUNS)
    parts = Counter(name for name, _ in critic.asked)
    assert parts["short"] == parts["middle"] == votes
    assert parts["long"] > 2 * votes
    assert manifest.counts["failures"] == 0
    assert manifest.run["usage"]["trajectories"] == manifest.counts["trajectories"] == 3
    again = PlannedCritic(votes=votes)
    assert run(source, tmp_path / "labels", again).run["reused"] == 3
    assert again.asked == []


@pytest.mark.parametrize("takes", [5900, 4200, 2900])
def test_over_long_requests_lead_to_smaller_ones_until_every_step_is_labelled(
    source, tmp_path, takes
):
    critic = PlannedCritic(takes=takes, ahead=7)
    manifest = run(source, tmp_path / "labels", critic)
    assert labelled(tmp_path / "labels") == whole(*RUNS)
    assert manifest.counts["failures"] == 0
    assert manifest.run["usage"]["trajectories"] == 3
    again = PlannedCritic(takes=takes)
    run(source, tmp_path / "labels", again)
    assert again.asked == []


def test_what_is_over_long_at_every_scale_is_a_failure_and_asked_no_more(source, tmp_path):
    folder = tmp_path / "labels"
    critic = PlannedCritic(takes=100)
    manifest = run(source, folder, critic)
    assert labelled(folder) == {}
    failures = pl.read_parquet(folder / "requests.parquet")["failure"].to_list()
    assert set(failures) == {"over-long: too much"}
    assert manifest.counts["trajectories"] == 3
    limits = {Part.parse(part).limit for name, part in critic.asked if name == "long"}
    assert limits == {int(6000 * scale) for scale in SCALES}
    again = PlannedCritic(takes=100)
    run(source, folder, again)
    assert again.asked == []
    better = PlannedCritic()
    run(source, folder, better, retry_failed=True)
    assert labelled(folder) == whole(*RUNS)


def test_a_run_that_broke_off_goes_on_with_the_smaller_requests(source, tmp_path):
    folder = tmp_path / "labels"
    critic = PlannedCritic(takes=4200)
    run(source, folder, critic)
    num_first = sum(part.endswith("@6000") for _, part in critic.asked)
    (ledger,) = ledger_files(folder)
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[: num_first + 3]))
    again = PlannedCritic(takes=4200)
    run(source, folder, again)
    assert labelled(folder) == whole(*RUNS)
    assert not any(part.endswith("@6000") for _, part in again.asked)
    assert len(again.asked) == len(lines) - num_first - 3


def test_a_window_that_fails_costs_its_steps_alone_and_can_be_retried(source, tmp_path):
    folder = tmp_path / "labels"
    parts = planned_parts("long")
    critic = PlannedCritic(unparseable=frozenset(parts[1:2]))
    manifest = run(source, folder, critic)
    lost = set(Part.parse(parts[1]).steps(60))
    assert labelled(folder) == {
        key: name for key, name in whole(*RUNS).items() if key[0] != "long" or key[1] not in lost
    }
    assert manifest.counts["failures"] == 1
    again = PlannedCritic()
    run(source, folder, again)
    assert again.asked == [], "a failure is asked again only with --retry-failed"
    run(source, folder, again, retry_failed=True)
    assert again.asked == [("long", parts[1])]
    assert labelled(folder) == whole(*RUNS)


def planned_parts(name, **fields):
    (chosen,) = (each for each in RUNS if each.trajectory_id == name)
    return [request.part for request in PlannedCritic(**fields).plan(chosen)]


def test_another_limit_asks_again_only_what_was_clipped(source, tmp_path):
    folder = tmp_path / "labels"
    run(source, folder, PlannedCritic(limit=6000))
    for limit in (8000, 12_000, 4000):
        other = PlannedCritic(limit=limit)
        run(source, folder, other)
        assert {name for name, _ in other.asked} <= {"middle", "long"}
        assert "long" in {name for name, _ in other.asked}
        assert all(part.endswith(f"@{limit}") for _, part in other.asked)
        assert labelled(folder) == whole(*RUNS)
    back = PlannedCritic(limit=6000)
    run(source, folder, back)
    assert back.asked == []


def test_more_votes_ask_only_the_further_answers(source, tmp_path):
    folder = tmp_path / "labels"
    run(source, folder, PlannedCritic(votes=2))
    more = PlannedCritic(votes=4)
    run(source, folder, more)
    assert {Part.parse(part).vote for _, part in more.asked} == {2, 3}
    fewer = PlannedCritic(votes=3)
    run(source, folder, fewer)
    assert fewer.asked == []


def test_copies_are_asked_once_with_windows_and_votes(tmp_path):
    copies = [replace(RUNS[2], trajectory_id=name) for name in ("one", "two")]
    source = write_trajectories(tmp_path / "runs", copies)
    critic = PlannedCritic(votes=2, takes=4200, ahead=1000)
    label(source, tmp_path / "labels", critic, critic.config())
    assert {name for name, _ in critic.asked} == {"one"}
    assert labelled(tmp_path / "labels") == whole(*copies)
    assert set(Counter(ledger_keys(tmp_path / "labels")).values()) == {1}


MONEY = Rates(price=PRICE)


@settings(max_examples=25)
@given(
    limit=st.floats(0, 0.6),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    ahead=st.sampled_from([1, 4, 1000]),
    votes=st.integers(1, 2),
    takes=st.sampled_from([10**9, 4200]),
)
def test_no_run_spends_more_than_its_budget_and_every_run_ends(limit, share, ahead, votes, takes):
    fields = {"rates": MONEY, "share": share, "ahead": ahead, "votes": votes, "takes": takes}
    with TemporaryDirectory() as name:
        source = write_trajectories(Path(name) / "runs", RUNS)
        folder = Path(name) / "labels"
        run(source, folder, PlannedCritic(**fields), budget=Budget(limit))
        assert spent(folder) <= limit + 1e-9
        same = PlannedCritic(**fields)
        run(source, folder, same, budget=Budget(limit))
        assert same.asked == []
        larger = PlannedCritic(**fields)
        run(source, folder, larger, budget=Budget(100.0))
        assert labelled(folder) == whole(*RUNS)
        assert set(Counter(ledger_keys(folder)).values()) == {1}


def test_a_budget_stop_is_told_and_is_a_failure_of_what_was_not_asked(source, tmp_path):
    folder = tmp_path / "labels"
    critic = PlannedCritic(rates=MONEY, share=1.0)
    first = [
        most_usd(request.question, MONEY) for each in RUNS[:2] for request in critic.plan(each)
    ]
    manifest = run(source, folder, critic, budget=Budget(sum(first) + 1e-6))
    assert labelled(folder) == whole(*RUNS[:2])
    rows = pl.read_parquet(folder / "requests.parquet").to_dicts()
    assert rows[-1]["failure"].startswith("unasked: 60 of 60 steps: the budget of $")
    assert manifest.counts["failures"] == 1


def test_money_that_was_set_aside_and_not_spent_is_spent_on_the_rest(source, tmp_path):
    """All requests are out at once, so that at first the budget suffices for few of them."""
    critic = PlannedCritic(rates=MONEY, share=0.001, ahead=1000)
    most = [most_usd(request.question, MONEY) for each in RUNS for request in critic.plan(each)]
    run(source, tmp_path / "labels", critic, budget=Budget(max(most) * 2))
    assert labelled(tmp_path / "labels") == whole(*RUNS)


def test_without_a_price_a_reply_is_taken_to_cost_what_the_others_did(source, tmp_path):
    @dataclass
    class Hourly(PlannedCritic):
        def answer(self, request):
            return replace(super().answer(request), usd=1.0)

    critic = Hourly(rates=Rates(usd_per_hour=2.0))
    run(source, tmp_path / "labels", critic, budget=Budget(3.5))
    assert len(critic.asked) == 3


PRICES = st.builds(
    Price,
    input=st.floats(0, 100),
    output=st.floats(0, 100),
    cached_input=st.floats(0, 100),
    cache_write=st.floats(0, 100),
    batch_factor=st.floats(0, 1),
    long_prompt_tokens=st.none() | st.integers(0, 4000),
    long_input_factor=st.floats(1, 3),
    long_output_factor=st.floats(1, 3),
)


@given(PRICES, st.booleans(), st.integers(0, 5000), st.integers(0, 5000), st.data())
def test_the_most_that_a_question_can_cost_is_never_exceeded(price, batch, prompt, most, data):
    question = Question(
        system="s",
        shared="é" * data.draw(st.integers(0, 40)),
        rest="",
        schema={},
        prompt_tokens=prompt,
        output_tokens=1,
        max_output_tokens=most,
        prompt_ids=data.draw(st.none() | st.just((1, 2))),
    )
    sent = data.draw(st.integers(0, prompt))
    cached = data.draw(st.integers(0, sent))
    cost = price.usd(
        prompt_tokens=sent,
        cached_tokens=cached,
        cache_write_tokens=data.draw(st.integers(0, sent - cached)),
        completion_tokens=data.draw(st.integers(0, most)),
        batch=batch,
    )
    assert cost <= most_usd(question, Rates(price=price, batch=batch)) * (1 + 1e-12)


def test_an_estimated_prompt_may_have_a_token_for_every_byte():
    question = Question(
        system="é" * 100,
        shared="a" * 400,
        rest="b" * 400,
        schema={},
        prompt_tokens=10,
        output_tokens=1,
        max_output_tokens=0,
    )
    rates = Rates(price=Price(input=1e6, output=0, cached_input=0, cache_write=0))
    assert most_usd(question, rates) == 1000
    assert most_usd(replace(question, prompt_ids=(1,) * 10), rates) == 10
    assert most_usd(None, rates) == most_usd(question, Rates()) == 0


def num_lines(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("ledger-*.jsonl"))


@pytest.mark.slow
def test_a_killed_run_with_windows_and_votes_asks_every_key_once(tmp_path):
    runs = [long_run(f"run-{number}", num_steps=40) for number in range(8)]
    source = write_trajectories(tmp_path / "runs", runs)
    folder, gate = tmp_path / "labels", tmp_path / "gate"
    words = [sys.executable, __file__, str(source), str(folder), str(gate)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    critic = child_critic()
    expected = [(each.content_hash, request.part) for each in runs for request in critic.plan(each)]
    for share in (0.2, 0.5):
        shut = FileGate(gate)
        child = subprocess.Popen([*words, str(int(share * len(expected)))], env=environment)
        try:
            while not shut.is_reached:
                assert child.poll() is None, "it ended before it was killed"
                time.sleep(0.002)
        finally:
            child.kill()
            child.wait()
        assert 0 < num_lines(folder) < len(expected)
    shut.open()
    assert subprocess.run(words, env=environment, check=False).returncode == 0
    assert Counter(ledger_keys(folder)) == Counter(expected)
    assert labelled(folder) == whole(*runs)
    assert verify(folder).problems == ()


def child_critic():
    return PlannedCritic(votes=2, ahead=3, seconds=0.004)


class WaitingCritic(PlannedCritic):
    """Waits at a gate once it has given some answers."""

    def __init__(self, gate, most):
        super().__init__(votes=2, ahead=3, seconds=0.004)
        self.gate, self.left = gate, most

    def answer(self, request):
        if self.left == 0:
            wait_at(self.gate)
        self.left -= 1
        return super().answer(request)


if __name__ == "__main__":
    critic = child_critic()
    if len(sys.argv) > 4:
        critic = WaitingCritic(Path(sys.argv[3]), int(sys.argv[4]))
    label(Path(sys.argv[1]), Path(sys.argv[2]), critic, critic.config())
