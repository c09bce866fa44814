"""The tokenize stage: parts, processes, what is dropped, what is refused, and how it says so."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import AutoTokenizer

from srft_prep.chat import tokenizer_path
from tests.stages import Run, srft_prep

KEEPS_LAST_OBSERVATION = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'user' and loop.index0 and loop.index0 < messages | length - 2 %}
        {{- '[left out]' }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Hand-made: an older observation gives way, as harnesses with a history processor do it."""

NO_TOOLS = """
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- raise_exception('this model knows no tools') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def run_of(
    name: str, *, num_steps: int = 3, role: str = "user", thought: str | None = None
) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{name}: task"}]
    for step in range(num_steps):
        if step:
            seen = f"{name}: <|im_end|> output {step} \u00e9"
            messages.append({"role": role, "content": seen})
        action = {"role": "assistant", "content": f"{name}: action {step}"}
        if thought:
            action["reasoning_content"] = f"{thought} {step}"
        messages.append(action)
    return {"trajectory_id": name, "messages": messages}


def tokenize(
    folder: Path, runs: Sequence[dict[str, Any]], *options: object, tokenizer: object = "example"
) -> tuple[Run, Path]:
    trajectories, output = ingested(folder, runs), folder / "tokens"
    given = ("--tokenizer", tokenizer, "-o", output, "--json", "--workers", 1)
    return srft_prep("tokenize", trajectories, *given, *options), output


def ingested(folder: Path, runs: Sequence[dict[str, Any]]) -> Path:
    source, trajectories = folder / "runs.jsonl", folder / "trajectories"
    source.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    run = srft_prep("ingest", source, "-o", trajectories, "--overwrite")
    assert run.status == 0, run
    return trajectories


def template_file(folder: Path, text: str) -> tuple[str, Path]:
    path = folder / "template.jinja"
    path.write_text(text, encoding="utf-8")
    return "--chat-template", path


def counts_of(run: Run) -> dict[str, Any]:
    return json.loads(run.stdout.splitlines()[-1])


def rows_of(output: Path) -> list[dict[str, Any]]:
    parts = sorted(output.glob("part-*.parquet"))
    return [row for part in parts for row in pl.read_parquet(part).iter_rows(named=True)]


def assert_refused(run: Run, output: Path, *words: str) -> None:
    """One clear sentence, exit status 2, nothing written."""
    assert run.status == 2, run
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert "Traceback" not in run.stderr
    for word in words:
        assert word in last
    assert not output.exists()


# Parts and processes ------------------------------------------------------------------------------


def test_two_workers_write_the_bytes_that_one_writes(tmp_path: Path) -> None:
    rows = [
        {
            "trajectory_id": f"run-{number}",
            "messages": [
                {"role": "user", "content": f"task {number}"},
                {"role": "assistant", "content": "ça <|im_end|> va? \U0001f642" * (number % 7)},
                {"role": "tool" if number % 50 == 0 else "user", "content": "seen"},
                {"role": "assistant", "content": f"done {number}"},
            ],
        }
        for number in range(600)
    ]
    trajectories = ingested(tmp_path, rows)
    assert len(list(trajectories.glob("part-*.parquet"))) == 3
    option = template_file(tmp_path, NO_TOOLS)
    for workers in ("1", "2"):
        command = [sys.executable, "-m", "srft_prep", "tokenize", trajectories, *option]
        command += ["--tokenizer", "example", "--workers", workers, "-o", tmp_path / workers]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 1, run.stderr
        assert "12 rejected" in run.stdout
    first, second = tmp_path / "1", tmp_path / "2"
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert [name for name in names if name.startswith("part-")] == [
        f"part-{number:05d}.parquet" for number in range(3)
    ]
    for name in names:
        one, two = (folder / name for folder in (first, second))
        if name == "manifest.json":
            documents = [json.loads(path.read_bytes()) for path in (one, two)]
            assert [document.pop("command")[0] for document in documents] == ["srft-prep"] * 2
            assert documents[0] == documents[1]
        else:
            assert one.read_bytes() == two.read_bytes(), name
    ids = [row["trajectory_id"] for row in rows_of(first)]
    assert ids == [f"run-{number}" for number in range(600) if number % 50]


# What is counted ----------------------------------------------------------------------------------


def test_thoughts_that_a_template_drops_are_counted_and_told(
    shared_data: Path, tmp_path: Path
) -> None:
    qwen = shared_data / "tokenizers" / "qwen2.5-coder-instruct"
    runs = [run_of("a", thought="hm"), run_of("b")]
    run, output = tokenize(tmp_path, runs, tokenizer=qwen)
    assert run.status == 0
    assert counts_of(run)["dropped_reasoning_content"] == 3
    assert "3 of 6 steps lost their reasoning: the chat template leaves it out" in run.stderr
    manifest = json.loads((output / "manifest.json").read_bytes())
    assert manifest["counts"]["dropped_reasoning_content"] == 3


def test_the_content_that_a_template_drops_beside_tool_calls_is_counted(
    shared_data: Path, tmp_path: Path
) -> None:
    """Llama 3.1 writes the call and leaves the thought beside it out."""
    call = {"id": "1", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "task"},
        {"role": "assistant", "content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "seen", "tool_call_id": "1"},
        {"role": "assistant", "content": "done"},
    ]
    template = shared_data / "templates" / "trl" / "llama3_1.jinja"
    fitting = template.read_text(encoding="utf-8").replace("<|eot_id|>", "<|im_end|>")
    run, _ = tokenize(tmp_path, [{"messages": messages}], *template_file(tmp_path, fitting))
    assert run.status == 0, run
    assert counts_of(run)["dropped_content"] == 1
    assert "1 of 2 steps lost their content" in run.stderr


def test_control_tokens_in_content_are_counted(tmp_path: Path) -> None:
    run, _ = tokenize(tmp_path, [run_of("a"), run_of("b", num_steps=1)])
    assert run.status == 0
    assert counts_of(run)["control_tokens_as_text"] == 2


# What is refused ----------------------------------------------------------------------------------


def test_a_conversation_that_the_template_refuses_is_set_aside_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    runs = [run_of("a"), run_of("b", role="tool"), run_of("c")]
    run, output = tokenize(tmp_path, runs, *template_file(tmp_path, NO_TOOLS))
    assert run.status == 1
    assert [row["trajectory_id"] for row in rows_of(output)] == ["a", "c"]
    (rejected,) = map(json.loads, (output / "rejected.jsonl").read_text().splitlines())
    assert rejected["trajectory_id"] == "b"
    assert "this model knows no tools" in rejected["reason"]
    assert counts_of(run)["rejected"] == 1
    assert counts_of(run)["sequences"] == 2


def test_a_template_that_refuses_every_conversation_is_refused(tmp_path: Path) -> None:
    runs = [run_of("a", role="tool"), run_of("b", role="tool")]
    run, output = tokenize(tmp_path, runs, *template_file(tmp_path, NO_TOOLS))
    assert_refused(run, output, "fits none of the trajectories", "this model knows no tools")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{% for message in messages %}{{ message.content }", "is broken, line 1"),
        ("{{ messages[0].content }}", "has no loop over messages"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "nothing of what an assistant says"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_clear_sentence(
    text: str, word: str, tmp_path: Path
) -> None:
    run, output = tokenize(tmp_path, [run_of("a")], *template_file(tmp_path, text))
    assert_refused(run, output, word)


def test_a_tokenizer_that_is_not_there_is_one_clear_sentence(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    run, output = tokenize(tmp_path, [run_of("a")], tokenizer=missing)
    assert_refused(run, output, f"--tokenizer {missing}: there is no such folder")


def test_a_tokenizer_without_a_template_asks_for_one(tmp_path: Path) -> None:
    bare = AutoTokenizer.from_pretrained(tokenizer_path("example"))
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    run, output = tokenize(tmp_path, [run_of("a")], tokenizer=tmp_path / "bare")
    assert_refused(run, output, "has no chat template; give --chat-template FILE")
    option = template_file(tmp_path, NO_TOOLS)
    run, output = tokenize(tmp_path, [run_of("a")], *option, tokenizer=tmp_path / "bare")
    assert run.status == 0


# Templates that rewrite history -------------------------------------------------------------------


def cases(shared_data: Path, folder: Path) -> dict[str, tuple[object, tuple[object, ...]]]:
    qwen3 = shared_data / "tokenizers" / "qwen3"
    return {
        "qwen3": (qwen3, ()),
        "hand-made": (qwen3, template_file(folder, KEEPS_LAST_OBSERVATION)),
    }


@pytest.mark.parametrize("case", ["qwen3", "hand-made"])
def test_a_template_that_rewrites_history_is_refused_with_the_choices(
    case: str, shared_data: Path, tmp_path: Path
) -> None:
    tokenizer, option = cases(shared_data, tmp_path)[case]
    runs = [run_of("a", thought="hm"), run_of("b", thought="hm")]
    run, output = tokenize(tmp_path, runs, *option, tokenizer=tokenizer)
    choices = ("rewrites history", "--history per-step", "--history full")
    assert_refused(run, output, *choices)


@pytest.mark.parametrize("case", ["qwen3", "hand-made"])
def test_per_step_gives_every_step_the_ids_of_its_own_conversation(
    case: str, shared_data: Path, tmp_path: Path
) -> None:
    tokenizer, option = cases(shared_data, tmp_path)[case]
    oracle = AutoTokenizer.from_pretrained(tokenizer)
    if option:
        oracle.chat_template = KEEPS_LAST_OBSERVATION
    oracle.chat_control_tokens = []
    runs = [run_of("a", thought="hm"), run_of("b", num_steps=2, thought="oh")]
    run, output = tokenize(tmp_path, runs, *option, "--history", "per-step", tokenizer=tokenizer)
    assert run.status == 0, run
    assert "sequences of" in run.stderr
    assert "times those of full" in run.stderr
    rows = rows_of(output)
    expected = [(run, step) for run in runs for step in range(len(run["messages"]) // 2)]
    assert len(rows) == (3 if option else 5)  # steps share a sequence while it only grows
    steps = [(row, *span.values()) for row in rows for span in row["step_spans"]]
    assert len(steps) == len(expected) == 5
    for (row, number, start, end), (source, step) in zip(steps, expected, strict=True):
        seen = source["messages"][: 2 + 2 * step]
        ids = oracle.apply_chat_template(seen, sanitize_control_tokens=True)["input_ids"]
        assert row["trajectory_id"] == source["trajectory_id"]
        assert row["input_ids"][:end] == ids[:end]
        assert number == step
        thought = "" if option else f"<think>\n{seen[-1]['reasoning_content']}\n</think>\n\n"
        written = oracle.decode(row["input_ids"][start:end])
        assert written == f"{thought}{seen[-1]['content']}<|im_end|>"


@pytest.mark.parametrize("case", ["qwen3", "hand-made"])
def test_full_trains_on_the_final_rendering(case: str, shared_data: Path, tmp_path: Path) -> None:
    tokenizer, option = cases(shared_data, tmp_path)[case]
    oracle = AutoTokenizer.from_pretrained(tokenizer)
    if option:
        oracle.chat_template = KEEPS_LAST_OBSERVATION
    oracle.chat_control_tokens = []
    source = run_of("a", thought="hm")
    run, output = tokenize(tmp_path, [source], *option, "--history", "full", tokenizer=tokenizer)
    assert run.status == 0, run
    (row,) = rows_of(output)
    ids = oracle.apply_chat_template(source["messages"], sanitize_control_tokens=True)["input_ids"]
    assert row["input_ids"] == ids
    written = [oracle.decode(ids[span["start"] : span["end"]]) for span in row["step_spans"]]
    last_thought = "" if option else "<think>\nhm 2\n</think>\n\n"
    assert written == [
        *("a: action 0<|im_end|>", "a: action 1<|im_end|>"),
        f"{last_thought}a: action 2<|im_end|>",
    ]


def test_a_late_trajectory_whose_history_is_rewritten_is_set_aside(
    shared_data: Path, tmp_path: Path
) -> None:
    """The first ones decide whether to start; every later one is still checked by itself."""
    tool_runs = [run_of(f"run-{number}", role="tool", thought="hm") for number in range(70)]
    runs = [*tool_runs, run_of("late", thought="hm")]
    run, output = tokenize(tmp_path, runs, tokenizer=shared_data / "tokenizers" / "qwen3")
    assert run.status == 1, run
    (rejected,) = map(json.loads, (output / "rejected.jsonl").read_text().splitlines())
    assert rejected["trajectory_id"] == "late"
    assert "use --history per-step or full" in rejected["reason"]
    assert len(rows_of(output)) == 70
