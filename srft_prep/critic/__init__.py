"""Critics: what labels the steps of a trajectory good, unnecessary or harmful.

A critic plans the requests of a trajectory (one, or for a model with a small context a window of
steps each). Requests stream in, replies stream out as they finish, in any order, one for each
request. An item that fails is a reply with `failure`; only a backend that cannot work at all raises
BackendError. One shape serves a plain loop, an asyncio client, a provider's batch job and
continuous batching.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Final, Literal, Protocol, Self

from srft_prep.critic.pricing import Rates
from srft_prep.errors import ConfigError, in_one_line
from srft_prep.types import Label, Trajectory

CRITICS: Final[dict[str, str]] = {
    "anthropic": "srft_prep.critic.anthropic:anthropic_critic",
    "openai": "srft_prep.critic.openai:openai_critic",
    "rules": "srft_prep.critic.rules:RulesCritic",
    "transformers": "srft_prep.critic.transformers:TransformersCritic",
    "vllm": "srft_prep.critic.vllm:VllmCritic",
    "scripted": "srft_prep.critic.scripted:ScriptedCritic",
}
"""Short name -> import path of a factory that takes the critic's options as keywords."""


WHOLE: Final = "all"
"""The part of a request that asks for all steps of a trajectory, nothing of it left out."""

FailureKind = Literal[
    "refused", "unparseable", "over-long", "timeout", "rejected", "unavailable", "expired", "engine"
]
"""Why a model gave no labels.

refused: it declined to answer. unparseable: what it wrote is not the answer asked for, nor was it
when asked again. over-long: the backend says that the request exceeds its context. timeout: no
answer in time. rejected: the backend calls the request invalid. unavailable: the server failed or
could not be reached, as often as it was tried. expired: the provider's batch ended without it.
engine: the local engine died of it.
"""


def failure_of(kind: FailureKind, reason: str) -> str:
    """Return the text of a failure: its kind, a colon, and the reason in one line of UTF-8."""
    line = in_one_line(reason)
    return f"{kind}: {line.encode('utf-8', 'replace').decode()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a model is asked about some steps: the same words for every backend."""

    system: str
    shared: str
    """The user part up to the steps: the same for all requests of a trajectory."""
    rest: str
    """The user part from the steps on."""
    schema: dict[str, Any]
    """JSON schema of the answer, with exactly the steps asked for."""
    prompt_tokens: int
    """Tokens of the whole prompt: exact with the model's tokenizer, else an estimate."""
    output_tokens: int
    """What a usual answer takes, about."""
    max_output_tokens: int
    """What the longest sound answer takes, thoughts included."""
    prompt_ids: tuple[int, ...] | None = None
    """The prompt under the model's own chat template; None where the backend renders it."""

    @property
    def user(self) -> str:
        """The whole user part."""
        return self.shared + self.rest


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticRequest:
    """Steps of one trajectory to label in one go."""

    trajectory_id: str
    content_hash: str
    """The trajectory's; a part of the ledger's key."""
    part: str
    """Which steps, seen how: `all`, or a `Part` in text; a part of the ledger's key."""
    steps: tuple[int, ...]
    """0-based indices of the steps to label."""
    clipped_tokens: int = 0
    """Tokens of the trajectory that were left out to fit the critic's input."""
    trajectory: Trajectory | None = None
    """The whole trajectory; None once the request is answered."""
    question: Question | None = None
    """What a model is asked; None for critics that are none, and once it is answered."""

    @classmethod
    def of(cls, trajectory: Trajectory, **fields: Any) -> Self:
        """Return a request about a trajectory, by default one for all of its steps."""
        fields = {"part": WHOLE, "steps": tuple(range(trajectory.num_steps)), **fields}
        return cls(
            trajectory_id=trajectory.trajectory_id,
            content_hash=trajectory.content_hash,
            trajectory=trajectory,
            **fields,
        )

    def light(self) -> Self:
        """Return the request without the trajectory's text and the question."""
        return replace(self, trajectory=None, question=None)


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
    """Time from asking to the answer; of a local engine this item's share of its time."""
    usd: float = 0.0
    """Price of this item in US dollars."""
    failure: str | None = None
    """Why there are no labels (`failure_of`); None where there are."""


class Critic(Protocol):
    """Labels steps."""

    critic_id: str
    """`model@revision` or `rules@version`; a part of the ledger's key."""
    prompt_hash: str
    """Hash of all that shapes the labels beside the model; a part of the ledger's key."""
    rates: Rates
    """How it is paid."""

    max_input_tokens: int | None
    """Longest prompt; None where there is none."""

    def plan(self, trajectory: Trajectory, *, scale: float = 1.0) -> Sequence[CriticRequest]:
        """Return the requests that together ask for every step of a trajectory.

        A pure function of the trajectory and the critic's settings, so that a rerun finds in the
        ledger what it asked before. With a `scale` below 1 they fit that part of the input that
        they would have to fit otherwise: for a model that found larger ones over-long.
        """
        ...

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
