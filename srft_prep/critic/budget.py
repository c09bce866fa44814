"""A hard limit on what a run may spend.

Every request reserves the most that it can cost before it is sent and settles what it did cost.
What is spent and reserved together never exceeds the limit, so nothing is sent that could.
"""

from threading import Lock

from srft_prep.critic import Question
from srft_prep.critic.pricing import Rates


class Budget:
    """Money left to spend; may be used from several threads."""

    def __init__(self, limit_usd: float | None, *, spent_usd: float = 0.0) -> None:
        """Start with what earlier runs have spent; a limit of None is none."""
        self.limit_usd = limit_usd
        self.spent_usd = spent_usd
        self.num_refused = 0
        """Requests that were not sent for want of money."""
        self._reserved_usd = 0.0
        self._lock = Lock()

    def reserve(self, usd: float) -> bool:
        """Set the most that a request can cost aside; False where the money does not suffice."""
        with self._lock:
            together = self.spent_usd + self._reserved_usd + usd
            if self.limit_usd is not None and together > self.limit_usd:
                self.num_refused += 1
                return False
            self._reserved_usd += usd
            return True

    def settle(self, reserved_usd: float, usd: float) -> None:
        """Put what a request did cost in the place of what was set aside for it."""
        with self._lock:
            self._reserved_usd -= reserved_usd
            self.spent_usd += usd

    def hold(self, usd: float) -> None:
        """Set money aside that is owed already, whether or not it suffices."""
        with self._lock:
            self._reserved_usd += usd


def most_usd(question: Question | None, rates: Rates) -> float:
    """Return the most that asking a question once can cost, in US dollars.

    Where its tokens are estimated, its bytes are taken for them: no byte-level tokenizer makes more
    of a text, and of numbers and hex they make nearly as many.
    """
    if question is None or rates.price is None:
        return 0.0
    num_tokens = question.prompt_tokens
    if question.prompt_ids is None:
        num_bytes = len(question.system.encode()) + len(question.user.encode())
        num_tokens = max(num_tokens, num_bytes)
    return max(
        rates.price.usd(
            prompt_tokens=num_tokens,
            cached_tokens=cached,
            cache_write_tokens=written,
            completion_tokens=question.max_output_tokens,
            batch=rates.batch,
        )
        for cached, written in ((0, 0), (num_tokens, 0), (0, num_tokens))
    )
