"""What a cascade tells of its costs: estimates beside estimates, each failure with its bill."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest

from srft_prep.cascade_report import cascade_lines
from srft_prep.config import LabelConfig
from srft_prep.critic import Critic, CriticReply, CriticRequest
from srft_prep.critic.parts import Part
from srft_prep.critic.scripted import ScriptedCritic
from srft_prep.labeling import label_together
from srft_prep.manifest import Manifest, read_manifest
from srft_prep.panel import Panel, config_of
from srft_prep.types import Trajectory
from srft_prep.verification import verify
from tests.critic.api_server import ApiServer, Reaction, Turn
from tests.stages import srft_prep, write_trajectories
from tests.test_cascade import (
    LARGE,
    MODELS,
    PRICES,
    SHORT,
    SMALL,
    by_step,
    cascade,
    critics_file,
    labels_in,
    long_run,
    script,
    told,
)
from tests.test_label_rounds import PRICE, PlannedCritic


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.toml"
    path.write_text(PRICES)
    return path


def nonsense(turn: Turn) -> Reaction:
    """Return a paid answer that holds no labels."""
    reaction = by_step(turn)
    body = json.loads(reaction.body)
    body["choices"][0]["message"]["content"] = "nonsense"
    body["choices"][0]["logprobs"] = None
    return replace(reaction, body=json.dumps(body).encode())


def costs(folder: Path) -> dict[str, float]:
    requests = pl.read_parquet(folder / "requests.parquet")
    return dict(requests.group_by("critic_id").agg(pl.sum("usd")).iter_rows())


def test_where_nothing_is_settled_nothing_is_saved_however_tokens_are_counted(
    tmp_path: Path, prices: Path
) -> None:
    runs = [*SHORT, long_run("long", num_steps=20)]
    said = script(tmp_path / "said.jsonl", runs, unsure=lambda *_: True)
    source = write_trajectories(tmp_path / "runs", runs)
    with ApiServer(by_step, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        done = cascade(source, tmp_path / "labels", critics, f"scripted:{said},large")
    report = told(done)["cascade"]
    assert report["stages"][0]["settled"] == 0
    assert report["last_alone"] == report["last_asked"]
    assert report["last_alone"]["prompt_tokens"] != report["stages"][1]["prompt_tokens"]
    assert report["saved_share"] == {"prompt_tokens": 0.0, "usd": pytest.approx(0.0)}
    assert report["last_alone_usd"] == pytest.approx(report["stages"][1]["usd"])


def test_half_of_the_trajectories_settled_saves_half_and_a_dear_first_critic_is_told(
    tmp_path: Path, prices: Path
) -> None:
    def react(turn: Turn) -> Reaction:
        # the small model is as verbose as can be, and is sure of nothing
        return by_step(turn) if turn.body["model"] == LARGE else nonsense(turn)

    even = {run.trajectory_id for run in SHORT[::2]}
    said = script(
        tmp_path / "said.jsonl", SHORT, unsure=lambda run, _: run.trajectory_id not in even
    )
    source = write_trajectories(tmp_path / "runs", SHORT)
    with ApiServer(react, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        half = cascade(source, tmp_path / "half", critics, f"scripted:{said},large")
        dear = cascade(source, tmp_path / "dear", critics, "small,large")
    saved = told(half)["cascade"]["saved_share"]
    assert saved["prompt_tokens"] == pytest.approx(0.5, abs=0.01)
    assert saved["usd"] == pytest.approx(0.5, abs=0.01)
    assert "cost 50.0% less" in half.stderr
    report = told(dear)["cascade"]
    small, large = report["stages"]
    assert report["saved_share"]["usd"] == pytest.approx(-small["usd"] / large["usd"])
    assert report["saved_share"]["prompt_tokens"] == 0
    assert "% more" in dear.stderr


def test_failures_of_a_cheap_critic_stay_its_own_and_are_told(tmp_path: Path, prices: Path) -> None:
    def react(turn: Turn) -> Reaction:
        return nonsense(turn) if turn.body["model"] == SMALL else by_step(turn)

    source, output = write_trajectories(tmp_path / "runs", SHORT), tmp_path / "labels"
    with ApiServer(react, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        done = cascade(source, output, critics, "small,large")
        jobs = [tmp_path / f"job-{index}" for index in range(2)]
        for index, job in enumerate(jobs):
            array = ("--shard-index", index, "--num-shards", 2)
            assert cascade(source, job, critics, "small,large", *array).status == 0
    assert done.status == 0, "every step has its label"
    merged = srft_prep("merge", *jobs, "-o", tmp_path / "merged")
    assert merged.status == 0, merged.stderr
    found = read_manifest(tmp_path / "merged")
    assert found.counts == read_manifest(output).counts
    assert found.data["cascade"]["saved_share"]["prompt_tokens"] == 0
    document = told(done)
    assert (document["failures"], document["went_on"]) == (24, 24)
    small, large = document["cascade"]["stages"]
    assert (small["requests"], small["failed"], large["requests"], large["failed"]) == (
        0,
        24,
        24,
        0,
    )
    assert "24 more of its requests failed: what it was asked went on" in done.stderr
    assert "24 of 24 failures cost no label" in done.stderr
    assert "failed: run-00: unparseable" in done.stderr
    requests = pl.read_parquet(output / "requests.parquet")
    failed = requests.filter(pl.col("failure").is_not_null())
    assert failed["critic_id"].unique().to_list() == [f"{SMALL}@openai"]
    assert failed.height == 24
    assert failed["usd"].min() > 0
    assert costs(output) == pytest.approx(
        {f"{SMALL}@openai": small["usd"], f"{LARGE}@openai": large["usd"]}
    )
    assert len(labels_in(output)) == 24 * 6
    assert verify(output).problems == ()


def test_a_paid_failure_stays_on_the_bill_where_nothing_is_asked_any_more(
    tmp_path: Path, prices: Path
) -> None:
    runs = [long_run("long", num_steps=6, words=5)]
    said = script(tmp_path / "said.jsonl", runs, unsure=lambda _, step: step == 2)
    source, output = write_trajectories(tmp_path / "runs", runs), tmp_path / "labels"
    names = f"scripted:{said},large"
    with ApiServer(nonsense, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        first = cascade(source, output, critics, names)
        paid, num_asked = costs(output), len(server.turns)
        second = cascade(source, output, critics, names, "--sure", "0.5", "--overwrite")
        assert len(server.turns) == num_asked
    assert (first.status, second.status) == (1, 0)
    assert paid[f"{LARGE}@openai"] > 0
    assert costs(output) == paid
    assert told(second)["cascade"]["usd"] == told(first)["cascade"]["usd"]
    assert (told(second)["failures"], told(second)["went_on"]) == (1, 1)
    assert verify(output).problems == ()


def test_a_higher_threshold_goes_on_in_windows_though_the_whole_is_cheaper_than_all_of_them(
    tmp_path: Path, prices: Path
) -> None:
    run = long_run("long")
    said = tmp_path / "said.jsonl"
    script(said, [run], unsure=lambda _, step: step in {3, 41})
    rows = [orjson.loads(line) for line in said.read_bytes().splitlines()]
    for step in (15, 22, 30, 50, 59):
        rows[step] |= {"p_good": 0.92, "p_unnecessary": 0.04, "p_harmful": 0.04}
    said.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    source, output = write_trajectories(tmp_path / "runs", [run]), tmp_path / "labels"
    names = f"scripted:{said},large"
    with ApiServer(by_step, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        assert cascade(source, output, critics, names).status == 0
        first = {step for each in server.turns for step in each.turn.steps}
        num_first = len(server.turns)
        higher = (names, "--sure", "0.95", "--overwrite")
        assert cascade(source, output, critics, *higher).status == 0
        second = {step for each in server.turns[num_first:] for step in each.turn.steps}
        num_second = len(server.turns)
        assert cascade(source, output, critics, *higher).status == 0
        assert len(server.turns) == num_second, "a rerun asks nothing"
    assert {3, 41} <= first
    assert {15, 22, 30, 50, 59} <= first | second
    assert not first & second
    assert verify(output).problems == ()


class Watched:
    """A critic that writes down when it plans, and when it has no more to say."""

    def __init__(self, critic: PlannedCritic) -> None:
        self.critic, self.events = critic, list[str]()
        self.critic_id, self.prompt_hash = critic.critic_id, critic.prompt_hash
        self.rates, self.max_input_tokens = critic.rates, critic.max_input_tokens

    def plan(self, trajectory: Trajectory, *, scale: float = 1.0) -> list[CriticRequest]:
        self.events.append(trajectory.trajectory_id)
        planned: list[CriticRequest] = self.critic.plan(trajectory, scale=scale)
        return planned

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        yield from self.critic.label(requests)
        self.events.append("end")

    def close(self) -> None:
        self.events.append("end")


def watched(
    folder: Path, runs: list[Trajectory], *, unsure: Any, only: Any = "all", **last: Any
) -> tuple[Manifest, list[str], PlannedCritic]:
    """Run a cascade of a scripted critic and a planned one; return also what the last one did."""
    said = script(folder / "said.jsonl", runs, unsure=unsure)
    first = ScriptedCritic(model=said)
    critic = PlannedCritic(**last)
    settings = LabelConfig(
        critic="scripted", critic_id=first.critic_id, prompt_hash=first.prompt_hash, only=only
    )
    config = config_of("cascade", [settings, critic.config(only=only)], sure=0.9)
    panel = Panel(config=config, members=config.members, calibrations=(None, None))
    source = folder / "runs"
    if not source.exists():
        write_trajectories(source, runs)
    seen = Watched(critic)
    critics: list[Critic] = [first, seen]
    return label_together(source, folder / "labels", critics, panel), seen.events, critic


def test_every_plan_is_made_while_the_last_critic_is_at_work_and_none_where_nothing_is_asked(
    tmp_path: Path,
) -> None:
    def unsure(run: Trajectory, _: int) -> bool:
        return run.trajectory_id in ("run-03", "run-07")

    manifest, events, _ = watched(tmp_path, SHORT[:12], unsure=unsure)
    assert sorted(set(events[: events.index("end")])) == sorted(
        run.trajectory_id for run in SHORT[:12]
    )
    assert set(events[events.index("end") :]) == {"end"}
    again, events, _ = watched(tmp_path, SHORT[:12], unsure=unsure)
    assert set(events) == {"end"}
    assert again.data["cascade"] == manifest.data["cascade"]
    assert manifest.data["cascade"]["last_asked"]["trajectories"] == 2
    assert manifest.data["cascade"]["last_alone"]["trajectories"] == 12


def test_requests_that_replace_over_long_ones_are_what_the_last_critic_alone_would_take(
    tmp_path: Path,
) -> None:
    runs = [long_run("long", words=200)]
    rates = replace(PlannedCritic().rates, price=PRICE)
    manifest, _, critic = watched(
        tmp_path, runs, unsure=lambda _, step: step, limit=9000, takes=7500, rates=rates
    )
    limits = {Part.parse(part).limit for _, part in critic.asked}
    assert len(limits) > 1
    report = manifest.data["cascade"]
    assert report["stages"][0]["settled"] == 1
    assert report["last_asked"] == report["last_alone"]
    assert report["last_asked"]["prompt_tokens"] == report["stages"][1]["prompt_tokens"]
    assert report["saved_share"]["prompt_tokens"] == 0
    assert any("spared 0.0% of the tokens" in line for line in cascade_lines(report))
