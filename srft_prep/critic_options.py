"""The options of `label` that choose and set up a critic, and the critic that they make.

Which options a critic takes is one table; one given for a critic that has no use for it is refused,
never ignored.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from srft_prep.errors import ConfigError
from srft_prep.options import FILE, MAX_COUNT

MODEL_CRITICS: Final = ("vllm", "transformers", "openai", "anthropic")
API_CRITICS: Final = ("openai", "anthropic")
LOCAL_CRITICS: Final = ("vllm", "transformers")
CRITIC_NAMES: Final = ("rules", *MODEL_CRITICS, "scripted")

TAKES: Final[dict[str, tuple[str, ...]]] = {
    "model": (*MODEL_CRITICS, "scripted"),
    "prompt": MODEL_CRITICS,
    "rationale": MODEL_CRITICS,
    "votes": MODEL_CRITICS,
    "reasoning": MODEL_CRITICS,
    "context": ("rules", *MODEL_CRITICS),
    "max_input_tokens": MODEL_CRITICS,
    "base_url": API_CRITICS,
    "tokenizer": API_CRITICS,
    "concurrency": API_CRITICS,
    "timeout": API_CRITICS,
    "batch": API_CRITICS,
    "prices": API_CRITICS,
    "device": ("transformers",),
    "gpus": ("vllm",),
    "engine_arg": ("vllm",),
    "gpu_usd_per_hour": LOCAL_CRITICS,
    "budget_usd": MODEL_CRITICS,
    "dry_run": CRITIC_NAMES,
}
"""Option -> the critics that take it."""

_MAX_VOTES: Final = 100


def critic_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose and set up a critic to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def _finite(_context: click.Context, _parameter: click.Parameter, value: float | None) -> Any:
    """Refuse a number that is none: no comparison with it holds, so that no range refuses it."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"expected a number, got {value}")
    return value


_OPTIONS: Final = (
    click.option(
        "--critic",
        "critic_name",
        type=click.Choice((*CRITIC_NAMES, "auto")),
        default="rules",
        show_default=True,
        help="Who judges the steps: rules needs no model; vllm and transformers run one here; "
        "openai (any compatible server) and anthropic ask one; scripted takes labels from a file. "
        "auto: vllm where a GPU and vllm are here, with the model recommended for its memory, else "
        "rules.",
    ),
    click.option(
        "--model",
        metavar="NAME",
        help="vllm, transformers: folder or hub id. openai, anthropic: the model's name. scripted: "
        "JSONL or CSV of labels.",
    ),
    click.option(
        "--prompt",
        type=FILE,
        help="The question, a Markdown file; by default prompts/step_critic.md.",
    ),
    click.option("--rationale", is_flag=True, help="Ask for a sentence on every step, too."),
    click.option(
        "--votes",
        type=click.IntRange(1, _MAX_VOTES),
        default=1,
        show_default=True,
        help="Ask every question N times at temperature 1; label probabilities are the mean, and "
        "of equally likely labels the more severe one counts.",
    ),
    click.option(
        "--reasoning",
        type=click.Choice(["none", "low", "medium", "high"]),
        default="none",
        show_default=True,
        help="How much a reasoning model may think before it answers.",
    ),
    click.option(
        "--context",
        type=click.Choice(["none", "outcome", "patch"]),
        default="none",
        show_default=True,
        help="What the critic is told beside the trajectory: nothing, as in the paper; whether it "
        "was resolved; or that and the run's final patch. To the rules, outcome makes the last "
        "submission of an unresolved run harmful.",
    ),
    click.option(
        "--max-input-tokens",
        type=click.IntRange(1, MAX_COUNT),
        help="Longest prompt; longer trajectories are clipped, then asked about in windows. By "
        "default what the model takes.",
    ),
    click.option(
        "--base-url",
        multiple=True,
        metavar="URL",
        help="The API's address, with /v1 where it has it. Repeatable: several share the load.",
    ),
    click.option(
        "--tokenizer",
        metavar="PATH_OR_ID",
        help="openai, anthropic: counts prompts with this tokenizer instead of by their bytes.",
    ),
    click.option(
        "--concurrency",
        type=click.IntRange(1, 4096),
        default=256,
        show_default=True,
        help="Requests in flight to one address, at most; the number adapts to its limits.",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        callback=_finite,
        default=600.0,
        show_default=True,
        help="Seconds to wait for an answer.",
    ),
    click.option(
        "--batch",
        is_flag=True,
        help="Use the provider's batch API: half the price, up to 24 hours. A killed run finds its "
        "jobs again.",
    ),
    click.option(
        "--device",
        metavar="NAME",
        help="transformers: PyTorch's name of the device, such as cpu; by default a GPU if there "
        "is one.",
    ),
    click.option(
        "--gpus",
        type=click.IntRange(1, 1024),
        help="GPUs to use, one engine each (or for each group of tensor_parallel_size); by default "
        "all.",
    ),
    click.option(
        "--engine-arg",
        multiple=True,
        metavar="KEY=VALUE",
        help="An argument of vLLM's engine, such as tensor_parallel_size=2. Repeatable.",
    ),
    click.option(
        "--gpu-usd-per-hour",
        type=click.FloatRange(min=0),
        callback=_finite,
        default=0.0,
        show_default=True,
        help="What one GPU costs, for the cost columns and --budget-usd.",
    ),
    click.option("--prices", type=FILE, help="TOML table of prices instead of the package's."),
    click.option(
        "--budget-usd",
        type=click.FloatRange(min=0),
        callback=_finite,
        help="Stop before a request that could bring what this directory cost with this critic "
        "and question above it. Trajectories are taken in their order. GPU time is reckoned from "
        "the requests so far.",
    ),
    click.option(
        "--dry-run", is_flag=True, help="Print tokens, time and cost of what is to be asked; stop."
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenCritic:
    """A critic as chosen on the command line."""

    name: str
    options: dict[str, Any]
    """What `open_critic` takes."""
    values: Mapping[str, Any]
    """The options of the command line by their names."""


def settled_values(context: click.Context) -> dict[str, Any]:
    """Return a command's values with `auto` settled, and say how.

    Raises:
        click.UsageError: an option is given that the chosen critic does not take.
    """
    values: dict[str, Any] = dict(context.params)
    if values["critic_name"] == "auto":
        values |= _auto(values["model"], values["engine_arg"], num_gpus=values["gpus"])
    _refuse_foreign_options(context, values["critic_name"])
    return values


def _auto(
    model: str | None, engine_arg: tuple[str, ...], *, num_gpus: int | None
) -> dict[str, Any]:
    """Return the values of the best critic that can run here, and say in a line which that is."""
    from srft_prep.critic.hardware import gpus, has_module
    from srft_prep.critic.models import recommended_critic

    found = gpus()[:num_gpus]
    if not found or not has_module("vllm"):
        if not found:
            missing = "there is no GPU here"
        else:
            missing = "vllm is not installed (pip install 'srft-prep[vllm]')"
        unused = f"; --model {model} is not used" if model else ""
        click.echo(
            f"critic: rules, observable evidence only, because {missing}{unused}; a model behind "
            "an API: --critic openai or anthropic",
            err=True,
        )
        return {"critic_name": "rules", "model": None}
    machine = f"{len(found)} x {found[0].name}"
    if model is None:
        memory_bytes = min(gpu.memory_bytes for gpu in found)
        recommended = recommended_critic(memory_bytes, len(found))
        if recommended is None:
            raise ConfigError(
                f"--critic auto: no model of the table fits {machine} ({memory_bytes / 1e9:.0f} "
                "GB); give one with --model (docs/MODELS.md)"
            )
        model, arguments = recommended
        engine_arg = (*(f"{key}={value}" for key, value in arguments.items()), *engine_arg)
    click.echo(f"critic: vllm with {model} on {machine}", err=True)
    return {"critic_name": "vllm", "model": model, "engine_arg": engine_arg}


def _refuse_foreign_options(context: click.Context, name: str) -> None:
    for parameter in context.command.params:
        if parameter.name not in TAKES or name in TAKES[parameter.name]:
            continue
        source = context.get_parameter_source(parameter.name)
        if source is not click.core.ParameterSource.DEFAULT and not (
            parameter.name == "model" and context.params["critic_name"] == "auto"
        ):
            takers = ", ".join(TAKES[parameter.name])
            raise click.UsageError(
                f"{parameter.opts[0]}: the {name} critic takes none; those that do: {takers}"
            )


def chosen_critic(values: Mapping[str, Any], *, output: Path) -> ChosenCritic:
    """Return the critic of the command line's values.

    Raises:
        click.UsageError: `--model` is missing, or values do not go together.
        ConfigError: the prompt, the prices or an engine argument are wrong.
    """
    name, model = values["critic_name"], values["model"]
    options: dict[str, Any]
    if name == "rules":
        if values["context"] == "patch":
            raise click.UsageError("--context patch: the rules critic reads no patch")
        options = {"use_outcome": values["context"] == "outcome"}
        return ChosenCritic(name=name, options=options, values=values)
    if model is None:
        what = {"scripted": "the file of labels"}.get(name, "the model")
        raise click.UsageError(f"--critic {name}: give {what} with --model")
    if name == "scripted":
        return ChosenCritic(name=name, options={"model": model}, values=values)
    options = {"model": model, "settings": _settings(values)}
    if name in LOCAL_CRITICS:
        if values["budget_usd"] is not None and not values["gpu_usd_per_hour"]:
            raise ConfigError(
                f"--budget-usd: the {name} critic costs what its machine costs; give that with "
                "--gpu-usd-per-hour"
            )
        options["usd_per_hour"] = values["gpu_usd_per_hour"] * _num_gpus(name, values["gpus"])
    if name == "transformers":
        options["device"] = values["device"]
    if name == "vllm":
        options |= {"gpus": values["gpus"], "engine_args": _engine_args(values["engine_arg"])}
    if name in API_CRITICS:
        options |= _api_options(values, output=output)
    return ChosenCritic(name=name, options=options, values=values)


def _num_gpus(critic_name: str, given: int | None) -> int:
    """Return how many GPUs a local critic uses; 1 where there is none, for the machine."""
    from srft_prep.critic.hardware import gpus

    return 1 if critic_name == "transformers" else given or len(gpus()) or 1


def default_prompt() -> Path:
    """Return the prompt that comes with the package, installed or in its repository."""
    package = Path(__file__).parent
    installed = package / "prompts" / "step_critic.md"
    return installed if installed.exists() else package.parent / "prompts" / "step_critic.md"


def _settings(values: Mapping[str, Any]) -> Any:
    from srft_prep.critic.prompt import load_prompt
    from srft_prep.critic.question import QuestionSettings

    return QuestionSettings(
        prompt=load_prompt(values["prompt"] or default_prompt()),
        rationale=values["rationale"],
        context=values["context"],
        votes=values["votes"],
        reasoning=values["reasoning"],
        max_input_tokens=values["max_input_tokens"],
    )


def _engine_args(texts: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--engine-arg {text}: expected KEY=VALUE")
        found[key.strip().replace("-", "_")] = value.strip()
    return found


def _api_options(values: Mapping[str, Any], *, output: Path) -> dict[str, Any]:
    from srft_prep.critic.pricing import load_prices, price_of

    model, name = values["model"], values["critic_name"]
    price = price_of(model, load_prices(values["prices"]))
    if price is None and values["budget_usd"] is not None:
        raise ConfigError(
            f"--budget-usd: the price of {model} is not known; give a table that has it with "
            "--prices FILE (the form: srft_prep/critic/prices.toml)"
        )
    return {
        "base_urls": values["base_url"],
        "tokenizer": values["tokenizer"],
        "concurrency": values["concurrency"],
        "timeout_seconds": values["timeout"],
        "price": price,
        "batch_journal": output / f"batches-{name}.jsonl" if values["batch"] else None,
        # A server of one's own says how long a prompt may be; that costs nothing.
        "dry_run": values["dry_run"] and not values["base_url"],
    }
