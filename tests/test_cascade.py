"""Critics one after the other: what each is asked, what stays settled, and what is told of it."""

import json
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest

from srft_prep.cascade_report import summed_reports
from srft_prep.config import IngestConfig
from srft_prep.critic.parts import Part
from srft_prep.examples.record import RUNS_DIR
from srft_prep.ingest import ingest
from srft_prep.manifest import read_manifest
from srft_prep.panel import is_audited
from srft_prep.types import LABELS, Trajectory
from srft_prep.verification import verify
from tests.critic.api_server import ApiServer, Reaction, Turn, answer, label_of, late
from tests.gates import kill_when
from tests.stages import Run, srft_prep, trajectory, write_trajectories

SMALL, LARGE = "small-1", "large-1"
MODELS = ({"id": SMALL}, {"id": LARGE})
PRICES = f"""
["{SMALL}"]
input = 0.1
output = 1.0
["{LARGE}"]
input = 10.0
output = 100.0
"""


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")


def long_run(name: str, *, num_steps: int = 60, words: int = 300) -> Trajectory:
    run = trajectory(name, num_steps=num_steps)
    messages = [
        message._replace(content=f"{message.content} " + "seen " * words)
        if message.kind == "observation"
        else message
        for message in run.messages
    ]
    return replace(run, messages=tuple(messages))


def script(path: Path, runs: Any, *, unsure: Any, label: Any = lambda step: "good") -> Path:
    """Write what a scripted critic says: sure of all steps but those it is not."""
    with path.open("w") as file:
        for run in runs:
            for step in range(run.num_steps):
                top = 0.5 if unsure(run, step) else 0.98
                given = label(step)
                chances = {name: top if name == given else (1 - top) / 2 for name in LABELS}
                row = {"trajectory_id": run.trajectory_id, "step_index": step, "label": given}
                row |= {f"p_{name}": chance for name, chance in chances.items()}
                file.write(json.dumps(row) + "\n")
    return path


def critics_file(path: Path, server: ApiServer, prices: Path, **more: Any) -> Path:
    sections = []
    for name, model in (("small", SMALL), ("large", LARGE)):
        sections.append(
            f'[{name}]\ncritic = "openai"\nmodel = "{model}"\nbase-url = ["{server.openai_url}"]\n'
            f'prices = "{prices}"\n' + more.get(name, "")
        )
    path.write_text("\n".join(sections))
    return path


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.toml"
    path.write_text(PRICES)
    return path


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example runs, ingested."""
    folder = tmp_path_factory.mktemp("examples") / "trajectories"
    ingest([str(RUNS_DIR)], folder, IngestConfig(), outcomes=[str(RUNS_DIR)])
    return folder


def cascade(runs: Path, output: Path, critics: Path, names: str, *more: object) -> Run:
    words = ("--cascade", names, "--critics-file", critics, "--only", "all", "--json")
    return srft_prep("label", runs, "-o", output, *words, *more)


def told(done: Run) -> dict[str, Any]:
    document: dict[str, Any] = orjson.loads(done.stdout.splitlines()[-1])
    return document


def labels_in(folder: Path) -> dict[tuple[str, int], tuple[str, str]]:
    rows = pl.read_parquet(folder / "labels.parquet")
    return {
        (name, step): (label, critic)
        for name, step, label, critic in rows.select(
            "trajectory_id", "step_index", "label", "critic_id"
        ).iter_rows()
    }


def by_step(turn: Turn) -> Reaction:
    """Return labels by the step's number, harmful for the small model where the large says so."""
    return answer(turn, prompt=len(turn.prompt) // 4, completion=5 * len(turn.steps))


def unsure_of(turn: Turn, share: float) -> Reaction:
    """Return the right labels with probabilities; of some steps, by the prompt, unsure ones."""
    reaction = by_step(turn)
    body = json.loads(reaction.body)
    pieces = (body["choices"][0]["logprobs"] or {"content": []})["content"]
    step = iter(turn.steps)
    for piece in pieces:
        if piece["token"] in LABELS:
            unsure = turn.share(str(next(step))) < share
            for other in piece["top_logprobs"]:
                same = other["token"] == piece["token"]
                other["logprob"] = (
                    (-0.7 if unsure else -0.001) if same else (-1.6 if unsure else -9.0)
                )
    return replace(reaction, body=json.dumps(body).encode())


def two_models(turn: Turn) -> Reaction:
    if turn.body["model"] == SMALL:
        return unsure_of(turn, 0.1)
    return by_step(turn)


SHORT = [trajectory(f"run-{number:02d}", num_steps=6) for number in range(24)]


def test_only_uncertain_steps_go_on_and_in_windows_where_that_is_cheaper(
    tmp_path: Path, prices: Path
) -> None:
    uncertain = {"long": {3, 41}, "other": set(range(0, 60, 2)), "settled": set()}
    runs = [long_run(name) for name in uncertain]
    said = script(
        tmp_path / "said.jsonl",
        runs,
        unsure=lambda run, step: step in uncertain[run.trajectory_id],
        label=lambda step: "unnecessary",
    )
    source = write_trajectories(tmp_path / "runs", runs)
    output = tmp_path / "labels"
    with ApiServer(by_step, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        done = cascade(source, output, critics, f"scripted:{said},large")
        assert done.status == 0, done.stderr
        asked = [each.turn.steps for each in server.turns]
        again = cascade(source, output, critics, f"scripted:{said},large")
        assert again.status == 0, again.stderr
        assert len(server.turns) == len(asked), "a rerun asks nothing"
        alone = cascade(source, tmp_path / "dry", critics, f"scripted:{said},large", "--dry-run")
    assert verify(output).problems == ()
    found = labels_in(output)
    assert len(found) == 180
    for (name, step), (label, critic) in found.items():
        if step in uncertain[name]:
            assert (label, critic) == (label_of(step), f"{LARGE}@openai")
        else:
            assert (label, critic.partition("@")[0]) == ("unnecessary", "scripted")
    parts = pl.read_parquet(output / "requests.parquet").filter(
        pl.col("critic_id") == "large-1@openai"
    )
    of = {name: group["part"].to_list() for (name,), group in parts.group_by("trajectory_id")}
    assert set(of) == {"long", "other"}
    assert of["other"] == ["all"], "all windows hold an uncertain step: the whole is cheaper"
    windows = [Part.parse(part) for part in of["long"]]
    assert len(windows) == 2
    assert all(window is not None and window.limit == 8192 for window in windows)
    assert {step for window in windows for step in window.steps(60)} >= {3, 41}
    report = told(done)["cascade"]
    first, last = report["stages"]
    assert (first["settled"], first["left"], last["settled"], last["left"]) == (148, 32, 32, 0)
    assert (last["trajectories"], last["requests"]) == (2, 3)
    assert report["last_alone"]["requests"] == 3
    assert 0.3 < report["saved_share"]["usd"] < 0.7
    assert report == told(again)["cascade"] == read_manifest(output).data["cascade"]
    expected = told(alone)["critics"]
    assert [each["requests"] for each in expected] == [3, 3], "what costs nothing is asked for it"
    assert [each["usd"] == 0 for each in expected] == [True, False]
    assert [each["at_most"] for each in expected] == [False, False]


def test_a_higher_threshold_asks_only_about_the_windows_that_it_adds(
    tmp_path: Path, prices: Path
) -> None:
    run = long_run("long")
    said = tmp_path / "said.jsonl"
    script(said, [run], unsure=lambda _, step: step == 3)
    rows = [orjson.loads(line) for line in said.read_bytes().splitlines()]
    rows[41] |= {"p_good": 0.92, "p_unnecessary": 0.04, "p_harmful": 0.04}
    said.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    source = write_trajectories(tmp_path / "runs", [run])
    output, names = tmp_path / "labels", f"scripted:{said},large"
    with ApiServer(by_step, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        assert cascade(source, output, critics, names).status == 0
        assert len(server.turns) == 1
        refused = cascade(source, output, critics, names, "--sure", "0.95")
        assert refused.status == 2
        assert "--overwrite" in refused.stderr
        assert "--sure 0.95 anew" in refused.stderr
        assert cascade(source, output, critics, names, "--sure", "0.95", "--overwrite").status == 0
        assert len(server.turns) == 2
        assert cascade(source, tmp_path / "fresh", critics, names, "--sure", "0.95").status == 0
    assert labels_in(output) == labels_in(tmp_path / "fresh")
    owners = Counter(critic for _, critic in labels_in(output).values())
    assert owners[f"{LARGE}@openai"] == 2
    assert verify(output).problems == ()


def test_a_cascade_killed_in_its_midst_goes_on_and_asks_nothing_twice(
    tmp_path: Path, prices: Path
) -> None:
    source = write_trajectories(tmp_path / "runs", SHORT)
    output = tmp_path / "labels"

    def slowly(turn: Turn) -> Reaction:
        reaction = two_models(turn)
        return replace(reaction, delay_seconds=late(turn, 0.02 + 0.1 * turn.share()).delay_seconds)

    def num_kept() -> int:
        return sum(file.read_bytes().count(b"\n") for file in output.glob("ledger-*.jsonl"))

    rng = random.Random(3)
    with ApiServer(slowly, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices, large="concurrency = 2\n")
        words = ("label", source, "-o", output, "--cascade", "rules,small,large", "--only", "all")
        words += ("--critics-file", critics, "--concurrency", "2", "--audit", "0.3")
        for goal in (30, 50):  # 24 by the rules; in the small model's turn, and later
            enough = goal + rng.randint(0, 3)
            kill_when(lambda enough=enough: num_kept() >= enough, tmp_path / "gate", *words)
            while server._in_flight:  # answers that nobody takes any more
                time.sleep(0.01)
        kept = num_kept()
        billed = sum(server.billed().values())
        last = srft_prep(*words)
        assert last.status == 0, last.stderr
        assert sum(server.billed().values()) - billed == num_kept() - kept
        whole = cascade(source, tmp_path / "whole", critics, "rules,small,large", "--audit", "0.3")
        assert whole.status == 0, whole.stderr
    lines = [
        orjson.loads(line)
        for file in output.glob("ledger-*.jsonl")
        for line in file.read_bytes().split(b"\n")[:-1]
    ]
    asked = Counter((row["content_hash"], row["critic_id"], row["part"]) for row in lines)
    assert set(asked.values()) == {1}
    assert verify(output).problems == ()
    assert (output / "labels.parquet").read_bytes() == (
        tmp_path / "whole" / "labels.parquet"
    ).read_bytes()


def test_the_audit_sees_trajectories_whatever_was_settled_and_changes_no_label(
    tmp_path: Path, prices: Path
) -> None:
    said = script(
        tmp_path / "said.jsonl", SHORT, unsure=lambda *_: False, label=lambda step: LABELS[step % 2]
    )
    source = write_trajectories(tmp_path / "runs", SHORT)
    drawn = [run for run in SHORT if is_audited(run.content_hash, 0.3)]
    assert 2 < len(drawn) < 16
    with ApiServer(by_step, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        names = f"scripted:{said},large"
        plain = cascade(source, tmp_path / "plain", critics, names)
        assert not server.turns
        audited = cascade(source, tmp_path / "audited", critics, names, "--audit", "0.3")
        assert len(server.turns) == len(drawn)
    assert plain.status == audited.status == 0
    assert "audited: no trajectory" in plain.stderr
    assert "audited: no trajectory" not in audited.stderr
    assert labels_in(tmp_path / "plain") == labels_in(tmp_path / "audited")
    report = told(audited)["cascade"]
    assert report["audited_trajectories"] == len(drawn)
    audit = report["stages"][0]["audit"]
    assert audit["steps"] == 6 * len(drawn)
    pairs = [(LABELS[step % 2], label_of(step)) for _ in drawn for step in range(6)]
    assert audit["agreement"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    chance = (
        sum(
            Counter(a for a, _ in pairs)[name] * Counter(b for _, b in pairs)[name]
            for name in LABELS
        )
        / len(pairs) ** 2
    )
    assert audit["kappa"] == pytest.approx((audit["agreement"] - chance) / (1 - chance))
    assert "audited settled steps" in audited.stderr


def test_reports_of_runs_that_share_the_trajectories_add_up(tmp_path: Path, prices: Path) -> None:
    said = script(tmp_path / "said.jsonl", SHORT, unsure=lambda _, step: step == 2)
    reports = []
    with ApiServer(by_step, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        for number, runs in enumerate((SHORT[:9], SHORT[9:], SHORT)):
            source = write_trajectories(tmp_path / f"runs-{number}", runs)
            names, output = f"scripted:{said},large", tmp_path / f"labels-{number}"
            done = cascade(source, output, critics, names, "--audit", "0.5")
            reports.append(told(done)["cascade"])
    found, whole = summed_reports(reports[:2]), reports[2]
    assert whole["audited_trajectories"] > 0
    for one, other in zip(found.pop("stages"), whole.pop("stages"), strict=True):
        for name in ("audit", "beside"):
            assert one.pop(name, None) == other.pop(name, None)
        assert one.pop("seconds") >= 0 <= other.pop("seconds")
        assert one == pytest.approx(other)
    assert found.pop("saved_share") == pytest.approx(whole.pop("saved_share"))
    for name in ("last_alone", "last_asked"):
        assert found.pop(name) == pytest.approx(whole.pop(name))
    assert found == pytest.approx(whole)


def test_what_a_cheap_critic_fails_on_goes_on(tmp_path: Path, prices: Path) -> None:
    said = script(tmp_path / "said.jsonl", SHORT[1:], unsure=lambda *_: False)
    source = write_trajectories(tmp_path / "runs", SHORT)
    with ApiServer(by_step, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        done = cascade(source, tmp_path / "labels", critics, f"scripted:{said},large")
        assert len(server.turns) == 1
    assert done.status == 0, done.stderr
    assert (told(done)["failures"], told(done)["went_on"]) == (1, 1)
    assert told(done)["cascade"]["stages"][0]["failed"] == 1
    assert "1 of 1 failures cost no label" in done.stderr
    found = labels_in(tmp_path / "labels")
    assert {critic for (name, _), (_, critic) in found.items() if name == "run-00"} == {
        f"{LARGE}@openai"
    }
    assert len(found) == 24 * 6
    assert verify(tmp_path / "labels").problems == ()


def test_steps_that_the_last_critic_fails_on_have_no_label_and_the_failure_is_told(
    tmp_path: Path, prices: Path
) -> None:
    said = script(
        tmp_path / "said.jsonl", SHORT, unsure=lambda run, step: run is SHORT[2] and step == 4
    )
    source = write_trajectories(tmp_path / "runs", SHORT)
    with ApiServer(lambda turn: answer(turn, "", refusal="no"), models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        done = cascade(source, tmp_path / "labels", critics, f"scripted:{said},large")
    assert done.status == 1
    assert told(done)["failures"] == 1
    assert "failed: run-02: refused" in done.stderr
    found = labels_in(tmp_path / "labels")
    assert len(found) == 24 * 6 - 1
    assert ("run-02", 4) not in found
    assert verify(tmp_path / "labels").problems == ()


def test_rules_settle_what_a_rule_flags_and_a_critic_without_probabilities_everything(
    examples: Path, tmp_path: Path, prices: Path
) -> None:
    with ApiServer(by_step, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        done = cascade(examples, tmp_path / "one", critics, "rules,large")
        assert done.status == 0, done.stderr
        asked = len(server.turns)
        srft_prep("label", examples, "-o", tmp_path / "rules", "--only", "all")
        listed = pl.read_parquet(tmp_path / "rules" / "labels.parquet")
        plain = tmp_path / "said.jsonl"
        listed.select("trajectory_id", "step_index", "label").write_ndjson(plain)
        whole = cascade(examples, tmp_path / "two", critics, f"scripted:{plain},large")
        assert len(server.turns) == asked
    flagged = {
        (name, step): label
        for name, step, label in listed.filter(pl.col("rationale").is_not_null())
        .select("trajectory_id", "step_index", "label")
        .iter_rows()
    }
    found = labels_in(tmp_path / "one")
    assert flagged
    assert {key: label for key, (label, critic) in found.items() if critic == "rules@1"} == flagged
    assert "sure of what a rule flagged, alone" in done.stderr
    assert whole.status == 0
    assert "it measured no probabilities: taken to be sure of everything" in whole.stderr
    assert told(whole)["cascade"]["stages"][0]["left"] == 0


def test_the_budget_is_that_of_all_critics_together(tmp_path: Path, prices: Path) -> None:
    source = write_trajectories(tmp_path / "runs", SHORT)
    output = tmp_path / "labels"
    with ApiServer(lambda turn: unsure_of(turn, 0.5), models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        first = cascade(source, output, critics, "small,large", "--budget-usd", "0.1")
        spent = told(first)["usage"]["usd"]
        last = cascade(source, output, critics, "small,large", "--budget-usd", "50")
    assert first.status == 1
    assert 0 < spent <= 0.1
    assert "stopped by --budget-usd" in first.stderr
    assert "unasked: " in first.stderr
    assert last.status == 0, last.stderr
    assert told(last)["failures"] == 0
    assert verify(output).problems == ()
    costs = pl.read_parquet(output / "requests.parquet").group_by("critic_id").agg(pl.sum("usd"))
    by_critic = dict(costs.iter_rows())
    assert by_critic[f"{SMALL}@openai"] < by_critic[f"{LARGE}@openai"]
    assert sum(by_critic.values()) == pytest.approx(told(last)["cascade"]["usd"])


def test_a_dry_run_sends_nothing_and_says_where_it_knows_only_the_most(
    tmp_path: Path, prices: Path
) -> None:
    source = write_trajectories(tmp_path / "runs", SHORT)
    with ApiServer(two_models, models=MODELS) as server:
        critics = critics_file(tmp_path / "critics.toml", server, prices)
        words = ("rules,small,large", "--dry-run")
        before = cascade(source, tmp_path / "labels", critics, *words)
        assert not server.turns
        assert not (tmp_path / "labels").exists()
        assert cascade(source, tmp_path / "labels", critics, "rules,small,large").status == 0
        held = {path.name: path.read_bytes() for path in (tmp_path / "labels").iterdir()}
        after = cascade(source, tmp_path / "labels", critics, *words)
        assert {path.name: path.read_bytes() for path in (tmp_path / "labels").iterdir()} == held
    rules, small, large = told(before)["critics"]
    assert (rules["requests"], rules["usd"], rules["at_most"]) == (24, 0, False)
    assert (small["requests"], small["at_most"]) == (24, False)
    assert (large["requests"], large["at_most"]) == (24, True)
    assert f"{LARGE}@openai, at most:" in before.stdout
    assert [each["requests"] for each in told(after)["critics"]] == [0, 0, 0]
