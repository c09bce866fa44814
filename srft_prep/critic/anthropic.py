"""A critic behind Anthropic's messages.

A cache write costs a quarter more than a token sent plainly, so a prompt is marked for the cache
only where another request will read it: the part that all windows of a trajectory share, and all
of it where it is asked several times. What the provider refuses for a model (`OPTIONS`) is left
out from then on, and reported.
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from srft_prep.critic import CriticRequest, Question
from srft_prep.critic.answers import Completion
from srft_prep.critic.api.critic import ApiCritic, ApiOptions, Provider
from srft_prep.critic.api.exchange import ModelFacts
from srft_prep.critic.api.preflight import model_missing
from srft_prep.critic.question import REASONING_TOKENS, QuestionSettings
from srft_prep.errors import ConfigError

BASE_URL: Final = "https://api.anthropic.com"
DEFAULT_INPUT_TOKENS: Final = 180_000
"""Longest prompt where the provider does not say what the model takes."""

OPTIONS: Final[dict[str, re.Pattern[str]]] = {
    "disabled": re.compile(r"thinking|disabled", re.IGNORECASE),
    "adaptive": re.compile(r"thinking|adaptive", re.IGNORECASE),
    "effort": re.compile(r"effort", re.IGNORECASE),
    "thinking": re.compile(r"thinking", re.IGNORECASE),
    "temperature": re.compile(r"temperature", re.IGNORECASE),
    "output_config": re.compile(r"output_config|output_format|schema|grammar", re.IGNORECASE),
}
"""What a request can do without -> how the provider names it when it refuses it."""

LOSES: Final[dict[str, str]] = {
    "disabled": "the model may think before it answers",
    "adaptive": "a fixed number of tokens to think instead",
    "effort": "the model thinks as much as it likes",
    "thinking": "the model does not think before it answers",
    "temperature": "answers vary",
    "output_config": "answers are not held to the schema",
}
"""What labels lose without an option."""

_MIN_THINKING_TOKENS: Final = 1024
_KEPT: Final = frozenset(
    {"$defs", "$ref", "type", "enum", "const", "anyOf", "allOf", "properties", "required"}
    | {"items", "title", "description"}
)
"""Schema keywords that structured outputs know (anthropic 2.12, `lib/_parse/_transform.py`)."""


def anthropic_critic(
    *, model: str, settings: QuestionSettings, base_urls: tuple[str, ...] = (), **options: Any
) -> ApiCritic:
    """Return a critic that asks over messages, one by one or in Anthropic's batches.

    The key comes from the environment (ANTHROPIC_API_KEY).

    Args:
        model: its name at the servers.
        settings: how to ask.
        base_urls: of the servers, over which the load is spread; Anthropic by default.
        options: fields of `ApiOptions`.

    Raises:
        ConfigError: there is no key, no package `anthropic`, or no such model, or a base URL is
            none, or the prompt does not fit.
        BackendError: a server cannot be reached, or refuses the key.
    """
    urls = base_urls or (os.environ.get("ANTHROPIC_BASE_URL") or BASE_URL,)
    key = os.environ.get("ANTHROPIC_API_KEY", "").strip()
    chosen = ApiOptions(**options)
    if not key and not chosen.dry_run:
        raise ConfigError("--critic anthropic: expected a key, got none (export ANTHROPIC_API_KEY)")

    def batch_body(question: Question, without: Collection[str]) -> dict[str, Any]:
        return request_body(question, model=model, settings=settings, without=without)

    provider = Provider(
        wire=AnthropicWire(model=model, settings=settings),
        key=key,
        urls=urls,
        hosted=frozenset(),
        default_tokens=DEFAULT_INPUT_TOKENS,
        batch_body=batch_body,
        batches=_batches,
    )
    return ApiCritic(provider, model=model, settings=settings, options=chosen)


def _batches(**options: Any) -> Any:
    from srft_prep.critic.batch.anthropic import AnthropicBatches

    return AnthropicBatches(**options)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnthropicWire:
    """Messages, as the driver uses them."""

    model: str
    settings: QuestionSettings
    provider: ClassVar[str] = "anthropic"
    client: ClassVar[str] = "AsyncAnthropic"
    path: ClassVar[str] = "/v1/messages"
    options: ClassVar[Mapping[str, re.Pattern[str]]] = OPTIONS
    loses: ClassVar[Mapping[str, str]] = LOSES

    def body(
        self,
        request: CriticRequest,
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
            cache_shared=_is_window(request),
            cache_all=self.settings.votes > 1,
            without=without,
        )

    def options_in(self, body: Mapping[str, Any]) -> list[str]:
        """Return the options that a body makes use of."""
        used = {"temperature"} & body.keys()
        config, thinking = body.get("output_config", {}), body.get("thinking", {}).get("type")
        used |= {"output_config"} if "format" in config else set()
        used |= {"effort"} & config.keys()
        used |= {str(thinking)} if thinking in ("disabled", "adaptive") else set()
        used |= {"thinking"} if thinking == "enabled" else set()
        return [name for name in OPTIONS if name in used]

    def completion_of(self, response: Any) -> Completion:
        """Return what a response says; ValueError where it is none."""
        return completion_of(response)

    def model_path(self, model: str) -> str:
        """Return where the provider tells of a model."""
        return f"/v1/models/{model}"

    def model_facts(self, response: Any, model: str) -> ModelFacts:
        """Return the context and what the model does not take."""
        if "id" not in response:
            raise model_missing("", model, [])
        capabilities = response.get("capabilities") or {}
        thinking = (capabilities.get("thinking") or {}).get("types") or {}
        supported = {
            "disabled": thinking.get("disabled"),
            "adaptive": thinking.get("adaptive"),
            "effort": capabilities.get("effort"),
            "output_config": capabilities.get("structured_outputs"),
        }
        without = [name for name, value in supported.items() if value and not value["supported"]]
        context = response.get("max_input_tokens")
        return ModelFacts(context_tokens=int(context) if context else None, without=tuple(without))

    def warmed_by(self, request: CriticRequest) -> tuple[Any, ...]:
        """Return the parts of the prompt that are marked for the cache."""
        names: list[Any] = []
        if _is_window(request):
            names.append(request.content_hash)
        if self.settings.votes > 1:
            names.append((request.content_hash, request.steps))
        return tuple(names)


def _is_window(request: CriticRequest) -> bool:
    """Return whether other requests ask about the other steps of the trajectory."""
    trajectory = request.trajectory
    return trajectory is not None and len(request.steps) < trajectory.num_steps


def request_body(
    question: Question,
    *,
    model: str,
    settings: QuestionSettings,
    structured: bool = True,
    cache_shared: bool = False,
    cache_all: bool = False,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Return the body of a message that asks a question.

    Args:
        question: what to ask.
        model: the provider's name of the model.
        settings: temperature and reasoning.
        structured: hold the answer to the question's schema.
        cache_shared: mark the part that all requests of a trajectory share for the prompt cache.
        cache_all: mark the whole prompt for the prompt cache.
        without: names of `OPTIONS` that the provider refuses.
    """
    # The API takes no empty text block.
    blocks = [
        {"type": "text", "text": text} | ({"cache_control": {"type": "ephemeral"}} if mark else {})
        for text, mark in ((question.shared, cache_shared), (question.rest, cache_all))
        if text
    ]
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": question.max_output_tokens,
        "system": question.system,
        "messages": [{"role": "user", "content": blocks}],
    }
    config: dict[str, Any] = {}
    if settings.reasoning == "none":
        if not {"disabled", "thinking"}.intersection(without):
            body["thinking"] = {"type": "disabled"}
        if "temperature" not in without:
            body["temperature"] = settings.temperature
    elif "adaptive" not in without:
        body["thinking"] = {"type": "adaptive"}
        if "effort" not in without:
            config["effort"] = settings.reasoning
    elif "thinking" not in without:
        tokens = min(REASONING_TOKENS[settings.reasoning], question.max_output_tokens - 1)
        body["thinking"] = {"type": "enabled", "budget_tokens": max(tokens, _MIN_THINKING_TOKENS)}
    if structured and "output_config" not in without:
        config["format"] = {"type": "json_schema", "schema": _supported(question.schema)}
    if config:
        body["output_config"] = config
    return body


def completion_of(response: Any) -> Completion:
    """Return what a message says; its thoughts are dropped.

    Raises:
        ValueError: it is no message.
    """
    try:
        usage = response["usage"]
        blocks = response["content"]
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
        reason = response.get("stop_reason")
        cached = int(usage.get("cache_read_input_tokens") or 0)
        written = int(usage.get("cache_creation_input_tokens") or 0)
        refusal = None
        if reason == "refusal":
            details = response.get("stop_details") or {}
            refusal = details.get("explanation") or details.get("category") or "no reason given"
        return Completion(
            text=text,
            prompt_tokens=int(usage.get("input_tokens") or 0) + cached + written,
            cached_tokens=cached,
            cache_write_tokens=written,
            completion_tokens=int(usage.get("output_tokens") or 0),
            refusal=refusal,
            cut=reason in ("max_tokens", "model_context_window_exceeded"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        got = ", ".join(response) if isinstance(response, Mapping) else type(response).__name__
        raise ValueError(f"expected a message, got {got}: {error!r}") from None


def _supported(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema with the keywords that structured outputs know, and closed objects."""
    kept = {name: value for name, value in schema.items() if name in _KEPT}
    for name in ("properties", "$defs"):
        if name in kept:
            kept[name] = {key: _supported(value) for key, value in kept[name].items()}
    for name in ("anyOf", "allOf"):
        if name in kept:
            kept[name] = [_supported(value) for value in kept[name]]
    if "items" in kept:
        kept["items"] = _supported(kept["items"])
    if kept.get("type") == "array" and schema.get("minItems") in (0, 1):
        kept["minItems"] = schema["minItems"]
    if kept.get("type") == "object":
        kept["additionalProperties"] = False
    return kept
