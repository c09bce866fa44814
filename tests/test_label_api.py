"""`label` as a user runs it, against real HTTP servers on loopback."""

import random
from collections import Counter
from pathlib import Path

import orjson
import polars as pl
import pytest

from srft_prep.chat import load_backend
from srft_prep.config import LabelConfig
from srft_prep.critic import open_critic
from srft_prep.critic.batch.provider import BatchSettings
from srft_prep.critic.prompt import load_prompt
from srft_prep.critic.question import QuestionSettings
from srft_prep.labeling import label
from srft_prep.manifest import read_manifest
from srft_prep.verification import verify
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
from tests.critic.batch_server import KEY, BatchServer
from tests.gates import kill_when
from tests.stages import Run, srft_prep

PROMPT = Path(__file__).resolve().parents[1] / "prompts" / "step_critic.md"
NUM_RUNS = 60
SECRET = "sk-0123456789-not-to-be-seen"


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("ANTHROPIC_API_KEY", SECRET)


@pytest.fixture(scope="module")
def runs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real trajectories."""
    folder = tmp_path_factory.mktemp("api") / "trajectories"
    source = shared_data / "trajectories"
    done = srft_prep("ingest", source, "--outcomes", source, "--limit", NUM_RUNS, "-o", folder)
    assert done.status in (0, 1), done.stderr
    return folder


def words(runs: Path, output: Path, server: ApiServer, critic: str, *more: object) -> list[str]:
    url = server.openai_url if critic == "openai" else server.anthropic_url
    named = ("--critic", critic, "--model", MODEL, "--base-url", url, "--only", "all")
    return list(map(str, ("label", runs, "-o", output, *named, *more)))


def run_label(
    runs: Path, output: Path, server: ApiServer, critic: str, *more: object, retry: bool = False
) -> Run:
    return srft_prep(*words(runs, output, server, critic, *more), *(["--retry-failed"] * retry))


def keys_in(output: Path) -> Counter[tuple[str, str]]:
    files = [file.read_bytes().split(b"\n")[:-1] for file in output.glob("ledger-*.jsonl")]
    entries = [orjson.loads(line) for lines in files for line in lines]
    return Counter((entry["content_hash"], entry["part"]) for entry in entries)


def unlabelled(runs: Path, output: Path) -> dict[str, int]:
    """Return the trajectories that lack labels, and how many."""
    parts = read_manifest(runs).parts
    due = pl.concat(pl.read_parquet(part, columns=["trajectory_id", "num_steps"]) for part in parts)
    labels = pl.read_parquet(output / "labels.parquet").group_by("trajectory_id").len("found")
    left = due.join(labels, on="trajectory_id", how="left").with_columns(
        pl.col("found").fill_null(0)
    )
    lacking = left.filter(pl.col("found") < pl.col("num_steps"))
    return {name: steps - found for name, steps, found in lacking.iter_rows()}


def misbehaving(turn: Turn) -> Reaction:
    """Return a fault at first, by the prompt, and in the end what was asked for, or a refusal."""
    kind = int(turn.share("kind") * 14)
    if kind == 13:
        return answer(turn, "", refusal="I would rather not")
    if turn.asked:
        return answer(turn)
    labels = {step: label_of(step) for step in turn.steps}
    return (
        lambda: limited(retry_after="1"),
        lambda: limited(),
        lambda: problem(500),
        lambda: problem(529, "overloaded"),
        lambda: late(turn, 0.5),
        lambda: dropped(),
        lambda: half(turn),
        lambda: not_json(),
        lambda: answer(turn, '{"labels": {'),
        lambda: answer(turn, labels_text({**labels, turn.steps[0]: "bad"})),
        lambda: answer(turn, labels_text(dict(list(labels.items())[1:]))),
        lambda: answer(turn, labels_text({**labels, 9999: "good"})),
        lambda: answer(turn),
    )[kind]()


@pytest.mark.parametrize("critic", ["openai", "anthropic"])
def test_every_step_has_a_label_or_a_recorded_failure_whatever_the_server_does(
    critic: str, runs: Path, tmp_path: Path
) -> None:
    with ApiServer(misbehaving) as server:
        done = run_label(runs, tmp_path / "labels", server, critic)
        billed = server.billed()
    assert done.status == 1, done.stderr
    assert verify(tmp_path / "labels").problems == ()
    requests = pl.read_parquet(tmp_path / "labels" / "requests.parquet")
    failed = requests.filter(pl.col("failure").is_not_null())
    assert failed["failure"].str.starts_with("refused: ").all()
    assert 0 < failed.height < requests.height / 3
    assert set(unlabelled(runs, tmp_path / "labels")) == set(failed["trajectory_id"])
    assert set(keys_in(tmp_path / "labels").values()) == {1}
    assert max(billed.values()) <= 2, "an answer and one re-ask"
    kept = b"".join(file.read_bytes() for file in (tmp_path / "labels").iterdir() if file.is_file())
    assert SECRET.encode() not in kept + done.stderr.encode() + done.stdout.encode()


def test_a_killed_run_goes_on_and_asks_nothing_again_that_had_come_back(
    runs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    rng = random.Random(7)
    with ApiServer(lambda turn: late(turn, 0.2 + 0.4 * turn.share())) as server:
        command = words(runs, output, server, "openai", "--concurrency", 8)
        kept: list[set[tuple[str, str]]] = []
        for _ in range(3):
            enough = sum(keys_in(output).values()) + rng.randint(3, 10)
            has_enough = lambda enough=enough: keys_in(output).total() >= enough  # noqa: E731
            kill_when(has_enough, tmp_path / "gate", *command)
            kept.append(set(keys_in(output)))
        num_billed = sum(server.billed().values())
        last = srft_prep(*command)
        num_asked_last = sum(server.billed().values()) - num_billed
    assert last.status == 0, last.stderr
    counted = keys_in(output)
    assert set(counted.values()) == {1}
    assert num_asked_last == len(counted) - len(kept[-1])
    assert unlabelled(runs, output) == {}
    assert verify(output).problems == ()


@pytest.mark.parametrize(
    ("critic", "model"), [("openai", "gpt-4.1-mini"), ("anthropic", "claude-sonnet-4-20250514")]
)
def test_the_estimate_is_within_5_percent_of_what_is_billed(
    critic: str, model: str, runs: Path, shared_data: Path, tmp_path: Path
) -> None:
    tokenizer = shared_data / "tokenizers" / "qwen2.5-coder-instruct"
    backend, _ = load_backend(str(tokenizer))

    def counted(turn: Turn) -> Reaction:
        system = turn.body.get("system") or turn.body["messages"][0]["content"]
        text = labels_text({step: label_of(step) for step in turn.steps})
        sent = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{turn.prompt}<|im_end|>\n"
        )
        num_tokens = [len(each.ids) for each in backend.encode_batch([sent, text])]
        return answer(turn, text, prompt=num_tokens[0] + 3, completion=num_tokens[1])

    with ApiServer(counted, models=({"id": model},)) as server:
        more = ("--model", model, "--tokenizer", tokenizer, "--json")
        dry = run_label(runs, tmp_path / "labels", server, critic, *more, "--dry-run")
        assert not server.turns
        assert not (tmp_path / "labels").exists()
        done = run_label(runs, tmp_path / "labels", server, critic, *more)
    assert done.status == 0, done.stderr
    expected = orjson.loads(dry.stdout.splitlines()[-1])
    billed = orjson.loads(done.stdout.splitlines()[-1])["usage"]
    assert expected["requests"] == billed["requests"]
    assert billed["usd"] > 0
    assert abs(expected["usd"] / billed["usd"] - 1) < 0.05
    assert abs(expected["prompt_tokens"] / billed["prompt_tokens"] - 1) < 0.05


def test_a_budget_ends_the_run_before_it_is_exceeded_and_a_larger_one_goes_on(
    runs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    model = "claude-sonnet-4-20250514"

    def billed(turn: Turn) -> Reaction:
        return answer(turn, prompt=len(turn.prompt) // 3, completion=200)

    with ApiServer(billed, models=({"id": model},)) as server:
        more = ("--model", model, "--json")
        first = run_label(runs, output, server, "anthropic", *more, "--budget-usd", "1")
        spent = orjson.loads(first.stdout.splitlines()[-1])["usage"]["usd"]
        asked = len(server.turns)
        again = run_label(runs, output, server, "anthropic", *more, "--budget-usd", "1")
        assert len(server.turns) == asked, "the money is spent"
        last = run_label(runs, output, server, "anthropic", *more, "--budget-usd", "50")
    assert first.status == again.status == 1
    assert 0.4 < spent <= 1
    assert "stopped by --budget-usd" in again.stderr
    assert "unasked: " in first.stderr
    assert "the budget of $1.00" in first.stderr
    assert last.status == 0, last.stderr
    assert unlabelled(runs, output) == {}
    assert set(keys_in(output).values()) == {1}
    assert verify(output).problems == ()


@pytest.mark.parametrize("critic", ["openai", "anthropic"])
def test_batches_label_every_step_at_the_batch_price(
    critic: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from srft_prep.critic.pricing import Price

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    price = Price(input=1.0, output=4.0, cached_input=0.1, cache_write=1.25, batch_factor=0.5)
    with BatchServer() as batches:
        opened = open_critic(
            critic,
            model=MODEL,
            settings=QuestionSettings(prompt=load_prompt(PROMPT)),
            base_urls=(batches.url + "/v1" * (critic == "openai"),),
            price=price,
            batch_journal=tmp_path / "labels" / f"batches-{critic}.jsonl",
            batch_settings=BatchSettings(poll_seconds=0.05, max_requests=25),
        )
        config = LabelConfig(
            critic=critic,
            critic_id=opened.critic_id,
            prompt_hash=opened.prompt_hash,
            only="all",
            max_input_tokens=opened.max_input_tokens,
        )
        try:
            manifest = label(runs, tmp_path / "labels", opened, config)
        finally:
            opened.close()
        assert set(batches.accepted.values()) == {1}
    assert manifest.counts["failures"] == 0
    assert unlabelled(runs, tmp_path / "labels") == {}
    requests = pl.read_parquet(tmp_path / "labels" / "requests.parquet")
    assert requests["usd"].to_list() == pytest.approx(
        [
            price.usd(
                prompt_tokens=row["prompt_tokens"],
                cached_tokens=row["cached_tokens"],
                completion_tokens=row["completion_tokens"],
                batch=True,
            )
            for row in requests.iter_rows(named=True)
        ]
    )
    assert verify(tmp_path / "labels").problems == ()
