"""Unnecessary rules know the state: same output, and no write in between."""

import orjson
import pytest

from srft_prep.critic.rules import RulesCritic
from srft_prep.types import Message, Trajectory

FAILED = "<returncode>1</returncode>\n<output>\nFAILED test_a in 0.31s\n</output>"
FILE = "\n".join(f"{number:6}\tvalue_{number} = {number}" for number in range(1, 40))


def run(*turns):
    messages = [Message(role="user", kind="prompt", content="Solve the issue.")]
    for command, output in turns:
        action = command if isinstance(command, Message) else bash(command)
        messages += [action, Message(role="user", kind="observation", content=output)]
    return Trajectory(
        trajectory_id="t", instance_id="i", format="messages", messages=tuple(messages)
    )


def bash(command):
    text = f"THOUGHT: next.\n\n```bash\n{command}\n```"
    return Message(role="assistant", kind="action", content=text)


def view(path, *, lines=None):
    arguments = {"command": "view", "path": path} | ({"view_range": lines} if lines else {})
    function = {"name": "str_replace_editor", "arguments": orjson.dumps(arguments).decode()}
    calls = orjson.dumps([{"id": "c", "type": "function", "function": function}]).decode()
    return Message(role="assistant", kind="action", content="", tool_calls=calls)


def fired(trajectory):
    return {(it.step_index, it.rule_id) for it in RulesCritic().findings(trajectory)}


def test_the_same_command_with_the_same_output_is_unnecessary():
    (finding,) = RulesCritic().findings(
        run(("pytest -x", FAILED), ("grep -rn foo .", "a.py:1"), ("pytest -x", FAILED))
    )
    assert (finding.step_index, finding.label) == (2, "unnecessary")
    assert finding.rationale == (
        "repeated-action: same action and output as step 0, no write since"
    )


def test_durations_and_addresses_do_not_make_outputs_differ():
    later = FAILED.replace("0.31s", "0.52s")
    assert fired(run(("pytest -x", FAILED), ("pytest -x", later))) == {(1, "repeated-action")}


def test_a_different_output_is_no_repeat():
    assert not fired(run(("pytest -x", FAILED), ("pytest -x", FAILED.replace("test_a", "test_b"))))


@pytest.mark.parametrize(
    "write",
    [
        "sed -i 's/a/b/' a.py",
        "echo 1 > a.py",
        "cat <<'EOF' >> a.py\nx = 1\nEOF",
        "git apply fix.diff",
        "git checkout a.py",
        "pip install -e .",
        "rm cache.json",
        "python fix.py",
        "python - <<'EOF'\nfrom pathlib import Path\nPath('a.py').write_text('')\nEOF",
        "curl -s x | tee a.py",
    ],
)
def test_a_write_in_between_makes_a_repeat_work(write):
    assert not fired(run(("pytest -x", FAILED), (write, ""), ("pytest -x", FAILED)))


@pytest.mark.parametrize(
    "read",
    ["git diff", "ls > /dev/null 2>&1", "sed -n '1,5p' b.py", "python -c 'import a; print(a)'"],
)
def test_a_read_in_between_does_not(read):
    found = fired(run(("pytest -x", FAILED), (read, "1"), ("pytest -x", FAILED)))
    assert found == {(2, "repeated-action")}


def test_repeating_a_write_is_not_judged_as_a_repeat():
    assert not fired(run(("echo x >> a.txt", ""), ("echo x >> a.txt", "")))


def test_the_third_run_of_a_failing_action_is_unnecessary_even_if_outputs_differ():
    tries = [("make check", f"error {n}\n[Command finished with exit code 2]") for n in (1, 2, 3)]
    assert fired(run(*tries)) == {(2, "repeated-failure")}
    assert not fired(run(*tries[:2]))
    assert not fired(run(tries[0], ("sed -i s/a/b/ a.c", ""), *tries[1:]))


def test_a_loop_of_two_actions_is_unnecessary_from_its_second_round():
    pair = [("sed -i s/a/b/ a.py", ""), ("pytest -x", FAILED)]
    assert fired(run(*pair, *pair)) == {(2, "loop"), (3, "loop")}
    passed = [pair[0], ("pytest -x", "1 passed")]
    assert not fired(run(*pair, *passed))
    assert not fired(run(*pair, pair[0]))


def test_reading_again_what_was_shown_is_unnecessary():
    part = FILE[: FILE.index("\n    20")]
    both = run((view("/r/a.py"), FILE), ("ls", "a.py"), (view("/r/a.py", lines=[1, 19]), part))
    assert fired(both) == {(2, "reread")}


def test_reading_is_no_repeat_after_a_write_to_the_file_or_of_new_lines():
    again = (view("/r/a.py"), FILE)
    assert not fired(run(again, ("sed -i s/1/1/ a.py", ""), (view("/r/a.py", lines=[1, 39]), FILE)))
    assert not fired(run(again, (view("/r/a.py", lines=[1, 50]), FILE + "\n    40\tnew = 1")))
    assert not fired(run(again, (view("/r/b.py"), FILE)))
    other = ("sed -i s/1/1/ b.py", "")
    assert fired(run(again, other, (view("/r/a.py", lines=[1, 39]), FILE))) == {(2, "reread")}


def test_a_script_that_writes_itself_and_runs_forgets_what_was_shown():
    fix = ("cat > fix.py <<'EOF'\nedit()\nEOF\npython fix.py", "done")
    assert not fired(run((view("/r/a.py"), FILE), fix, (view("/r/a.py", lines=[1, 39]), FILE)))


def test_a_file_made_and_removed_without_use_is_unnecessary_and_its_removal_is_not():
    make, remove = ("cat > try_this.py <<'EOF'\nx = 1\nEOF", ""), ("rm try_this.py", "")
    assert fired(run(make, ("ls src", "a"), remove)) == {(0, "unused-file")}
    assert not fired(run(make, ("python try_this.py", "1"), remove))
    assert not fired(run(make, ("DJANGO_SETTINGS_MODULE=try_this python m.py", "1"), remove))
    assert not fired(run(make, ("ls src", "a")))
