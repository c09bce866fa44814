"""What it costs to label 1,000 trajectories: APIs by the token, local models by the GPU hour.

The questions are the ones that `label` asks (the same planner and prompt), about real runs; their
tokens are counted with a real tokenizer, the same for all models, and an answer is one label a step
in the JSON that is asked for. Nothing is sent anywhere. Beside it stands what the paper paid:
$660 for 5,000 trajectories with Claude Sonnet 4, $132 for 1,000 (section 4).

    columns   what they are
    live      every request by itself, nothing cached
    batch     the provider's batch job, where it has one
    local     by the model's operations at 22% to 55% of what the GPU can do (models.py): computed

Uses ../shared/data where it is there, else the runs that come with the package. The last line is
one JSON document.
"""

import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import orjson

from srft_prep.config import IngestConfig
from srft_prep.critic import CriticRequest
from srft_prep.critic.encoding import TextEncoder
from srft_prep.critic.flops import request_flops
from srft_prep.critic.models import MFU, Row, load_rows
from srft_prep.critic.pricing import Price, load_prices
from srft_prep.critic.prompt import load_prompt
from srft_prep.critic.question import Planner, QuestionSettings
from srft_prep.ingest import ingest
from srft_prep.records import discover
from srft_prep.trajectories import read_trajectories
from srft_prep.types import Trajectory

REPOSITORY: Final = Path(__file__).resolve().parents[1]
SHARED: Final = REPOSITORY.parent / "shared" / "data"
EXAMPLES: Final = REPOSITORY / "srft_prep" / "examples"
PAPER_USD: Final = 132.0
"""For 1,000 trajectories: $660 for 5,000 (the paper, section 4)."""
API_TOKENS: Final = 200_000
"""Longest prompt sent to an API: what all models of the price table take."""
RATIONALE: Final = (
    "The edit removes the check that the failing test needs, and nothing replaces it."
)
"""A sentence of the length that is asked for."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The size of one request."""

    prompt_tokens: int
    completion_tokens: int
    prompt_bytes: int


@click.command()
@click.option("--usd-per-gpu-hour", default=3.0, show_default=True, help="Price of one GPU hour.")
@click.option("--rationale", is_flag=True, help="Ask for a sentence on every step.")
@click.option("--only", default="", help="Only models whose name contains this.")
def main(usd_per_gpu_hour: float, rationale: bool, only: str) -> None:
    """Count the tokens of the questions and print what they cost."""
    source = SHARED / "trajectories" if SHARED.is_dir() else EXAMPLES / "runs"
    tokenizer = SHARED / "tokenizers" / "qwen2.5-coder-instruct"
    encoder = TextEncoder(str(tokenizer if SHARED.is_dir() else EXAMPLES / "tokenizer"))
    settings = QuestionSettings(
        prompt=load_prompt(REPOSITORY / "prompts" / "step_critic.md"), rationale=rationale
    )
    trajectories = read(source)
    requests = sizes_of(trajectories, settings, encoder, API_TOKENS)
    per_1000 = 1000 / len(trajectories)
    prompts = [each.prompt_tokens for each in requests]
    facts = {
        "trajectories": len(trajectories),
        "steps": sum(each.num_steps for each in trajectories),
        "requests": len(requests),
        "prompt_tokens_mean": statistics.mean(prompts),
        "prompt_tokens_median": statistics.median(prompts),
        "completion_tokens_mean": statistics.mean(each.completion_tokens for each in requests),
        "bytes_per_token": sum(each.prompt_bytes for each in requests) / sum(prompts),
        "bytes_per_token_lowest_5%": statistics.quantiles(
            (each.prompt_bytes / each.prompt_tokens for each in requests), n=20
        )[0],
    }
    click.echo(", ".join(f"{name} {value:,.6g}" for name, value in facts.items()))
    apis = [
        api_row(model, price, requests, per_1000)
        for model, price in load_prices().items()
        if only in model
    ]
    click.echo(f"\n{'API':22}{'live $/1,000':>14}{'batch $/1,000':>15}{'live / paper':>14}")
    for row in apis:
        batch = "-" if row["batch_usd"] is None else f"{row['batch_usd']:.2f}"
        share = row["live_usd"] / PAPER_USD
        click.echo(f"{row['model']:22}{row['live_usd']:14.2f}{batch:>15}{share:13.2f}x")
    click.echo(f"{'the paper (Sonnet 4)':22}{PAPER_USD:14.2f}{'-':>15}{1:13.2f}x")
    rows = [row for row in load_rows() if only in row.model]
    contexts = {int(row.engine_args["max_model_len"]) for row in rows}
    windowed = {
        context: sizes_of(trajectories, settings, encoder, context) for context in sorted(contexts)
    }
    local = [
        local_row(row, windowed[int(row.engine_args["max_model_len"])], per_1000, usd_per_gpu_hour)
        for row in rows
    ]
    click.echo(f"\n{'local, computed':62}{'requests':>9}{'GPU hours/1,000':>18}{'$/1,000':>16}")
    for found in local:
        hours, usd = found["gpu_hours"], found["usd"]
        click.echo(
            f"{found['machine'] + ' ' + found['model']:62}{found['requests']:9}"
            f"{f'{hours[0]:.2f} - {hours[1]:.2f}':>18}{f'{usd[0]:.2f} - {usd[1]:.2f}':>16}"
        )
    document = {
        "benchmark": "label_cost",
        "paper_usd": PAPER_USD,
        "usd_per_gpu_hour": usd_per_gpu_hour,
        "rationale": rationale,
        **facts,
        "apis": apis,
        "local": local,
    }
    click.echo(orjson.dumps(document))


def read(source: Path) -> list[Trajectory]:
    """Return the trajectories of raw runs that have steps."""
    files = [str(path) for path in discover([str(source)])]
    with tempfile.TemporaryDirectory() as folder:
        parts = ingest(files, Path(folder) / "trajectories", IngestConfig()).parts
        return [each for each in read_trajectories(parts) if each.num_steps]


def sizes_of(
    trajectories: Iterable[Trajectory],
    settings: QuestionSettings,
    encoder: TextEncoder,
    context_tokens: int,
) -> list[Sizes]:
    """Return the size of every request about some trajectories, planned for one context."""
    planner = Planner(
        settings, encoder, max_input_tokens=context_tokens, context_tokens=context_tokens
    )
    found = []
    for trajectory in trajectories:
        planned = planner.plan(trajectory)
        answers = encoder.count([answer(each, settings) for each in planned])
        for request, completion in zip(planned, answers, strict=True):
            question = request.question
            assert question is not None
            num_bytes = len((question.system + question.user).encode())
            found.append(Sizes(question.prompt_tokens, completion, num_bytes))
    return found


def answer(request: CriticRequest, settings: QuestionSettings) -> str:
    """Return an answer to a request, as short as JSON goes."""
    entry: Any = {"rationale": RATIONALE, "label": "good"} if settings.rationale else "good"
    return orjson.dumps({"labels": {str(step): entry for step in request.steps}}).decode()


def api_row(model: str, price: Price, requests: Sequence[Sizes], per_1000: float) -> dict[str, Any]:
    """Return what the requests cost at an API, for 1,000 trajectories."""
    live, batch = (
        per_1000
        * sum(
            price.usd(
                prompt_tokens=each.prompt_tokens,
                completion_tokens=each.completion_tokens,
                batch=batch,
            )
            for each in requests
        )
        for batch in (False, True)
    )
    batch_usd = batch if price.batch_factor < 1 else None
    return {"model": model, "live_usd": live, "batch_usd": batch_usd}


def local_row(
    row: Row, requests: Sequence[Sizes], per_1000: float, usd_per_gpu_hour: float
) -> dict[str, Any]:
    """Return what a local model takes for 1,000 trajectories, fastest first."""
    flops = per_1000 * request_flops(
        row.shape, [(each.prompt_tokens, 0, each.completion_tokens) for each in requests]
    )
    hours = [row.gpu_hours(flops, mfu) for mfu in reversed(MFU)]
    return {
        "machine": row.machine,
        "model": row.model,
        "requests": len(requests),
        "pflop": flops / 1e15,
        "gpu_hours": hours,
        "usd": [usd_per_gpu_hour * each for each in hours],
    }


if __name__ == "__main__":
    main()
