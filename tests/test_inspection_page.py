"""The page of one trajectory: what it says and shows, and that nothing in it runs or loads."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import orjson
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.chat import load_backend
from srft_prep.config import PackConfig
from srft_prep.errors import ConfigError
from srft_prep.hostile_text import printable
from srft_prep.inspection import ShownTokens, find
from srft_prep.inspection_page import page, token_texts
from srft_prep.inspection_text import lines
from srft_prep.packed_steps import Stretch, placed_in
from srft_prep.shards import pack
from srft_prep.tokens import tokenize
from srft_prep.types import Message, Trajectory
from srft_prep.weights import DEFAULT_WEIGHTS
from tests import strategies
from tests.page_reader import Page, read_page
from tests.stages import (
    Examples,
    label_row,
    srft_prep,
    trajectory,
    write_labels,
    write_trajectories,
)

SHOWN = "attempt-2/example__pathglob-7"
"""An unresolved run of 14 steps with harmful and unnecessary ones."""


@pytest.fixture(scope="module")
def shards(examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "shards"
    weights = {"good": 1.0, "unnecessary": 0.5, "harmful": 0.0}
    config = PackConfig(recipe="srft", weights=weights, seq_len=8192)
    pack(examples.tokens, path, config, labels=examples.labels)
    return path


def written(tmp_path: Path, *args: object) -> Page:
    """Return the page that the command writes, having found that it neither runs nor loads."""
    file = tmp_path / "page.html"
    file.unlink(missing_ok=True)
    run = srft_prep("inspect", *args, "--html", file)
    assert (run.status, run.stdout, run.stderr) == (0, "", "")
    read = read_page(file.read_text(encoding="utf-8"))
    assert read.problems() == []
    return read


def sections(read: Page) -> list[tuple[str, str]]:
    """Return the class and the style of each stretch or message."""
    return [
        ((found["class"] or "").removeprefix("shown "), found.get("style") or "")
        for tag, found in read.elements
        if tag == "section"
    ]


def test_a_trajectory_shows_all_its_messages_and_each_step_by_its_label(
    examples: Examples, tmp_path: Path
) -> None:
    read = written(tmp_path, examples.trajectories, "--id", SHOWN, "--labels", examples.labels)
    shown = find(examples.trajectories, SHOWN, labels=examples.labels)
    assert not isinstance(shown, list)
    for message in shown.trajectory.messages:
        assert (message.content or "") in read.text
    assert shown.judgements is not None
    kinds = [kind for kind, _ in sections(read) if kind != "outside"]
    assert kinds == [shown.judgements[step].label for step in range(14)]
    assert "step 3 | harmful | weight 0" in read.text
    assert "every-seventh: by the list" in read.text
    assert (shown.trajectory.patch or "") in read.text


def test_what_colour_says_stands_in_words_beside_every_stretch(
    examples: Examples, shards: Path, tmp_path: Path
) -> None:
    command = (shards, "--id", SHOWN, "--tokens", examples.tokens, "--labels", examples.labels)
    read = written(tmp_path, *command)
    titles = re.findall(r"step (\d+) \| (\w+) \| weight ([\d.]+)", read.text)
    found = [kind for kind, _ in sections(read) if kind != "outside"]
    looks = {"1": "trained", "0.5": "partly", "0": "harmful"}
    assert found == [looks[weight] for _, _, weight in titles]
    assert [int(step) for step, _, _ in titles] == list(range(14))
    assert Counter(found).keys() == {"trained", "partly", "harmful"}
    styles = {style for kind, style in sections(read) if kind == "partly"}
    assert styles == {"--weight: 0.5"}
    # the bar above leads to each stretch, in the same words
    links = [found for tag, found in read.elements if tag == "a"]
    ids = [found["id"] for tag, found in read.elements if tag == "section" and "id" in found]
    assert [link["href"] for link in links] == [f"#{name}" for name in ids]
    assert all(link["aria-label"] == link["title"] for link in links)
    assert (links[3]["title"] or "").startswith("step 3 | harmful | weight 0 | ")
    assert sum(
        int(length)
        for _, found in read.elements
        for length in re.findall(r"flex-grow: (\d+)", found.get("style") or "")
    ) == len(documents(examples, shards)[0].ids)


def documents(examples: Examples, shards: Path) -> list[ShownTokens]:
    shown = find(shards, SHOWN, tokens=examples.tokens, labels=examples.labels)
    assert isinstance(shown, list)
    return shown


def test_the_masked_steps_of_a_shard_are_told_only_with_the_tokens_they_came_from(
    examples: Examples, shards: Path, tmp_path: Path
) -> None:
    alone = written(tmp_path, shards, "--id", SHOWN)
    kinds = Counter(kind for kind, _ in sections(alone))
    told = documents(examples, shards)[0].stretches
    assert kinds["harmful"] == 0
    weighted = sum(1 for stretch in told if stretch.weight)
    assert kinds["trained"] + kinds["partly"] == weighted
    assert sum(1 for stretch in told if stretch.label == "harmful") == 14 - weighted
    text = [line for line, _ in lines(documents(examples, shards))]
    assert any(line.endswith("| step 3 | harmful | weight 0") for line in text)


def test_tokens_show_the_parts_of_each_step(examples: Examples, tmp_path: Path) -> None:
    read = written(tmp_path, examples.tokens, "--id", SHOWN)
    names = [found for tag, found in read.elements if found.get("class") == "part-name"]
    assert len(names) == 2 * 14
    assert read.text.count("thought") >= 14


def test_every_token_of_a_step_is_told_apart_and_together_they_are_its_text(
    examples: Examples, tmp_path: Path
) -> None:
    read = written(tmp_path, examples.tokens, "--id", SHOWN)
    shown = find(examples.tokens, SHOWN)
    assert isinstance(shown, list)
    titles = [found["title"] or "" for tag, found in read.elements if tag == "i"]
    named = [int(name) for title in titles for name in title.split(": ")[1].split()]
    assert named == [
        each for step in shown[0].stretches for each in shown[0].ids[step.start : step.end]
    ]
    for stretch in shown[0].stretches:
        text = shown[0].decode(shown[0].ids[stretch.start : stretch.end - 1])
        assert text in read.text


TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | strategies.texts()


@pytest.fixture(scope="module", params=["example", "qwen2.5-coder-instruct", "phi-3-mini"])
def backend(request: pytest.FixtureRequest, shared_data: Path) -> object:
    name = request.param
    return load_backend(name if name == "example" else str(shared_data / "tokenizers" / name))[0]


@given(text=TEXTS)
def test_the_texts_of_tokens_joined_are_the_text_of_all(backend: object, text: str) -> None:
    ids = backend.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]

    def decode(some: list[int]) -> str:
        return backend.decode(some, skip_special_tokens=False)  # type: ignore[attr-defined,no-any-return]

    found = token_texts(ids, decode)  # type: ignore[arg-type]
    assert "".join(said for _, _, said in found) == decode(ids)
    assert [bound for bound, _, _ in found] == [0, *(end for _, end, _ in found)][: len(found)]
    if found:
        assert found[-1][1] == len(ids)
    if text.isascii():
        assert len(found) == len(ids)


@given(
    st.lists(st.integers(0, 40), max_size=12, unique=True),
    st.lists(st.integers(0, 40), max_size=12, unique=True),
    st.integers(0, 20),
    st.integers(1, 40),
)
def test_steps_and_weights_laid_over_each_other_say_the_same_of_every_token(
    step_bounds: list[int], run_bounds: list[int], first: int, length: int
) -> None:
    pairs = list(pairwise(sorted(step_bounds)))[::2]
    spans = [{"step": n, "start": a, "end": b} for n, (a, b) in enumerate(pairs)]
    clipped = [(a, min(b, length)) for a, b in list(pairwise(sorted(run_bounds)))[::2]]
    runs = [
        Stretch(start=a, end=b, weight=1 / (n + 1)) for n, (a, b) in enumerate(clipped) if a < b
    ]
    labels = {0: "harmful", 2: "good"}
    found = placed_in({"step_spans": spans}, runs, first, length, labels=labels)  # type: ignore[arg-type]
    for one, other in pairwise(found):
        assert one.end <= other.start
    for token in range(length):
        step = next((n for n, (a, b) in enumerate(pairs) if a <= token + first < b), None)
        weight = next((run.weight for run in runs if run.start <= token < run.end), None)
        stretch = next((each for each in found if each.start <= token < each.end), None)
        if step is None and weight is None:
            assert stretch is None
            continue
        assert stretch is not None
        expected = weight if step is None or weight is not None else 0.0
        assert (stretch.step, stretch.weight) == (step, expected)
        assert stretch.label == (None if step is None else labels.get(step))


@pytest.mark.parametrize("overlong", ["truncate", "windows"])
def test_a_document_cut_from_a_long_trajectory_knows_its_steps(
    examples: Examples, tmp_path: Path, overlong: str
) -> None:
    config = PackConfig(
        recipe="naive", weights=dict(DEFAULT_WEIGHTS), seq_len=1000, overlong=overlong
    )
    pack(examples.tokens, tmp_path / "shards", config)
    shown = find(tmp_path / "shards", SHOWN, tokens=examples.tokens)
    assert isinstance(shown, list)
    trained = [each.step for document in shown for each in document.stretches if each.weight]
    assert trained == list(range(len(trained)))
    assert len(trained) == (14 if overlong == "windows" else 3)
    replayed = sum(1 for each in shown for step in each.stretches if step.weight == 0)
    assert bool(replayed) == (overlong == "windows")
    read = read_page(page(shown))
    assert read.text.count("document ") == (len(shown) if len(shown) > 1 else 0)
    ids = [found["id"] for _, found in read.elements if "id" in found]
    assert len(ids) == len(set(ids))


def test_tokens_and_labels_are_taken_only_where_they_say_something(
    examples: Examples, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--tokens: only beside shards"):
        find(examples.trajectories, SHOWN, tokens=examples.tokens)
    with pytest.raises(ConfigError, match="--labels: only beside trajectories, or beside shards"):
        find(shards, SHOWN, labels=examples.labels)
    other = trajectory(SHOWN, num_steps=14)
    runs = write_trajectories(tmp_path / "runs", [other])
    tokenize(runs, tmp_path / "tokens", tokenizer="example")
    says = f"hold other tokens than .*, which was packed from {examples.tokens}; give those"
    with pytest.raises(ConfigError, match=says):
        find(shards, SHOWN, tokens=tmp_path / "tokens")


HOSTILE = (
    "</pre></section><script>alert(1)</script><img src=x onerror=alert(1)>"
    "<a href='javascript:alert(1)'>x</a> \x1b[2J\u202eevil\u2066 \r\x00\x08 end"
)


def hostile_run() -> Trajectory:
    call = {"function": {"name": HOSTILE, "arguments": orjson.dumps({HOSTILE: HOSTILE}).decode()}}
    odd = {"function": {"name": None, "arguments": "{not json"}}
    return Trajectory(
        trajectory_id=HOSTILE,
        instance_id=HOSTILE,
        format=HOSTILE,
        patch=HOSTILE,
        messages=(
            Message(role="user", kind="prompt", content=HOSTILE * 40, name=HOSTILE),
            Message(
                role="assistant",
                kind="action",
                content=HOSTILE,
                reasoning_content=HOSTILE,
                tool_calls=orjson.dumps([call, odd, {"odd": HOSTILE}]).decode(),
            ),
            Message(role=f"exit{HOSTILE}", kind="artifact", content=HOSTILE),
        ),
    )


def test_hostile_text_is_shown_as_text_on_every_page(tmp_path: Path) -> None:
    run = hostile_run()
    runs = write_trajectories(tmp_path / "runs", [run])
    labels = write_labels(tmp_path / "labels", [label_row(run, 0, "harmful", rationale=HOSTILE)])
    plain = write_trajectories(
        tmp_path / "plain",
        [
            Trajectory(
                trajectory_id=HOSTILE,
                instance_id="",
                format="messages",
                messages=(
                    Message(role="user", kind="prompt", content=HOSTILE * 40),
                    Message(role="assistant", kind="action", content=HOSTILE),
                ),
            )
        ],
    )
    tokenize(plain, tmp_path / "tokens", tokenizer="example")
    config = PackConfig(recipe="naive", weights=dict(DEFAULT_WEIGHTS), seq_len=8192)
    pack(tmp_path / "tokens", tmp_path / "shards", config)
    for command in (
        (runs, "--labels", labels),
        (tmp_path / "tokens",),
        (tmp_path / "shards", "--tokens", tmp_path / "tokens"),
    ):
        read = written(tmp_path, *command, "--id", HOSTILE)
        assert read.scripts == []
        assert printable(HOSTILE) in read.text
        assert {tag for tag, _ in read.elements}.isdisjoint({"script", "img"})
        assert not any(char in read.text for char in "\x1b\u202e\u2066\r\x00\x08")


def test_a_trajectory_of_32k_tokens_makes_a_page_of_at_most_three_megabytes(
    tmp_path: Path,
) -> None:
    words = " ".join(f"value_{n} = call({n}) # {n * n}" for n in range(800))
    steps = [
        message
        for n in range(6)
        for message in (
            Message(role="assistant", kind="action", content=f"{n} {words}"),
            Message(role="user", kind="observation", content="ok"),
        )
    ]
    run = Trajectory(trajectory_id="long", instance_id="", format="messages", messages=(*steps,))
    runs = write_trajectories(tmp_path / "runs", [run])
    tokenize(runs, tmp_path / "tokens", tokenizer="example")
    (tokens,) = pl.read_parquet(tmp_path / "tokens" / "part-*.parquet")["num_tokens"]
    assert tokens > 32_768
    shown = find(tmp_path / "tokens", "long")
    assert len(page(shown)) < 90 * tokens


def test_long_context_is_folded_and_none_of_it_is_left_out(tmp_path: Path) -> None:
    said = "\n".join(f"line {number}" for number in range(100))
    run = trajectory("run", num_steps=1)
    long = Message(role="user", kind="observation", content=said)
    wide = Message(role="user", kind="observation", content="x" * 5000)
    run = Trajectory(
        trajectory_id="run", instance_id="", format="m", messages=(*run.messages, long, wide)
    )
    read = written(tmp_path, write_trajectories(tmp_path / "runs", [run]), "--id", "run")
    assert said in read.text
    assert "observation (user) | 100 lines: line 0 line 1" in read.text
    assert "observation (user) | 5,000 characters: xxx" in read.text
    assert [tag for tag, _ in read.elements].count("details") == 2


def test_arguments_that_can_be_read_and_not_written_again_are_shown_as_they_are(
    tmp_path: Path,
) -> None:
    deep = "[" * 400 + "]" * 400
    calls = orjson.dumps([{"function": {"name": "edit", "arguments": deep}}]).decode()
    run = Trajectory(
        trajectory_id="deep",
        instance_id="",
        format="messages",
        messages=(Message(role="assistant", kind="action", tool_calls=calls),),
    )
    read = written(tmp_path, write_trajectories(tmp_path / "runs", [run]), "--id", "deep")
    assert deep in read.text
