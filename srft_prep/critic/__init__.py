"""Critics: what labels the steps of a trajectory good, unnecessary or harmful.

Requests stream in, replies stream out as they finish, in any order, one for each request. An item
that fails is a reply with `failure`; only a backend that cannot work at all raises BackendError.
One shape serves a plain loop, an asyncio client, a provider's batch job and continuous batching.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Protocol

from srft_prep.errors import ConfigError
from srft_prep.types import Label, Trajectory

CRITICS: Final[dict[str, str]] = {
    "rules": "srft_prep.critic.rules:RulesCritic",
    "scripted": "srft_prep.critic.scripted:ScriptedCritic",
}
"""Short name -> import path of a factory that takes the critic's options as keywords."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticRequest:
    """Steps of one trajectory to label in one go."""

    trajectory: Trajectory
    """The whole trajectory: a critic may look at all of it."""
    part: str
    """Which steps: `all` or `steps:START-END`; a part of the ledger's key."""
    steps: tuple[int, ...]
    """0-based indices of the steps to label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLabel:
    """What a critic says of one step."""

    step_index: int
    """0-based position among the trajectory's steps."""
    label: Label
    p_good: float | None = None
    """Probability in [0, 1] that the step is good; None where the critic measures none."""
    p_unnecessary: float | None = None
    """Probability in [0, 1] that the step is unnecessary; None where the critic measures none."""
    p_harmful: float | None = None
    """Probability in [0, 1] that the step is harmful; None where the critic measures none."""
    rationale: str | None = None
    """Why, in a line: a model's words, or `rule-id: evidence`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticReply:
    """The answer to one request: a label for each step asked, or a failure."""

    request: CriticRequest
    labels: tuple[StepLabel, ...] = ()
    """One for each step asked, in the order asked; empty where the item failed."""
    prompt_tokens: int = 0
    """Tokens sent, the cached ones included."""
    cached_tokens: int = 0
    """Those of `prompt_tokens` that the backend had in its prefix cache."""
    completion_tokens: int = 0
    """Tokens received, kept even where parsing them failed: they were billed."""
    seconds: float = 0.0
    """Time spent on this item alone, in seconds."""
    usd: float = 0.0
    """Price of this item in US dollars."""
    clipped_tokens: int = 0
    """Tokens of the trajectory that were left out to fit the critic's input."""
    failure: str | None = None
    """Why there are no labels; None where there are."""


class Critic(Protocol):
    """Labels steps."""

    critic_id: str
    """`model@revision` or `rules@version`; a part of the ledger's key."""
    prompt_hash: str
    """Hash of all that shapes the labels beside the model; a part of the ledger's key."""

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        """Yield one reply for each request, in any order.

        Raises:
            BackendError: the backend cannot work at all.
        """
        ...

    def close(self) -> None:
        """Free what the critic holds; it cannot be used afterwards."""
        ...


def open_critic(name: str, **options: Any) -> Critic:
    """Return the critic of a short name, built with its options.

    Raises:
        ConfigError: no critic has this name, or it does not take one of the options, or it needs
            one that is not given.
        BackendError: its backend cannot work at all.
    """
    path = CRITICS.get(name)
    if path is None:
        raise ConfigError(f"critic {name!r}: expected one of {', '.join(sorted(CRITICS))}")
    module, _, attribute = path.partition(":")
    factory: Callable[..., Critic] = getattr(import_module(module), attribute)
    signature = inspect.signature(factory)
    try:
        signature.bind(**options)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "no options"
        raise ConfigError(f"critic {name!r}: {error}; it takes {takes}") from None
    return factory(**options)
