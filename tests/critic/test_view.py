import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.critic.view import clipped, digest_line, joined, note, steps_of, task_of
from srft_prep.types import Message, Trajectory
from tests.strategies import texts, trajectories


def run_of(*messages):
    return Trajectory(trajectory_id="run", instance_id="", format="messages", messages=messages)


def said(kind, text, **fields):
    role = "assistant" if kind == "action" else "user"
    return Message(role=role, kind=kind, content=text, **fields)


def call(arguments, name="bash"):
    function = {"name": name, "arguments": arguments}
    return orjson.dumps([{"id": "1", "type": "function", "function": function}]).decode()


@given(trajectories(min_steps=1))
def test_every_step_is_shown_with_its_action_first_and_all_that_came_back(run):
    views = steps_of(run)
    assert [view.index for view in views] == list(range(run.num_steps))
    for view, step in zip(views, run.steps, strict=True):
        action, *others = view.pieces
        assert action.tag == "action"
        for text in (step.action.content, step.action.reasoning_content):
            assert text is None or text in action.text
        came = [piece.text for piece in others if piece.tag == "observation"]
        assert came == [message.content or "" for message in step.observations]


@given(trajectories())
def test_all_texts_before_the_first_step_but_demonstrations_are_the_task(run):
    task = task_of(run)
    before = []
    for message in run.messages:
        if message.kind == "action":
            break
        before.append(message)
    for message in before:
        assert message.kind == "demo" or (message.content or "") in task
    if any(message.kind == "demo" for message in before):
        assert "[a demonstration of" in task


def test_demonstrations_are_left_out_with_a_note_of_how_many():
    demos = [said("demo", f"demo {number}") for number in range(3)]
    run = run_of(said("prompt", "Fix it."), *demos, said("action", "ls"))
    assert task_of(run) == "Fix it.\n\n[a demonstration of 3 messages, left out]"


def test_a_run_of_demonstrations_alone_has_no_step():
    assert steps_of(run_of(said("demo", "a"), said("demo", "b"))) == []


def test_what_no_agent_and_no_tool_wrote_is_a_message_of_the_step_before_it():
    run = run_of(
        said("action", "ls"),
        said("prompt", "Go on."),
        said("demo", "not shown"),
        said("artifact", "Exit due to cost limit"),
    )
    (view,) = steps_of(run)
    assert [(piece.tag, piece.text) for piece in view.pieces[1:]] == [
        ("message", "Go on."),
        ("message", "[a demonstration, left out]"),
        ("message", "Exit due to cost limit"),
    ]


def test_a_step_is_tagged_text():
    run = run_of(said("action", "ls"), said("observation", "a.py"))
    assert joined(steps_of(run)) == (
        "<step 0>\n<action>\nls\n</action>\n<observation>\na.py\n</observation>\n</step>"
    )


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"command": "ls\\n-l", "timeout": 5}', "command: ls\n-l\ntimeout: 5"),
        ('{"edits": ["a", {"b": null}]}', 'edits: ["a",{"b":null}]'),
        ("not json", "not json"),
        ('"text"', "text"),
        ("[1, 2]", "[1,2]"),
        ("", ""),
        (None, ""),
        ({"path": "a.py"}, "path: a.py"),
        ('{"n": NaN}', '{"n": NaN}'),
    ],
)
def test_the_arguments_of_a_call_are_shown_as_text(arguments, shown):
    run = run_of(said("action", None, tool_calls=call(arguments)))
    ((action,),) = [view.pieces for view in steps_of(run)]
    assert action.text == f"<call bash>\n{shown}\n</call>"


@pytest.mark.parametrize("depth", [300, 2000])
def test_arguments_nested_very_deeply_are_shown_as_they_are(depth):
    arguments = '{"a": ' + "[" * depth + "]" * depth + "}"
    (view,) = steps_of(run_of(said("action", None, tool_calls=call(arguments))))
    assert arguments in view.pieces[0].text


def test_thoughts_text_and_calls_come_in_that_order():
    action = said("action", "I look.", reasoning_content="hm", tool_calls=call("{}"))
    (view,) = steps_of(run_of(action))
    assert view.pieces[0].text == "<thoughts>\nhm\n</thoughts>\nI look.\n<call bash>\n\n</call>"


@given(texts(400), st.integers(0, 60), st.integers(1, 10**6))
def test_a_cut_text_keeps_its_ends_and_says_in_the_middle_what_is_missing(text, num_chars, missing):
    num_chars = min(num_chars, len(text))
    cut = clipped(text, num_chars=num_chars, left_out=missing)
    head, mark, tail = cut.partition(note(missing))
    assert mark == f"\n[... {missing} tokens left out ...]\n"
    if "tokens left out" not in text:
        assert text.startswith(head)
        assert text.endswith(tail)
        assert len(head) + len(tail) == num_chars
        assert abs(len(head) - 0.6 * num_chars) <= 1


@given(trajectories(min_steps=1))
def test_a_digest_is_one_short_line(run):
    for view in steps_of(run):
        line = digest_line(view)
        assert len(line.splitlines()) == 1
        assert line.startswith(f"step {view.index}:")
        assert len(line) < 260


@pytest.mark.parametrize(
    ("action", "observation", "line"),
    [
        ("look\n```bash\nls  -l\n```\n", "a.py\nb.py", "step 0: ls -l => a.py b.py"),
        ("```\nfirst\n```\n```sh\nlast\n```", None, "step 0: last"),
        ("no fence", "", "step 0: no fence"),
        ("", "out", "step 0:  => out"),
        ("a" * 500, "b" * 500, f"step 0: {'a' * 139}… => {'b' * 79}…"),
    ],
)
def test_a_digest_tells_the_command_and_how_the_answer_begins(action, observation, line):
    came = [] if observation is None else [said("observation", observation)]
    (view,) = steps_of(run_of(said("action", action), *came))
    assert digest_line(view) == line
