"""Worker process of the vLLM critic: one engine, fed over a socket, answering as replies finish.

    python -m srft_prep.critic.engine.vllm_worker SOCKET_FD PARENT_PID

The engine runs in this process and is stepped by hand, with more requests waiting than it works on
at a time, so that its batch stays full. Only the tokens that can begin a label are scored at each
place (13 of Qwen2.5's 151,643), and text is decoded once, at the end. One run on a busy 2-core CPU,
80 requests to a tiny model: 12.4 s without scores, 16.2 s so, 18.2 s with the 20 likeliest tokens.

What the parent sends: a greeting {model, context_tokens, engine_args, revision}, then requests {id,
prompt_ids, max_tokens, temperature, schema}, or {abort}. What it gets: {ready: [requests, tokens]}
or {ends, config}, then for each request {id, text, tokens, ...} or {id, rejected} or {id, failed}.
"""

import os
import select
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from srft_prep.critic.engine.frames import Channel, frame_of
from srft_prep.critic.engine.guardian import continue_under_guard
from srft_prep.critic.engine.label_tokens import label_token_ids, pieces_of
from srft_prep.errors import in_one_line

if TYPE_CHECKING:
    from vllm import RequestOutput

WAITING: Final = 1.25
"""Requests in the engine's hands, as a multiple of what it works on at a time."""
CPU_CACHE_BYTES: Final = 256 << 20
"""Least memory of the key-value cache on a CPU; unasked, vLLM takes nearly all there is."""


def main() -> None:
    """Serve until the parent closes the socket."""
    channel_fd, parent_id = int(sys.argv[1]), int(sys.argv[2])
    continue_under_guard(parent_id, channel_fd=channel_fd)
    channel = Channel(socket.socket(fileno=channel_fd))
    status = 0
    try:
        serve(channel)
    except Exception as error:  # noqa: BLE001 - whatever the engine raises, the parent is told
        import traceback

        traceback.print_exc()
        channel.send(
            frame_of({"ends": f"{type(error).__name__}: {in_one_line(error, limit=1000)}"})
        )
        status = 1
    while channel.unsent_bytes and channel.is_open:
        select.select([], [channel], [])
        channel.flush()
    sys.stderr.flush()
    os._exit(status)  # an engine that is torn down in order takes seconds, or hangs


def serve(channel: Channel) -> None:
    """Start the engine and answer until the parent is gone."""
    waiting = _messages(channel)
    engine = Engine(next(waiting))
    channel.send(frame_of({"ready": [engine.window, engine.window_tokens]}))
    while channel.is_open:
        if not engine.is_busy or channel.unsent_bytes:
            writing = [channel] if channel.unsent_bytes else []
            select.select([channel], writing, [], 0 if engine.is_busy else None)
            channel.flush()
        for message in channel.receive():
            if "abort" in message:
                engine.abort()
            elif refusal := engine.add(message):
                channel.send(frame_of(refusal))
        if engine.is_busy:
            for answer in engine.step():
                channel.send(frame_of(answer))


def _messages(channel: Channel) -> Iterator[Any]:
    """Yield what comes until the other side is gone; wait for it."""
    while channel.is_open:
        select.select([channel], [], [])
        yield from channel.receive()


class Engine:
    """A vLLM engine in this process."""

    def __init__(self, greeting: Mapping[str, Any]) -> None:
        """Load the model."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        llm = LLM(**engine_settings(greeting))
        self._engine = llm.llm_engine
        config = self._engine.vllm_config
        tokenizer = llm.get_tokenizer()
        self._tokenizer = tokenizer
        self._label_ids = label_token_ids(tokenizer)
        self._reasoner = _reasoner(config, tokenizer)
        blocks, block_size = config.cache_config.num_gpu_blocks, config.cache_config.block_size
        self.window = int(config.scheduler_config.max_num_seqs * WAITING) + 1
        """Requests that it takes at a time."""
        self.window_tokens = int(blocks * block_size * WAITING) + (
            2 * config.scheduler_config.max_num_batched_tokens
        )
        """Tokens of all those together: what the cache holds, and what waits for it."""
        self._in_flight: dict[str, int] = {}
        """Request -> prompt tokens."""
        self._num_tokens = 0
        self._unpaid_seconds = 0.0
        """Time that the engine was busy with requests that are still in flight."""

    @property
    def is_busy(self) -> bool:
        """Whether a request is in flight."""
        return bool(self._in_flight)

    def add(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take a request; return an answer only if the engine refuses it."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        started = time.perf_counter()
        name = str(message["id"])
        ids: list[int] = message["prompt_ids"]
        try:
            self._engine.add_request(
                name,
                TokensPrompt(prompt_token_ids=ids),
                SamplingParams(
                    temperature=message["temperature"],
                    max_tokens=message["max_tokens"],
                    structured_outputs=StructuredOutputsParams(json=message["schema"]),
                    logprob_token_ids=self._label_ids or None,
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                ),
            )
        except (ValueError, VLLMClientError) as error:
            return {"id": message["id"], "rejected": in_one_line(error, limit=1000)}
        self._in_flight[name] = len(ids)
        self._num_tokens += len(ids)
        self._unpaid_seconds += time.perf_counter() - started
        return None

    def step(self) -> list[dict[str, Any]]:
        """Let the engine work for one step; return the answers to requests that it finished."""
        started = time.perf_counter()
        finished = [
            output
            for output in self._engine.step()
            if output.finished and output.request_id in self._in_flight
        ]
        answers = [self._answer(output) for output in finished]
        self._unpaid_seconds += time.perf_counter() - started
        for output, answer in zip(finished, answers, strict=True):
            answer["seconds"] = self._pay(output.request_id)
        return answers

    def abort(self) -> None:
        """Drop all requests."""
        self._engine.abort_request(list(self._in_flight))
        self._in_flight.clear()
        self._num_tokens = 0
        self._unpaid_seconds = 0.0

    def _pay(self, name: str) -> float:
        """Return a finished request's part of the busy time: by its tokens among those in flight.

        The parts of all add up to the busy time, because the last one gets what is left.
        """
        num_tokens = self._in_flight.pop(name)
        share = num_tokens / self._num_tokens if self._in_flight else 1.0
        seconds = self._unpaid_seconds * share
        self._num_tokens -= num_tokens
        self._unpaid_seconds -= seconds
        return seconds

    def _answer(self, output: "RequestOutput") -> dict[str, Any]:
        (completion,) = output.outputs
        answer: dict[str, Any] = {
            "id": int(output.request_id),
            "cached_tokens": output.num_cached_tokens or 0,
            "completion_tokens": len(completion.token_ids),
        }
        if completion.finish_reason not in ("stop", "length"):
            return {**answer, "failed": f"the engine ended it with {completion.finish_reason!r}"}
        ids = list(completion.token_ids)
        start = self._thoughts_end(ids)
        scores: list[Sequence[tuple[int, float]]] = [()] * (len(ids) - start)
        flat = completion.logprobs
        if flat is not None and self._label_ids:
            known = set(self._label_ids)
            for place, token_id in enumerate(ids[start:], start=start):
                if token_id in known:
                    span = slice(flat.start_indices[place], flat.end_indices[place])
                    pairs = zip(flat.token_ids[span], flat.logprobs[span], strict=True)
                    scores[place - start] = list(pairs)
        text, tokens = pieces_of(self._tokenizer, ids[start:], scores)
        return {
            **answer,
            "text": text,
            "tokens": tokens,
            "cut": completion.finish_reason == "length",
        }

    def _thoughts_end(self, ids: list[int]) -> int:
        """Return where a model's answer begins after its thoughts, in tokens; 0 if it has none."""
        if self._reasoner is None:
            return 0
        content = list(self._reasoner.extract_content_ids(ids))
        start = len(ids) - len(content)
        return start if content and ids[start:] == content else 0


def engine_settings(greeting: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM`: what is best for labels, and over it the user's."""
    from vllm.platforms import current_platform

    given: dict[str, Any] = greeting["engine_args"]
    structured = {"backend": "xgrammar", "disable_any_whitespace": True}
    settings: dict[str, Any] = {
        "model": greeting["model"],
        "max_model_len": greeting["context_tokens"],
        "enable_prefix_caching": True,
        **greeting["revision"],
    }
    if current_platform.is_cpu():
        cache_bytes = max(CPU_CACHE_BYTES, 2 * greeting["context_tokens"] * greeting["token_bytes"])
        settings |= {"kv_cache_memory_bytes": cache_bytes, "enforce_eager": True, "block_size": 32}
        # Logits serve as well: what all tokens have in common cancels out among three labels.
        settings |= {"dtype": "bfloat16", "logprobs_mode": "processed_logits"}
    else:
        settings |= {"max_num_batched_tokens": 16_384, "max_num_seqs": 1024}
    structured |= given.get("structured_outputs_config", {})
    return {**settings, **given, "structured_outputs_config": structured}


def _reasoner(config: Any, tokenizer: Any) -> Any:
    """Return the parser that tells a model's thoughts from its answer; None if it has none."""
    name = config.structured_outputs_config.reasoning_parser
    if not name:
        return None
    from vllm.reasoning import ReasoningParserManager

    return ReasoningParserManager.get_reasoning_parser(name)(tokenizer)


if __name__ == "__main__":
    main()
