"""What TRL and axolotl train: their recorded answers, their real answers, and the rules' laws."""

import json
import subprocess
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from srft_prep.chat import TokenizerSpec, load_spec, tokenizer_path
from srft_prep.config import IngestConfig
from srft_prep.conventions import (
    EOS_REACH,
    Placeholders,
    axolotl_spans,
    blocks_of_turns,
    convention_spans,
    token_ends,
    trl_spans,
)
from srft_prep.engines import Encoded, FastEngine, ReferenceEngine
from srft_prep.errors import FormatError
from srft_prep.examples.record import RUNS_DIR
from srft_prep.ingest import ingest
from srft_prep.manifest import read_manifest
from srft_prep.render import ChatTemplate
from srft_prep.template_messages import template_messages, template_tools
from srft_prep.trajectories import read_trajectories

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = REPOSITORY / "tests" / "golden" / "conventions"
PEERS = REPOSITORY / "benchmarks" / "peers"
TOOLS = ("trl", "axolotl")

Chat = dict[str, Any]
Spans = list[tuple[int, int]]


class Student:
    """A tokenizer and a template, and what our rules say of a chat."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        self.backend = Tokenizer.from_str(spec.backend)
        self.reference = ReferenceEngine(self.backend)
        self.template = ChatTemplate(
            spec.template, variables=spec.variables, control_tokens=spec.control_tokens
        )
        self.placeholders = Placeholders(self.template.render)
        self.eos = self.backend.token_to_id(spec.variables["eos_token"])

    def encoded(self, chat: Chat) -> Encoded:
        text = self.template.render(chat["messages"], chat["tools"]).text
        return self.reference.encode([text])[0]

    def trained(self, tool: str, chat: Chat, encoded: Encoded | None = None) -> Spans:
        """Return the token ranges that the tool trains, those that touch as one."""
        messages, tools = chat["messages"], chat["tools"]
        rendering = self.template.render(messages, tools)
        encoded = encoded or self.reference.encode([rendering.text])[0]
        starts = encoded.firsts
        ends = token_ends(encoded.begun, length=len(rendering.text))
        if tool == "trl":
            blocks = blocks_of_turns(rendering.generation, rendering.segments, {})
            return merged(trl_spans(blocks, starts=starts, ends=ends))
        written = self.placeholders.written(rendering, messages, tools, steps={})
        return merged(
            axolotl_spans(written, starts=starts, ends=ends, ids=encoded.ids, eos=self.eos)
        )

    def chosen(self, chat: Chat, turns: set[int]) -> Spans:
        """Return what axolotl trains where only these messages are to be trained."""
        messages, tools = chat["messages"], chat["tools"]
        rendering = self.template.render(messages, tools)
        encoded = self.reference.encode([rendering.text])[0]
        steps = {turn: turn for turn in turns}
        written = self.placeholders.written(rendering, messages, tools, steps=steps)
        spans = axolotl_spans(
            [each for each in written if each[0] in turns],
            starts=encoded.firsts,
            ends=token_ends(encoded.begun, length=len(rendering.text)),
            ids=encoded.ids,
            eos=self.eos,
        )
        return merged(spans)


def merged(spans: list[tuple[int, int, int]]) -> Spans:
    found: Spans = []
    for _, start, end in sorted(spans, key=lambda span: span[1:]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


@lru_cache
def example_student(template: str) -> Student:
    return Student(load_spec("example", GOLDEN / template))


def read_chats(path: Path) -> list[Chat]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


CASES = {chat["id"]: chat for chat in read_chats(GOLDEN / "cases.jsonl")}


@pytest.fixture(scope="module")
def example_chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    folder = tmp_path_factory.mktemp("examples") / "ingested"
    ingest([str(RUNS_DIR)], folder, IngestConfig())
    return {chat["id"]: chat for chat in chats_of(folder)} | CASES


def chats_of(folder: Path) -> Iterator[Chat]:
    for trajectory in read_trajectories(read_manifest(folder, stage="ingest").parts):
        messages, _ = template_messages(trajectory)
        tools = template_tools(trajectory)
        yield {"id": f"{trajectory.trajectory_id}#0", "messages": messages, "tools": tools}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("template", ["example_training.jinja", "thinking_training.jinja"])
def test_every_recorded_answer_is_met(
    tool: str, template: str, example_chats: dict[str, Chat]
) -> None:
    student = example_student(template)
    expected = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))[template]
    assert set(expected) == set(example_chats)
    for name, answer in expected.items():
        chat = example_chats[name]
        assert len(student.encoded(chat).ids) == answer["tokens"], name
        assert student.trained(tool, chat) == [tuple(span) for span in answer[tool]], name


def test_the_recorded_templates_test_both_ways_to_find_frames() -> None:
    assert example_student("example_training.jinja").placeholders.constant is not None
    assert example_student("thinking_training.jinja").placeholders.constant is None


@pytest.mark.parametrize("name", CASES)
def test_the_fast_engine_gives_the_same_ranges(name: str) -> None:
    student = example_student("example_training.jinja")
    chat = CASES[name]
    text = student.template.render(chat["messages"], chat["tools"]).text
    (fast,) = FastEngine(student.spec.backend).encode([text])
    assert fast is not None
    for tool in TOOLS:
        assert student.trained(tool, chat, fast) == student.trained(tool, chat), tool


def test_a_token_that_merges_with_the_header_is_trained_by_both() -> None:
    student = example_student("example_training.jinja")
    chat = CASES["newlines_first"]
    encoded = student.encoded(chat)
    header = encoded.ids.tolist().index(student.backend.token_to_id("<|im_start|>"), 1) + 1
    for tool in TOOLS:
        first = student.trained(tool, chat)[0][0]
        assert encoded.firsts[first] < encoded.begun[first + 1] - 1  # more than one character
        assert first > header


def test_axolotl_trains_nothing_of_an_empty_turn() -> None:
    student = example_student("example_training.jinja")
    chat = CASES["empty"]
    turns = [message for message in chat["messages"] if message["role"] == "assistant"]
    written = [message for message in turns if message["content"]]
    assert len(student.trained("axolotl", chat)) == len(written) < len(turns)
    assert len(student.trained("trl", chat)) == len(turns)


def test_each_range_names_the_step_that_it_belongs_to() -> None:
    student = example_student("example_training.jinja")
    chat = CASES["consecutive"]
    rendering = student.template.render(chat["messages"], chat["tools"])
    turns = [i for i, message in enumerate(chat["messages"]) if message["role"] == "assistant"]
    steps = {turn: step for step, turn in enumerate(turns[1:])}  # the first is a demonstration
    blocks = blocks_of_turns(rendering.generation, rendering.segments, steps)
    written = student.placeholders.written(rendering, chat["messages"], chat["tools"], steps=steps)
    assert [step for step, _, _ in blocks] == [step for step, _, _ in written] == [-1, 0, 1, 2]


tokens = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=12).map(
    lambda steps: [
        (int(start), int(start) + length)
        for start, (_, length) in zip(np.cumsum([step for step, _ in steps]), steps, strict=True)
    ]
)
"""Offsets of tokens as `tokenizers` gives them: starts and ends do not fall."""


def in_order(offsets: Spans) -> tuple[Any, Any]:
    starts = np.array([start for start, _ in offsets], np.int32)
    return starts, np.maximum.accumulate(np.array([end for _, end in offsets], np.int32))


ranges = st.lists(st.integers(0, 24), min_size=2, max_size=8).map(
    lambda edges: list(zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False))
)


@given(tokens, ranges)
def test_trl_trains_the_tokens_that_overlap_a_block(offsets: Spans, blocks: Spans) -> None:
    starts, ends = in_order(offsets)
    mask = [
        any(end > first and start < last for first, last in blocks)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    spans = trl_spans([(0, *block) for block in blocks], starts=starts, ends=ends)
    trained = {token for _, start, end in spans for token in range(start, end)}
    assert trained == {token for token, masked in enumerate(mask) if masked}


@given(tokens, ranges, st.data())
def test_axolotl_adds_the_first_end_of_text_within_reach(
    offsets: Spans, written: Spans, data: st.DataObject
) -> None:
    starts, ends = in_order(offsets)
    kinds = st.lists(st.integers(0, 1), min_size=len(starts), max_size=len(starts))
    ids = np.array(data.draw(kinds), np.int32)
    labels: set[int] = set()
    for first, last in written:
        start, end = bisect_right(ends.tolist(), first), bisect_left(starts.tolist(), last)
        if start < end:
            labels |= set(range(start, end))
            eos = next((i for i in range(end, len(ids)) if ids[i] == 1), None)
            if eos is not None and eos - end <= EOS_REACH:
                labels.add(eos)
    spans = axolotl_spans(
        [(0, *each) for each in written], starts=starts, ends=ends, ids=ids, eos=1
    )
    assert {token for _, start, end in spans for token in range(start, end)} == labels


def test_without_an_end_of_text_token_only_the_range_is_trained() -> None:
    starts, ends = np.array([0, 4, 8], np.int32), np.array([4, 8, 9], np.int32)
    ids = np.array([1, 2, 3], np.int32)
    assert axolotl_spans([(0, 4, 8)], starts=starts, ends=ends, ids=ids, eos=None) == [(0, 1, 2)]


def test_both_conventions_are_found_from_one_list() -> None:
    starts, ends = np.array([0, 4, 8], np.int32), np.array([4, 8, 9], np.int32)
    conventions = [("axolotl", 0, 5, 8), ("trl", 0, 5, 9), ("trl", -1, 8, 8)]
    found = convention_spans(
        conventions, starts=starts, ends=ends, ids=np.array([5, 6, 7], np.int32), eos=7
    )
    assert found == (("trl", 0, 1, 3), ("axolotl", 0, 1, 3))


contents = st.text(st.sampled_from("ab[]z \n<|_>imd"), max_size=6)


@given(st.lists(contents, min_size=1, max_size=4), st.sampled_from(sorted(GOLDEN.glob("*.jinja"))))
def test_frames_give_what_a_rendering_for_each_turn_gives(texts: list[str], path: Path) -> None:
    student = example_student(path.name)
    messages: list[dict[str, Any]] = []
    for text in texts:
        messages += [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
    rendering = student.template.render(messages, None)
    slow = Placeholders(student.template.render)
    slow.constant, slow._independent = None, False
    found = student.placeholders.written(rendering, messages, None, steps={})
    assert found == slow.written(rendering, messages, None, steps={})


def test_a_turn_that_changes_others_is_replaced_alone() -> None:
    """As in DeepSeek's templates: only the first call is introduced."""
    spec = load_spec("example")
    source = (
        "{% set seen = namespace(call=false) %}{% for m in messages %}{% if m.tool_calls %}"
        "{% if not seen.call %}CALLS{% endif %}{% set seen.call = true %}c{% else %}"
        "{{ m.content }}{% endif %};{% endfor %}"
    )
    template = ChatTemplate(source, variables=spec.variables, control_tokens=spec.control_tokens)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [{"role": "user", "content": "u"}, call, {"role": "user", "content": "u"}, call]
    rendering = template.render(messages, None)
    assert rendering.text == "u;CALLSc;u;c;"
    written = Placeholders(template.render).written(rendering, messages, None, steps={1: 0, 3: 1})
    assert written == [(0, 2, 11), (1, 11, 12)]


def test_a_template_that_refuses_turns_without_their_calls_says_so() -> None:
    spec = load_spec("example")
    source = (
        "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls"
        " %}{{ raise_exception('no call') }}{% endif %}{{ loop.index }}{{ m.content }};{% endfor %}"
    )
    template = ChatTemplate(source, variables=spec.variables, control_tokens=spec.control_tokens)
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "t"},
    ]
    rendering = template.render(messages, None)
    with pytest.raises(FormatError, match="no call"):
        Placeholders(template.render).written(rendering, messages, None, steps={})


@pytest.mark.peers
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [
        ("qwen2.5-coder-instruct", "qwen2_5_training"),
        ("qwen3", "qwen3_training"),
        ("qwen3", "qwen3_5_think_training"),
    ],
)
def test_the_real_tools_train_what_we_say(
    tool: str, tokenizer: str, template: str, shared_data: Path, tmp_path: Path
) -> None:
    """On a sample of the real trajectories, the shortest of each kind, and on the cases."""
    folder = shared_data / "tokenizers" / tokenizer
    path = shared_data / "templates" / "trl" / f"{template}.jinja"
    student = Student(load_spec(str(folder), path))
    chats = [*real_chats(shared_data, tmp_path, student), *CASES.values()]
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    answers = ask(tool, rows, folder, path, tmp_path / "answers.jsonl")
    for chat, answer in zip(chats, answers, strict=True):
        assert student.encoded(chat).ids.tolist() == answer["ids"], chat["id"]
        theirs = [tuple(span) for span in answer["trained"]]
        assert student.trained(tool, chat) == theirs, chat["id"]


@pytest.mark.peers
def test_axolotls_field_for_training_chooses_turns_and_moves_no_edge(tmp_path: Path) -> None:
    name = "thinking_training.jinja"
    student = example_student(name)
    rows, expected = [], []
    for chat in CASES.values():
        turns = [i for i, each in enumerate(chat["messages"]) if each["role"] == "assistant"]
        chosen = set(turns[::2])
        expected.append(student.chosen(chat, chosen))
        marked = [
            {**message, "train": index in chosen} if index in turns else message
            for index, message in enumerate(chat["messages"])
        ]
        rows.append({**chat, "messages": marked})
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(chat) + "\n" for chat in rows), encoding="utf-8")
    tokenizer = Path(tokenizer_path("example"))
    answers = ask("axolotl", chats, tokenizer, GOLDEN / name, tmp_path / "answers.jsonl")
    for answer, spans in zip(answers, expected, strict=True):
        assert [tuple(span) for span in answer["trained"]] == spans, answer["id"]


def real_chats(shared_data: Path, scratch: Path, student: Student) -> list[Chat]:
    """Return the three shortest chats of each kind: with tools, with reasoning, with calls."""
    ingest([str(shared_data / "trajectories")], scratch / "ingested", IngestConfig())
    kinds: dict[tuple[bool, ...], list[Chat]] = {}
    for chat in sorted(chats_of(scratch / "ingested"), key=lambda chat: len(json.dumps(chat))):
        turns = [message for message in chat["messages"] if message["role"] == "assistant"]
        if not turns or student.template.render(chat["messages"], chat["tools"]).forged:
            continue
        fields = ("reasoning_content", "tool_calls")
        has = (bool(chat["tools"]), *(any(turn.get(f) for turn in turns) for f in fields))
        kinds.setdefault(has, []).append(chat)
    return [chat for kind in kinds.values() for chat in kind[:3]]


def ask(tool: str, chats: Path, tokenizer: Path, template: Path, answers: Path) -> list[Chat]:
    """Return what the real tool makes of chats, in its own environment."""
    made = subprocess.run(
        [sys.executable, str(PEERS / "environments.py"), tool], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(made.stderr.strip().splitlines()[-1])
    script = [made.stdout.strip(), str(PEERS / "prepare.py"), tool]
    done = subprocess.run(
        [*script, str(chats), str(tokenizer), str(template), "1"],
        input=f"{answers}\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return read_chats(answers)
