"""A critic in the processes of a Ray cluster: the same labels, from more than one machine.

This process plans the requests, and takes the replies one by one, so that each is in the ledger
before the next is looked at. The critics themselves are actors, each on a core, a GPU, or a group
of GPUs. An actor says how many requests it has room for and is given no more; so what is lost with
it, or with its node, is what it was at work on, and others are asked that again.

A request that three actors died of is given up: it may be what kills them.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final

from srft_prep.critic import CriticReply, CriticRequest, failure_of, open_critic
from srft_prep.critic.cut_answers import OnlyCutAnswers
from srft_prep.errors import BackendError, ConfigError, SrftError
from srft_prep.ray_cluster import LostError, RayCluster

CRITICS: Final = ("rules", "scripted", "transformers", "vllm")
"""Those that compute: an API's client waits, and needs no second machine for it."""
AHEAD: Final = 8
"""Requests that lie at an actor beside those that it is at work on."""
DEATHS: Final = 3
"""Actors that may die of a request."""
DEATHS_IN_A_ROW: Final = 12
"""Deaths without a reply between them, for each actor, that call the backend unusable."""
TAKE_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 30.0

_Key = tuple[str, str]


class CriticActor:
    """A critic that is given requests and asked for what came of them, in a process of its own."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name, self._options = name, dict(options)
        self._critic: Any = None
        self._requests: SimpleQueue[CriticRequest | None] = SimpleQueue()
        self._news: SimpleQueue[int | CriticReply | SrftError | None] = SimpleQueue()
        self._totals: dict[int, int] = {}

    def begin(self, number: int) -> None:
        """Ask for requests, until there have been as many as `end` says of this round."""
        Thread(target=self._answer, args=(number,), daemon=True).start()

    def give(self, request: CriticRequest) -> None:
        """Take a request."""
        self._requests.put(request)

    def end(self, number: int, num_requests: int) -> None:
        """Hear how many requests a round has: calls overtake each other."""
        self._totals[number] = num_requests
        self._requests.put(None)

    def take(self) -> list[int | CriticReply | SrftError | None]:
        """Return the news: replies, numbers of requests wanted, an error, or None at the end."""
        try:
            news = [self._news.get(timeout=TAKE_SECONDS)]
        except Empty:
            return []
        while not self._news.empty():
            news.append(self._news.get())
        return news

    def close(self) -> None:
        """Close the critic."""
        if self._critic is not None:
            self._critic.close()

    def _answer(self, number: int) -> None:
        try:
            if self._critic is None:
                self._critic = open_critic(self._name, **self._options)
            for reply in self._critic.label(self._requests_of(number)):
                self._news.put(replace(reply, request=reply.request.light()))
            self._news.put(None)
        except SrftError as error:
            self._news.put(error)
        except Exception as error:  # noqa: BLE001 - a thread's exception would be lost
            self._news.put(BackendError(f"--critic {self._name}: {type(error).__name__}: {error}"))

    def _requests_of(self, number: int) -> Iterator[CriticRequest]:
        self._news.put(AHEAD)
        num_requests = 0
        while num_requests != self._totals.get(number):
            request = self._requests.get()
            if request is not None:
                num_requests += 1
                self._news.put(1)
                yield request


@dataclass(slots=True, kw_only=True, eq=False)
class _Actor:
    handle: Any
    news: Any = None
    """Reference of the call of `take` that is under way."""
    room: int = 0
    """Requests that it has asked for."""
    in_flight: dict[_Key, CriticRequest] = field(default_factory=dict)
    round: int = 0
    """Number of what it works at until it is told that there is no more."""
    num_given: int = 0
    """Requests of this round."""
    is_working: bool = False
    """Whether it waits for requests or answers them."""
    is_ready: bool = False
    """Whether it has asked for requests: an engine may take minutes to start."""
    is_ending: bool = False
    """Whether it was told that there are no more."""
    is_first: bool = True
    """Whether it takes nobody's place."""


class RayCritic:
    """A critic whose work is done by actors."""

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        cluster: RayCluster,
        *,
        workers: int | None = None,
        gpu_usd_per_hour: float = 0.0,
    ) -> None:
        """Set up the critic that plans here; the actors start with the first request.

        Args:
            name: the critic's short name.
            options: what `open_critic` takes.
            cluster: where the actors are.
            workers: how many; by default one a core, of a model one for each `tensor_parallel_size`
                GPUs of the cluster, or one in a cluster without any.
            gpu_usd_per_hour: what one GPU costs.

        Raises:
            ConfigError: the critic does not compute, or the cluster has not enough for it.
        """
        if name not in CRITICS:
            raise ConfigError(
                f"--engine ray: expected a critic that computes ({', '.join(CRITICS)}), got "
                f"{name}, which waits for a server (choose --engine local)"
            )
        self._cluster, self._name = cluster, name
        self._options = dict(options)
        has_gpus = name in ("transformers", "vllm") and cluster.number_of("GPU") > 0
        each = _gpus_each(self._options) if has_gpus else 1
        limit = self._options.get("gpus")
        if workers is None and limit is not None:
            workers = limit // each
        if workers is None and name in ("transformers", "vllm") and not has_gpus:
            workers = 1
        resource = "GPU" if has_gpus else "CPU"
        self.num_actors = cluster.workers_for(resource, each=each, wanted=workers)
        self._needs = {"num_gpus": each} if has_gpus else {}
        if "usd_per_hour" in self._options:
            self._options["usd_per_hour"] = gpu_usd_per_hour * each
        self._planner = open_critic(name, **_planning(self._options))
        if "gpus" in self._options:
            self._options["gpus"] = each if has_gpus else None
        self.critic_id = self._planner.critic_id
        self.prompt_hash = self._planner.prompt_hash
        self.max_input_tokens = self._planner.max_input_tokens
        usd_per_hour = self._planner.rates.usd_per_hour * self.num_actors
        self.rates = replace(self._planner.rates, usd_per_hour=usd_per_hour)
        self._actors: list[_Actor] = []
        self._num_deaths: Counter[_Key] = Counter()
        self._deaths_in_a_row = 0
        self._num_rounds = 0

    def plan(self, trajectory: Any, *, scale: float = 1.0) -> Sequence[CriticRequest]:
        """Return the requests that together ask for every step of a trajectory."""
        return self._planner.plan(trajectory, scale=scale)

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        """Yield one reply for each request, as it comes.

        Raises:
            BackendError: no critic starts, or none stays alive; or all answers are cut off.
            ConfigError: the critic refuses its settings on another machine.
        """
        source, more = iter(requests), True
        first = next(source, None)
        if first is None:
            return
        again: deque[CriticRequest] = deque([first])
        replies: deque[CriticReply] = deque()
        try:
            self._actors += [self._start() for _ in range(self.num_actors - len(self._actors))]
            for actor in self._actors:
                self._begin(actor)
            while more or again or any(_is_needed(actor) for actor in self._actors):
                while (more or again) and (open_to := self._one_with_room()):
                    request = again.popleft() if again else next(source, None)
                    more = more and request is not None
                    if request is not None:
                        self._give(open_to, request)
                if not (more or again):
                    self._end_all()
                elif again:
                    for actor in self._actors:
                        self._begin(actor)
                self._hear(replies, again)
                while replies:
                    yield replies.popleft()
        except (KeyboardInterrupt, SrftError):
            yield from replies
            raise
        finally:
            self._kill_all(but=[actor for actor in self._actors if not actor.is_working])

    def close(self) -> None:
        """End the actors."""
        if self._cluster.ray is None:
            return
        closing = [actor.handle.close.remote() for actor in self._actors]
        if closing:
            self._cluster.ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        self._kill_all()
        self._planner.close()

    def _start(self) -> _Actor:
        handle = self._cluster.start_actor(
            CriticActor, self._name, self._options, threads=4, **self._needs
        )
        return _Actor(handle=handle)

    def _begin(self, actor: _Actor) -> None:
        """Let an actor that does nothing ask for requests."""
        if not actor.is_working:
            self._num_rounds += 1
            actor.round = self._num_rounds
            actor.handle.begin.remote(actor.round)
            actor.is_working, actor.is_ending, actor.is_ready = True, False, False
            actor.room = actor.num_given = 0
            actor.news = actor.handle.take.remote()

    def _end_all(self) -> None:
        for actor in self._actors:
            if actor.is_working and not actor.is_ending:
                actor.handle.end.remote(actor.round, actor.num_given)
                actor.is_ending, actor.room = True, 0

    def _one_with_room(self) -> _Actor | None:
        """Return the actor with room that has the least to do."""
        with_room = [actor for actor in self._actors if actor.room and not actor.is_ending]
        return min(with_room, key=lambda actor: len(actor.in_flight), default=None)

    def _give(self, actor: _Actor, request: CriticRequest) -> None:
        actor.in_flight[request.content_hash, request.part] = request
        actor.room -= 1
        actor.num_given += 1
        light = replace(request, trajectory=None) if request.question else request
        actor.handle.give.remote(light)

    def _hear(self, replies: deque[CriticReply], again: deque[CriticRequest]) -> None:
        """Wait for news of any actor and take it in."""
        by_news = {actor.news: actor for actor in self._actors if actor.is_working}
        if not by_news:
            return
        ready, _ = self._cluster.ray.wait(list(by_news), num_returns=1)
        for reference in ready:
            actor = by_news[reference]
            try:
                news = self._cluster.result_of(reference)
            except LostError as error:
                self._replace(actor, str(error), replies, again)
                continue
            if self._heed(actor, news, replies, again) and actor.is_working:
                actor.news = actor.handle.take.remote()

    def _heed(
        self,
        actor: _Actor,
        news: Sequence[Any],
        replies: deque[CriticReply],
        again: deque[CriticRequest],
    ) -> bool:
        """Take in an actor's news; return whether it is still to be heard."""
        for each in news:
            if isinstance(each, SrftError):
                if actor.is_first or isinstance(each, ConfigError | OnlyCutAnswers):
                    raise each
                self._replace(actor, str(each), replies, again)
                return False
            if isinstance(each, CriticReply):
                request = actor.in_flight.pop((each.request.content_hash, each.request.part))
                replies.append(replace(each, request=request.light()))
                self._deaths_in_a_row, actor.is_first = 0, False
            elif each is None:
                actor.is_working = False
            else:
                actor.is_ready = True
                actor.room += 0 if actor.is_ending else each
        return True

    def _replace(
        self, actor: _Actor, story: str, replies: deque[CriticReply], again: deque[CriticRequest]
    ) -> None:
        """Start another actor in the place of a dead one; ask again what it was asked."""
        self._cluster.end_actor(actor.handle)
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= DEATHS_IN_A_ROW * self.num_actors:
            raise BackendError(
                f"--critic {self._name}: {self._deaths_in_a_row} actors died without a reply in "
                f"between: {story}; the same command continues"
            )
        for key, request in actor.in_flight.items():
            self._num_deaths[key] += 1
            if self._num_deaths[key] < DEATHS:
                again.append(request)
            else:
                failure = failure_of("engine", f"{DEATHS} actors died of it, the last: {story}")
                replies.append(CriticReply(request=request.light(), failure=failure))
        fresh = self._start()
        fresh.is_first = False
        self._actors[self._actors.index(actor)] = fresh
        self._begin(fresh)

    def _kill_all(self, *, but: Sequence[_Actor] = ()) -> None:
        for actor in self._actors:
            if actor not in but:
                self._cluster.end_actor(actor.handle)
        self._actors = list(but)


def _is_needed(actor: _Actor) -> bool:
    """Return whether a round waits for an actor: not for one that is still to start, unasked."""
    return bool(actor.in_flight) or (actor.is_working and actor.is_ready)


def _gpus_each(options: Mapping[str, Any]) -> int:
    """Return how many GPUs an actor's engine takes."""
    text = (options.get("engine_args") or {}).get("tensor_parallel_size", "1")
    if not text.isdecimal() or not int(text):
        raise ConfigError(
            f"--engine-arg tensor_parallel_size: expected a number from 1, got {text!r}"
        )
    return int(text)


def _planning(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the critic that only plans: this machine may have no GPU."""
    planning = dict(options)
    if "gpus" in planning:
        planning["gpus"] = None
    if planning.get("engine_args"):
        planning["engine_args"] = {
            name: text
            for name, text in planning["engine_args"].items()
            if name != "tensor_parallel_size"
        }
    return planning
