"""A real HTTP server on loopback that speaks both wire formats and misbehaves as it is told.

A script is a function from a turn (one request as it came) to a reaction (what goes back on the
wire). Every turn is kept, so that a test can count what was billed: an answer with status 200 that
left the server whole. One that was cut on the wire was billed too, but nobody could have it.

    with ApiServer(lambda turn: limited(turn) if turn.number < 3 else answer(turn)) as server:
        openai_critic(model="critic", base_urls=(server.openai_url,), ...)

Run as a program it answers at once, prints its port, and keeps no turns: for benchmarks.
"""

import asyncio
import hashlib
import json
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from srft_prep.types import LABELS

MODEL = "critic-1"
_STEPS = re.compile(r"Label the steps (\d+) to (\d+)[.,]")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One request as it came."""

    number: int
    """0-based among all requests for answers."""
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    prompt: str
    """The first user message."""
    asked: int
    """How often this prompt had come before."""
    in_flight: int
    """Requests under way, this one included."""

    @property
    def steps(self) -> range:
        """The steps that the prompt asks for."""
        first, last = _STEPS.search(self.prompt).groups()
        return range(int(first), int(last) + 1)

    @property
    def is_openai(self) -> bool:
        return self.path.endswith("/chat/completions")

    @property
    def is_asked_again(self) -> bool:
        """Whether an answer and its error stand in the conversation."""
        return sum(message["role"] == "user" for message in self.body["messages"]) > 1

    def share(self, salt: str = "") -> float:
        """Return a number in [0, 1) that depends on the prompt alone."""
        digest = hashlib.blake2b((salt + self.prompt).encode(), digest_size=4).digest()
        return int.from_bytes(digest) / 2**32


@dataclass(frozen=True, kw_only=True)
class Reaction:
    """What goes back on the wire."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay_seconds: float = 0.0
    part: float = 1.0
    """Share of the body that is sent before the connection is dropped; 0 sends nothing at all."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A turn and what came of it."""

    turn: Turn
    status: int
    delivered: bool

    @property
    def billed(self) -> bool:
        return self.status == 200


Script = Callable[[Turn], Reaction]


def label_of(step: int) -> str:
    """Return the label that the server gives a step."""
    return LABELS[step % 3]


def answer(
    turn: Turn,
    text: str | None = None,
    *,
    finish: str = "",
    refusal: str | None = None,
    **usage: int,
) -> Reaction:
    """Return an answer in the format of the request: by default the right labels."""
    if text is None:
        text = labels_text({step: label_of(step) for step in turn.steps})
    usage = {"prompt": 100, "completion": 10, "cached": 0, "written": 0} | usage
    value = _chat(turn, text, finish, refusal, usage)
    if not turn.is_openai:
        value = _message(text, finish, refusal, usage)
    return Reaction(body=json.dumps(value).encode())


def labels_text(labels: Mapping[Any, str]) -> str:
    """Return the text of an answer."""
    return json.dumps({"labels": {str(step): label for step, label in labels.items()}})


def problem(
    status: int, message: str = "no", *, code: str = "", param: str | None = None, **headers: str
) -> Reaction:
    """Return an error as both providers write it."""
    error = {"type": code or "error", "code": code or None, "param": param, "message": message}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reaction(status=status, headers=named, body=json.dumps({"error": error}).encode())


def limited(_turn: Turn | None = None, **headers: str) -> Reaction:
    """Return a rate limit."""
    return problem(429, "slow down", code="rate_limit_exceeded", **headers)


def dropped(_turn: Turn | None = None) -> Reaction:
    """Return no byte and close the connection."""
    return Reaction(part=0.0, status=0)


def half(turn: Turn) -> Reaction:
    """Return the right answer, cut in the middle of its body."""
    return replace(answer(turn), part=0.5)


def not_json(_turn: Turn | None = None) -> Reaction:
    """Return a body that is whole and no JSON."""
    return Reaction(status=200, body=b"<html>Bad gateway</html>")


def late(turn: Turn, seconds: float) -> Reaction:
    """Return the right answer late."""
    return replace(answer(turn), delay_seconds=seconds)


class ApiServer:
    """The server, in a thread of this process."""

    def __init__(
        self,
        script: Script = answer,
        *,
        models: Sequence[Mapping[str, Any]] = ({"id": MODEL},),
        keep: bool = True,
    ) -> None:
        """Choose the reactions and the models that it lists; `keep` turns for the test."""
        self.script = script
        self.models = list(models)
        self.models_status = 200
        self.turns: list[Answered] = []
        self.most_in_flight = 0
        self.port = 0
        self._keep = keep
        self._numbers: Counter[str] = Counter()
        self._num_turns = 0
        self._in_flight = 0
        self._connections: set[asyncio.Transport] = set()
        self._loop = asyncio.new_event_loop()
        self._place: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="api-server")

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._place is not None:
            self._place.close()

    @property
    def openai_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def anthropic_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Close the port and drop every connection, as a server that dies."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()

    def restart(self) -> None:
        """Open the same port again."""
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def billed(self) -> Counter[str]:
        """Return how often each prompt was answered with status 200 in whole."""
        return Counter(each.turn.prompt for each in self.turns if each.billed and each.delivered)

    async def _open(self) -> None:
        if self._place is None:
            self._place = _kept_place()
            self.port = self._place.getsockname()[1]
        self._server = await self._loop.create_server(
            lambda: _Connection(self), "127.0.0.1", self.port, backlog=1024, reuse_port=True
        )

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for transport in tuple(self._connections):
            transport.abort()
        await asyncio.sleep(0)

    def turn_of(self, path: str, headers: Mapping[str, str], body: bytes) -> Turn:
        """Return a request for an answer as a turn."""
        value = json.loads(body)
        content = next(each for each in value["messages"] if each["role"] == "user")["content"]
        if not isinstance(content, str):
            content = "".join(block["text"] for block in content)
        turn = Turn(
            number=self._num_turns,
            path=path,
            headers=headers,
            body=value,
            prompt=content,
            asked=self._numbers[content],
            in_flight=self._in_flight,
        )
        self._num_turns += 1
        if self._keep:
            self._numbers[content] += 1
        return turn

    def listed(self, path: str) -> Reaction:
        """Return the list of models, or one of them."""
        if self.models_status != 200:
            return problem(self.models_status)
        name = path.partition("/models")[2].strip("/").partition("?")[0]
        if not name:
            value = {"object": "list", "data": self.models}
            return Reaction(body=json.dumps(value).encode())
        found = next((model for model in self.models if model["id"] == name), None)
        if found is None:
            return problem(404, f"model: {name}", code="not_found_error")
        return Reaction(body=json.dumps({"type": "model", "display_name": name, **found}).encode())


def _kept_place() -> socket.socket:
    """Return what holds a free port, and refuses connections where nobody else listens there.

    A server that is dead for a while would lose its port to whoever asks for a free one.
    """
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # once it is ours alone
    return place


class _Connection(asyncio.Protocol):
    """One kept-alive HTTP/1.1 connection; requests one after the other, with Content-Length."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.buffer = b""
        self.transport: Any = None
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        if self.server._server is None:  # it was accepted while the server died
            self.transport.abort()
        self.server._connections.add(self.transport)

    def connection_lost(self, _error: Exception | None) -> None:
        self.server._connections.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, mark, rest = self.buffer.partition(b"\r\n\r\n")
        if not mark:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1)[:1] + line.split(": ", 1)[1:] for line in lines)
        size = int(headers.get("content-length", 0))
        if len(rest) < size:
            return
        self.buffer = rest[size:]
        method, path, _ = first.split(" ", 2)
        if method == "GET":
            self.send(self.server.listed(path), None)
            return
        server = self.server
        server._in_flight += 1
        server.most_in_flight = max(server.most_in_flight, server._in_flight)
        turn = server.turn_of(path, headers, rest[:size])
        reaction = server.script(turn)
        if reaction.delay_seconds:
            server._loop.call_later(reaction.delay_seconds, self.send, reaction, turn)
        else:
            self.send(reaction, turn)

    def send(self, reaction: Reaction, turn: Turn | None) -> None:
        closed = self.transport.is_closing()
        if turn is not None:
            self.server._in_flight -= 1
            if self.server._keep:
                delivered = reaction.part == 1.0 and not closed
                self.server.turns.append(
                    Answered(turn=turn, status=reaction.status, delivered=delivered)
                )
        if closed:
            return
        if not reaction.part:
            self.transport.abort()
            return
        size = len(reaction.body)
        named = {"content-type": "application/json", "content-length": str(size)}
        lines = "".join(
            f"{name}: {value}\r\n" for name, value in (named | {**reaction.headers}).items()
        )
        head = f"HTTP/1.1 {reaction.status} Because\r\n{lines}\r\n".encode()
        self.transport.write(head + reaction.body[: int(size * reaction.part)])
        if reaction.part < 1:
            self.transport.close()


def _chat(
    turn: Turn, text: str, finish: str, refusal: str | None, usage: Mapping[str, int]
) -> dict[str, Any]:
    logprobs = None
    if turn.is_openai and turn.body.get("logprobs"):
        logprobs = {"content": [_logprob(piece) for piece in re.findall(r"\w+|\W", text)]}
    return {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": refusal},
                "finish_reason": finish or "stop",
                "logprobs": logprobs,
            }
        ],
        "usage": {
            "prompt_tokens": usage["prompt"],
            "completion_tokens": usage["completion"],
            "prompt_tokens_details": {"cached_tokens": usage["cached"]},
        },
    }


def _logprob(piece: str) -> dict[str, Any]:
    others = [piece, *(label for label in LABELS if label != piece and piece in LABELS)]
    return {
        "token": piece,
        "logprob": -0.5,
        "bytes": list(piece.encode()),
        "top_logprobs": [{"token": other, "logprob": -0.5 - at} for at, other in enumerate(others)],
    }


def _message(
    text: str, finish: str, refusal: str | None, usage: Mapping[str, int]
) -> dict[str, Any]:
    reason = {"length": "max_tokens", "": "end_turn"}.get(finish, finish)
    return {
        "type": "message",
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": '{"labels": {"0": "harmful"}}', "signature": "x"},
            {"type": "text", "text": text},
        ],
        "stop_reason": "refusal" if refusal else reason,
        "stop_details": {"type": "refusal", "explanation": refusal} if refusal else None,
        "usage": {
            "input_tokens": usage["prompt"] - usage["cached"] - usage["written"],
            "cache_read_input_tokens": usage["cached"],
            "cache_creation_input_tokens": usage["written"],
            "output_tokens": usage["completion"],
        },
    }


if __name__ == "__main__":
    cached: dict[bool, Reaction] = {}

    def at_once(turn: Turn) -> Reaction:
        return cached.get(turn.is_openai) or cached.setdefault(turn.is_openai, answer(turn))

    with ApiServer(at_once, keep=False) as running:
        print(running.port, flush=True)  # noqa: T201
        sys.stdin.read()
