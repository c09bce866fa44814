"""What labelling will take, and what it took: tokens, time, money.

A trajectory counts once all of its requests were answered. Tokens a second are over the wall time
of asking. MFU is the operations of the weights and of causal attention on tokens that no cache
held, divided by what the GPUs can do by their data sheet in dense bf16. Dollars stand beside those
of the paper's critic: Claude Sonnet 4, $660 for 5,000 trajectories (its section 4).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from srft_prep.critic import CriticRequest
from srft_prep.critic.flops import mfu
from srft_prep.critic.pricing import Rates

PAPER_USD_PER_1000: Final = 132.0
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
    hosted: bool = False,
    flops: Callable[[int, int, int], float] | None = None,
    peak_flops: float | None = None,
) -> Estimate:
    """Return what a run's requests are expected to take.

    Args:
        requests: all of them.
        rates: how the critic is paid.
        hosted: whether a provider's rate limits decide how long it takes.
        flops: operations of a request by its prompt, cached and completion tokens.
        peak_flops: operations a second of all GPUs; with `flops`, they decide.
    """
    total = Estimate()
    contents: set[str] = set()
    usd = operations = 0.0
    for request in requests:
        question = request.question
        assert question is not None
        assert request.trajectory is not None
        contents.add(request.content_hash)
        total.requests += 1
        total.steps += len(request.steps)
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
    if hosted and not rates.batch:
        total.seconds = 60 * total.prompt_tokens / HOSTED_TOKENS_PER_MINUTE
    elif operations and peak_flops:
        total.seconds = operations / (USUAL_MFU * peak_flops)
    total.usd = usd if rates.price is not None else None
    if rates.usd_per_hour and total.seconds is not None:
        total.usd = rates.usd_per_hour * total.seconds / 3600
    return total


def estimate_lines(found: Estimate, *, exact: bool) -> list[str]:
    """Return an estimate in words."""
    about = "" if exact else "about "
    counted = "" if exact else "; counted by bytes, --tokenizer counts tokens"
    lines = [
        f"to ask: {found.requests:,} requests about {found.trajectories:,} trajectories, "
        f"{found.steps:,} steps ({found.windows:,} of the requests are windows; "
        f"{found.clipped_tokens:,} tokens left out)",
        f"tokens: {about}{found.prompt_tokens:,} input, about {found.completion_tokens:,} output"
        f"{counted}",
    ]
    if found.usd is None:
        lines.append("cost: not known (--prices for an API, --gpu-usd-per-hour for a GPU)")
    else:
        lines.append(f"cost: about ${found.usd:,.2f}{_per_1000(found.usd, found.trajectories)}")
    if found.seconds is not None:
        lines.append(f"time: about {_time(round(found.seconds))}, as far as it can be known before")
    return lines


def usage_lines(usage: Mapping[str, float], *, peak_flops: float | None = None) -> list[str]:
    """Return what a run took in words; nothing where it asked no model.

    Args:
        usage: the `usage` of a run (`labeling.label`).
        peak_flops: operations a second of all GPUs that were used together.
    """
    if not usage.get("prompt_tokens"):
        return []
    seconds = max(usage["wall_seconds"], 1e-9)
    prompt, cached = usage["prompt_tokens"], usage["cached_tokens"]
    lines = [
        f"asked {usage['requests']:,.0f} requests in {_time(seconds)}: "
        f"{usage['trajectories']:,.0f} trajectories, {usage['steps']:,.0f} steps"
    ]
    lines.append(
        f"tokens/s: {(prompt - cached) / seconds:,.0f} input, {cached / seconds:,.0f} cached, "
        f"{usage['completion_tokens'] / seconds:,.0f} output"
    )
    if usage.get("limited_requests"):
        lines.append(
            f"to fit: {usage['limited_requests']:,.0f} of the requests show their trajectory in "
            f"part, {usage['clipped_tokens']:,.0f} tokens left out (summed over requests)"
        )
    if peak_flops and usage.get("flops"):
        share = mfu(usage["flops"], seconds, peak_flops)
        lines.append(f"MFU: {share:.1%} of the bf16 peak, attention included")
    if usage["usd"]:
        lines.append(f"cost: ${usage['usd']:,.2f}{_per_1000(usage['usd'], usage['trajectories'])}")
    return lines


def _per_1000(usd: float, trajectories: float) -> str:
    if not trajectories:
        return ""
    each = 1000 * usd / trajectories
    return f", ${each:,.2f} for 1,000 trajectories (the paper's critic: ${PAPER_USD_PER_1000:,.0f})"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds} s" if isinstance(seconds, int) else f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
