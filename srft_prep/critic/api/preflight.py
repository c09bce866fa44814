"""What a server says of a model before anything is sent that costs money, and what follows."""

from typing import Any, Final

import orjson

from srft_prep.critic.api.exchange import ModelFacts, Secrets, Wire
from srft_prep.critic.api.problems import problem_of
from srft_prep.critic.api.servers import Server
from srft_prep.critic.encoding import TextEncoder
from srft_prep.critic.question import Planner, QuestionSettings
from srft_prep.errors import BackendError, ConfigError

LOOK_SECONDS: Final = 30.0
_CONTEXT_SHARE: Final = 0.95
_SHOWN_MODELS: Final = 5


async def facts_of(
    server: Server, wire: Wire, model: str, sdk: Any, secrets: Secrets
) -> ModelFacts:
    """Return what a server says of a model; nothing where it has no such endpoint.

    Raises:
        ConfigError: it does not have the model.
        BackendError: it cannot be reached, or refuses the key.
    """
    import httpx2

    try:
        response = await server.clients[-1].get(
            wire.model_path(model), cast_to=httpx2.Response, options={"timeout": LOOK_SECONDS}
        )
    except sdk.APIStatusError as error:
        status = error.response.status_code
        content = error.response.content
        problem = problem_of(status, error.response.headers, content, options={})
        if status in (401, 403) or status >= 500:
            reason = secrets.scrub(problem.reason)
            raise BackendError(f"{server.url}: expected its models, got {reason}") from None
        if status == 404 and b"not_found_error" in content:
            listed = await _listed(server, wire, sdk)
            raise model_missing(server.url, model, listed) from None
        return ModelFacts()
    except sdk.APIConnectionError as error:
        cause = secrets.scrub(str(error.__cause__ or error)) or type(error.__cause__).__name__
        raise BackendError(
            f"{server.url}: expected a server, got {cause} (start it, or check --base-url)"
        ) from None
    try:
        return wire.model_facts(orjson.loads(response.content), model)
    except ConfigError as error:
        raise ConfigError(f"{server.url}: {secrets.scrub(str(error))}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        return ModelFacts()


def model_missing(where: str, model: str, listed: list[str]) -> ConfigError:
    """Return the error that a server does not have a model."""
    names = ", ".join(listed[:_SHOWN_MODELS]) or "none"
    more = f" and {len(listed) - _SHOWN_MODELS} more" if len(listed) > _SHOWN_MODELS else ""
    prefix = f"{where}: " if where else ""
    return ConfigError(f"{prefix}expected the model {model!r}, got only {names}{more} (--model)")


async def answers(server: Server, wire: Wire, model: str) -> bool:
    """Return whether a server that was set aside is back: it says anything of its own."""
    import httpx2

    try:
        response = await server.clients[-1].get(
            wire.model_path(model), cast_to=httpx2.Response, options={"timeout": LOOK_SECONDS}
        )
    except Exception as error:  # noqa: BLE001 - a probe: whatever it is, the server is not back
        status = getattr(getattr(error, "response", None), "status_code", 503)
        return int(status) < 500
    return bool(response.status_code < 500)


def planner_of(
    settings: QuestionSettings, tokenizer: str | None, *, facts: ModelFacts, default_tokens: int
) -> Planner:
    """Return what plans the questions to a model that is sent text.

    Args:
        settings: how to ask.
        tokenizer: counts tokens; None to estimate them.
        facts: what the servers say of the model.
        default_tokens: longest prompt where neither the settings nor the servers say.

    Raises:
        ConfigError: there is no such tokenizer, or the prompt does not fit.
    """
    context = facts.context_tokens
    if context is not None:
        # What a chat template adds is not counted, and without a tokenizer nothing is exact.
        context = int(context * _CONTEXT_SHARE)
    longest = settings.max_input_tokens or context or default_tokens
    encoder = TextEncoder(tokenizer)
    return Planner(settings, encoder, max_input_tokens=longest, context_tokens=context)


async def _listed(server: Server, wire: Wire, sdk: Any) -> list[str]:
    import httpx2

    path = wire.model_path("").rstrip("/")
    try:
        response = await server.clients[-1].get(
            path, cast_to=httpx2.Response, options={"timeout": LOOK_SECONDS}
        )
        return [str(entry["id"]) for entry in orjson.loads(response.content)["data"]]
    except (sdk.APIError, ValueError, TypeError, KeyError):
        return []
