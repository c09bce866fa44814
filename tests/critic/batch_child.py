"""A labelling run over batches as a program of its own, to be killed: `main` below.

Like `label`, it asks only what its ledger does not hold, and commits each reply at once.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from srft_prep.critic import CriticReply, CriticRequest, Question
from srft_prep.critic.anthropic import request_body as anthropic_body
from srft_prep.critic.batch.anthropic import AnthropicBatches
from srft_prep.critic.batch.driver import label_in_batches
from srft_prep.critic.batch.journal import custom_id_of
from srft_prep.critic.batch.openai import OpenAIBatches
from srft_prep.critic.batch.provider import BatchProvider, BatchSettings
from srft_prep.critic.budget import Budget
from srft_prep.critic.openai import request_body as openai_body
from srft_prep.critic.pricing import Price
from srft_prep.critic.prompt import load_prompt
from srft_prep.critic.question import QuestionSettings

CRITIC = {"critic_id": "judge@1", "prompt_hash": "f00d"}
PRICE = Price(input=2.0, output=8.0, cached_input=0.5, cache_write=2.0, batch_factor=0.5)
PROMPTS = Path(__file__).resolve().parents[2] / "prompts"


def provider_of(name: str, url: str) -> BatchProvider:
    """Return the real adapter of a provider, for a server on loopback."""
    settings = QuestionSettings(prompt=load_prompt(next(iter(sorted(PROMPTS.glob("*.md"))))))
    if name == "openai":
        body = partial(openai_body, model="gpt-judge", settings=settings)
        return OpenAIBatches(body=body, base_url=f"{url}/v1", timeout_seconds=120)
    body = partial(anthropic_body, model="claude-judge", settings=settings)
    return AnthropicBatches(body=body, base_url=url, timeout_seconds=120)


def request_of(number: int, *, fate: str = "good", padding: int = 0) -> CriticRequest:
    """Return a request about three steps of a trajectory."""
    return CriticRequest(
        trajectory_id=f"run-{number}",
        content_hash=f"{number:016x}",
        part="all",
        steps=(0, 1, 2),
        question=Question(
            system="Judge the steps.",
            shared=f"Task {number}. " + "x" * padding,
            rest=f"steps=0,1,2 fate={fate}",
            schema={
                "type": "object",
                "properties": {"labels": {"type": "object", "properties": {}}},
                "required": ["labels"],
            },
            prompt_tokens=1000,
            max_output_tokens=100,
            output_tokens=30,
        ),
    )


def id_of(request: CriticRequest) -> str:
    return custom_id_of(request, **CRITIC)


def settings_of(**changes: Any) -> BatchSettings:
    return BatchSettings(**{"poll_seconds": 0.02, "settle_seconds": 0.2, **changes})


def run(
    requests: Iterator[CriticRequest] | list[CriticRequest],
    provider: BatchProvider,
    journal: Path,
    budget: Budget | None = None,
    **changes: Any,
) -> Iterator[CriticReply]:
    return label_in_batches(
        requests,
        provider=provider,
        journal=journal,
        price=PRICE,
        budget=budget,
        settings=settings_of(**changes),
        **CRITIC,
    )


def committed(ledger: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a ledger."""
    lines = ledger.read_bytes().split(b"\n")[:-1] if ledger.exists() else []
    return [orjson.loads(line) for line in lines]


def main(name: str, url: str, folder: str, num_requests: str, max_requests: str) -> None:
    """Label the requests 0 to num_requests - 1 that the ledger does not hold."""
    ledger = Path(folder) / "ledger.jsonl"
    held = {entry["id"] for entry in committed(ledger)}
    asked = (request_of(number) for number in range(int(num_requests)))
    missing = (request for request in asked if id_of(request) not in held)
    provider = provider_of(name, url)
    journal = Path(folder) / "batches.jsonl"
    with ledger.open("ab") as file:
        for reply in run(missing, provider, journal, max_requests=int(max_requests)):
            entry = {"id": id_of(reply.request), "failure": reply.failure, "usd": reply.usd}
            file.write(orjson.dumps(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())
    provider.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
