import os
import pty
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.config import PackConfig
from srft_prep.errors import ConfigError, LabelError
from srft_prep.hostile_text import printable
from srft_prep.inspection import find
from srft_prep.inspection_text import clipped, lines
from srft_prep.shards import pack
from srft_prep.tokens import tokenize
from srft_prep.types import Message, Trajectory
from srft_prep.weights import DEFAULT_WEIGHTS
from tests import strategies
from tests.conftest import Golden
from tests.stages import (
    Examples,
    label_row,
    labels_by,
    srft_prep,
    trajectory,
    write_labels,
    write_trajectories,
)

SHOWN = "attempt-2/example__pathglob-7"
"""An unresolved run of 14 steps with harmful and unnecessary ones."""


def inspected(*args: object) -> str:
    run = srft_prep("inspect", *args)
    assert (run.status, run.stderr) == (0, "")
    return run.stdout


def test_a_trajectory_with_labels_reads_as_the_golden_file(
    examples: Examples, golden: Golden
) -> None:
    text = inspected(examples.trajectories, "--id", SHOWN, "--labels", examples.labels)
    golden.check("inspect-trajectory.txt", text)


def test_its_tokens_read_as_the_golden_file(examples: Examples, golden: Golden) -> None:
    golden.check("inspect-tokens.txt", inspected(examples.tokens, "--id", SHOWN))


def test_its_packed_sequence_reads_as_the_golden_file(
    examples: Examples, golden: Golden, tmp_path: Path
) -> None:
    weights = {"good": 1.0, "unnecessary": 0.5, "harmful": 0.0}
    config = PackConfig(recipe="srft", weights=weights, seq_len=8192)
    pack(examples.tokens, tmp_path / "shards", config, labels=examples.labels)
    golden.check("inspect-packed.txt", inspected(tmp_path / "shards", "--id", SHOWN))


def test_the_header_of_a_step_says_label_weight_and_rule(examples: Examples) -> None:
    text = inspected(examples.trajectories, "--id", SHOWN, "--labels", examples.labels)
    headers = [line for line in text.splitlines() if line.startswith("===")]
    assert len(headers) == 14
    assert headers[0] == "=== step 0 | good | weight 1"
    assert headers[3] == "=== step 3 | harmful | weight 0 | every-seventh: by the list"
    assert headers[4] == "=== step 4 | unnecessary | weight 1 | every-fifth: by the list"


def test_without_labels_a_header_is_the_step_alone(examples: Examples) -> None:
    text = inspected(examples.trajectories, "--id", SHOWN)
    assert "\n=== step 3\n" in text
    assert "weight" not in text.split("=== step 0")[0]


def test_a_resolved_run_has_weight_1_whatever_its_labels(tmp_path: Path) -> None:
    solved = trajectory("solved", resolved=True, num_steps=2)
    runs = write_trajectories(tmp_path / "runs", [solved])
    labels = write_labels(tmp_path / "labels", [label_row(solved, 1, "harmful")])
    text = inspected(runs, "--id", "solved", "--labels", labels)
    assert "weights     recipe srft, whole: 1 everywhere" in text
    assert "=== step 0 | no label | weight 1" in text
    assert "=== step 1 | harmful | weight 1" in text


def test_long_observations_are_clipped_unless_they_are_asked_for(tmp_path: Path) -> None:
    said = [f"line {number}" for number in range(100)]
    run = talk(Message(role="tool", kind="observation", content="\n".join(said), name="bash"))
    runs = write_trajectories(tmp_path / "runs", [run])
    short = inspected(runs, "--id", "talk")
    assert "[... 88 more lines ...]" in short
    assert "    line 5\n    [..." in short
    assert "--- observation (tool bash)" in short
    full = inspected(runs, "--id", "talk", "--full")
    assert [line.strip() for line in full.splitlines() if "line" in line] == said


@given(st.lists(strategies.texts(), max_size=40), st.integers(2, 20))
def test_clipping_keeps_start_and_end_and_counts_the_rest(said: list[str], limit: int) -> None:
    result = clipped(said, limit)
    if len(said) <= limit + 1:
        assert result == said
        return
    half = limit // 2
    assert (result[:half], result[-half:]) == (said[:half], said[-half:])
    assert result[half] == f"[... {len(said) - 2 * half} more lines ...]"
    assert clipped(said, None) == said


NASTY = "\x1b[2J\x1b]0;owned\x07red\x9b31m \u202eevil\u2066 \r\x00\x08\x7f\u2028\ufeff end"


def talk(*messages: Message, trajectory_id: str = "talk") -> Trajectory:
    action = Message(
        role="assistant",
        kind="action",
        content="look",
        reasoning_content="first\nthink",
        tool_calls=orjson.dumps(
            [
                {"id": "1", "function": {"name": "bash", "arguments": '{"command": "ls\\n"}'}},
                {"id": "2", "function": {"name": "edit", "arguments": {"path": "a"}}},
                {"odd": True},
            ]
        ).decode(),
    )
    return Trajectory(
        trajectory_id=trajectory_id,
        instance_id="",
        format="messages",
        messages=(action, *messages),
    )


def test_reasoning_and_calls_are_told_from_what_was_said(tmp_path: Path) -> None:
    runs = write_trajectories(tmp_path / "runs", [talk()])
    text = inspected(runs, "--id", "talk")
    assert text.endswith(
        "=== step 0\n"
        "    [reasoning]\n"
        "    first\n"
        "    think\n"
        "    [/reasoning]\n"
        "    look\n"
        '    > bash({"command": "ls\\n"})\n'
        '    > edit({"path":"a"})\n'
        '    > {"odd":true}\n'
    )


def is_harmless(text: str) -> bool:
    """Whether a terminal does nothing but show the text."""
    return all(char in "\n\t" or unicodedata.category(char)[0] not in "C" for char in text)


def nasty_run() -> Trajectory:
    return Trajectory(
        trajectory_id="nasty\x1b[31m",
        instance_id=NASTY,
        format="messages",
        messages=(
            Message(role="user", kind="prompt", content=NASTY, name=NASTY),
            Message(role="assistant", kind="action", content=NASTY),
            Message(role=f"exit{NASTY}", kind="artifact", content=NASTY),
        ),
    )


def test_no_control_character_of_a_run_reaches_the_output(tmp_path: Path) -> None:
    nasty = nasty_run()
    runs = write_trajectories(tmp_path / "runs", [nasty])
    rows = [label_row(nasty, 0, "harmful", rationale=NASTY)]
    labels = write_labels(tmp_path / "labels", rows)
    text = inspected(runs, "--id", nasty.trajectory_id, "--labels", labels)
    assert is_harmless(text)
    assert r"\x1b[2J\x1b]0;owned\x07red\x9b31m \u202eevil\u2066" in text
    tokenize(runs, tmp_path / "tokens", tokenizer="example")
    assert is_harmless(inspected(tmp_path / "tokens", "--id", nasty.trajectory_id))
    config = PackConfig(recipe="naive", weights=dict(DEFAULT_WEIGHTS), seq_len=8192)
    pack(tmp_path / "tokens", tmp_path / "shards", config)
    assert is_harmless(inspected(tmp_path / "shards", "--id", nasty.trajectory_id))


def test_an_error_shows_no_control_character_either(tmp_path: Path) -> None:
    runs = write_trajectories(tmp_path / "runs", [nasty_run()])
    run = srft_prep("inspect", runs, "--id", "nasty")
    assert run.status == 2
    assert is_harmless(run.stderr)
    assert r"nasty\x1b[31m" in run.stderr


@given(st.text() | strategies.texts())
def test_printable_text_is_harmless_and_ordinary_text_is_unchanged(text: str) -> None:
    shown = printable(text)
    assert is_harmless(shown)
    assert "\n" not in shown
    if text.isascii() and text.isprintable():
        assert shown == text


@settings(deadline=None)  # writes files
@given(run=strategies.trajectories())
def test_any_trajectory_can_be_shown(
    tmp_path_factory: pytest.TempPathFactory, run: Trajectory
) -> None:
    runs = write_trajectories(tmp_path_factory.mktemp("any") / "runs", [run])
    shown = [text for text, _ in lines(find(runs, run.trajectory_id))]
    assert all(is_harmless(line) and line == line.rstrip() for line in shown)
    assert sum(bool(re.match(r"=== step \d+$", line)) for line in shown) >= run.num_steps


def test_color_is_on_when_asked_for_and_adds_nothing_else(examples: Examples) -> None:
    args = (examples.trajectories, "--id", SHOWN, "--labels", examples.labels)
    plain, colored = inspected(*args), inspected(*args, "--color")
    assert "\x1b" not in plain
    assert "\x1b[31m" in colored
    assert re.sub(r"\x1b\[\d+m", "", colored) == plain
    assert inspected(*args, "--no-color") == plain


def test_on_a_terminal_color_is_on_by_itself(examples: Examples) -> None:
    args = ("inspect", examples.trajectories, "--id", SHOWN, "--labels", examples.labels)
    command = [sys.executable, "-m", "srft_prep", *map(str, args)]
    leader, follower = pty.openpty()
    with subprocess.Popen(command, stdout=follower, stdin=follower) as process:
        os.close(follower)
        output = b""
        while True:
            try:
                piece = os.read(leader, 1 << 16)
            except OSError:  # Linux reports the closed terminal so
                break
            if not piece:
                break
            output += piece
    os.close(leader)
    assert process.returncode == 0
    assert b"\x1b[31m" in output


@pytest.mark.parametrize("stage", ["trajectories", "tokens", "shards"])
def test_an_unknown_id_is_an_error_that_names_near_ones(
    examples: Examples, tmp_path: Path, stage: str
) -> None:
    config = PackConfig(recipe="naive", weights=dict(DEFAULT_WEIGHTS), seq_len=8192)
    pack(examples.tokens, tmp_path / "shards", config)
    folder = tmp_path / "shards" if stage == "shards" else getattr(examples, stage)
    part = srft_prep("inspect", folder, "--id", "example__slots")
    assert (part.status, part.stdout) == (2, "")
    assert "no trajectory 'example__slots'" in part.stderr
    for attempt in (1, 2, 3):
        assert f"attempt-{attempt}/example__slots-12" in part.stderr
    typo = srft_prep("inspect", folder, "--id", "attempt-2/example_pathglob7")
    assert SHOWN in typo.stderr
    nothing = srft_prep("inspect", folder, "--id", "zzz")
    assert nothing.stderr.count("example__") == 5


def test_labels_of_another_version_are_refused(tmp_path: Path) -> None:
    run = trajectory("failed")
    runs = write_trajectories(tmp_path / "runs", [run])
    rows = [label_row(run, 0, "good", content_hash="0" * 32)]
    labels = write_labels(tmp_path / "labels", rows)
    with pytest.raises(LabelError, match="labels of another version of failed"):
        find(runs, "failed", labels=labels)


def test_labels_belong_beside_trajectories(examples: Examples) -> None:
    with pytest.raises(ConfigError, match="give the trajectories, and this folder as --labels"):
        find(examples.labels, SHOWN)
    with pytest.raises(ConfigError, match="--labels: only beside trajectories"):
        find(examples.tokens, SHOWN, labels=examples.labels)


def test_tokens_of_another_tokenizer_are_not_decoded(examples: Examples, tmp_path: Path) -> None:
    manifest = orjson.loads((examples.tokens / "manifest.json").read_bytes())
    manifest["tokenizer"]["tokenizer_hash"] = "0" * 64
    folder = tmp_path / "tokens"
    folder.mkdir()
    for file in manifest["files"]:
        (folder / file["name"]).write_bytes((examples.tokens / file["name"]).read_bytes())
    (folder / "manifest.json").write_bytes(orjson.dumps(manifest))
    with pytest.raises(ConfigError, match="not the tokenizer that these tokens were made with"):
        find(folder, SHOWN)


def test_a_label_without_a_step_is_no_trouble(tmp_path: Path) -> None:
    run = trajectory("failed", num_steps=1)
    runs = write_trajectories(tmp_path / "runs", [run])
    labels = write_labels(tmp_path / "labels", labels_by([run], {"failed": ("harmful", "good")}))
    text = inspected(runs, "--id", "failed", "--labels", labels)
    assert "=== step 0 | harmful | weight 0" in text


def test_an_error_about_labels_shows_no_control_character_either(tmp_path: Path) -> None:
    nasty, plain = nasty_run(), trajectory("plain")
    runs = write_trajectories(tmp_path / "runs", [nasty, plain])
    given = [{"trajectory_id": "plain", "step_index": step, "label": "good"} for step in range(3)]
    said = tmp_path / "said.jsonl"
    said.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in given))
    words = ("label", runs, "--critic", "scripted", "--model", said, "-o", tmp_path / "labels")
    run = srft_prep(*words)
    assert run.status == 1
    assert r"failed: nasty\x1b[31m" in run.stderr
    assert is_harmless(run.stderr)
    lost = {"trajectory_id": nasty.trajectory_id, "step_index": 5, "label": "good"}
    gold = tmp_path / "gold.jsonl"
    gold.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in (*given, lost)))
    run = srft_prep("critic-eval", "--labels", tmp_path / "labels", "--gold", gold)
    assert run.status == 2
    assert r"nasty\x1b[31m" in run.stderr
    assert is_harmless(run.stderr)


def test_a_usage_error_shows_no_control_character_and_keeps_its_lines(tmp_path: Path) -> None:
    run = srft_prep("stats", tmp_path / "no\x1b]0;owned\x07where")
    assert run.status == 2
    assert "stats [OPTIONS] TRAJECTORIES" in run.stderr.splitlines()[0]
    assert is_harmless(run.stderr)
    assert run.stderr.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize("label", ['x"><h1>INJECTED</h1>', "evil", "\x1b[31m"])
@pytest.mark.parametrize("resolved", [True, False])
def test_a_label_that_is_none_is_refused(tmp_path: Path, label: str, resolved: bool) -> None:
    run = trajectory("failed", resolved=resolved)
    runs = write_trajectories(tmp_path / "runs", [run])
    labels = write_labels(tmp_path / "labels", [label_row(run, 1, label)])
    words = ("inspect", runs, "--id", "failed", "--labels", labels)
    for more in ((), ("--html", tmp_path / "page.html")):
        found = srft_prep(*words, *more)
        assert found.status == 2
        assert "failed: step 1: expected a label of good, unnecessary, harmful" in found.stderr
        assert is_harmless(found.stderr)
    assert not (tmp_path / "page.html").exists()
