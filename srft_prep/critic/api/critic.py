"""A critic behind an API, whichever the provider: live, in batches, or to plan for only."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srft_prep.critic import CriticReply, CriticRequest, Question
from srft_prep.critic.api.driver import Api
from srft_prep.critic.api.exchange import PATIENT, ModelFacts, Patience, Wire
from srft_prep.critic.api.preflight import planner_of
from srft_prep.critic.batch.provider import BatchSettings
from srft_prep.critic.budget import Budget
from srft_prep.critic.pricing import Price, Rates
from srft_prep.critic.question import QuestionSettings
from srft_prep.errors import ConfigError
from srft_prep.types import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """What sets one provider apart."""

    wire: Wire
    key: str
    """From the environment."""
    urls: tuple[str, ...]
    """Base URLs of its servers."""
    hosted: frozenset[str]
    """Those of `urls` that are the provider's own."""
    default_tokens: int
    """Longest prompt where nobody says."""
    batch_body: Callable[[Question, Collection[str]], dict[str, Any]]
    """A question and the options to leave out -> the body of a batch's item."""
    batches: Callable[..., Any]
    """Opens the provider's batches: `body` and `base_url` as keywords."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiOptions:
    """How a provider is asked."""

    tokenizer: str | None = None
    """Counts the prompts' tokens; None to estimate them."""
    concurrency: int = 256
    """Most requests under way at one server."""
    timeout_seconds: float = 600.0
    """For one answer."""
    price: Price | None = None
    """Of tokens; None where it is not known."""
    budget: Budget | None = None
    """What asking again is paid from; None for no limit."""
    batch_journal: Path | None = None
    """File of the provider's batches under way; None to ask one by one."""
    patience: Patience = PATIENT
    """How long to try."""
    batch_settings: BatchSettings = field(default_factory=BatchSettings)
    """Sizes and times of batches."""
    dry_run: bool = False
    """Only plan: no server is looked at, and none can be asked."""


class ApiCritic:
    """A critic that asks one by one or in the provider's batches."""

    def __init__(
        self, provider: Provider, *, model: str, settings: QuestionSettings, options: ApiOptions
    ) -> None:
        """Connect, and look whether the model is there; that costs nothing.

        Raises:
            ConfigError: the provider's package is missing, there is no such model, a base URL is
                none, the prompt does not fit, or batches are wanted of several servers.
            BackendError: a server cannot be reached, or refuses the key.
        """
        if options.batch_journal is not None and len(provider.urls) > 1:
            raise ConfigError(f"--batch: expected one --base-url, got {len(provider.urls)}")
        self._provider, self._options = provider, options
        self.critic_id = f"{model}@{provider.wire.provider}"
        self.rates = Rates(price=options.price, batch=options.batch_journal is not None)
        self._api: Api | None = None
        facts = ModelFacts()
        if not options.dry_run:
            self._api = Api(
                provider.wire,
                model=model,
                base_urls=provider.urls,
                key=provider.key,
                concurrency=options.concurrency,
                timeout_seconds=options.timeout_seconds,
                price=options.price,
                budget=options.budget,
                patience=options.patience,
                is_hosted=provider.hosted,
            )
            facts = self._api.facts
        self._facts = facts
        try:
            self._planner = planner_of(
                settings, options.tokenizer, facts=facts, default_tokens=provider.default_tokens
            )
        except BaseException:
            self.close()
            raise
        self.max_input_tokens: int | None = self._planner.max_input_tokens
        self.prompt_hash = self._planner.prompt_hash

    def plan(self, trajectory: Trajectory, *, scale: float = 1.0) -> Sequence[CriticRequest]:
        """Return the requests that together ask for every step of a trajectory."""
        return self._planner.plan(trajectory, scale=scale)

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        """Yield a reply for each request as soon as it is there.

        Raises:
            BackendError: the servers cannot be used, or not any more.
        """
        if self._api is None:
            raise ValueError("a critic opened with dry_run is asked to label")
        if self._options.batch_journal is None:
            yield from self._api.label(requests)
            return
        from srft_prep.critic.batch.driver import label_in_batches

        batches = self._provider.batches(
            body=lambda question: self._provider.batch_body(question, self._facts.without),
            base_url=self._provider.urls[0],
        )
        try:
            yield from label_in_batches(
                requests,
                provider=batches,
                journal=self._options.batch_journal,
                critic_id=self.critic_id,
                prompt_hash=self.prompt_hash,
                price=self._options.price,
                budget=self._options.budget,
                settings=self._options.batch_settings,
            )
        finally:
            batches.close()

    def close(self) -> None:
        """End all requests and connections."""
        if self._api is not None:
            self._api.close()
