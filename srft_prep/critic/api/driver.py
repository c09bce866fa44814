"""The driver of critics behind an API: requests in, replies out, hundreds of them under way.

One asyncio loop in a thread of its own talks to the servers; the thread that iterates pulls the
requests and hands out the replies. Invariants: a request is pulled only when a server will soon
take it; whatever came back is handed out before an error is raised; an answer that is not the one
asked for is asked for once more, never twice. Cost: benchmarks/client_overhead.py.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

from srft_prep.critic import CriticReply, CriticRequest, Question
from srft_prep.critic.answers import AnswerError, Completion, without_thoughts
from srft_prep.critic.api.concurrency import AdaptiveLimit
from srft_prep.critic.api.connection import clients_of, load_sdk, shown_url
from srft_prep.critic.api.exchange import Exchange, Failed, ModelFacts, Patience, Secrets, Wire
from srft_prep.critic.api.preflight import answers, facts_of
from srft_prep.critic.api.servers import Server, Servers, Stopped
from srft_prep.critic.api.usage import Usage, judged
from srft_prep.critic.budget import Budget
from srft_prep.critic.cut_answers import CutAnswers
from srft_prep.critic.pricing import Price

T = TypeVar("T")

_LOOK_AHEAD: Final = 8
"""Requests pulled beyond what the servers take now, so that none waits for the next one."""
_REMEMBERED_PROMPTS: Final = 4096
"""Prompts in the provider's cache that are remembered; it forgets them after minutes itself."""


class Api:
    """A model behind one or more servers of one provider's format."""

    def __init__(
        self,
        wire: Wire,
        *,
        model: str,
        base_urls: Sequence[str],
        key: str,
        concurrency: int,
        timeout_seconds: float,
        price: Price | None,
        budget: Budget | None,
        patience: Patience,
        is_hosted: frozenset[str] = frozenset(),
    ) -> None:
        """Connect, and look whether the model is there; that costs nothing.

        Args:
            wire: the provider's format.
            model: its name at the servers.
            base_urls: of the servers; the load is spread over them.
            key: sent to all of them.
            concurrency: most requests under way at one server.
            timeout_seconds: for one answer.
            price: of tokens; None where it is not known.
            budget: what asking again is paid from; None for no limit.
            patience: how long to try.
            is_hosted: those of `base_urls` that are the provider itself.

        Raises:
            ConfigError: the client's package is missing, a base URL is none, or the model is not
                among those of a server.
            BackendError: a server cannot be reached, or refuses the key.
        """
        self._wire, self._model, self._price, self._budget = wire, model, price, budget
        self._patience = patience
        self._most = concurrency * len(base_urls)
        sdk = load_sdk(wire.provider)
        secrets = Secrets(key, base_urls)
        servers = [
            Server(
                url=shown_url(url),
                clients=clients_of(sdk, wire, url, key, concurrency, timeout_seconds),
                limit=AdaptiveLimit(concurrency, pause_seconds=patience.pause_seconds),
                hosted=url in is_hosted,
            )
            for url in base_urls
        ]
        self._servers = Servers(
            servers,
            is_back=lambda server: answers(server, wire, model),
            probe_seconds=patience.probe_seconds,
            longest_wait_seconds=patience.limited_seconds,
        )
        self._exchange = Exchange(
            wire,
            sdk,
            servers=self._servers,
            secrets=secrets,
            timeout_seconds=timeout_seconds,
            patience=patience,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_following = 0
        self._draining = False
        self._cut_answers = CutAnswers(model)
        self._warm: OrderedDict[Any, asyncio.Future[None]] = OrderedDict()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="api", daemon=True)
        self._thread.start()
        try:
            self.facts: ModelFacts = self._call(self._look(sdk, secrets))
            """What the servers say of the model; of several contexts the smallest."""
        except BaseException:
            self.close()
            raise

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        """Yield a reply for each request as soon as it is there.

        Raises:
            BackendError: the servers cannot be used, or not any more.
        """
        finished: SimpleQueue[_Outcome] = SimpleQueue()
        self._cut_answers = CutAnswers(self._model)
        source = iter(requests)
        more, under_way = True, 0
        error: BaseException | None = None
        try:
            while True:
                while more and finished.empty() and under_way < self._room():
                    try:
                        request = next(source, None)
                    except Exception as failed:  # noqa: BLE001 - raised below, once all is in
                        request, error = None, failed
                    if request is None:
                        more = False
                        break
                    self._loop.call_soon_threadsafe(self._start, request, finished)
                    under_way += 1
                if not under_way:
                    break
                outcome = finished.get()
                under_way -= 1
                if outcome.error is not None:
                    more, error = False, error or outcome.error
                if outcome.reply is not None:
                    yield from self._handed_out(outcome)
        except KeyboardInterrupt:
            with suppress(Empty):
                while True:
                    yield from self._handed_out(finished.get_nowait())
            raise
        finally:
            if not self._loop.is_closed():
                self._call(self._cancel())
        if isinstance(error, Stopped):
            error = self._servers.error or error
        if error is not None:
            raise error

    def close(self) -> None:
        """End all requests, the clients and the thread."""
        if self._loop.is_closed():
            return
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _handed_out(self, outcome: "_Outcome") -> Iterator[CriticReply]:
        """Yield a reply; what was set aside for its second answer is free once it is counted.

        Who asked counts the reply's `usd` before he asks for the next.
        """
        try:
            if outcome.reply is not None:
                yield outcome.reply
        finally:
            if self._budget and outcome.reserved_usd:
                self._budget.settle(outcome.reserved_usd, 0.0)

    def _room(self) -> int:
        """Return how many requests may be pulled and not answered."""
        return min(self._servers.size + self._num_following + _LOOK_AHEAD, 2 * self._most)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _look(self, sdk: Any, secrets: Secrets) -> ModelFacts:
        servers = self._servers.servers
        found = [await facts_of(each, self._wire, self._model, sdk, secrets) for each in servers]
        for server, facts in zip(servers, found, strict=True):
            for option in facts.without:
                server.without.add(option)
                self._exchange.tell(server, option, "the model does not take it")
        contexts = [facts.context_tokens for facts in found if facts.context_tokens]
        without = tuple(dict.fromkeys(option for facts in found for option in facts.without))
        return ModelFacts(context_tokens=min(contexts, default=None), without=without)

    def _start(self, request: CriticRequest, finished: SimpleQueue["_Outcome"]) -> None:
        task = self._loop.create_task(self._run(request, finished))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, request: CriticRequest, finished: SimpleQueue["_Outcome"]) -> None:
        """Put exactly one outcome into the queue, whatever happens."""
        outcome = _Outcome(error=Stopped())
        try:
            outcome = await self._reply(request)
        except Stopped as stopped:
            outcome = _Outcome(error=stopped)
            self._drain()
        except Exception as error:  # noqa: BLE001 - raised by `label` in its own thread
            self._servers.stop(error)
            outcome = _Outcome(error=error)
        finally:
            finished.put(outcome)

    async def _reply(self, request: CriticRequest) -> "_Outcome":
        question = request.question
        if question is None:
            raise ValueError(f"{request.trajectory_id}: a request for a model without a question")
        light = request.light()
        usage = Usage(price=self._price)
        leading: list[asyncio.Future[None]] = []
        try:
            await self._await_cache(request, leading)
            usage.started = time.monotonic()
            first = await self._exchange.ask(
                request, question, on_unreadable=lambda: usage.add_unreadable(question)
            )
        except Failed as failed:
            return _Outcome(reply=usage.failure(light, failed))
        except Stopped as stopped:
            if not usage.usd:
                raise
            self._drain()  # What was paid is handed out, so that it is counted.
            ended = Failed("unavailable", "the run was ended after an answer that is none")
            return _Outcome(reply=usage.failure(light, ended), error=stopped)
        finally:
            for future in leading:
                future.set_result(None)
        usage.add(first, question)
        made = judged(light, first, usage)
        if not first.cut or not isinstance(made, AnswerError):
            self._cut_answers.note(is_twice=False)
        if not isinstance(made, AnswerError):
            return _Outcome(reply=made)
        return await self._ask_again(request, question, first, made, usage)

    async def _ask_again(
        self,
        request: CriticRequest,
        question: Question,
        first: Completion,
        wrong: AnswerError,
        usage: Usage,
    ) -> "_Outcome":
        """Return what comes of asking once more: with more room, or with the error told."""
        light = request.light()
        conversation: list[dict[str, str]] = []
        prompt_tokens = max(first.prompt_tokens, question.prompt_tokens)
        if first.cut:
            question = replace(question, max_output_tokens=2 * question.max_output_tokens)
        else:
            said = without_thoughts(first.text)[0].strip() or "(nothing)"
            told = f"{wrong}\n\nAnswer again, with the JSON object alone."
            conversation = [
                {"role": "assistant", "content": said},
                {"role": "user", "content": told},
            ]
            prompt_tokens += first.completion_tokens + len(told)
        reserved = 0.0
        if self._price:
            reserved = self._price.usd(
                prompt_tokens=prompt_tokens,
                cache_write_tokens=prompt_tokens,
                completion_tokens=question.max_output_tokens,
            )
        if self._budget and reserved and not self._budget.reserve(reserved):
            failed = Failed("unparseable", f"{wrong} (the budget does not suffice to ask again)")
            return _Outcome(reply=usage.failure(light, failed))
        question = replace(question, prompt_tokens=prompt_tokens)
        try:
            second = await self._exchange.ask(
                request,
                question,
                conversation=conversation,
                on_unreadable=lambda: usage.add_unreadable(question),
            )
        except Failed as failed:
            reply = usage.failure(light, failed)
        except Stopped:
            reply = usage.failure(light, Failed("unparseable", f"{wrong} (the run was ended)"))
        else:
            usage.add(second, question)
            made = judged(light, second, usage)
            is_twice = second.cut and isinstance(made, AnswerError)
            if ended := self._cut_answers.note(is_twice=is_twice):
                self._servers.stop(ended)
            if isinstance(made, AnswerError):
                made = usage.failure(light, Failed("unparseable", f"{made} (asked twice)"))
            reply = made
        return _Outcome(reply=reply, reserved_usd=reserved if self._budget else 0.0)

    async def _await_cache(
        self, request: CriticRequest, leading: list[asyncio.Future[None]]
    ) -> None:
        """Wait until the request that puts this one's prompt into the cache is answered.

        Where this one is the first of its prompt, others will wait for what it adds to `leading`.
        It waits for nobody that came after it, so that no two wait for each other.
        """
        for name in self._wire.warmed_by(request):
            ahead = self._warm.get(name)
            if ahead is None:
                leading.append(self._loop.create_future())
                self._warm[name] = leading[-1]
                if len(self._warm) > _REMEMBERED_PROMPTS:
                    self._warm.popitem(last=False)
            elif not ahead.done():
                self._num_following += 1
                try:
                    await asyncio.shield(ahead)
                finally:
                    self._num_following -= 1

    def _drain(self) -> None:
        """Let answers under way come in, for a while."""
        if not self._draining:
            self._draining = True
            self._loop.call_later(self._patience.drain_seconds, self._cancel_tasks)

    def _cancel_tasks(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()

    async def _cancel(self) -> None:
        tasks = tuple(self._tasks)
        self._cancel_tasks()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _shut(self) -> None:
        await self._cancel()
        await self._servers.close()
        for server in self._servers.servers:
            for client in dict.fromkeys(server.clients):
                await client.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What became of a request."""

    reply: CriticReply | None = None
    error: BaseException | None = None
    """Why there is no reply."""
    reserved_usd: float = 0.0
    """Set aside for a second answer, until the reply is counted."""
