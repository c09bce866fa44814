"""Which steps a request is about and how they were seen, as the text in the ledger's key.

    all                       every step, nothing left out
    steps:0-41@8192           steps 0 to 41, clipped or as a window to fit 8,192 input tokens
    all+context:3f2a...       with context beside the trajectory: the hash of what was told
    all+vote:2                the third of several answers to the same question

A request that shows the whole trajectory is good for every limit; one that left something out is
asked again under another limit, and only that.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Final, Self

import orjson

from srft_prep.config import OUTCOMES
from srft_prep.critic import WHOLE

_PATTERN: Final = re.compile(
    r"(?:all|steps:(?P<first>\d{1,9})-(?P<last>\d{1,9})@(?P<limit>\d{1,12}))"
    r"(?:\+context:(?P<context>[0-9a-f]+))?(?:\+vote:(?P<vote>[1-9]\d{0,5}))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The steps of a request."""

    first: int = 0
    last: int | None = None
    """The last step, inclusive; None where all steps are asked for and nothing is left out."""
    limit: int | None = None
    """Input tokens that the request had to fit; None where nothing is left out."""
    context: str | None = None
    """Hash of what was told beside the trajectory, in hex; None for nothing."""
    vote: int = 0
    """0-based number of the answer among several to the same question."""

    def steps(self, num_steps: int) -> range:
        """Return the steps asked for, of a trajectory that has `num_steps`."""
        return range(self.first, (num_steps if self.last is None else self.last + 1))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the part of a text; None where it is none."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            return None
        first, last, limit, context, vote = match.group("first", "last", "limit", "context", "vote")
        return cls(
            first=int(first or 0),
            last=None if last is None else int(last),
            limit=None if limit is None else int(limit),
            context=context,
            vote=int(vote or 0),
        )

    def __str__(self) -> str:
        steps = WHOLE if self.last is None else f"steps:{self.first}-{self.last}@{self.limit}"
        context = f"+context:{self.context}" if self.context else ""
        return f"{steps}{context}{f'+vote:{self.vote}' if self.vote else ''}"


def context_hash(context: str, resolved: bool | None, patch: str | None = None) -> str | None:
    """Return the hash of what a critic is told beside a trajectory; None for nothing.

    Args:
        context: `none`, `outcome` or `patch`.
        resolved: the trajectory's outcome.
        patch: its final diff, which counts only where the context is `patch`.
    """
    if context == "none":
        return None
    told = [OUTCOMES[resolved], patch if context == "patch" else None]
    return hashlib.blake2b(orjson.dumps(told), digest_size=4).hexdigest()
