"""What labelling will take, and what it took: tokens, time, money.

A trajectory counts once all of its requests were answered. Tokens a second are over the wall time
of asking. MFU is the operations of the weights and of causal attention on tokens that no cache
held, divided by what the GPUs can do by their data sheet in dense bf16. Dollars stand beside those
of the paper's critic: Claude Sonnet 4, $660 for 5,000 trajectories (its section 4).
"""

from collections.abc import Mapping
from typing import Final

from srft_prep.critic.flops import mfu
from srft_prep.estimates import Estimate

PAPER_USD_PER_1000: Final = 132.0


def estimate_lines(found: Estimate, *, exact: bool, free: bool = False) -> list[str]:
    """Return an estimate in words.

    Args:
        found: the estimate.
        exact: whether tokens were counted with the model's tokenizer.
        free: whether no model is asked.
    """
    about = "" if exact else "about "
    counted = "" if exact else "; counted by bytes, --tokenizer counts tokens"
    asked = (
        f"to ask: {found.requests:,} requests about {found.trajectories:,} trajectories, "
        f"{found.steps:,} steps"
    )
    if free:
        return [asked, "cost: $0.00, no model is asked"]
    lines = [
        f"{asked} ({found.windows:,} of the requests are windows; "
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
