"""What stands on the wire, in both formats."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srft_prep.critic import Question, anthropic, openai
from srft_prep.critic.answers import Completion
from srft_prep.critic.prompt import load_prompt
from srft_prep.critic.question import QuestionSettings

SETTINGS = QuestionSettings(
    prompt=load_prompt(Path(__file__).parents[2] / "prompts" / "step_critic.md")
)
THINKING = replace(SETTINGS, reasoning="low")
RATIONALE = {
    "type": "object",
    "properties": {
        "rationale": {"type": "string", "maxLength": 300},
        "label": {"type": "string", "enum": ["good", "harmful"]},
    },
    "required": ["rationale", "label"],
    "additionalProperties": False,
}
QUESTION = Question(
    system="Judge.",
    shared="What it was told.",
    rest="What it did.",
    schema={
        "type": "object",
        "properties": {"labels": RATIONALE, "maxLength": {"type": "integer", "minimum": 3}},
        "required": ["labels"],
    },
    prompt_tokens=10,
    output_tokens=10,
    max_output_tokens=5000,
)
ANSWER = '{"labels": {"0": "good"}}'


def keys_of(value: Any) -> set[str]:
    """Return every key of a schema."""
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


def test_a_question_to_openai_itself() -> None:
    body = openai.request_body(QUESTION, model="m", settings=SETTINGS)
    schema = body.pop("response_format")["json_schema"]
    assert schema["strict"] is True
    assert schema["schema"]["properties"]["labels"]["properties"]["rationale"] == {"type": "string"}
    assert "maxLength" in schema["schema"]["properties"]
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Judge."},
            {"role": "user", "content": "What it was told.What it did."},
        ],
        "max_completion_tokens": 5000,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 20,
    }


def test_a_question_to_a_server_of_its_format() -> None:
    body = openai.request_body(QUESTION, model="m", settings=SETTINGS, hosted=False)
    assert body["max_tokens"] == 5000
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["response_format"]["json_schema"]["schema"] == QUESTION.schema


def test_a_question_to_a_reasoning_model() -> None:
    body = openai.request_body(QUESTION, model="m", settings=THINKING)
    assert body["reasoning_effort"] == "low"
    assert not {"temperature", "logprobs", "top_logprobs", "chat_template_kwargs"} & body.keys()
    body = openai.request_body(QUESTION, model="m", settings=THINKING, hosted=False)
    assert {"reasoning_effort", "temperature", "logprobs"} <= body.keys()
    assert "chat_template_kwargs" not in body


@pytest.mark.parametrize("option", [*openai.OPTIONS])
def test_what_is_left_out_for_openai_is_not_used(option: str) -> None:
    wire = openai.OpenAIWire(model="m", settings=SETTINGS)
    for hosted in (True, False):
        body = openai.request_body(
            QUESTION, model="m", settings=SETTINGS, hosted=hosted, without={option}
        )
        assert option not in wire.options_in(body)
        assert {"max_tokens", "max_completion_tokens"} & body.keys()


@pytest.mark.parametrize(
    ("model", "thinks"),
    [
        ("gpt-5", True),
        ("gpt-5-2025-08-07", True),
        ("gpt-5-mini", True),
        ("o1", True),
        ("o3-mini", True),
        ("gpt-5.1", True),
        ("gpt-5.2-mini", True),
        ("gpt-6", True),
        ("gpt-10", True),
        ("gpt-5-chat-latest", False),
        ("gpt-5.1-chat-latest", False),
        ("gpt-4.1", False),
        ("gpt-4o", False),
        ("gpt-4o-mini", False),
        ("gpt-oss-120b", False),
        ("omni", False),
    ],
)
def test_a_reasoning_model_is_sent_no_temperature_even_where_it_may_not_think(
    model: str, thinks: bool
) -> None:
    body = openai.request_body(QUESTION, model=model, settings=SETTINGS)
    assert body.keys().isdisjoint({"temperature", "logprobs", "top_logprobs"}) == thinks
    can_stop = thinks and model.startswith(("gpt-5.", "gpt-6", "gpt-10"))
    assert body.get("reasoning_effort") == ("none" if can_stop else None)
    body = openai.request_body(QUESTION, model=model, settings=SETTINGS, hosted=False)
    assert "temperature" in body
    assert "reasoning_effort" not in body


def test_a_question_to_anthropic() -> None:
    body = anthropic.request_body(QUESTION, model="m", settings=SETTINGS)
    schema = body.pop("output_config")["format"]["schema"]
    assert not {"minimum", "additionalItems"} & keys_of(schema)
    assert schema["properties"]["labels"]["properties"]["rationale"] == {"type": "string"}
    assert schema["properties"]["labels"]["required"] == ["rationale", "label"]
    assert schema["additionalProperties"] is False
    assert body == {
        "model": "m",
        "max_tokens": 5000,
        "system": "Judge.",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What it was told."},
                    {"type": "text", "text": "What it did."},
                ],
            }
        ],
        "thinking": {"type": "disabled"},
        "temperature": 0.0,
    }


def test_thinking_at_anthropic_falls_back_from_adaptive_to_a_budget_to_none() -> None:
    ask = {"model": "m", "settings": THINKING, "structured": False}
    body = anthropic.request_body(QUESTION, **ask)
    assert (body["thinking"], body["output_config"]) == ({"type": "adaptive"}, {"effort": "low"})
    assert "temperature" not in body
    body = anthropic.request_body(QUESTION, without={"adaptive"}, **ask)
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 2048}
    assert "output_config" not in body
    body = anthropic.request_body(QUESTION, without={"adaptive", "thinking"}, **ask)
    assert "thinking" not in body


def test_a_chat_completion_is_read_without_its_thoughts() -> None:
    pieces = ["<think>", "hm", "</think>", "\n\n", *ANSWER, "<|im_end|>"]
    response = chat(ANSWER, pieces)
    response["choices"][0]["message"]["reasoning_content"] = '{"labels": {"0": "harmful"}}'
    found = openai.completion_of(response)
    assert (found.text, found.prompt_tokens, found.cached_tokens) == (ANSWER, 7, 3)
    assert [token.text for token in found.tokens] == [*ANSWER]


def test_a_token_that_begins_before_the_text_is_cut_and_says_nothing() -> None:
    found = openai.completion_of(chat(ANSWER, ["\n" + ANSWER[:3], *ANSWER[3:]]))
    assert "".join(token.text for token in found.tokens) == ANSWER
    assert found.tokens[0].alternatives == ()
    assert found.tokens[1].alternatives


def test_tokens_that_are_parts_of_a_character_add_up_by_their_bytes() -> None:
    text = 'née {"0": "good"}'
    pieces = [*text]
    response = chat(text, pieces)
    entries = response["choices"][0]["logprobs"]["content"]
    at = pieces.index("é")
    entries[at : at + 1] = [
        {"token": "\ufffd", "logprob": -1.0, "bytes": [byte], "top_logprobs": []}
        for byte in "é".encode()
    ]
    found = openai.completion_of(response)
    assert "".join(token.text for token in found.tokens) == text


def test_tokens_that_do_not_add_up_are_none() -> None:
    assert openai.completion_of(chat(ANSWER, ["something", "else"])).tokens is None
    assert openai.completion_of(chat(ANSWER, [])).tokens is None


@pytest.mark.parametrize(
    "response",
    [[], {}, {"choices": []}, {"choices": [{"message": {"content": 3}}]}, {"error": "x"}, None, 3],
)
def test_what_is_no_completion_is_an_error(response: object) -> None:
    with pytest.raises(ValueError, match="expected a chat completion, got"):
        openai.completion_of(response)
    with pytest.raises(ValueError, match="expected a message, got"):
        anthropic.completion_of(response)


def test_an_answer_that_was_stopped_says_why() -> None:
    cut = chat("", []) | {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}
    assert openai.completion_of(cut).cut
    message = {"content": [], "stop_reason": "refusal", "usage": {"output_tokens": 3}}
    found = anthropic.completion_of(message | {"stop_details": {"explanation": "harm"}})
    assert found == Completion(text="", completion_tokens=3, refusal="harm")
    assert anthropic.completion_of(message | {"stop_reason": "max_tokens"}).cut


def test_a_messages_tokens_count_what_the_cache_had_and_got() -> None:
    usage = {
        "input_tokens": 5,
        "cache_read_input_tokens": 70,
        "cache_creation_input_tokens": 25,
        "output_tokens": 2,
    }
    found = anthropic.completion_of({"content": [], "usage": usage})
    assert (found.prompt_tokens, found.cached_tokens, found.cache_write_tokens) == (100, 70, 25)


def chat(text: str, pieces: list[str]) -> dict[str, Any]:
    """Return a chat completion with the log-probabilities of some tokens."""
    content = [
        {
            "token": piece,
            "logprob": -0.1,
            "bytes": list(piece.encode()),
            "top_logprobs": [{"token": piece, "logprob": -0.1}],
        }
        for piece in pieces
    ]
    usage = {"prompt_tokens": 7, "completion_tokens": 4}
    return {
        "choices": [
            {
                "message": {"content": text},
                "finish_reason": "stop",
                "logprobs": {"content": content} if content else None,
            }
        ],
        "usage": usage | {"prompt_tokens_details": {"cached_tokens": 3}},
    }
