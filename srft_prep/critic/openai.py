"""A critic behind OpenAI's chat completions: OpenAI itself, and servers that speak its format.

vLLM and SGLang serve the same format with a few words of their own; `hosted` says that it is
OpenAI itself. What a server refuses (`OPTIONS`) is left out from then on, and reported.
"""

import codecs
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal
from urllib.parse import urlsplit

from srft_prep.critic import CriticRequest, Question
from srft_prep.critic.answers import Completion, Token
from srft_prep.critic.api.critic import ApiCritic, ApiOptions, Provider
from srft_prep.critic.api.exchange import ModelFacts
from srft_prep.critic.api.preflight import model_missing
from srft_prep.critic.question import QuestionSettings
from srft_prep.errors import ConfigError

BASE_URL: Final = "https://api.openai.com/v1"
HOST: Final = "api.openai.com"
DEFAULT_INPUT_TOKENS: Final = 100_000
"""Longest prompt for a server that does not say what it takes."""
TOP_LOGPROBS: Final = 20
"""Alternatives a token: the most that OpenAI and vLLM give by default."""
FEW_LOGPROBS: Final = 5
"""Where a server does not give that many."""

_UNKNOWN: Final = r"(?i:unsupported|not supported|unrecogni[sz]ed|unknown|not permitted|unexpected)"
"""How a limit is refused for its name, not for its value."""

OPTIONS: Final[dict[str, re.Pattern[str]]] = {
    "top_logprobs": re.compile(r"top_logprobs|logprobs of \d+.*greater", re.IGNORECASE),
    "logprobs": re.compile(r"logprobs", re.IGNORECASE),
    "maxLength": re.compile(r"maxLength|minLength"),
    "response_format": re.compile(r"response_format|json_schema|schema|grammar", re.IGNORECASE),
    "reasoning_effort": re.compile(r"reasoning_effort|reasoning effort", re.IGNORECASE),
    "max_completion_tokens": re.compile(rf"max_completion_tokens.*{_UNKNOWN}|{_UNKNOWN}.*max_comp"),
    "max_tokens": re.compile(rf"max_tokens.*{_UNKNOWN}|{_UNKNOWN}.*max_tokens"),
    "temperature": re.compile(r"temperature", re.IGNORECASE),
    "chat_template_kwargs": re.compile(r"chat_template_kwargs|enable_thinking"),
}
"""What a request can do without -> how a server that refuses it names it."""

LOSES: Final[dict[str, str]] = {
    "top_logprobs": f"{FEW_LOGPROBS} alternatives a token instead of {TOP_LOGPROBS}",
    "logprobs": "labels get no probabilities",
    "response_format": "answers are not held to the schema",
    "reasoning_effort": "the model thinks as much as it likes",
    "chat_template_kwargs": "the model may think before it answers",
    "temperature": "answers vary",
}
"""What labels lose without an option."""

_REASONING_MODEL: Final = re.compile(
    r"(?:ft:)?(?:o\d+|gpt-(?P<major>[5-9]|\d\d+)(?:\.(?P<minor>\d+))?)(?![\w.])(?!-chat)"
)
"""OpenAI's own models that think: o1, o3-mini, gpt-5, gpt-5.1-mini; not gpt-4o, gpt-5-chat-latest.
From gpt-5.1 on they can be told not to."""

_OUTPUT_LIMITS: Final = ("max_completion_tokens", "max_tokens")


def openai_critic(
    *, model: str, settings: QuestionSettings, base_urls: tuple[str, ...] = (), **options: Any
) -> ApiCritic:
    """Return a critic that asks over chat completions, one by one or in OpenAI's batches.

    The key comes from the environment (OPENAI_API_KEY); servers other than OpenAI's may do without.

    Args:
        model: its name at the servers.
        settings: how to ask.
        base_urls: of the servers, over which the load is spread; OpenAI by default.
        options: fields of `ApiOptions`.

    Raises:
        ConfigError: there is no key, no package `openai`, or no such model, or it cannot but
            think and is asked not to, or a base URL is none, or the prompt does not fit.
        BackendError: a server cannot be reached, or refuses the key.
    """
    urls = base_urls or (os.environ.get("OPENAI_BASE_URL") or BASE_URL,)
    hosted = frozenset(url for url in urls if is_hosted(url))
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    chosen = ApiOptions(**options)
    if hosted and not key and not chosen.dry_run:
        raise ConfigError("--critic openai: expected a key, got none (export OPENAI_API_KEY)")

    if hosted and settings.reasoning == "none" and _thinking_of(model) == "always":
        raise ConfigError(
            f"--model {model}: is a reasoning model, which thinks before each answer, got "
            "--reasoning none, which leaves no room for that (give --reasoning low)"
        )

    def batch_body(question: Question, without: Collection[str]) -> dict[str, Any]:
        return request_body(
            question, model=model, settings=settings, hosted=urls[0] in hosted, without=without
        )

    provider = Provider(
        wire=OpenAIWire(model=model, settings=settings),
        key=key or "none",
        urls=urls,
        hosted=hosted,
        default_tokens=DEFAULT_INPUT_TOKENS,
        batch_body=batch_body,
        batches=_batches,
    )
    return ApiCritic(provider, model=model, settings=settings, options=chosen)


def _batches(**options: Any) -> Any:
    from srft_prep.critic.batch.openai import OpenAIBatches

    return OpenAIBatches(**options)


def _thinking_of(model: str) -> Literal["no", "optional", "always"]:
    """Return whether a model of OpenAI's own thinks before it answers."""
    found = _REASONING_MODEL.match(model)
    if found is None:
        return "no"
    version = int(found["major"] or 0), int(found["minor"] or 0)
    return "optional" if version > (5, 0) else "always"


def is_hosted(url: str) -> bool:
    """Return whether a base URL is OpenAI's own."""
    host = urlsplit(url).hostname or ""
    return host == HOST or host.endswith(f".{HOST}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIWire:
    """Chat completions, as the driver uses them."""

    model: str
    settings: QuestionSettings
    provider: ClassVar[str] = "openai"
    client: ClassVar[str] = "AsyncOpenAI"
    path: ClassVar[str] = "/chat/completions"
    options: ClassVar[Mapping[str, re.Pattern[str]]] = OPTIONS
    loses: ClassVar[Mapping[str, str]] = LOSES

    def body(
        self,
        _request: CriticRequest,
        question: Question,
        *,
        hosted: bool,
        structured: bool,
        without: frozenset[str],
    ) -> dict[str, Any]:
        """Return the body that asks a question."""
        return request_body(
            question,
            model=self.model,
            settings=self.settings,
            structured=structured,
            hosted=hosted,
            without=without,
        )

    def options_in(self, body: Mapping[str, Any]) -> list[str]:
        """Return the options that a body makes use of."""
        used = {name for name in OPTIONS if name in body}
        if body.get("top_logprobs") != TOP_LOGPROBS:
            used.discard("top_logprobs")
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
        if schema is not None and _without_lengths(schema) != schema:
            used.add("maxLength")
        return [name for name in OPTIONS if name in used]

    def completion_of(self, response: Any) -> Completion:
        """Return what a response says; ValueError where it is none."""
        return completion_of(response)

    def model_path(self, _model: str) -> str:
        """Return where a server lists its models."""
        return "/models"

    def model_facts(self, response: Any, model: str) -> ModelFacts:
        """Return the context that vLLM tells; ConfigError where the model is not listed."""
        listed = {str(entry["id"]): entry for entry in response["data"]}
        if model not in listed:
            raise model_missing("", model, list(listed))
        context = listed[model].get("max_model_len")
        return ModelFacts(context_tokens=int(context) if context else None)

    def warmed_by(self, _request: CriticRequest) -> tuple[Any, ...]:
        """Return nothing: the cache costs nothing to write and is warm while prompts are read."""
        return ()


def request_body(
    question: Question,
    *,
    model: str,
    settings: QuestionSettings,
    structured: bool = True,
    hosted: bool = True,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Return the body of a chat completion that asks a question.

    Args:
        question: what to ask.
        model: the model's name at the server.
        settings: temperature and reasoning.
        structured: hold the answer to the question's schema.
        hosted: for OpenAI itself, whose reasoning models take neither a temperature nor
            log-probabilities, and whose schemas know no lengths of text; not for vLLM and the like.
        without: names of `OPTIONS` that the server refuses.
    """
    thinks = settings.reasoning != "none"
    left_out = set(without)
    if hosted:
        left_out |= {"maxLength", "chat_template_kwargs"}
    thinking = _thinking_of(model) if hosted else "no"
    if hosted and (thinks or thinking != "no"):
        left_out |= {"temperature", "logprobs"}
    limit = "max_completion_tokens" if hosted else "max_tokens"
    if limit in left_out:
        limit = next(name for name in _OUTPUT_LIMITS if name != limit)
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": question.system},
            {"role": "user", "content": question.user},
        ],
        limit: question.max_output_tokens,
    }
    if "temperature" not in left_out:
        body["temperature"] = settings.temperature
    if "logprobs" not in left_out:
        body["logprobs"] = True
        body["top_logprobs"] = FEW_LOGPROBS if "top_logprobs" in left_out else TOP_LOGPROBS
    if structured and "response_format" not in left_out:
        schema = question.schema
        if "maxLength" in left_out:
            schema = _without_lengths(schema)
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "labels", "strict": True, "schema": schema},
        }
    if (thinks or thinking == "optional") and "reasoning_effort" not in left_out:
        body["reasoning_effort"] = settings.reasoning
    if not thinks and "chat_template_kwargs" not in left_out:
        body["chat_template_kwargs"] = {"enable_thinking": False}
    return body


def completion_of(response: Any) -> Completion:
    """Return what a chat completion says; thoughts that come in a field of their own are dropped.

    Raises:
        ValueError: it is no chat completion.
    """
    try:
        choice = response["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content") or "", message.get("refusal")
        reason = choice.get("finish_reason")
        usage = response.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        logprobs = (choice.get("logprobs") or {}).get("content")
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        if reason == "content_filter" and not refusal:
            refusal = "stopped by the provider's content filter"
        return Completion(
            text=text,
            tokens=_tokens_of(logprobs, text) if logprobs else None,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            cached_tokens=int(details.get("cached_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            refusal=str(refusal) if refusal else None,
            cut=reason == "length",
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        got = ", ".join(response) if isinstance(response, Mapping) else type(response).__name__
        raise ValueError(f"expected a chat completion, got {got}: {error!r}") from None


def _without_lengths(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        return {
            name: _without_lengths(value)
            for name, value in schema.items()
            if not (name in ("maxLength", "minLength") and isinstance(value, int))
        }
    return [_without_lengths(value) for value in schema] if isinstance(schema, list) else schema


def _tokens_of(entries: Sequence[Mapping[str, Any]], text: str) -> tuple[Token, ...] | None:
    """Return the tokens that make up the text; None where they do not add up to it.

    Thoughts before the text and the end of turn after it may have tokens too; they are left out.
    """
    texts = [str(entry["token"]) for entry in entries]
    joined = "".join(texts)
    start = joined.rfind(text)
    if start < 0:
        texts = _texts_of_bytes(entries)
        joined = "".join(texts)
        start = joined.rfind(text)
    if start < 0 or not text:
        return None
    end, at, tokens = start + len(text), 0, []
    for entry, piece in zip(entries, texts, strict=True):
        inside = piece[max(start - at, 0) : max(end - at, 0)]
        if inside:
            whole = inside == piece
            tokens.append(Token(inside, _alternatives(entry) if whole else ()))
        at += len(piece)
    return tuple(tokens)


def _texts_of_bytes(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the texts that tokens add to a text: of a character in several, the last has it all.

    A server writes a fragment of a character as U+FFFD or an escape, and its bytes beside it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [
        decoder.decode(bytes(entry["bytes"]))
        if entry.get("bytes") is not None
        else str(entry["token"])
        for entry in entries
    ]


def _alternatives(entry: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    return tuple(
        (str(other["token"]), float(other["logprob"]))
        for other in entry.get("top_logprobs") or (entry,)
    )
