"""What a request has taken so far, and the reply that it makes of an answer."""

import time
from dataclasses import dataclass, replace
from typing import Any, Final

from srft_prep.critic import CriticReply, CriticRequest, Question, failure_of
from srft_prep.critic.answers import AnswerError, Completion, reply_of
from srft_prep.critic.api.exchange import Failed
from srft_prep.critic.pricing import Price

_NO_ANSWER: Final = Completion(text="")


@dataclass(slots=True, kw_only=True)
class Usage:
    """All answers of one request together."""

    price: Price | None
    started: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0

    def add(self, completion: Completion, question: Question) -> None:
        """Count an answer; where it costs and its server does not say how much, as estimated."""
        if self.price:
            completion = _estimated(completion, question)
            self.usd += self.price.usd(
                prompt_tokens=completion.prompt_tokens,
                cached_tokens=completion.cached_tokens,
                cache_write_tokens=completion.cache_write_tokens,
                completion_tokens=completion.completion_tokens,
            )
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens
        self.completion_tokens += completion.completion_tokens

    def add_unreadable(self, question: Question) -> None:
        """Count an answer that nobody can read: it was billed all the same."""
        self.add(_NO_ANSWER, question)

    def fields(self) -> dict[str, Any]:
        """Return a reply's fields."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "usd": self.usd,
            "seconds": time.monotonic() - self.started,
        }

    def failure(self, request: CriticRequest, failed: Failed) -> CriticReply:
        """Return a failed reply."""
        failure = failure_of(failed.kind, failed.reason)
        return CriticReply(request=request, failure=failure, **self.fields())


def judged(
    request: CriticRequest, completion: Completion, usage: Usage
) -> CriticReply | AnswerError:
    """Return the reply that an answer makes, or why it is not the answer asked for."""
    if completion.refusal is not None:
        return usage.failure(request, Failed("refused", completion.refusal))
    try:
        return reply_of(request, completion.text, completion.tokens, **usage.fields())
    except AnswerError as error:
        if completion.cut:
            error = AnswerError(f"cut off after {completion.completion_tokens} tokens: {error}")
        return error


def _estimated(completion: Completion, question: Question) -> Completion:
    """Return an answer with an estimate of the tokens that its server does not tell."""
    if completion.prompt_tokens:
        return completion
    received = question.max_output_tokens if completion.cut else question.output_tokens
    return replace(
        completion,
        prompt_tokens=question.prompt_tokens,
        completion_tokens=completion.completion_tokens or received,
    )
