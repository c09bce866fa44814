import random
import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from sklearn.metrics import cohen_kappa_score

from srft_prep.errors import ConfigError, LabelError, ShardError
from srft_prep.gold import GoldFile, GoldLabel, read_gold
from srft_prep.review.catalogue import Catalogue
from srft_prep.review.columns import read_critic
from srft_prep.review.filters import Filter, filter_of
from srft_prep.review.session import Session, Settings
from srft_prep.review.view import MORE_CHARS, PREVIEW_CHARS, blocks_of, piece_of
from srft_prep.types import LABELS, Label, Message, Trajectory
from tests.stages import label_row, labels_by, trajectory, write_labels, write_trajectories

ANY = Filter()
RUNS = [trajectory(f"run-{name}", num_steps=4, resolved=name == "b") for name in "abc"]
BY_CRITIC: dict[str, list[Label]] = {
    "run-a": ["good", "harmful", "good", "unnecessary"],
    "run-b": ["harmful", "good", "good", "good"],
}

Open = Callable[..., Session]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    trajectories = write_trajectories(tmp_path / "trajectories", RUNS)
    labels = write_labels(tmp_path / "labels", labels_by(RUNS, BY_CRITIC))

    def open_session(annotator: str = "ada", **settings: bool) -> Session:
        catalogue = Catalogue(trajectories)
        critics = [read_critic(labels, "rules", catalogue)]
        gold = tmp_path / "gold.jsonl"
        return Session(catalogue, critics, Settings(annotator=annotator, gold=gold, **settings))

    return open_session


def said(session: Session, row: int) -> list[dict]:
    return session.trajectory(row, ANY)["said"]


def gold_of(session: Session) -> Path:
    assert session.settings.gold is not None
    return session.settings.gold


def test_blind_counts_and_filters_are_of_the_steps_that_may_be_seen(opened: Open) -> None:
    session = opened()
    assert [row["labels"] for row in session.rows(ANY, offset=0, limit=9)["rows"]] == [[0] * 3] * 3
    assert session.rows(Filter(label="harmful"), offset=0, limit=9)["total"] == 0
    assert session.rows(Filter(state="disagreement"), offset=0, limit=9)["total"] == 0
    assert session.disagreements(offset=0, limit=9)["rows"] == []
    assert all(
        each == {"label": None, "hidden": True, "critics": [], "others": []}
        for each in said(session, 0)
    )
    session.label(0, 1, "good")
    assert [each["hidden"] for each in said(session, 0)] == [True, False, True, True]
    assert session.rows(ANY, offset=0, limit=1)["rows"][0]["labels"] == [1, 0, 1]
    (row,) = session.disagreements(offset=0, limit=9)["rows"]
    assert row["said"] == [["ada", "good"], ["critic rules", "harmful"]]


def test_a_session_that_is_not_blind_shows_everything_from_the_beginning(opened: Open) -> None:
    for session in (opened(blind=False), opened(read_only=True), opened(adjudicates=True)):
        assert session.rows(ANY, offset=0, limit=1)["rows"][0]["labels"] == [2, 1, 1]
        assert said(session, 0)[1]["critics"][0]["label"] == "harmful"


def test_the_gold_file_says_which_labels_were_given_blind(opened: Open) -> None:
    session = opened()
    session.label(0, 0, "good")
    session.label(0, 0, "harmful")
    session.undo()
    session.undo()
    session.label(0, 0, "harmful")
    lines = [orjson.loads(line) for line in gold_of(session).read_bytes().splitlines()]
    assert [line.get("blind") for line in lines] == [True, False, True, None, False]
    assert [line.get("undoes", False) for line in lines] == [False, False, True, True, False]
    assert [line["label"] for line in lines] == ["good", "harmful", "good", None, "harmful"]
    assert lines[0]["content_hash"] == RUNS[0].content_hash


def test_a_label_that_undo_restores_is_as_blind_as_it_was(opened: Open) -> None:
    first = opened()
    first.label(0, 0, "good")
    first.label(0, 0, "harmful")
    first.label(0, 0, "unnecessary")
    assert opened().undo()["said"]["label"] == "harmful"
    found = read_gold([gold_of(first)], blind_only=True)
    assert found.labels == {}
    assert found.num_not_blind == 1
    assert opened().undo()["said"]["label"] == "good"
    assert read_gold([gold_of(first)], blind_only=True).labels == {("run-a", 0): "good"}


def test_weights_are_those_of_srft(opened: Open) -> None:
    session = opened(read_only=True)
    by_step = [[each["weight"] for each in step["critics"]] for step in said(session, 0)]
    assert by_step == [[1.0], [0.0], [1.0], [1.0]]
    assert said(session, 1)[0]["critics"][0]["weight"] == 1.0  # resolved: taken whole
    assert session.trajectory(1, ANY)["weighted_by_label"] is False


def test_the_same_label_again_writes_no_line(opened: Open) -> None:
    session = opened()
    session.label(0, 0, "good")
    session.label(0, 0, "good")
    assert len(gold_of(session).read_bytes().splitlines()) == 1


def test_undo_goes_back_over_labels_of_earlier_processes(opened: Open) -> None:
    first = opened()
    first.label(0, 0, "good")
    first.label(1, 2, "harmful")
    first.label(0, 0, "unnecessary")
    second = opened()
    assert (second.undo()["said"]["label"], second.undo()["step"], second.undo()["row"]) == (
        "good",
        2,
        0,
    )
    assert second.undo() == {}
    assert read_gold([gold_of(second)]).labels == {}
    assert opened().undo() == {}


def test_undo_leaves_other_annotators_alone(opened: Open) -> None:
    ada, bob = opened("ada"), opened("bob")
    ada.label(0, 0, "good")
    bob.label(0, 0, "harmful")
    assert ada.undo()["step"] == 0
    assert read_gold([gold_of(ada)]).by_annotator == {"bob": {("run-a", 0): "harmful"}}


def test_two_servers_on_one_file_see_each_others_labels(opened: Open) -> None:
    ada, bob = opened("ada"), opened("bob")
    ada.label(0, 2, "harmful")
    assert bob.label(0, 2, "good")["said"]["others"] == [{"name": "ada", "label": "harmful"}]
    assert said(ada, 0)[2]["others"] == [{"name": "bob", "label": "good"}]
    assert bob.trajectory(0, ANY)["said"][1]["others"] == []


def test_kappa_between_annotators_is_that_of_scikit_learn(opened: Open) -> None:
    ada, bob = opened("ada"), opened("bob")
    words: dict[str, list[Label]] = {
        "ada": ["good", "good", "harmful", "unnecessary", "good", "harmful", "good"],
        "bob": ["good", "harmful", "harmful", "good", "good", "harmful", "unnecessary"],
    }
    for session in (ada, bob):
        for place, label in enumerate(words[session.settings.annotator]):
            session.label(place // 4, place % 4, label)
    pairs = {(pair["one"], pair["other"]): pair for pair in ada.agreement()["pairs"]}
    pair = pairs["ada", "bob"]
    assert pair["steps"] == 7
    assert pair["kappa"] == pytest.approx(cohen_kappa_score(words["ada"], words["bob"]))
    assert pair["agreement"] == pytest.approx(4 / 7)


def test_an_adjudication_settles_a_step(opened: Open) -> None:
    ada, bob, eve = opened("ada"), opened("bob"), opened("eve", adjudicates=True)
    ada.label(2, 0, "good")
    bob.label(2, 0, "harmful")
    assert read_gold([gold_of(ada)]).disagreements == {("run-c", 0)}
    assert eve.next_step("disagreement", ANY, row=-1, step=-1) == {"row": 2, "step": 0}
    eve.label(2, 0, "harmful")
    assert eve.next_step("disagreement", ANY, row=-1, step=-1) == {}
    gold = read_gold([gold_of(ada)])
    assert gold.labels == {("run-c", 0): "harmful"}
    assert gold.disagreements == frozenset()


def test_an_annotator_can_adjudicate_by_their_own_earlier_label(opened: Open) -> None:
    ada, bob, judge = opened("ada"), opened("bob"), opened("ada", adjudicates=True)
    ada.label(2, 0, "harmful")
    bob.label(2, 0, "good")
    assert judge.label(2, 0, "harmful")["progress"]["disagreements"] == 0
    assert read_gold([gold_of(judge)]).labels == {("run-c", 0): "harmful"}
    judge.label(2, 0, "harmful")
    ada.label(2, 0, "harmful")  # the same again takes no adjudication back
    assert len(gold_of(judge).read_bytes().splitlines()) == 3


def test_an_undone_adjudication_leaves_what_its_annotator_said_before(opened: Open) -> None:
    ada, bob, judge = opened("ada"), opened("bob"), opened("ada", adjudicates=True)
    ada.label(2, 0, "good")
    bob.label(2, 0, "harmful")
    judge.label(2, 0, "harmful")
    after = judge.undo()
    assert (after["said"]["label"], after["said"]["adjudicated"]) == ("good", False)
    assert after["progress"]["disagreements"] == 1
    gold = read_gold([gold_of(judge)])
    assert gold.disagreements == {("run-c", 0)}
    assert gold.by_annotator["ada"] == {("run-c", 0): "good"}


def test_undo_restores_an_adjudication_whatever_the_session_is(opened: Open) -> None:
    ada, bob, judge = opened("ada"), opened("bob"), opened("eve", adjudicates=True)
    ada.label(2, 0, "good")
    bob.label(2, 0, "harmful")
    judge.label(2, 0, "harmful")
    judge.label(2, 0, "good")
    after = opened("eve").undo()
    assert (after["said"]["label"], after["said"]["adjudicated"]) == ("harmful", True)
    assert read_gold([gold_of(judge)]).labels == {("run-c", 0): "harmful"}


@pytest.mark.parametrize("seed", range(20))
def test_the_page_and_the_gold_file_agree_on_which_steps_are_in_dispute(
    opened: Open, seed: int
) -> None:
    draw = random.Random(seed)
    names = ("ada", "bob", "eve")
    sessions = [opened(name, blind=False) for name in names]
    sessions += [opened(name, adjudicates=True) for name in names]
    for _ in range(30):
        session = draw.choice(sessions)
        if draw.random() < 0.3:
            session.undo()
        else:
            session.label(2, draw.randrange(4), draw.choice(LABELS))
    gold = read_gold([gold_of(sessions[0])])
    for session in (draw.choice(sessions), opened("reader", read_only=True)):
        found = session.disagreements(offset=0, limit=9)["rows"]
        assert {(each["trajectory_id"], each["step"]) for each in found} == gold.disagreements


def test_annotators_and_critics_whose_shown_names_are_alike_are_held_apart(opened: Open) -> None:
    opened("critic rules", blind=False).label(0, 0, "harmful")
    named = opened("unnamed", blind=False)
    named.label(2, 0, "harmful")
    line = GoldLabel(trajectory_id="run-c", step_index=0, label="good")
    GoldFile(gold_of(named)).append(line)
    reader = opened("reader", read_only=True)
    assert [each["said"] for each in reader.disagreements(offset=0, limit=9)["rows"]] == [
        [["critic rules", "harmful"], ["critic rules", "good"]],
        [["unnamed", "harmful"], ["unnamed", "good"]],
    ]
    assert len(reader.agreement()["pairs"]) == 4 * 3 / 2


def test_labels_made_again_under_a_running_server_are_not_shown_as_others(
    opened: Open, tmp_path: Path
) -> None:
    session = opened(blind=False)
    assert said(session, 1)[0]["critics"][0]["label"] == "harmful"
    again = {"run-b": ["harmful"] * 4, "run-c": ["good"] * 4}
    shutil.rmtree(tmp_path / "labels")
    write_labels(tmp_path / "labels", labels_by(RUNS, again))
    with pytest.raises(ShardError, match=r"labels\.parquet: changed since this server started"):
        session.trajectory(1, ANY)
    with pytest.raises(ShardError, match="start it again"):
        session.label(1, 0, "good")
    assert not gold_of(session).exists()
    shutil.rmtree(tmp_path / "labels")
    with pytest.raises(ShardError, match=r"labels\.parquet: changed since this server started"):
        session.trajectory(1, ANY)


def test_the_next_unlabelled_step_goes_round_within_the_filter(opened: Open) -> None:
    session = opened()
    assert session.next_step("unlabelled", ANY, row=0, step=3) == {"row": 1, "step": 0}
    assert session.next_step("unlabelled", ANY, row=2, step=3) == {"row": 0, "step": 0}
    session.label(1, 0, "good")
    resolved = Filter(outcome="resolved")
    assert session.next_step("unlabelled", resolved, row=1, step=3) == {"row": 1, "step": 1}
    for step in range(4):
        session.label(1, step, "good")
    assert session.next_step("unlabelled", resolved, row=0, step=0) == {}


def test_labels_of_other_versions_of_a_trajectory_are_not_shown(
    opened: Open, tmp_path: Path
) -> None:
    stale = {"trajectory_id": "run-a", "step_index": 0, "label": "good", "annotator": "ada"}
    lines = [
        stale | {"content_hash": "0" * 32},
        stale | {"trajectory_id": "gone"},
        stale | {"step_index": 99},
    ]
    (tmp_path / "gold.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)) + b"\n")
    session = opened()
    assert session.agreement()["num_foreign"] == 3
    assert session.num_labelled() == 0
    assert session.undo() == {}


def test_neighbours_are_those_of_the_filtered_list(opened: Open) -> None:
    session = opened()
    found = session.trajectory(0, Filter(outcome="unresolved"))
    assert (found["previous"], found["next"], found["place"], found["total"]) == (None, 2, 1, 2)


def test_a_filter_finds_ids_in_any_case_and_nothing_else_by_it(opened: Open) -> None:
    session = opened()
    assert session.rows(Filter(search="RUN-B"), offset=0, limit=9)["total"] == 1
    assert session.rows(Filter(search=".*"), offset=0, limit=9)["total"] == 0
    with pytest.raises(ConfigError, match="outcome: expected one of resolved, unresolved, unknown"):
        filter_of({"outcome": "maybe"})


def test_what_is_not_there_is_refused(opened: Open) -> None:
    session = opened()
    for call in (
        lambda: session.trajectory(3, ANY),
        lambda: session.label(0, 4, "good"),
        lambda: session.text(0, message=99, block=0, start=0),
        lambda: session.text(0, message=0, block=5, start=0),
        lambda: opened(read_only=True).label(0, 0, "good"),
    ):
        with pytest.raises(ConfigError):
            call()
    assert not gold_of(session).exists()


def test_labels_that_do_not_fit_the_trajectories_are_refused(tmp_path: Path) -> None:
    catalogue = Catalogue(write_trajectories(tmp_path / "trajectories", RUNS))
    beyond = write_labels(tmp_path / "beyond", [label_row(RUNS[0], 4, "good")])
    with pytest.raises(LabelError, match="'run-a' has no step 4"):
        read_critic(beyond, "x", catalogue)
    other = write_labels(tmp_path / "other", [label_row(trajectory("other"), 0, "good")])
    with pytest.raises(LabelError, match="none of its labels belongs to these trajectories"):
        read_critic(other, "x", catalogue)


def read_all(folder: Path) -> None:
    catalogue = Catalogue(folder)
    for row in range(catalogue.num_trajectories):
        catalogue.read(row)


def test_a_damaged_part_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    folder = write_trajectories(tmp_path / "trajectories", RUNS)
    part = folder / "part-00000.parquet"
    content = bytearray(part.read_bytes())
    place = content.rfind(b"PAR1", 0, 8) + 200
    content[place] ^= 0xFF
    part.write_bytes(content)
    with pytest.raises(ShardError, match=r"part-00000\.parquet: damaged"):
        read_all(folder)


def test_pieces_of_a_long_text_are_the_text(tmp_path: Path) -> None:
    text = "\n".join("x" * length for length in range(0, 1500, 7)) + "y" * 250_000 + "z"
    piece = piece_of(text, 0, PREVIEW_CHARS)
    assert piece["text"].endswith("\n")
    found = piece["text"]
    while piece["end"] < piece["total"]:
        piece = piece_of(text, piece["end"])
        assert 0 < len(piece["text"]) <= MORE_CHARS
        found += piece["text"]
    assert found == text


def test_blocks_of_a_call_are_its_arguments_and_broken_ones_are_shown_as_they_are() -> None:
    def blocks(arguments: object) -> list[tuple[str, str, str]]:
        calls = [{"function": {"name": "edit", "arguments": arguments}}]
        message = Message(role="assistant", kind="action", tool_calls=orjson.dumps(calls).decode())
        return [(block.part, block.title, block.text) for block in blocks_of(message)]

    assert blocks('{"path": "a.py", "old_str": "a", "new_str": "b", "n": [1]}') == [
        ("call", "edit", ""),
        ("argument", "path", "a.py"),
        ("old", "old_str", "a"),
        ("new", "new_str", "b"),
        ("argument", "n", "[1]"),
    ]
    assert blocks('{"path": ') == [("call", "edit", ""), ("argument", "", '{"path": ')]
    deep = "[" * 600 + "]" * 600
    assert blocks(deep)[1][2] == deep


@pytest.mark.parametrize("runs", [[], [trajectory("empty", num_steps=0)]])
def test_a_directory_without_steps_can_be_opened(tmp_path: Path, runs: list[Trajectory]) -> None:
    catalogue = Catalogue(write_trajectories(tmp_path / "trajectories", runs))
    critic = read_critic(write_labels(tmp_path / "labels", []), "rules", catalogue)
    settings = Settings(annotator="ada", gold=tmp_path / "gold.jsonl")
    session = Session(catalogue, [critic], settings)
    assert session.describe()["num_trajectories"] == len(runs)
    assert session.rows(ANY, offset=0, limit=9)["total"] == len(runs)
    assert session.rows(Filter(search="x", state="labelled"), offset=0, limit=9)["total"] == 0
    assert session.next_step("unlabelled", ANY, row=0, step=0) == {}
    assert session.agreement()["pairs"][0]["kappa"] is None
    assert [session.trajectory(row, ANY)["said"] for row in range(len(runs))] == [[]] * len(runs)
