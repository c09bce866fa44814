"""What came of one request of a batch -> its reply, at the batch's price."""

from srft_prep.critic import CriticReply, CriticRequest, failure_of
from srft_prep.critic.answers import AnswerError, reply_of
from srft_prep.critic.batch.provider import BatchProvider, ItemResult
from srft_prep.critic.pricing import Price


def reply_of_result(
    request: CriticRequest,
    result: ItemResult,
    *,
    provider: BatchProvider,
    price: Price | None,
    seconds: float,
) -> CriticReply:
    """Return the reply to a request: labels, or why there are none.

    An answer that cannot be parsed is paid all the same. It is no longer possible to ask again: the
    batch is over.
    """
    if result.response is None:
        return CriticReply(request=request, failure=result.failure, seconds=seconds)
    try:
        found = provider.completion(result.response)
    except ValueError as error:
        failure = failure_of("unparseable", str(error))
        return CriticReply(request=request, failure=failure, seconds=seconds)
    usd = 0.0
    if price is not None:
        usd = price.usd(
            prompt_tokens=found.prompt_tokens,
            cached_tokens=found.cached_tokens,
            cache_write_tokens=found.cache_write_tokens,
            completion_tokens=found.completion_tokens,
            batch=True,
        )
    failure = failure_of("refused", found.refusal or "")
    if found.refusal is None:
        try:
            return reply_of(
                request,
                found.text,
                found.tokens,
                prompt_tokens=found.prompt_tokens,
                cached_tokens=found.cached_tokens,
                completion_tokens=found.completion_tokens,
                seconds=seconds,
                usd=usd,
            )
        except AnswerError as error:
            cut = "cut off at the most output tokens: " if found.cut else ""
            failure = failure_of("unparseable", f"{cut}{error}")
    return CriticReply(
        request=request,
        prompt_tokens=found.prompt_tokens,
        cached_tokens=found.cached_tokens,
        completion_tokens=found.completion_tokens,
        seconds=seconds,
        usd=usd,
        failure=failure,
    )
