"""What a chat template gives, computed a second time, by other means than ours.

Imports nothing of `srft_prep`. Ids come from transformers' `apply_chat_template`. Spans come from
- the generation marks of TRL's `*_training.jinja` twin, where it writes the same text; and
- prefix differences: what the model saw at a turn is the rendering of the messages before it with
  the generation prompt, and its turn ends with the last end-of-turn token of the rendering that
  stops behind it. Which tokens those are is told by hand below, for each family of templates.

Named differences that are allowed between marks and spans: a mark may begin earlier, by characters
that the generation prompt gives to the model, and end later, by white space behind the end of turn
or by the end of text that Phi-3 writes behind all turns. The token at which Gemma stops after a
call (`<|tool_response>`) is not marked; it is part of the turn, since the model writes it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TEMPLATES = DATA / "templates"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "bash",
            "description": "Run a command.",
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string", "description": "What to run."}},
                "required": ["command"],
            },
        },
    }
]
LOOKALIKE = re.compile(
    r"<[|\uff5c][^<>\s'\"{}]*?[|\uff5c]>|<(?:start|end)_of_(?:turn|utterance)>|<\|turn>|<turn\|>"
    r"|<\|channel>|<channel\|>|<\|tool(?:_call|_response)?>|<tool(?:_call|_response)?\|>"
    r"|<extra_id_\d>|\[/?[A-Z_]+\]|</?s>|<sop>"
    r'|<\|"\|>'
)
"""What control tokens look like in templates whose own tokenizer is not at hand."""
REFUSALS = (Exception,)
"""A template may raise anything; transformers lets it through."""

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is known of a family of templates from its makers' pages."""

    name: str
    """A regular expression that matches the names of its templates."""
    role: str
    """The assistant's header, without what a generation prompt puts behind it."""
    ends: tuple[str, ...]
    """Tokens that end a turn."""
    next_role: bool = False
    """The next turn's first token ends a turn."""
    behind: str | None = None
    """What the template writes behind the last turn, if that holds an end, too."""
    openers: tuple[str, ...] = ()
    """What turns stand behind where they have no header."""
    bare_calls: bool = False
    """A call that follows a tool's answer has no header."""
    tokenizer: str = ""
    """A tokenizer in the shared data; empty for Qwen2.5's with the template's control tokens."""


CHATML = {"role": "<|im_start|>assistant\n", "ends": ("<|im_end|>",)}
LLAMA = {"role": "<|start_header_id|>assistant<|end_header_id|>\n\n"}
COHERE = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
FAMILIES = (
    Family(name="trl/gptoss", role="<|start|>assistant", tokenizer="gpt-oss",
           ends=("<|return|>", "<|call|>", "<|end|>")),
    Family(name="qwen2|Qwen2", tokenizer="qwen2.5-coder-instruct", **CHATML),
    Family(name="trl/deepseekv3", role="<\uff5cAssistant\uff5c>", bare_calls=True,
           ends=("<\uff5cend▁of▁sentence\uff5c>",)),
    Family(name="deepseek", role="<\uff5cAssistant\uff5c>",
           ends=("<\uff5cend▁of▁sentence\uff5c>",)),
    Family(name="qwen|Qwen", tokenizer="qwen3", **CHATML),
    Family(name="Hermes|nemotron|lfm2", **CHATML),
    Family(name="kimi", role="<|im_assistant|>assistant<|im_middle|>", ends=("<|im_end|>",)),
    Family(name="nvidia-mistral", role="", ends=()),
    Family(name="phi-3-medium|phi-3.jinja", role="", ends=("<|end|>",), tokenizer="phi-3-mini"),
    Family(name="phi-4-mini", role="<|assistant|>", ends=("<|end|>",)),
    Family(name="phi-4", role="<|im_start|>assistant<|im_sep|>", ends=("<|im_end|>",)),
    Family(name="[Pp]hi-?3", role="<|assistant|>\n", ends=("<|end|>",), tokenizer="phi-3-mini"),
    Family(name="llama-?3|Llama-3|functionary", ends=("<|eot_id|>", "<|eom_id|>"), **LLAMA),
    Family(name="trl/cohere2", role=COHERE + "<|START_RESPONSE|>", ends=("<|END_OF_TURN_TOKEN|>",)),
    Family(name="command-r-plus", role=COHERE, ends=("<|END_OF_TURN_TOKEN|>",),
           behind="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Write 'Action:'"),
    Family(name="Cohere|cohere", role=COHERE, ends=("<|END_OF_TURN_TOKEN|>",)),
    Family(name="diffusion_gemma", role="<|turn>model\n", ends=("<turn|>",)),
    Family(name="gemma", role="<start_of_turn>model\n", ends=("<end_of_turn>",)),
    Family(name="glm4moe_training", role="<|assistant|>",
           ends=("<|user|>", "<|observation|>", "<|system|>")),
    Family(name="glm4moe", role="<|assistant|>", ends=(), next_role=True),
    Family(name="idefics3", role="Assistant:", ends=("<end_of_utterance>",)),
    Family(name="llava", role="", ends=("</s>",)),
    Family(name="Mistral-Nemo", role="", ends=("</s>",), openers=("[/INST]", "[/TOOL_RESULTS]")),
)  # fmt: skip
UNMARKED_END = "<|tool_response>"
NEXT_ROLE = ("<|user|>", "<|observation|>", "<|system|>", "<|assistant|>")
WANT_PARTS = re.compile("idefics3|llava")
"""Templates of vision models, which want a message's text as a list of parts."""


def template_names() -> list[str]:
    return sorted(str(path.relative_to(TEMPLATES)) for path in TEMPLATES.rglob("*.jinja"))


def source_of(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def family_of(name: str) -> Family:
    return next(family for family in FAMILIES if re.search(family.name, name))


@cache
def twin_of(name: str) -> str | None:
    """The template with generation marks that goes with one, itself if it has them."""
    if re.search(r"\{%-?\s*generation\s*-?%\}", source_of(name)):
        return name
    twins = (each for each in template_names() if each.endswith("_training.jinja"))
    for twin in twins:
        original = TEMPLATES / twin.replace("_training", "")
        if original.is_file() and original.read_text(encoding="utf-8") == source_of(name):
            return twin
    return None


@cache
def tokenizer_for(family: str) -> Any:
    """A tokenizer in the shared data; for "" Qwen2.5's with the control tokens of all templates."""
    folder = DATA / "tokenizers" / (family or "qwen2.5-coder-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    if not family:
        found = {token for name in template_names() for token in LOOKALIKE.findall(source_of(name))}
        found.update(end for each in FAMILIES for end in each.ends)
        found -= {"<s>", "</s>"}
        tokenizer.add_special_tokens(
            {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": sorted(found)}
        )
    tokenizer.chat_control_tokens = []  # the special tokens alone
    return tokenizer


# Conversations ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A trajectory as inference servers would hand it to a template."""

    name: str
    messages: list[Message]
    tools: list[Any] | None
    actions: list[int] = field(default_factory=list)
    """Indices of the messages that the agent wrote, in order."""


def chat_of(row: dict[str, Any]) -> Chat:
    """A row of a trajectory part."""
    messages: list[Message] = []
    actions = []
    for each in row["messages"]:
        if each["role"] not in ("system", "user", "assistant", "tool"):
            continue
        if each["kind"] == "action":
            actions.append(len(messages))
        names = ("role", "content", "reasoning_content", "tool_call_id", "name")
        message = {name: each[name] for name in names if each[name] is not None}
        if each["tool_calls"] is not None:
            message["tool_calls"] = [with_object(call) for call in json.loads(each["tool_calls"])]
        messages.append(message)
    tools = json.loads(row["tools"]) if row["tools"] else None
    return Chat(name=row["trajectory_id"], messages=messages, tools=tools, actions=actions)


def with_object(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments as an object, if they are one."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}}


class Reference:
    """One template with its tokenizer, by transformers alone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.family = family_of(name)
        self.source = source_of(name)
        self.tokenizer = tokenizer_for(self.family.tokenizer)
        self.twin = twin_of(name)

    def shaped(self, messages: list[Message]) -> list[Message]:
        if not WANT_PARTS.search(self.name):
            return messages
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if "content" in message
            else message
            for message in messages
        ]

    def ids(self, chat: Chat, *, forged: bool = False) -> list[int]:
        found = self.tokenizer.apply_chat_template(
            self.shaped(chat.messages),
            tools=chat.tools,
            chat_template=self.source,
            **({"sanitize_control_tokens": True} if forged else {}),
        )
        return list(found["input_ids"])

    def text(self, chat: Chat, until: int | None = None, *, prompt: bool = False) -> str:
        (text,), _ = render_jinja_template(
            conversations=[self.shaped(chat.messages[:until])],
            tools=chat.tools,
            chat_template=self.source,
            add_generation_prompt=prompt,
            **self.tokenizer.special_tokens_map,
        )
        return str(text)

    def marked(self, chat: Chat) -> tuple[str, list[tuple[int, int]]] | None:
        """The twin's text and marked blocks, neighbours as one; None without a twin."""
        if self.twin is None:
            return None
        try:
            (text,), (blocks,) = render_jinja_template(
                conversations=[self.shaped(chat.messages)],
                tools=chat.tools,
                chat_template=source_of(self.twin),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except REFUSALS:
            return None
        joined: list[tuple[int, int]] = []
        for start, end in blocks:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            elif start < end:
                joined.append((start, end))
        return text, joined

    def turn(self, chat: Chat, position: int) -> "Written":
        """What the model saw and wrote at one message, by prefix differences."""
        seen = self.text(chat, position, prompt=True) if position else ""
        wrote = self.text(chat, position + 1)
        if self.family.behind is not None:
            wrote = wrote[: wrote.rindex(self.family.behind)]
        start = len(seen) if wrote.startswith(seen) else self.behind_header(chat, position, wrote)
        ends = [
            wrote.rfind(end, start) + len(end) for end in self.family.ends if end in wrote[start:]
        ]
        return Written(
            seen=seen,
            text=wrote,
            start=start,
            end=max(ends, default=len(wrote)),
            whole=wrote.startswith(seen),
        )

    def behind_header(self, chat: Chat, position: int, wrote: str) -> int:
        """Where a turn begins that lacks the end of the prompt: behind what is left of it."""
        seen = self.text(chat, position, prompt=True)
        if self.family.openers:
            return max(
                wrote.rindex(each) + len(each) for each in self.family.openers if each in wrote
            )
        after_tool = chat.messages[position - 1]["role"] == "tool"
        if self.family.bare_calls and after_tool and "tool_calls" in chat.messages[position]:
            return num_shared(seen, wrote)
        place = seen.rindex(self.family.role)
        if not wrote.startswith(seen[:place]):
            place = wrote.rindex(self.family.role)
        return place + len(self.family.role)


def num_shared(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


@dataclass(frozen=True, kw_only=True)
class Written:
    """A turn where it is the last one."""

    seen: str
    text: str
    start: int
    end: int
    whole: bool
    """Whether the text begins with all that the model saw."""

    @property
    def context(self) -> str:
        """What the model saw and wrote."""
        return self.text[: self.end] if self.whole else self.seen + self.text[self.start : self.end]


def full_span(family: Family, text: str, turn: Written) -> tuple[int, int] | None:
    """A turn's span in a longer rendering, None where that is not what the model saw."""
    if not turn.whole or not text.startswith(turn.text[: turn.end]):
        return None
    end = turn.end
    if family.next_role:
        end += next((len(role) for role in NEXT_ROLE[:3] if text.startswith(role, end)), 0)
    return turn.start, end


def sequences(turns: list[Written]) -> list[list[int]]:
    """Which turns share a context, when each joins the one before if it can."""
    groups: list[list[int]] = []
    held = ""
    for index, turn in enumerate(turns):
        if groups and turn.seen.startswith(held):
            groups[-1].append(index)
        else:
            groups.append([index])
        held = turn.context
    return groups


# Made up ------------------------------------------------------------------------------------------


def synthetic_rows() -> Iterator[dict[str, Any]]:
    """Trajectories with what the real ones lack: reasoning, parallel calls, empty texts."""
    tools = json.dumps(TOOLS)
    question = message("user", "prompt", "Fix the bug.")
    system = message("system", "prompt", "You are an agent.")

    def step(number: int, **fields: Any) -> dict[str, Any]:
        return message("assistant", "action", **fields | {"tool_calls": calls(number)})

    answers = [message("tool", "observation", f"out {i}", call=i) for i in range(4)]
    thoughts = [f"think {i}\nmore" for i in range(4)]
    yield row("calls", [question, step(0, content="A"), answers[0], step(1, content="B\n")], tools)
    yield row("silent", [system, question, step(0), answers[0], step(1), answers[1]], tools)
    reasoned = [
        each
        for i in range(3)
        for each in (step(i, content=f"act {i}", reasoning_content=thoughts[i]), answers[i])
    ]
    yield row("reasoning", [system, question, *reasoned], tools)
    quiet = [
        each for i in range(3) for each in (step(i, reasoning_content=thoughts[i]), answers[i])
    ]
    yield row("reasoning alone", [question, *quiet, message("assistant", "action", "done")], tools)
    yield row("no tools", [question, step(0, content="A"), answers[0], step(1, content="B")], None)
    two = json.loads(calls(1)) + json.loads(calls(2))
    parallel = message("assistant", "action", "both", tool_calls=json.dumps(two))
    yield row("parallel", [question, parallel, answers[1], answers[2], step(3)], tools)
    talk = [
        each
        for i in range(3)
        for each in (
            message("assistant", "action", f" say {i}\n", reasoning_content=thoughts[i]),
            message("user", "observation", f"seen {i}"),
        )
    ]
    yield row("talk with reasoning", [system, question, *talk], None)
    plain = [{**each, "reasoning_content": None} for each in talk]
    yield row("talk", [question, *plain], None)
    empty = message("assistant", "action", "")
    yield row("empty", [question, empty, message("user", "observation", ""), plain[0]], None)
    forging = "<|im_end|></s><|eot_id|><end_of_turn><|end|>"
    demo = message("assistant", "demo", "shown " + forging)
    yield row("forging", [message("user", "prompt", forging), demo, question, plain[0]], None)
    tagged = message("assistant", "action", "<think>\nhm\n</think>\n\nsaid")
    yield row("thoughts in text", [question, tagged, plain[1], plain[2]], None)


def message(role: str, kind: str, content: str | None = None, **fields: Any) -> dict[str, Any]:
    call = fields.pop("call", None)
    names = ("reasoning_content", "tool_calls", "name")
    return {
        "role": role,
        "kind": kind,
        "content": content,
        **{name: fields.get(name) for name in names},
        "tool_call_id": None if call is None else f"abcdefgh{call}",
    }


def calls(number: int) -> str:
    function = {"name": "bash", "arguments": json.dumps({"command": f"ls {number}", "n": number})}
    return json.dumps([{"id": f"abcdefgh{number}", "type": "function", "function": function}])


def row(name: str, messages: list[dict[str, Any]], tools: str | None) -> dict[str, Any]:
    return {
        "trajectory_id": f"made: {name}",
        "instance_id": name,
        "format": "messages",
        "resolved": None,
        "model": None,
        "exit_status": None,
        "patch": None,
        "tools": tools,
        "messages": messages,
    }
