import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from srft_prep.errors import FormatError
from srft_prep.examples.record import (
    RUNS_DIR,
    passes_hidden_tests,
    record_all,
    record_attempt,
    write_recordings,
)
from srft_prep.examples.sandbox import open_sandbox
from srft_prep.examples.scenario import Scenario, load_scenarios, read_scenario
from srft_prep.examples.train_tokenizer import (
    SPECIAL_TOKENS,
    TOKENIZER_DIR,
    read_training_texts,
    save_tokenizer,
    train_tokenizer,
)

SCENARIOS = load_scenarios()
BARE_TOKENIZER = Tokenizer.from_file(str(TOKENIZER_DIR / "tokenizer.json"))

needs_gnu_tools = pytest.mark.skipif(
    sys.platform != "linux", reason="messages of GNU sed and grep are part of the recorded runs"
)
each_scenario = pytest.mark.parametrize(
    "scenario", SCENARIOS, ids=[scenario.instance_id for scenario in SCENARIOS]
)


@needs_gnu_tools
def test_recording_again_gives_the_committed_bytes(tmp_path: Path) -> None:
    write_recordings(record_all(SCENARIOS), tmp_path)
    assert read_tree(tmp_path) == read_tree(RUNS_DIR)


@needs_gnu_tools
@each_scenario
def test_the_planted_bug_fails_the_hidden_test_and_no_visible_one(scenario: Scenario) -> None:
    assert not passes_hidden_tests(scenario, "")
    with open_sandbox(scenario.repository) as sandbox:
        assert sandbox.run("python -m unittest").returncode == 0


@needs_gnu_tools
@each_scenario
def test_summaries_agree_with_the_hidden_tests(scenario: Scenario) -> None:
    for attempt in scenario.attempts:
        summary = read_summary(attempt)
        submission = read_run(attempt, scenario.instance_id)["info"]["submission"]
        verdicts = {
            "resolved_ids": bool(submission) and passes_hidden_tests(scenario, submission),
            "empty_patch_ids": not submission,
        }
        verdicts["unresolved_ids"] = not any(verdicts.values())
        assert {name: scenario.instance_id in summary[name] for name in verdicts} == verdicts


def test_summary_counts_are_the_lengths_of_their_lists() -> None:
    for attempt in (1, 2, 3):
        summary = read_summary(attempt)
        for kind in ("submitted", "completed", "resolved", "unresolved", "empty_patch", "error"):
            assert summary[f"{kind}_instances"] == len(summary[f"{kind}_ids"])
        assert summary["total_instances"] == len(SCENARIOS)


def test_the_mix_that_the_readme_claims_is_what_the_files_hold() -> None:
    readme = (RUNS_DIR.parent / "README.md").read_text(encoding="utf-8")
    claimed = {
        name: int(count) for name, count in re.findall(r"^\| ([^|]+) \| (\d+) \|$", readme, re.M)
    }
    assert claimed == count_mix()


def test_no_run_tells_where_or_when_it_was_recorded() -> None:
    for path in RUNS_DIR.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/tmp/|/home/|/root|site-packages|\b20\d\d-\d\d-\d\d", text), path


def test_a_script_that_neither_submits_nor_uses_all_replies_is_refused() -> None:
    scenario = SCENARIOS[0]
    shortened = Scenario(
        instance_id=scenario.instance_id,
        task=scenario.task,
        repository=scenario.repository,
        hidden_tests=scenario.hidden_tests,
        attempts={1: ("THOUGHT: look.\n\n```bash\nls\n```",)},
    )
    with pytest.raises(FormatError, match=r"attempt-1\.md: expected a submission or 14 replies"):
        record_attempt(shortened, 1)


def test_an_archive_without_a_hidden_test_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "example__bare-1.txtar"
    path.write_text("-- task.md --\nx\n-- repo/a.py --\n-- attempt-1.md --\nx\n", encoding="utf-8")
    with pytest.raises(FormatError, match="hidden/"):
        read_scenario(path)


def test_training_again_gives_the_committed_tokenizer(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(read_training_texts()), tmp_path)
    assert read_tree(tmp_path) == read_tree(TOKENIZER_DIR)


@given(st.lists(st.text() | st.sampled_from(SPECIAL_TOKENS)).map("".join))
def test_the_tokenizer_round_trips_any_text(text: str) -> None:
    ids = BARE_TOKENIZER.encode(text).ids
    assert BARE_TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_transformers_loads_the_tokenizer_with_its_special_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR, local_files_only=True)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_template_writes_chatml_with_tool_calls() -> None:
    function = {"name": "bash", "arguments": {"command": "ls é"}}
    as_text = {"name": "bash", "arguments": '{"command": "pwd"}'}
    conversation: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Look.", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "a.py"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": as_text}]},
    ]
    assert render(conversation, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>assistant\nLook.\n<tool_call>\n"
        '{"name": "bash", "arguments": {"command": "ls é"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\na.py<|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>\n"
        '{"name": "bash", "arguments": {"command": "pwd"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>assistant\n"
    )


def test_a_longer_conversation_only_appends_to_the_rendering() -> None:
    messages = read_run(1, SCENARIOS[0].instance_id)["messages"]
    renderings = [render(messages[:count]) for count in range(1, len(messages) + 1)]
    for shorter, longer in pairwise(renderings):
        assert longer.startswith(shorter)


def count_mix() -> Counter[str]:
    counts: Counter[str] = Counter()
    for attempt in (1, 2, 3):
        summary = read_summary(attempt)
        counts["resolved"] += len(summary["resolved_ids"])
        counts["with an empty patch"] += len(summary["empty_patch_ids"])
        counts["unresolved"] += len(summary["unresolved_ids"]) + len(summary["empty_patch_ids"])
    for path in RUNS_DIR.rglob("*.traj.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        counts["attempts"] += 1
        counts["ended without a submission"] += run["info"]["exit_status"] == "LimitsExceeded"
        counts["with changed tests in the patch"] += "+++ b/tests/" in run["info"]["submission"]
        seen = set()
        for command, answer in iterate_steps(run["messages"]):
            status = re.match(r"<returncode>(\d+)</returncode>", answer)
            counts["steps"] += 1
            counts["steps whose command failed"] += bool(status and int(status[1]))
            counts["replies without exactly one command"] += command is None
            repeated = (command, answer) in seen
            counts["steps that repeat an earlier command and its output"] += repeated
            seen.add((command, answer))
    return counts


def iterate_steps(messages: list[dict[str, str]]) -> Iterator[tuple[str | None, str]]:
    for message, answer in pairwise(messages):
        if message["role"] == "assistant":
            commands = re.findall(r"```bash\n(.*?)\n```", message["content"], re.S)
            yield commands[0] if len(commands) == 1 else None, answer["content"]


def read_run(attempt: int, instance_id: str) -> dict[str, Any]:
    path = RUNS_DIR / f"attempt-{attempt}" / instance_id / f"{instance_id}.traj.json"
    run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return run


def read_summary(attempt: int) -> dict[str, Any]:
    path = RUNS_DIR / f"attempt-{attempt}" / f"example.attempt-{attempt}.json"
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def read_tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def render(messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR, local_files_only=True)
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(text, str)
    return text
