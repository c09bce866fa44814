"""Each harmful rule on the shape of real data, with a near miss beside it."""

import orjson
import pytest

from srft_prep.critic.rules import RulesCritic
from srft_prep.types import Message, Trajectory

CODE_127 = "<returncode>127</returncode>\n<output>"
SUBMIT = (
    "```bash\necho COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && git add -A && git diff --cached\n```"
)
PROMPT = "Solve the issue. DO NOT MODIFY: Tests, configuration files (pyproject.toml, setup.cfg)"


def run(*turns, prompt="Solve the issue.", resolved=None):
    """A trajectory of (action, observation) pairs; an action may be a Message."""
    messages = [Message(role="user", kind="prompt", content=prompt)]
    for action, observation in turns:
        if not isinstance(action, Message):
            action = Message(role="assistant", kind="action", content=action)
        messages.append(action)
        if observation is not None:
            messages.append(Message(role="user", kind="observation", content=observation))
    return Trajectory(
        trajectory_id="t", instance_id="i", format="messages", messages=tuple(messages),
        resolved=resolved,
    )  # fmt: skip


def call(name, /, **arguments):
    function = {"name": name, "arguments": orjson.dumps(arguments).decode()}
    calls = orjson.dumps([{"id": "c1", "type": "function", "function": function}]).decode()
    return Message(role="assistant", kind="action", content="", tool_calls=calls)


def fired(trajectory, **options):
    findings = RulesCritic(**options).findings(trajectory)
    return {(finding.step_index, finding.rule_id) for finding in findings}


def only(trajectory):
    (finding,) = RulesCritic().findings(trajectory)
    return finding


def bash(text):
    return f"THOUGHT: next.\n\n```bash\n{text}\n```"


def ok(text=""):
    return f"<returncode>0</returncode>\n<output>\n{text}\n</output>"


def test_an_empty_action_is_harmful_and_a_bare_tool_call_is_not():
    finding = only(run(("", None)))
    assert (finding.rule_id, finding.label) == ("empty-action", "harmful")
    assert not fired(run((call("execute_bash", command="ls"), "a.py")))


@pytest.mark.parametrize(
    "requery",
    [
        "Please always provide EXACTLY ONE action in triple backticks, found 3 actions.",
        "Tool call error:\n\n<error>\nNo tool calls found in the response\n</error>",
        "Your output was not formatted correctly. You must always include one discussion",
    ],
)
def test_an_action_that_the_harness_asks_for_again_is_harmful(requery):
    finding = only(run(("THOUGHT: two blocks", requery), (bash("ls"), ok("a.py"))))
    assert (finding.step_index, finding.rule_id) == (0, "format-error")
    assert finding.evidence == requery.split("\n")[0]


def test_source_code_that_holds_the_words_of_a_requery_is_no_evidence():
    text = "x = 1\n" * 200 + "Please always provide EXACTLY ONE action in triple backticks"
    assert not fired(run((bash("cat agent.py"), ok(text))))


def test_tool_calls_with_arguments_that_are_no_json_are_harmful():
    broken = '[{"id":"c","type":"function","function":{"name":"bash","arguments":"{\\"comm"}}]'
    action = Message(role="assistant", kind="action", content="", tool_calls=broken)
    assert fired(run((action, "ok"))) == {(0, "format-error")}


def test_a_tool_call_with_impossible_arguments_is_harmful():
    view = call("str_replace_editor", command="view", path="/workspace", view_range=[0, -1])
    error = "The `view_range` parameter is not allowed when `path` points to a directory."
    found = fired(run((view, f"OBSERVATION:\nERROR:\n{error}")))
    assert found == {(0, "bad-arguments"), (0, "tools-failed")}
    assert not fired(run((view, f"Here's the result of running `cat -n`:\n     1\t# {error}")))


def test_a_blocked_action_is_harmful_and_the_word_in_code_is_not():
    blocked = "Operation 'vim a.py' is not supported by this environment."
    assert fired(run(("```\nvim a.py\n```", blocked))) == {(0, "action-blocked")}
    migrations = "Operation 'AddField' was run."
    assert not fired(run((bash("python show.py"), ok(migrations))))


def test_an_edit_that_the_linter_rejects_is_harmful():
    edit = "Fix it.\n```\nedit 12:12\n    retrun x\nend_of_edit\n```"
    rejected = (
        "Your proposed edit has introduced new syntax error(s). Please read this error message "
        "carefully and then retry editing the file.\n\nERRORS:\n- E999 SyntaxError: invalid syntax"
    )
    finding = only(run((edit, rejected)))
    assert finding.rule_id == "edit-rejected"
    assert finding.evidence.startswith("Your proposed edit has introduced new syntax error(s)")
    assert not fired(run((edit, "[File: /a.py (99 lines total)]\n12:    return x")))
    assert not fired(run(("```\nopen linter.py\n```", "1:" + rejected.split("\n")[0])))


def test_a_replacement_that_found_nothing_is_harmful():
    edit = call("str_replace_editor", command="str_replace", path="/a.py", old_str="x", new_str="y")
    nothing = "ERROR:\nNo replacement was performed, old_str `x` did not appear verbatim in /a.py."
    assert (0, "edit-rejected") in fired(run((edit, nothing)))
    assert not fired(run((edit, "The file /a.py has been edited.")))


def test_patch_and_sed_failures_are_harmful_and_fuzz_is_not():
    failed = "patching file a.py\nHunk #1 FAILED at 470.\n1 out of 1 hunk FAILED"
    fuzz = "patching file a.py\nHunk #1 succeeded at 470 with fuzz 2 (offset -1 lines)."
    sed = "<returncode>1</returncode>\n<output>\nsed: -e expression #1, char 9: unknown option\n"
    assert fired(run((bash("patch -p1 < f.diff"), ok(failed)))) == {(0, "edit-rejected")}
    assert not fired(run((bash("patch -p1 < f.diff"), ok(fuzz))))
    assert fired(run((bash("sed -i 's/a/b/c/' a.py"), sed))) == {(0, "edit-rejected")}


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("pytest tests", f"{CODE_127}\nbash: line 1: pytest: command not found"),
        ("ponyc t", "bash: ponyc: command not found\n[The command completed with exit code 127.]"),
        ("foo -x", "/bin/sh: 1: foo: not found"),
        ("if [ 1", "bash: -c: line 2: syntax error: unexpected end of file"),
    ],
)  # fmt: skip
def test_a_command_that_the_shell_cannot_run_is_harmful(command, output):
    assert fired(run((bash(command), output))) == {(0, "shell-error")}


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("pytest -x", "<returncode>1</returncode>\n<output>\nFAILED tests/test_a.py::test_b\n"),
        ("grep -rn nothing .", "<returncode>1</returncode>\n<output>\n</output>"),
        ("python -m unittest", "<returncode>1</returncode>\n<output>\nERROR: test_x (t.T)\n"),
        ("make", "/bin/sh: 1: ocamlc: not found\n[The command completed with exit code 2.]"),
        ("cat run.sh", ok("bash: line 1: pytest: command not found")),
    ],
)
def test_a_non_zero_exit_alone_is_information(command, output):
    assert not fired(run((bash(command), output)))


def test_a_step_is_harmful_only_where_all_its_tools_failed():
    function = {"name": "str_replace_editor", "arguments": '{"command":"view","path":"/a"}'}
    calls = [{"id": key, "type": "function", "function": function} for key in "ab"]
    action = Message(
        role="assistant", kind="action", content="", tool_calls=orjson.dumps(calls).decode()
    )

    def both(first, second):
        answers = (Message(role="tool", kind="observation", content=it) for it in (first, second))
        trajectory = run((action, None))
        messages = (*trajectory.messages, *answers)
        return fired(
            Trajectory(trajectory_id="t", instance_id="i", format="openhands", messages=messages)
        )

    assert both("ERROR:\nno such file", "ERROR:\nno such file") == {(0, "tools-failed")}
    assert not both("ERROR:\nno such file", "     1\timport os")


def test_code_that_crashed_is_harmful_where_the_log_or_the_next_step_says_so():
    code = "Thought: list.\n\nCode:\n```py\nimport inspect\n```"
    said = (
        "Execution logs:\nCode execution failed at line 'import inspect' due to: InterpreterError"
    )
    assert fired(run((code, said))) == {(0, "code-failed")}
    works = ("Code:\n```py\nprint(1)\n```", "Execution logs:\n1")
    sorry = ("I apologize for the error. Again.\nCode:\n```py\nprint(3)\n```", "Execution logs:\n3")
    onward = ("Thought: good, on we go.\nCode:\n```py\nprint(3)\n```", "Execution logs:\n3")
    assert fired(run(works, (code, None), sorry)) == {(1, "code-failed")}
    assert not fired(run(works, (code, None), onward))
    assert fired(run(works, (code, None), (code, None), onward)) == {(2, "code-failed")}


PATCH = (
    "--- a/f.py\n+++ b/f.py\n@@ -1,3 +1,4 @@\n"
    " a = 1\n-old_value = compute(a)\n+b = 3\n+c = 4\n d = 5\n"
)
SHOWN = ("```py\nprint(text)\n```", "Execution logs:\na = 1\nold_value = compute(a)\nd = 5")


def final(patch):
    return (f'Code:\n```py\nfinal_answer("""{patch}""")\n```', None)


def test_a_typed_patch_that_cannot_apply_is_harmful():
    assert not fired(run(SHOWN, final(PATCH)))
    short = PATCH.replace("+1,4", "+1,9")
    long = PATCH.replace("-1,3 +1,4", "-1,2 +1,3")
    assert fired(run(SHOWN, final(short))) == {(1, "submit-corrupt-patch")}
    assert fired(run(SHOWN, final(long))) == {(1, "submit-corrupt-patch")}


def test_a_typed_patch_that_removes_lines_nobody_saw_is_harmful():
    draft = (f"```py\nprint('''{PATCH}''')\n```", f"Execution logs:\n{PATCH}")
    finding = only(run(draft, final(PATCH)))
    assert (finding.step_index, finding.rule_id) == (1, "submit-invented-lines")
    assert "old_value = compute(a)" in finding.evidence


def test_an_empty_submission_is_harmful():
    assert fired(run((SUBMIT, ""))) == {(0, "submit-empty")}
    assert fired(run((SUBMIT, "EMPTY_OUTPUT"))) == {(0, "submit-empty")}
    assert not fired(run((SUBMIT, "diff --git a/f.py b/f.py\n@@ -1,9 +1,9 @@\n+x")))
    assert not fired(run((SUBMIT, None)))


def test_the_outcome_is_used_only_where_asked_for():
    failed = run((bash("ls"), ok("a")), (SUBMIT, None), resolved=False)
    assert not fired(failed)
    assert fired(failed, use_outcome=True) == {(1, "submit-unresolved")}
    assert not fired(run((SUBMIT, None), resolved=True), use_outcome=True)
    assert not fired(run((SUBMIT, None), resolved=None), use_outcome=True)
    assert RulesCritic().prompt_hash != RulesCritic(use_outcome=True).prompt_hash


EDIT = (bash("sed -i 's/a/b/' pkg/core.py"), ok())


@pytest.mark.parametrize(
    "undo",
    [
        "git checkout -- pkg/core.py",
        "git checkout pkg/core.py && python run.py",
        "git restore pkg/core.py",
        "git reset --hard",
        "git stash",
        "mv pkg/core.py.bak pkg/core.py",
    ],
)
def test_an_edit_that_the_run_takes_back_is_harmful_and_taking_it_back_is_not(undo):
    finding = only(run(EDIT, (bash("python run.py"), ok("wrong")), (bash(undo), ok())))
    assert (finding.step_index, finding.rule_id) == (0, "edit-reverted")
    assert "step 2" in finding.evidence


@pytest.mark.parametrize(
    "other",
    [
        "git checkout -- pkg/other.py",
        "git checkout -b fix",
        "git restore --staged pkg/core.py",
        "git diff pkg/core.py",
        "git stash && python run.py; git stash pop",
    ],
)
def test_an_edit_that_stands_is_not_flagged(other):
    assert not fired(run(EDIT, (bash(other), ok())))


def test_an_edit_made_again_after_the_revert_and_a_probe_are_not_flagged():
    revert = (bash("git checkout pkg/core.py"), ok())
    assert fired(run(EDIT, revert, EDIT)) == set()
    probe = (bash("sed -i '5i print(value)' pkg/core.py"), ok())
    assert fired(run(probe, revert)) == set()


def test_the_inverse_edit_and_undo_take_an_edit_back():
    def replace(old, new):
        return call(
            "str_replace_editor", command="str_replace", path="/r/a.py", old_str=old, new_str=new
        )

    done = "The file /r/a.py has been edited."
    undo = call("str_replace_editor", command="undo_edit", path="/r/a.py")
    assert fired(run((replace("x", "y"), done), (replace("y", "x"), done))) == {
        (0, "edit-reverted")
    }
    assert not fired(run((replace("x", "y"), done), (replace("y", "z"), done)))
    undone = run((replace("x", "y"), done), (replace("p", "q"), done), (undo, "Last edit undone"))
    assert fired(undone) == {(1, "edit-reverted")}


def test_editing_tests_is_harmful_only_where_the_task_forbids_it():
    edit = (bash("sed -i 's/1/2/' tests/test_core.py"), ok())
    assert fired(run(edit, prompt=PROMPT)) == {(0, "edit-forbidden")}
    assert not fired(run(edit))
    own = (bash("cat > tests/test_new.py <<'EOF'\nassert True\nEOF"), ok())
    again = (bash("sed -i 's/True/False/' tests/test_new.py"), ok())
    assert not fired(run(own, again, prompt=PROMPT))
    assert fired(run((bash("echo x >> setup.cfg && sed -i s/a/b/ setup.cfg"), ok()), prompt=PROMPT))
