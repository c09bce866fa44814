"""What asking over an API costs this machine: the critics against a server that answers at once.

    python benchmarks/client_overhead.py [--requests 2000] [--rounds 3] [--kib 20]

The server runs in a process of its own; everything measured is pinned to one core. The ceiling is
a bare loop over the same POSTs, in the same run, by the HTTP library that the official clients are
built on. The last line is one JSON document.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import httpx2
import orjson

from srft_prep.critic import CriticRequest, Question
from srft_prep.critic.anthropic import anthropic_critic
from srft_prep.critic.api.critic import ApiCritic
from srft_prep.critic.openai import OpenAIWire, openai_critic
from srft_prep.critic.prompt import load_prompt
from srft_prep.critic.question import QuestionSettings
from srft_prep.types import Message, Trajectory

ROOT = Path(__file__).parents[1]
MODEL = "critic-1"
IN_FLIGHT = 64
TARGET_PER_SECOND = 300
SETTINGS = QuestionSettings(prompt=load_prompt(ROOT / "prompts" / "step_critic.md"))


def main() -> None:
    """Measure and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kib", type=int, default=20, help="size of a prompt")
    options = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = os.environ["ANTHROPIC_API_KEY"] = "none"
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    with subprocess.Popen(
        [sys.executable, "-m", "tests.critic.api_server"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, {cores[-1]}),
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        try:
            _measure(url, options.requests, options.rounds, options.kib << 10)
        finally:
            server.stdin.close()


def _measure(url: str, count: int, rounds: int, prompt_bytes: int) -> None:
    openai = openai_critic(model=MODEL, settings=SETTINGS, base_urls=(f"{url}/v1",))
    anthropic = anthropic_critic(model=MODEL, settings=SETTINGS, base_urls=(url,))

    def label(critic: ApiCritic) -> Callable[[int], None]:
        def ask(number: int) -> None:
            failures = [
                reply.failure
                for reply in critic.label(_requests(number, prompt_bytes))
                if reply.failure
            ]
            assert not failures, failures[0]

        return ask

    ways: dict[str, Callable[[int], None]] = {
        "bare httpx2 (ceiling)": lambda number: asyncio.run(_bare(url, number, prompt_bytes)),
        "openai critic": label(openai),
        "anthropic critic": label(anthropic),
    }
    per_second: dict[str, list[float]] = {name: [] for name in ways}
    for ask in ways.values():
        ask(count)
    before = _peak_mib()
    for _ in range(rounds):
        for name, ask in ways.items():
            started = time.perf_counter()
            ask(count)
            per_second[name].append(count / (time.perf_counter() - started))
    growth = _peak_mib() - before
    openai.close()
    anthropic.close()
    ceiling = statistics.median(per_second["bare httpx2 (ceiling)"])
    print(
        f"{count} requests of {prompt_bytes >> 10} KiB, {rounds} rounds, one core of "
        f"{os.cpu_count()} ({platform.machine()}), Python {platform.python_version()}, "
        f"openai {version('openai')}, anthropic {version('anthropic')}"
    )
    print(f"{'':24}{'requests/s':>12}{'spread':>16}{'of ceiling':>12}")
    for name, values in per_second.items():
        middle = statistics.median(values)
        spread = f"{min(values):.0f} to {max(values):.0f}"
        print(f"{name:24}{middle:12.0f}{spread:>16}{middle / ceiling:12.0%}")
    print(f"peak memory grew by {growth:.1f} MiB to {_peak_mib():.0f} MiB in the rounds measured")
    medians = {name: statistics.median(values) for name, values in per_second.items()}
    slowest = min(medians["openai critic"], medians["anthropic critic"])
    print(
        json.dumps(
            {
                "benchmark": "client_overhead",
                "requests": count,
                "rounds": rounds,
                "prompt_bytes": prompt_bytes,
                "per_second": {name: round(value, 1) for name, value in medians.items()},
                "peak_growth_mib": round(growth, 1),
                "target_per_second": TARGET_PER_SECOND,
                "reached": slowest >= TARGET_PER_SECOND,
            }
        )
    )


def _requests(count: int, prompt_bytes: int) -> Iterator[CriticRequest]:
    """Yield requests with prompts of their own, made one by one as a run does."""
    steps = tuple(range(10))
    names = [str(step) for step in steps]
    label = {"type": "string", "enum": ["good", "unnecessary", "harmful"]}
    labels = {
        "type": "object",
        "properties": dict.fromkeys(names, label),
        "required": names,
        "additionalProperties": False,
    }
    schema = {"type": "object", "properties": {"labels": labels}, "required": ["labels"]}
    action = Message(role="assistant", kind="action", content="ls")
    owner = Trajectory(
        trajectory_id="t", instance_id="t", format="messages", messages=(action,) * len(steps)
    )
    for number in range(count):
        question = Question(
            system="Judge.",
            shared=f"Trajectory {number}: ".ljust(prompt_bytes, "x"),
            rest="Label the steps 0 to 9.",
            schema=schema,
            prompt_tokens=prompt_bytes // 4,
            output_tokens=100,
            max_output_tokens=200,
        )
        yield CriticRequest.of(owner, question=question)


async def _bare(url: str, count: int, prompt_bytes: int) -> None:
    """Send the openai critic's bodies and parse what comes back, nothing more."""
    wire = OpenAIWire(model=MODEL, settings=SETTINGS)
    bodies = (
        orjson.dumps(
            wire.body(each, each.question, hosted=False, structured=True, without=frozenset())
        )
        for each in _requests(count, prompt_bytes)
        if each.question
    )
    limits = httpx2.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
    async with httpx2.AsyncClient(limits=limits, timeout=60.0) as client:

        async def work() -> None:
            for body in bodies:
                response = await client.post(
                    f"{url}/v1/chat/completions",
                    content=body,
                    headers={"Content-Type": "application/json"},
                )
                orjson.loads(response.content)

        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
