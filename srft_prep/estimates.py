"""What critic requests are expected to take: tokens, time, money. Nothing is asked for it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from srft_prep.critic import CriticRequest
from srft_prep.critic.pricing import Rates

HOSTED_TOKENS_PER_MINUTE: Final = 2_000_000
"""Input tokens that a hosted model takes, about: the limit of Anthropic's highest standard tier for
Claude Sonnet 4. For the time estimate alone."""
USUAL_MFU: Final = 0.3
"""What vLLM reaches on long prompts, about: public runs lie between 0.22 and 0.55 (docs/MODELS.md).
For the time estimate alone."""


@dataclass(slots=True, kw_only=True)
class Estimate:
    """What is to be asked, and what it is expected to take."""

    requests: int = 0
    trajectories: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    clipped_tokens: int = 0
    windows: int = 0
    """Requests that show a part of their trajectory."""
    usd: float | None = 0.0
    """None where nobody knows the price."""
    seconds: float | None = None
    """Wall time; None where nothing is known of the machine's speed."""


def estimate(
    requests: Iterable[CriticRequest],
    rates: Rates,
    *,
    free: bool = False,
    hosted: bool = False,
    flops: Callable[[int, int, int], float] | None = None,
    peak_flops: float | None = None,
) -> Estimate:
    """Return what a run's requests are expected to take.

    Args:
        requests: all of them.
        rates: how the critic is paid.
        free: whether the critic asks no model, so that requests take no tokens and no money.
        hosted: whether a provider's rate limits decide how long it takes.
        flops: operations of a request by its prompt, cached and completion tokens.
        peak_flops: operations a second of all GPUs; with `flops`, they decide.
    """
    total = Estimate()
    contents: set[str] = set()
    usd = operations = 0.0
    for request in requests:
        contents.add(request.content_hash)
        total.requests += 1
        total.steps += len(request.steps)
        if free:
            continue
        question = request.question
        assert question is not None
        assert request.trajectory is not None
        total.prompt_tokens += question.prompt_tokens
        total.completion_tokens += question.output_tokens
        total.clipped_tokens += request.clipped_tokens
        total.windows += len(request.steps) < request.trajectory.num_steps
        if flops is not None:
            operations += flops(question.prompt_tokens, 0, question.output_tokens)
        if rates.price is not None:
            usd += rates.price.usd(
                prompt_tokens=question.prompt_tokens,
                completion_tokens=question.output_tokens,
                batch=rates.batch,
            )
    total.trajectories = len(contents)
    if free:
        return total
    if hosted and not rates.batch:
        total.seconds = 60 * total.prompt_tokens / HOSTED_TOKENS_PER_MINUTE
    elif operations and peak_flops:
        total.seconds = operations / (USUAL_MFU * peak_flops)
    total.usd = usd if rates.price is not None else None
    if rates.usd_per_hour and total.seconds is not None:
        total.usd = rates.usd_per_hour * total.seconds / 3600
    return total
