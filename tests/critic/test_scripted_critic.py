from dataclasses import replace

import pytest

from srft_prep.critic import CriticRequest, open_critic
from srft_prep.critic.scripted import ScriptedCritic
from srft_prep.errors import ConfigError, LabelError
from srft_prep.types import Message, Trajectory

TRAJECTORY = Trajectory(
    trajectory_id="run-1",
    instance_id="i",
    format="messages",
    messages=tuple(Message(role="assistant", kind="action", content=str(n)) for n in range(6)),
)
JSONL = (
    '{"trajectory_id": "run-1", "step_index": 0, "label": "good"}\n'
    "\n"
    '{"trajectory_id": "run-1", "step_index": 1, "label": "harmful", "p_good": 0.1,'
    ' "p_unnecessary": 0.2, "p_harmful": 0.7, "rationale": "breaks the parser"}\n'
)
CSV = (
    "trajectory_id,step_index,label,p_good,p_unnecessary,p_harmful,rationale\n"
    "run-1,0,good,,,,\n"
    'run-1,1,harmful,0.1,0.2,0.7,"breaks\nthe parser"\n'
)


def write(folder, text, name="labels.jsonl"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def ask(critic, *steps):
    (reply,) = critic.label([CriticRequest.of(TRAJECTORY, part="all", steps=steps)])
    return reply


def test_labels_of_a_jsonl_file_come_back_as_written(tmp_path):
    critic = open_critic("scripted", model=str(write(tmp_path, JSONL)))
    reply = ask(critic, 1, 0)
    assert [(label.step_index, label.label) for label in reply.labels] == [
        (1, "harmful"),
        (0, "good"),
    ]
    harmful, good = reply.labels
    assert (harmful.p_good, harmful.p_unnecessary, harmful.p_harmful) == (0.1, 0.2, 0.7)
    assert harmful.rationale == "breaks the parser"
    assert good.p_good is None
    critic.close()


def test_a_csv_file_says_the_same(tmp_path):
    labels = ask(ScriptedCritic(model=write(tmp_path, CSV, "labels.CSV")), 0, 1).labels
    assert [label.label for label in labels] == ["good", "harmful"]
    assert labels[1].p_harmful == 0.7
    assert labels[1].rationale == "breaks\nthe parser"


def test_steps_without_a_line_make_the_request_a_failure(tmp_path):
    critic = ScriptedCritic(model=write(tmp_path, JSONL))
    reply = ask(critic, 0, 1, 3, 5)
    assert (reply.labels, reply.failure) == ((), "no label for steps 3, 5")
    assert ask(critic, 2).failure == "no label for step 2"
    assert ask(critic, *range(2, 20)).failure.endswith("9, 10, 11 and 8 more")
    other = Trajectory(trajectory_id="x", instance_id="i", format="messages", messages=())
    (reply,) = critic.label([CriticRequest.of(other, part="all", steps=(0,))])
    assert reply.failure.startswith("labels.jsonl has no line of this trajectory")


def test_a_file_about_other_trajectories_says_which_names_it_has(tmp_path):
    other = Trajectory(trajectory_id="x", instance_id="i", format="messages", messages=())
    request = CriticRequest.of(other, part="all", steps=(0,))
    (reply,) = ScriptedCritic(model=write(tmp_path, JSONL)).label([request])
    assert reply.failure == (
        "labels.jsonl has no line of this trajectory; those it has lines of (1) are named like "
        "run-1"
    )
    (reply,) = ScriptedCritic(model=write(tmp_path, "", "none.jsonl")).label([request])
    assert reply.failure == "none.jsonl holds no labels"


@pytest.mark.parametrize(
    ("num_steps", "has"), [(0, "no step"), (1, "only step 0"), (4, "the steps 0 to 3")]
)
def test_a_label_for_a_step_that_the_trajectory_lacks_is_a_failure(tmp_path, num_steps, has):
    lines = [
        f'{{"trajectory_id": "run-1", "step_index": {step}, "label": "good"}}\n'
        for step in (*range(num_steps), 999)
    ]
    run = replace(TRAJECTORY, messages=TRAJECTORY.messages[:num_steps])
    request = CriticRequest.of(run, part="all", steps=tuple(range(num_steps)))
    (reply,) = ScriptedCritic(model=write(tmp_path, "".join(lines))).label([request])
    assert reply.labels == ()
    assert reply.failure == f"a label for step 999, but the trajectory has {has}"


def test_a_reason_is_a_rationale_where_there_is_none(tmp_path):
    text = JSONL.replace('"good"', '"good", "reason": "first"').replace(
        '"rationale"', '"reason": "not this", "rationale"'
    )
    labels = ask(ScriptedCritic(model=write(tmp_path, text)), 0, 1).labels
    assert [label.rationale for label in labels] == ["first", "breaks the parser"]
    text = CSV.replace("rationale", "reason")
    labels = ask(ScriptedCritic(model=write(tmp_path, text, "labels.csv")), 0, 1).labels
    assert [label.rationale for label in labels] == [None, "breaks\nthe parser"]


def test_the_id_follows_the_bytes_of_the_file(tmp_path):
    one = ScriptedCritic(model=write(tmp_path, JSONL, "a.jsonl"))
    same = ScriptedCritic(model=write(tmp_path, JSONL, "b.jsonl"))
    other = ScriptedCritic(model=write(tmp_path, JSONL.replace("0.7", "0.6"), "c.jsonl"))
    assert one.critic_id == same.critic_id != other.critic_id
    assert one.critic_id.startswith("scripted@")
    assert one.prompt_hash == other.prompt_hash


GOOD = '{"trajectory_id": "r", "step_index": 0, "label": "good"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"labels\.jsonl:2: expected a JSON object: .*name a CSV file \.csv"),
        ("[1]", r"labels\.jsonl:2: expected a JSON object, got list"),
        (GOOD.replace('"r"', "7"), r":2: trajectory_id: expected text, got 7"),
        (GOOD.replace('"step_index": 0, ', ""), r":2: step_index: expected a number"),
        (GOOD.replace("0", "-1"), r":2: step_index: expected a number from 0, got -1"),
        (GOOD.replace("0", "true"), r":2: step_index: expected a number from 0, got True"),
        (GOOD.replace("good", "bad"), r":2: label: expected one of good, unnecessary, harm"),
        (GOOD[:-1] + ', "p_good": 1.5}', r":2: p_good: expected a number from 0 to 1 .* got 1.5"),
        (GOOD[:-1] + ', "p_good": true}', r":2: p_good: expected a number from 0 to 1"),
        (GOOD[:-1] + ', "p_good": [1]}', r":2: p_good: expected a number from 0 to 1"),
        (GOOD[:-1] + ', "rationale": 1}', r":2: rationale: expected text, got 1"),
        (GOOD[:-1] + ', "reason": 1}', r":2: reason: expected text, got 1"),
        (JSONL.split("\n")[0], r":2: expected one label .* step 0 of run-1 .* line 1"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_what_was_expected_and_what_came(tmp_path, line, message):
    path = write(tmp_path, JSONL.split("\n")[0] + "\n" + line + "\n")
    with pytest.raises(LabelError, match=message):
        ScriptedCritic(model=path)


HEADER = "trajectory_id,step_index,label"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,label\n1,good\n", r"a\.csv:1: expected a header with .* got step, label"),
        ("", r"a\.csv:1: expected a header .* got nothing"),
        (f"{HEADER}\nr,0,Good\n", r"a\.csv:2: label: expected one of .* got 'Good'"),
        (f"{HEADER},p_good\nr,0,good,nan\n", r"a\.csv:2: p_good: .* got 'nan'"),
        (f'{HEADER}\n"r"x,0,good\n', r"a\.csv:2: expected CSV"),
    ],
)
def test_bad_csv_is_named_too(tmp_path, text, message):
    path = write(tmp_path, text, "a.csv")
    with pytest.raises(LabelError, match=message):
        ScriptedCritic(model=path)


def test_a_file_that_is_not_there_or_not_text_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.jsonl: expected a JSONL or CSV file of labels"):
        ScriptedCritic(model=tmp_path / "none.jsonl")
    (tmp_path / "raw.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(LabelError, match="expected UTF-8 text"):
        ScriptedCritic(model=tmp_path / "raw.jsonl")
